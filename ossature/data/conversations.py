"""Records of chat data, in the shapes that people keep them in -> conversations.

    messages     {"messages": [{"role", "content", "thinking"?, "tool_calls"?, "channel"?}, ...],
                  "tools"?, "reasoning_effort"?, "chat_template_kwargs"?}
    completion   {"prompt", "completion"}, or input and output, or question and answer
    alpaca       {"instruction", "input"?, "output"}
    sharegpt     {"conversations": [{"from", "value"}, ...], "system"?, "tools"?}

A key or role that has no place here is an error that names it: nothing is left out of training in
silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

from ossature.data.harmony import CHANNELS, IDENTITY, Conversation, Message

Shape = Literal["messages", "completion", "alpaca", "sharegpt"]
SHAPES: tuple[Shape, ...] = ("messages", "completion", "alpaca", "sharegpt")
NEEDED: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",), "completion": (), "alpaca": ("instruction", "output"), "sharegpt":
    ("conversations",),
}  # fmt: skip
PAIRS = (("prompt", "completion"), ("input", "output"), ("question", "answer"))
SETTINGS = ("reasoning_effort", "model_identity")
EFFORTS = ("low", "medium", "high")
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot":
    "assistant", "model": "assistant", "chatgpt": "assistant", "system": "developer",
    "developer": "developer", "tool": "tool", "function_response": "tool", "observation": "tool",
}  # fmt: skip
"""Names of roles in ShareGPT's shape."""


def shape_of(record: dict[str, Any]) -> Shape:
    """The shape of a record, by its keys.

    Raises:
        ValueError: it is of none.
    """
    if "messages" in record:
        return "messages"
    if "conversations" in record:
        return "sharegpt"
    if "instruction" in record and "output" in record:
        return "alpaca"
    if any(a in record and b in record for a, b in PAIRS):
        return "completion"
    raise ValueError(
        f"keys {', '.join(record) or '(none)'} are of no shape we know: messages, prompt and "
        "completion, instruction and output, or conversations"
    )


def conversation(
    record: dict[str, Any], shape: Shape, ignore: frozenset[str], answered: bool = True
) -> Conversation:
    """One record as a conversation.

    Args:
        ignore: keys of records that say nothing about the conversation, such as an id.
        answered: the assistant must have said something; False for one that is to be answered.

    Raises:
        ValueError: a key, role or value that is not as it must be; in one sentence.
    """
    rest = {key: value for key, value in record.items() if key not in ignore}
    for key in NEEDED[shape]:
        if rest.get(key) is None:
            raise ValueError(f"no key {key!r}, which a record of shape {shape} has")
    if shape == "messages":
        messages = list(_messages(_list(rest.pop("messages", None), "messages")))
    elif shape == "sharegpt":
        messages = list(_sharegpt(rest))
    elif shape == "alpaca":
        messages = _alpaca(rest)
    else:
        messages = list(_completion(rest))
    settings = rest.pop("chat_template_kwargs", None) or {}
    if not isinstance(settings, dict):
        raise ValueError("chat_template_kwargs must be an object")
    settings = {key: value for key, value in settings.items() if value is not None}
    settings |= {key: rest.pop(key) for key in SETTINGS if rest.get(key) is not None}
    tools = _parsed(rest.pop("tools", None) or [], "tools")
    if not isinstance(tools, list):
        raise ValueError("tools must be a list")
    unknown = [key for key in rest if rest[key] is not None]
    unknown += [key for key in settings if key not in SETTINGS]
    if unknown:
        raise ValueError(f"key {unknown[0]!r} has no meaning here (--ignore {unknown[0]})")
    for key, value in settings.items():
        if not isinstance(value, str):
            raise ValueError(f"{key} must be a text, not {type(value).__name__}")
    if settings.get("reasoning_effort", "medium") not in EFFORTS:
        raise ValueError(
            f"reasoning_effort {settings['reasoning_effort']!r} must be {', '.join(EFFORTS)}"
        )
    _check(messages, answered)
    return Conversation(
        tuple(messages),
        tuple(_tool(tool) for tool in tools),
        reasoning_effort=settings.get("reasoning_effort", "medium"),
        identity=settings.get("model_identity", IDENTITY),
    )


def check_learnable(chat: Conversation) -> None:
    """Refuse what a model may have said, and none should learn.

    Raises:
        ValueError: a message of the assistant, to nobody in particular, has no text; or a function
            has no name that a header can hold.
    """
    names = [tool["name"] for tool in chat.tools]
    for name in [*names, *(m.recipient or m.author for m in chat.messages)]:
        if name and not NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is no name of a function: letters, figures, _, - and . alone"
            )
    for message in chat.messages:
        if message.role == "assistant" and not message.recipient and not message.text.strip():
            raise ValueError(
                f"an empty message of the assistant (channel {message.channel}): it would learn to "
                "say nothing"
            )


def _check(messages: list[Message], answered: bool) -> None:
    if answered and not any(message.role == "assistant" for message in messages):
        raise ValueError("no message of the assistant: there is nothing to learn")
    for n, message in enumerate(messages):
        if message.role == "developer" and n:
            raise ValueError(f"message {n + 1}: instructions must be the first message")
        if message.role == "tool" and not message.author:
            raise ValueError(f"message {n + 1}: a tool's result before any call of a tool")


REASONING = ("thinking", "reasoning", "reasoning_content")
"""Names that an assistant's analysis goes by."""
KEYS = {
    "system": {"role", "content", "name"},
    "developer": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", *REASONING, "tool_calls", "channel", "recipient", "name"},
    "tool": {"role", "content", "name", "tool_call_id"},
}
"""Of messages, by role."""
CALL_KEYS = {"id", "type", "index", "function", "name", "arguments", "content_type"}
NAME = re.compile(r"[\w.-]+")
"""Of a function: a header with a blank in it would be read in another way."""


def _messages(given: list[Any]) -> Iterator[Message]:
    called, ids = "", {}
    for n, entry in enumerate(given, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"message {n} must be an object, not {type(entry).__name__}")
        entry = {key: value for key, value in entry.items() if value is not None}
        role = entry.get("role")
        if not isinstance(role, str) or role not in KEYS:
            raise ValueError(
                f"message {n}: role {role!r} must be system, developer, user, assistant or tool"
            )
        everywhere = set().union(*KEYS.values())
        for key in entry:
            if key not in everywhere:
                raise ValueError(f"message {n}: key {key!r} has no meaning here")
            if entry[key] and key not in KEYS[role]:
                raise ValueError(f"message {n}: key {key!r} has no meaning in one of role {role}")
        if role in ("system", "developer"):
            yield Message("developer", _text(entry, n))
        elif role == "user":
            yield Message("user", _text(entry, n))
        elif role == "tool":
            call = _plain(entry.get("tool_call_id", ""), n) or None
            if ids and call is not None and call not in ids:
                raise ValueError(f"message {n}: tool_call_id {call!r} is of no call before it")
            name = _plain(entry.get("name") or ids.get(call) or called, n)
            name = name.removeprefix("functions.")
            text, kind = _result(entry.get("content"), n)
            yield Message("tool", text, author=_function(name), content_type=kind)
        else:
            for message in _assistant(entry, n):
                called = message.recipient or called
                yield message
            if not entry.get("recipient"):  # its calls were read, and are well formed
                calls = [c for c in entry.get("tool_calls") or [] if isinstance(c.get("id"), str)]
                ids |= {call["id"]: call.get("function", call)["name"] for call in calls}


def _assistant(entry: dict[str, Any], n: int) -> Iterator[Message]:
    channel = entry.get("channel", "")
    if channel and channel not in CHANNELS:
        raise ValueError(f"message {n}: channel {channel!r} must be {', '.join(CHANNELS)}")
    thinking = [entry[key] for key in REASONING if entry.get(key)]
    calls = entry.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"message {n}: tool_calls must be a list")
    content = _text(entry, n) if "content" in entry else ""
    if len(thinking) > 1:
        raise ValueError(f"message {n}: has thinking under more than one of {', '.join(REASONING)}")
    if entry.get("recipient"):
        if thinking or calls:
            both = "thinking" if thinking else "tool_calls"
            raise ValueError(
                f"message {n}: has a recipient, and {both} too: give each a message of its own"
            )
        recipient = _function(_plain(entry["recipient"], n))
        yield Message("assistant", content, channel or "commentary", recipient)
        return
    if calls and content and thinking and not channel:
        raise ValueError(
            f"message {n}: content, thinking and tool_calls in one: say which channel content is in"
        )
    if thinking:
        yield Message("assistant", _plain(thinking[0], n), "analysis")
    if calls:
        if content:  # as the published template reads it
            yield Message("assistant", content, channel or "analysis")
        for call in calls:
            outer = call if isinstance(call, dict) else {}
            call = outer.get("function", outer)
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                raise ValueError(f"message {n}: a tool call has no name")
            for key in (*outer, *call):
                if key not in CALL_KEYS and {**outer, **call}[key] is not None:
                    raise ValueError(f"message {n}: key {key!r} of a tool call has no meaning here")
            arguments = call.get("arguments", {})
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            kind = call.get("content_type") or "json"
            name = _function(call["name"])
            yield Message(
                "assistant", _plain(arguments, n), "commentary", name, content_type=_plain(kind, n)
            )
    elif "content" in entry or not thinking:
        if "content" not in entry:
            raise ValueError(f"message {n}: the assistant says nothing: no content")
        yield Message("assistant", content, channel or "final")


def _function(name: str) -> str:
    """Tools live in the namespace of functions, but for those that have one of their own."""
    return name if not name or "." in name or name in ("python", "browser") else f"functions.{name}"


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool has no name")
    place = f"tool {function['name']}"
    function = {key: value for key, value in function.items() if value is not None}
    if not isinstance(function.get("description", ""), str):
        raise ValueError(f"{place}: its description must be a text")
    if "parameters" in function:
        function["parameters"] = _schema(function["parameters"], f"{place}: parameters")
    return function


def _schema(schema: Any, place: str) -> dict[str, Any]:
    """A JSON schema without its nulls: tables have one for every key that another row has.

    Raises:
        ValueError: something that the renderer reads is not as it must be.
    """
    if not isinstance(schema, dict):
        raise ValueError(f"{place} must be a JSON schema")
    schema = {key: value for key, value in schema.items() if value is not None or key == "default"}
    if not isinstance(schema.get("description", ""), str):
        raise ValueError(f"{place}: description must be a text")
    kind = schema.get("type", "")
    for key, names in (
        ("type", [kind] if isinstance(kind, str) else kind),
        ("required", schema.get("required", [])),
    ):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{place}: {key} must be a list of names")
    for key in ("enum", "oneOf"):
        if not isinstance(schema.get(key, []), list):
            raise ValueError(f"{place}: {key} must be a list")
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise ValueError(f"{place}: properties must be an object")
    if properties:
        schema["properties"] = {
            name: _schema(inner, f"{place}: {name}")
            for name, inner in properties.items()
            if inner is not None
        }
    if schema.get("oneOf"):
        schema["oneOf"] = [_schema(inner, f"{place}: oneOf") for inner in schema["oneOf"]]
    if schema.get("items"):
        schema["items"] = _schema(schema["items"], f"{place}: items")
    return schema


def _result(content: Any, n: int) -> tuple[str, str]:
    """A tool's result and its type: text, or anything else as JSON."""
    if content is None:
        raise ValueError(f"message {n}: a tool's result has no content")
    if isinstance(content, str):
        return _plain(content, n), "text"
    return json.dumps(content, ensure_ascii=False), "json"


def _text(entry: dict[str, Any], n: int) -> str:
    content = entry.get("content")
    if isinstance(content, list):  # parts, as OpenAI's API has them
        kinds = [isinstance(part, dict) and part.get("type", "text") == "text" for part in content]
        parts = [part.get("text") for part, kind in zip(content, kinds, strict=True) if kind]
        if not all(kinds) or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"message {n}: has content that is not text")
        content = "".join(parts)
    if not isinstance(content, str):
        raise ValueError(f"message {n}: content must be a text, not {type(content).__name__}")
    return _plain(content, n)


def _plain(content: Any, n: int) -> str:
    if not isinstance(content, str):
        raise ValueError(f"message {n}: must be a text, not {type(content).__name__}")
    for tag in ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"):
        if tag in content:
            raise ValueError(
                f"message {n}: spells {tag}: analysis goes in 'thinking', the answer in 'content'"
            )
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"message {n}: has half of a surrogate pair: no Unicode text") from None
    return content


def _parsed(value: Any, key: str) -> Any:
    """Some files keep a list as a text of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key} is a text that is no JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{key} is JSON that is nested too deeply") from None


def _list(value: Any, key: str) -> list[Any]:
    value = _parsed(value, key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} must be a list of messages")
    return value


def _sharegpt(rest: dict[str, Any]) -> Iterator[Message]:
    given = _list(rest.pop("conversations"), "conversations")
    system = rest.pop("system", None)
    entries = [{"role": "developer", "content": system}] if system else []
    for n, entry in enumerate(given, 1):
        if not isinstance(entry, dict) or not {"from", "value"} <= set(entry):
            raise ValueError(f"message {n} must have 'from' and 'value'")
        unknown = [key for key in entry if key not in ("from", "value")]
        if unknown:
            raise ValueError(f"message {n}: key {unknown[0]!r} has no meaning here")
        if not isinstance(entry["from"], str) or entry["from"] not in ROLES:
            raise ValueError(f"message {n}: 'from' {entry['from']!r} is no role we know")
        entries.append({"role": ROLES[entry["from"]], "content": entry["value"]})
    return _messages(entries)


def _alpaca(rest: dict[str, Any]) -> list[Message]:
    question, more = rest.pop("instruction"), rest.pop("input", None)
    question = _plain(question, 1) + (f"\n\n{_plain(more, 1)}" if more else "")
    return [Message("user", question), Message("assistant", _plain(rest.pop("output"), 2), "final")]


def _completion(rest: dict[str, Any]) -> Iterator[Message]:
    pairs = [(a, b) for a, b in PAIRS if a in rest and b in rest]
    if not pairs:
        raise ValueError(f"keys {', '.join(rest)} are no prompt and completion")
    prompt, answer = (rest.pop(key) for key in pairs[0])
    entries = [prompt, answer]
    for n, role in enumerate(("user", "assistant")):
        if not isinstance(entries[n], list):
            entries[n] = [{"role": role, "content": entries[n]}]
    return _messages([*entries[0], *entries[1]])

"""Conversations -> records of the shape `messages`, which `conversations.py` reads back.

Thinking and what follows it share an entry, as the published template wants them, so that what was
said to a model can be trained on, here and elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ossature.data.harmony import IDENTITY, Conversation, Message


def record(conversation: Conversation) -> dict[str, Any]:
    """The record of a conversation: read back, it is the same conversation."""
    found: dict[str, Any] = {"messages": list(_entries(conversation.messages))}
    if conversation.tools:
        found["tools"] = [{"type": "function", "function": tool} for tool in conversation.tools]
    found["reasoning_effort"] = conversation.reasoning_effort
    if conversation.identity != IDENTITY:
        found["model_identity"] = conversation.identity
    return found


def _entries(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    thinking: Message | None = None
    for message in messages:
        if thinking is not None:
            joined = message.role == "assistant" and (
                (message.channel == "final" and not message.recipient)
                or (message.channel == "commentary" and message.recipient)
            )
            if joined:
                yield {"role": "assistant", "thinking": thinking.text} | _entry(message)
                thinking = None
                continue
            yield _entry(thinking)
            thinking = None
        if message.channel == "analysis" and message.text and not message.recipient:
            thinking = message
        else:
            yield _entry(message)
    if thinking is not None:
        yield _entry(thinking)


def _entry(message: Message) -> dict[str, Any]:
    if message.role == "tool":
        text = message.text if message.content_type == "text" else json.loads(message.text)
        name = message.author.removeprefix("functions.")
        return {"role": "tool", "name": name, "content": text}
    if message.role != "assistant":
        return {"role": message.role, "content": message.text}
    if message.recipient and message.channel == "commentary":
        function: dict[str, Any] = {"name": message.recipient.removeprefix("functions.")}
        function["arguments"] = _arguments(message.text)
        if message.content_type != "json":
            function["content_type"] = message.content_type
        call = {"type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}
    entry = {"role": "assistant", "content": message.text}
    if message.channel != "final":
        entry["channel"] = message.channel
    if message.recipient:
        entry["recipient"] = message.recipient
    return entry


def _arguments(text: str) -> Any:
    """As an object where that is read back to the letter, else as the text it is."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text
    same = isinstance(value, dict) and json.dumps(value, ensure_ascii=False) == text
    return value if same else text

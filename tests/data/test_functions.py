"""Tools and whole conversations, drawn at random, against the published renderers themselves."""

import random
from typing import Any

import pytest

from ossature.data import harmony
from ossature.data.conversations import conversation
from ossature.data.functions import functions
from ossature.data.harmony import Conversation, Message, Rendering
from tests.golden import golden

DATE = "2025-06-28"
KINDS = ("string", "number", "integer", "boolean", "array", "object", "one", "list", "any", "enum")


def schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """Of any kind, nested up to twice; with and without descriptions, defaults and nulls."""
    kind = draw.choice(KINDS if depth < 2 else KINDS[:4])
    spec: dict[str, Any] = {"type": kind}
    if kind == "array" and draw.random() < 0.7:
        spec["items"] = schema(draw, depth + 1)
    elif kind == "object" and draw.random() < 0.7:
        names = [f"p{n}" for n in range(draw.randint(1, 3))]
        properties = {name: schema(draw, depth + 1) for name in names}
        spec |= {"properties": properties, "required": ["p0"]}
    elif kind == "one":
        spec = {"oneOf": [schema(draw, depth + 1) for _ in range(draw.randint(1, 3))]}
    elif kind == "list":
        spec = {"type": draw.choice([["string", "null"], ["object", "object"], ["number"]])}
    elif kind == "any":
        spec = {}
    elif kind == "enum":
        spec = {"type": "string", "enum": ["a", "b"]}
    if draw.random() < 0.2:
        spec["nullable"] = True
    if draw.random() < 0.4:
        spec["description"] = 'Say "x" & <y>'
    if draw.random() < 0.3 and kind in ("string", "enum", "number", "one"):
        spec["default"] = draw.choice(["a", "b"])
    if draw.random() < 0.2 and kind in ("integer", "boolean"):
        spec["default"] = draw.choice([1, True])
    return spec


def tool(draw: random.Random, name: str) -> dict[str, Any]:
    described = {"name": name, "description": "Does it."}
    if draw.random() < 0.1:
        return described
    properties = {f"a{n}": schema(draw) for n in range(draw.randint(0, 3))}
    required = ["a0"] if draw.random() < 0.5 else []
    parameters = {"type": "object", "properties": properties, "required": required}
    return described | {"parameters": parameters}


def record(draw: random.Random) -> dict[str, Any]:
    """Instructions, turns, thinking, calls and results as they come."""
    messages: list[dict[str, Any]] = []
    if draw.random() < 0.5:
        messages.append({"role": draw.choice(["system", "developer"]), "content": "Be <b> “x”"})
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": draw.choice(["hi", "", 'ä "q"'])})
        for _ in range(draw.choice([0, 0, 1, 2])):
            arguments = draw.choice([{}, {"a": 1, "b": ["ü", None]}])
            call = {"type": "function", "function": {"name": "f0", "arguments": arguments}}
            said = draw.choice([{}, {"thinking": "think"}, {"content": "before"}])
            messages.append({"role": "assistant", "tool_calls": [call], **said})
            result = draw.choice([{"x": 1}, "text é", [1, 2], 3])
            messages.append({"role": "tool", "content": result})
        said = draw.choice([{}, {"thinking": "t"}])
        messages.append({"role": "assistant", "content": draw.choice(["a", "", "é"]), **said})
    tools = [
        {"type": "function", "function": tool(draw, f"f{n}")} for n in range(draw.randint(0, 2))
    ]
    effort = {"reasoning_effort": "high"} if draw.random() < 0.3 else {}
    return {"messages": messages, **({"tools": tools} if tools else {}), **effort}


def test_random_conversations_are_written_as_the_published_template_does(monkeypatch):
    chat_templates = pytest.importorskip("transformers.utils.chat_template_utils")
    path = golden().parent / "hf_files" / "20b_chat_template.jinja"
    if not path.is_file():
        pytest.skip("the published template is not at hand")
    template = path.read_text()
    assert "strftime_now" in template
    template = template.replace('strftime_now("%Y-%m-%d")', f'"{DATE}"')
    draw = random.Random(0)
    for _ in range(200):
        given = record(draw)
        rest = {key: value for key, value in given.items() if key not in ("messages", "tools")}
        (expected,), _ = chat_templates.render_jinja_template(
            [given["messages"]], tools=given.get("tools"), chat_template=template, **rest
        )
        pieces = harmony.render(conversation(given, "messages", frozenset()), Rendering(DATE))
        assert harmony.text(pieces) == expected


def test_random_tools_are_written_as_openai_harmony_does():
    openai_harmony = pytest.importorskip("openai_harmony")
    try:
        encoding = openai_harmony.load_harmony_encoding("HarmonyGptOss")
    except openai_harmony.HarmonyError as absent:  # it wants to download its vocabulary
        pytest.skip(str(absent))
    draw = random.Random(1)
    for _ in range(200):
        tools = [tool(draw, f"f{n}") for n in range(draw.randint(1, 2))]
        tools[0]["description"] = draw.choice(["Does it.", "One line\nand another"])
        described = [
            openai_harmony.ToolDescription.new(**{"parameters": None, **each}) for each in tools
        ]
        content = openai_harmony.DeveloperContent.new().with_instructions("Be.")
        message = openai_harmony.Message.from_role_and_content(
            openai_harmony.Role.DEVELOPER, content.with_function_tools(described)
        )
        chat = Conversation((Message("developer", "Be."), Message("user", "x")), tuple(tools))
        ours = harmony.text(harmony.render(chat, Rendering(DATE, "openai")))
        assert ours.startswith(encoding.decode(encoding.render(message)), ours.index("<|end|>") + 7)


def test_arguments_that_are_nested_keep_the_line_breaks_of_the_template():
    """Written down from the template's own text, for where it is not at hand."""
    inner = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    either = {"oneOf": [{"type": "string"}, inner], "default": "d"}
    parameters = {"type": "object", "properties": {"a": inner, "b": either}}
    tools = [{"name": "f", "description": "Does it.", "parameters": parameters}]

    assert functions(tools, "template") == (
        "## functions\n\nnamespace functions {\n\n// Does it.\ntype f = (_: {\n"
        "a?: {\nx: \n                number},\n"
        "b?: string | \n{\nx: \n                number}// default: d,\n"
        "}) => any;\n\n} // namespace functions"
    )
    assert functions(tools, "openai") == (
        "## functions\n\nnamespace functions {\n\n// Does it.\ntype f = (_: {\n"
        "a?: {\n    x: number,\n    },\n"
        '// default: "d"\nb?:\n | string\n | {\n   x: number,\n   }\n,\n'
        "}) => any;\n\n} // namespace functions"
    )

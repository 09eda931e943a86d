"""Conversations in harmony against what the published template and openai-harmony gave."""

import json
from pathlib import Path

import pytest

from ossature.data import harmony, vocabulary
from ossature.data.conversations import check_learnable, conversation, shape_of
from ossature.data.harmony import Conversation, Message, Parser, Rendering, Style
from ossature.data.tokenizer import Tokenizer, load
from tests.golden import golden

DATE = "2025-06-28"
TEMPLATE, OPENAI = Rendering(DATE), Rendering(DATE, "openai")
WEATHER = {
    "name": "get_current_weather",
    "description": "Gets the current weather in the provided location.",
    "parameters": {
        "type": "object",
        "properties": {
            "location": {
                "type": "string", "description": "The city and state, e.g. San Francisco, CA",
            },
            "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
        },
        "required": ["location"],
    },
}  # fmt: skip
THINKING = 'User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.'
TURNS = [("q1", "CoT one.", "a1"), ("q2", "CoT two.", "a2"), ("q3", "CoT three.", "a3")]


def turns(*given: tuple[str, str, str]) -> list[dict]:
    return [
        message
        for question, thinking, answer in given
        for message in (
            {"role": "user", "content": question},
            {"role": "assistant", "thinking": thinking, "content": answer},
        )
    ]


RECORDS = {
    "single_turn": {"messages": turns(("What is 2 + 2?", THINKING, "2 + 2 = 4."))},
    "developer_high": {
        "messages": [
            {"role": "system", "content": "Always respond in riddles"},
            *turns(("Hi", "Need riddle.", "I speak without a mouth.")),
        ],
        "reasoning_effort": "high",
    },
    "multi_turn": {
        "messages": turns(
            ("What is 2 + 2?", "CoT one.", "4"), ("What about 9 / 2?", "CoT two.", "4.5")
        ),
        "chat_template_kwargs": {"reasoning_effort": "low"},
    },
    "three_turn": {"messages": turns(*TURNS)},
    "tool_call": {
        "messages": [
            {"role": "developer", "content": "Use a friendly tone."},
            {"role": "user", "content": "What is the weather like in SF?"},
            {
                "role": "assistant",
                "thinking": "Need to use function get_current_weather.",
                "tool_calls": [
                    {
                        "type": "function",
                        "function": {
                            "name": "get_current_weather",
                            "arguments": {"location": "San Francisco"},
                        },
                    }
                ],
            },
            {"role": "tool", "content": {"sunny": True, "temperature": 20}},
            {"role": "assistant", "content": "Sunny!"},
        ],
        "tools": [{"type": "function", "function": WEATHER}],
    },
}
# Tokens in all, place of the first target, targets by default and of answers alone: worked out
# from the ids of the fixture.
COUNTS = {
    "single_turn": ((111, 75, 36, 12), (87, 75, 12, 12)),
    "developer_high": ((101, 81, 20, 10), (90, 80, 10, 10)),
    "multi_turn": ((111, 75, 22, 12), (111, 75, 22, 12)),
    "three_turn": ((113, 69, 28, 18), (123, 69, 38, 18)),
    "tool_call": ((221, 169, 25, 6), (223, 169, 27, 6)),
}


def read(record: dict) -> Conversation:
    return conversation(record, shape_of(record), frozenset())


@pytest.fixture(scope="module")
def o200k() -> Tokenizer:
    try:
        return load("o200k_harmony")
    except ValueError as absent:
        pytest.skip(str(absent))


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer(
        vocabulary.train(["what is the answer to a question? 1 2 3"] * 9, 400), "small"
    )


@pytest.mark.parametrize("case", RECORDS)
def test_texts_are_those_of_the_published_renderings(case):
    expected = json.loads(golden("harmony.json").read_text())["cases"][case]
    chat = read(RECORDS[case])
    assert harmony.text(harmony.render(chat, TEMPLATE)) == expected["hf_template_text"]
    assert harmony.text(harmony.render(chat, OPENAI)) == expected["harmony_training_text"]
    every = Rendering(DATE, "openai", analysis="all")
    found = harmony.text(harmony.render(chat, every))
    assert found == expected["harmony_training_keep_analysis_text"]


@pytest.mark.parametrize("style, column", [("template", 0), ("openai", 1)])
@pytest.mark.parametrize("case", RECORDS)
def test_ids_and_targets_are_those_of_the_published_renderings(o200k, case, style: Style, column):
    expected = json.loads(golden("harmony.json").read_text())["cases"][case]
    name = ("hf_template_tokens", "harmony_training_tokens")[column]
    chat = read(RECORDS[case])
    pieces = harmony.render(chat, Rendering(DATE, style))
    ids, mask = harmony.encode(pieces, harmony.targets(chat, pieces, "assistant"), o200k)
    assert ids == expected[name]
    answers = harmony.encode(pieces, harmony.targets(chat, pieces, "final"), o200k)[1]
    assert (len(ids), mask.index(True), sum(mask), sum(answers)) == COUNTS[case][column]


def marked(record: dict, loss: harmony.Loss, rendering: Rendering = TEMPLATE) -> str:
    """What is learnt, the rest as one dot."""
    chat = read(record)
    pieces = harmony.render(chat, rendering)
    chosen = harmony.targets(chat, pieces, loss)
    parts = [p.text if c else "." for p, c in zip(pieces, chosen, strict=True)]
    text = ""
    for part in parts:
        text += "" if part == "." and text.endswith(".") else part
    return text


def test_the_model_learns_all_that_it_will_write():
    """Of the tool's message in between nothing, and not the header it is prompted with."""
    keep = Rendering(DATE, "openai", analysis="all")
    assert marked(RECORDS["tool_call"], "assistant", keep) == (
        ".<|channel|>analysis<|message|>Need to use function get_current_weather.<|end|>"
        "<|start|>assistant to=functions.get_current_weather<|channel|>commentary "
        '<|constrain|>json<|message|>{"location": "San Francisco"}<|call|>'
        ".<|channel|>final<|message|>Sunny!<|return|>"
    )


def test_after_a_call_another_begins_what_writes_the_prompt():
    """Of two calls at once: the model stops with the first, and does not begin the second."""
    calls = [{"name": name, "arguments": {}} for name in "fg"]
    record = {"messages": [user("q"), {"role": "assistant", "tool_calls": calls, "thinking": "t"}]}
    assert marked(record, "assistant") == (
        ".<|channel|>analysis<|message|>t<|end|>"
        "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>"
        ". to=functions.g<|channel|>commentary json<|message|>{}<|call|>"
    )


def test_other_choices_of_the_loss():
    three = RECORDS["three_turn"]
    assert marked(three, "final") == (
        ".<|channel|>final<|message|>a1<|end|>.<|channel|>final<|message|>a2<|end|>"
        ".<|channel|>final<|message|>a3<|return|>"
    )
    assert marked(three, "last_turn") == (
        ".<|channel|>analysis<|message|>CoT three.<|end|><|start|>assistant<|channel|>final"
        "<|message|>a3<|return|>"
    )
    assert marked(three, "all") == (
        ".<|start|>assistant<|channel|>final<|message|>a1<|end|>"
        ".<|start|>assistant<|channel|>final<|message|>a2<|end|>"
        ".<|start|>assistant<|channel|>analysis<|message|>CoT three.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>a3<|return|>"
    )


def test_text_that_spells_special_tokens_is_ordinary_text(small):
    chat = read({"prompt": "<|end|> <|return|>", "completion": "<|start|>"})
    pieces = harmony.render(chat, TEMPLATE)
    ids, _ = harmony.encode(pieces, [False] * len(pieces), small)
    assert ids.count(small.special["<|end|>"]) == 2  # of the system's and the user's message
    assert ids.count(small.special["<|return|>"]) == 1
    assert small.decode(ids) == harmony.text(pieces)


def test_a_prompt_ends_where_the_model_begins(small):
    chat = read({"messages": [*turns(("q1", "t", "a1")), {"role": "user", "content": "q2"},
                              {"role": "assistant", "content": "x"}]})  # fmt: skip
    asked = Conversation(chat.messages[:-1])
    text = small.decode(harmony.prompt(asked, TEMPLATE, small))
    assert text.endswith(
        "<|start|>assistant<|channel|>final<|message|>a1<|end|><|start|>user<|message|>q2<|end|>"
        "<|start|>assistant"
    )
    assert "<|return|>" not in text and "analysis<|message|>t" not in text


def test_a_tools_text_is_quoted_by_the_template_alone():
    record = json.loads(json.dumps(RECORDS["tool_call"]))
    record["messages"][3]["content"] = 'so "sunny"'
    template, plain = (
        harmony.text(harmony.render(read(record), style)) for style in (TEMPLATE, OPENAI)
    )
    assert r'<|message|>"so \"sunny\""<|end|>' in template
    assert '<|message|>so "sunny"<|end|>' in plain


A = {"role": "assistant", "content": "a"}


def user(content) -> dict:
    return {"role": "user", "content": content}


SHAPES = {
    "messages": {"messages": [user("q"), A]},
    "completion": {"prompt": "q", "completion": "a"},
    "input": {"input": "q", "output": "a"},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_recognised_and_says_the_same(shape):
    assert read(SHAPES[shape]).messages == (
        Message("user", "q"), Message("assistant", "a", "final"),
    )  # fmt: skip


def test_alpacas_input_follows_its_instruction():
    chat = read({"instruction": "Add", "input": "1 and 2", "output": "3"})
    assert chat.messages[0].text == "Add\n\n1 and 2"


def tool(parameters: dict, **keys) -> dict:
    return {"messages": [user("q"), A], "tools": [{"name": "f", "parameters": parameters, **keys}]}


@pytest.mark.parametrize(
    "record, words",
    [
        ({"text": "x"}, "of no shape we know"),
        ({"messages": [user("q")]}, "no message of the assistant"),
        ({"messages": [user("q"), {"role": "bot", "content": "a"}]}, "role 'bot'"),
        ({"messages": [user("q"), {**A, "weight": 1}]}, "message 2: key 'weight'"),
        ({"messages": [user("q"), A], "id": 7}, "key 'id'"),
        ({"messages": [user(3), A]}, "must be a text, not int"),
        ({"messages": [user([{"type": "image", "image": "x"}]), A]}, "not text"),
        ({"messages": [user("q"), {**A, "channel": "thought"}]}, "channel 'thought'"),
        ({"messages": [user("q"), {**A, "content": "<|channel|>final<|message|>a"}]}, "spells"),
        ({"messages": [user("q"), A, {"role": "system", "content": "s"}]}, "first message"),
        ({"messages": [user("q"), {"role": "tool", "content": "r"}, A]}, "before any call"),
        ({"messages": [user("q"), A], "chat_template_kwargs": {"effort": 1}}, "key 'effort'"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "'from' 'alien'"),
        ({"conversations": [{"from": "human", "text": "q"}]}, "'from' and 'value'"),
        ({"messages": []}, "must be a list of messages"),
        ({"messages": [user("q"), {**A, "content": False}]}, "2: content must be a text, not bool"),
        ({"messages": [{**user("q"), "thinking": "t"}, A]}, "'thinking' has no meaning in one of"),
        ({"messages": [{**user("q"), "tool_calls": [1]}, A]}, "'tool_calls' has no meaning in one"),
        ({"messages": [user("q"), {**A, "recipient": "f", "thinking": "t"}]}, "recipient, and thi"),
        (
            {"messages": [user("q"), {**A, "recipient": "f", "tool_calls": [{"name": "g"}]}]},
            "message 2: has a recipient, and tool_calls too",
        ),
        (
            {"messages": [user("q"), {**A, "tool_calls": [{"name": "g", "why": "w"}]}]},
            "message 2: key 'why' of a tool call has no meaning",
        ),
        ({"messages": [user("\ud800"), A]}, "surrogate"),
        ({"messages": [user("q"), A], "tools": "[" * 100_000}, "nested too deeply"),
        (tool({"properties": {"x": "string"}}), "tool f: parameters: x must be a JSON schema"),
        (tool({"properties": {"x": {"type": ["string", 1]}}}), "x: type must be a list of names"),
        (tool({"properties": {"x": {"type": "array", "items": [{}]}}}), "x: items must be"),
        (tool({"properties": {"x": {"oneOf": ["y"]}}}), "x: oneOf must be a JSON schema"),
        (tool({"properties": {"x": {"type": "string", "enum": 5}}}), "x: enum must be a list"),
        (tool({"properties": {"x": {"properties": [1]}}}), "x: properties must be an object"),
        (tool({"properties": {"x": {}}, "required": 5}), "required must be a list of names"),
        (tool({"properties": {"x": {"description": 5}}}), "x: description must be a text"),
        (tool({}, description=5), "tool f: its description must be a text"),
    ],
)
def test_a_record_that_is_not_as_it_must_be_is_named(record, words):
    with pytest.raises(ValueError, match=words):
        read(record)


@pytest.mark.parametrize(
    "record, words",
    [
        ({"instruction": "q", "output": " "}, "empty message of the assistant \\(channel final"),
        ({"messages": [user("q"), {**A, "content": "", "thinking": "t"}]}, "channel final"),
        (
            {"messages": [user("q"), {"role": "assistant", "tool_calls": [{"name": "f <|end|>"}]}]},
            "'functions.f <|end|>' is no name of a function",
        ),
        ({"messages": [user("q"), A], "tools": [{"name": "f }"}]}, "'f }' is no name of a func"),
    ],
)
def test_what_a_model_may_say_and_none_should_learn_is_named(record, words):
    with pytest.raises(ValueError, match=words.replace("|", "[|]")):
        check_learnable(read(record))


def test_nulls_in_a_tool_are_keys_that_it_lacks():
    """A table has every key of every row in each of them."""
    spec = {"type": "string", "description": None, "enum": None, "items": None}
    nulls = tool({"properties": {"x": spec, "y": None}, "required": None}, description=None)
    plain = tool({"properties": {"x": {"type": "string"}}})
    assert read(nulls) == read(plain)
    assert "None" not in harmony.text(harmony.render(read(nulls), Rendering("2025-06-28")))


def test_keys_may_be_ignored_by_name():
    record = {**SHAPES["completion"], "id": 7, "source": "web"}
    assert conversation(record, "completion", frozenset({"id", "source"})).messages


@pytest.mark.parametrize("style", ["template", "openai"])
@pytest.mark.parametrize("case", RECORDS)
def test_the_parser_reads_back_what_was_rendered(small, case, style: Style):
    chat = read(RECORDS[case])
    rendering = Rendering(DATE, style, analysis="all")
    pieces = harmony.render(chat, rendering)
    last_user = max(n for n, message in enumerate(chat.messages) if message.role == "user")
    first = next(n for n, p in enumerate(pieces) if p.message == last_user + 1)
    ids, _ = harmony.encode(pieces[first + 2 :], [True] * len(pieces[first + 2 :]), small)
    parser = Parser(small)
    for token in ids:
        parser.push(token)
    parser.close()
    assert not parser.problem and parser.ended == "<|return|>"
    found = [(m.role, m.channel, m.text, m.author) for m in parser.messages]
    expected = [(m.role, m.channel, m.text, m.author) for m in chat.messages[last_user + 1 :]]
    assert [(r, c or "commentary", t, a) for r, c, t, a in expected] == found
    calls = [m for m in parser.messages if m.recipient and m.role == "assistant"]
    assert [m.recipient for m in calls] == [m.recipient for m in chat.messages if m.recipient]


def parsed(small: Tokenizer, text: str) -> Parser:
    parser = Parser(small)
    for token in small.encode(text, special=True):
        parser.push(token)
    parser.close()
    return parser


def test_the_parser_takes_the_recipient_in_either_place(small):
    ends = "<|message|>{}<|call|>"
    for head in (
        " to=functions.f<|channel|>commentary <|constrain|>json",
        " to=functions.f<|channel|>commentary json",
        "<|channel|>commentary to=functions.f <|constrain|>json",
    ):
        parser = parsed(small, head + ends)
        assert not parser.problem, head
        assert parser.messages == [
            Message("assistant", "{}", "commentary", "functions.f", content_type="json")
        ]


@pytest.mark.parametrize(
    "text, words",
    [
        ("<|channel|>final<|message|>a", "has no end"),
        ("<|channel|>final", "no <|message|>"),
        ("<|message|>a<|return|>", "without a channel"),
        ("<|channel|>final<|message|>a<|channel|>b<|return|>", "inside a message"),
        ("<|channel|>final<|message|>a<|end|>b", "between messages"),
        ("<|channel|>final<|message|>a<|call|>", "to nobody"),
        ("<|channel|>thoughts<|message|>a<|end|>", "'thoughts'"),
    ],
)
def test_the_parser_says_what_is_not_harmony(small, text, words):
    assert words in parsed(small, text).problem


def test_the_parser_agrees_with_openais(o200k):
    openai_harmony = pytest.importorskip("openai_harmony")
    try:
        encoding = openai_harmony.load_harmony_encoding("HarmonyGptOss")
    except Exception as absent:  # it wants to download its vocabulary
        pytest.skip(str(absent))
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.f<|channel|>"
        "commentary <|constrain|>json<|message|>{}<|call|>"
    )
    ids = o200k.encode(text, special=True)
    theirs = encoding.parse_messages_from_completion_tokens(ids, openai_harmony.Role.ASSISTANT)
    ours = Parser(o200k)
    for token in ids:
        ours.push(token)
    assert [(m.channel, m.recipient or None, m.content[0].text) for m in theirs] == [
        (m.channel, m.recipient or None, m.text) for m in ours.messages
    ]


def test_a_tokenizer_without_harmony_is_refused(tmp_path: Path):
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.add_special_tokens(["<|endoftext|>", "<|start|>"])
    with pytest.raises(ValueError, match=r"lacks special tokens of harmony: <\|channel\|>"):
        harmony.check(Tokenizer(inner, "bare"))

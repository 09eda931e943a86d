"""`ossature serve` as OpenAI's own client sees it: answers, tools, schemas, streams."""

import json

import openai
import pytest

from ossature.data.conversations import conversation
from ossature.data.harmony import Rendering, prompt
from tests.talk.scripted import CALL, THINK, answer, last_question, tokenizer
from tests.talk.serving import serving

USER = [{"role": "user", "content": "one"}]
WEATHER = {
    "name": "weather", "description": "Tells it.",
    "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": False,
    },
}  # fmt: skip
TOOLS = [{"type": "function", "function": WEATHER}]
NUMBER = {
    "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
    "additionalProperties": False,
}  # fmt: skip
seen: list[str] = []


def says(text: str) -> str:
    """What the model of most tests says to a prompt, which is remembered."""
    if not seen or seen[-1] != text:
        seen.append(text)
    if text.endswith("final<|message|>"):
        return '{"n": 5}<|return|>'
    if text.endswith("json<|message|>"):
        return '{"city": "Oslo"}<|call|>'
    if "functions.weather to=assistant" in text:
        return answer("It is clear.")
    question = last_question(text)
    if question.startswith("call "):
        return CALL.format(question.removeprefix("call "), "{}")
    if "weather" in question:
        head = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
        return THINK.format("hm") + head + CALL.format("weather", '{"city": "Oslo"}')
    if "number" in question:
        return answer('{"n": 5}', "five")
    return answer(f"to {question}", "a stop, no: hm")


@pytest.fixture(scope="module")
def there():
    with serving(says) as found:
        yield found


@pytest.fixture(autouse=True)
def forget():
    seen.clear()


def rendered(messages: list[dict], **more) -> str:
    record = {"messages": messages, **more}
    chat = conversation(record, "messages", frozenset(), answered=False)
    return tokenizer().decode(prompt(chat, Rendering("2025-06-28"), tokenizer()))


def ask(there, messages=USER, **more):
    return there.client.chat.completions.create(model="toy", messages=messages, **more)


def test_a_chat_is_answered_with_its_reasoning_apart(there):
    found = ask(there, reasoning_effort="high")

    message = found.choices[0].message
    assert (message.content, message.reasoning) == ("to one", "a stop, no: hm")
    assert found.choices[0].finish_reason == "stop" and found.model == "toy"
    assert seen[-1] == rendered(USER, reasoning_effort="high")
    assert found.usage.prompt_tokens == len(tokenizer().encode(seen[-1], special=True))
    said = tokenizer().encode(says(seen[-1]), special=True)
    assert found.usage.completion_tokens == len(said)
    thought = len(tokenizer().encode("a stop, no: hm"))
    assert found.usage.completion_tokens_details.reasoning_tokens == thought


def test_a_stream_adds_up_to_the_whole(there):
    stream = ask(there, stream=True, stream_options={"include_usage": True})
    content = reasoning = ""
    finishes, usage = [], None
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning", "")
            finishes += [choice.finish_reason] if choice.finish_reason else []
        usage = chunk.usage

    whole = ask(there)
    message = whole.choices[0].message
    assert (content, reasoning) == (message.content, message.reasoning)
    assert finishes == ["stop"] and usage == whole.usage


def test_instructions_of_two_messages_are_one(there):
    two = [{"role": "system", "content": "A."}, {"role": "developer", "content": "B."}]
    ask(there, [*two, *USER])

    assert seen[-1] == rendered([{"role": "developer", "content": "A.\n\nB."}, *USER])


def test_a_tool_is_called_and_its_result_answered(there):
    messages = [{"role": "user", "content": "weather?"}]
    first = ask(there, messages, tools=TOOLS).choices[0]
    (call,) = first.message.tool_calls

    assert first.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "weather", {"city": "Oslo"},
    )  # fmt: skip
    assert (first.message.content, first.message.reasoning) == ("I look.", "hm")
    assert "namespace functions" in seen[-1]

    messages.append(first.message.model_dump())
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "clear"})
    second = ask(there, messages, tools=TOOLS)

    assert second.choices[0].message.content == "It is clear."
    thought = {"role": "assistant", "channel": "analysis", "content": "hm"}
    preamble = {"role": "assistant", "channel": "commentary", "content": "I look."}
    made = {"role": "assistant", "tool_calls": [{"function": call.function.model_dump()}]}
    result = {"role": "tool", "name": "weather", "content": "clear"}
    assert seen[-1] == rendered([messages[0], thought, preamble, made, result], tools=TOOLS)


def test_a_call_is_streamed(there):
    calls: dict[int, list[str]] = {}
    for chunk in ask(there, [{"role": "user", "content": "weather?"}], tools=TOOLS, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            calls.setdefault(call.index, []).append(call.function.arguments)
            if call.id:
                assert call.function.name == "weather"

    assert "".join(calls[0]) == '{"city": "Oslo"}' and len(calls[0]) > 3


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_tool_can_be_forced(there, choice):
    found = ask(there, tools=TOOLS, tool_choice=choice).choices[0]

    assert seen[-1] == rendered(USER, tools=TOOLS) + (
        " to=functions.weather<|channel|>commentary json<|message|>"
    )
    assert json.loads(found.message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    assert found.finish_reason == "tool_calls" and found.message.content is None


@pytest.mark.parametrize("wanted", ["weather", "weather_of_the_week", "tides"])
def test_one_of_several_tools_has_to_be_called(there, wanted):
    """The model says which, were it by a name that begins with another's; streamed and whole."""
    pytest.importorskip("llguidance")
    names = ["tides", "weather", "weather_of_the_week"]
    tools = [{"type": "function", "function": {**WEATHER, "name": name}} for name in names]
    asked = {"messages": [{"role": "user", "content": f"call {wanted}"}], "tools": tools}
    found = ask(there, **asked, tool_choice="required", n=2, seed=1)

    for choice in found.choices:
        (call,) = choice.message.tool_calls
        assert call.function.name == wanted and choice.finish_reason == "tool_calls"
        assert json.loads(call.function.arguments) == {"city": "Oslo"}
        assert choice.message.content is None
    assert seen[-1] == rendered(asked["messages"], tools=tools) + (
        f" to=functions.{wanted}<|channel|>commentary json<|message|>"
    )
    calls = [
        call.function
        for chunk in ask(there, **asked, tool_choice="required", stream=True)
        for call in chunk.choices[0].delta.tool_calls or []
    ]
    assert [call.name for call in calls if call.name] == [wanted]
    assert json.loads("".join(call.arguments for call in calls)) == {"city": "Oslo"}
    flat = [{"type": "function", **tool["function"]} for tool in tools]
    response = there.client.responses.create(
        model="toy", input=f"call {wanted}", tools=flat, tool_choice="required"
    )
    assert [(item.type, item.name) for item in response.output] == [("function_call", wanted)]


def test_a_model_that_wants_to_answer_has_to_call_a_tool_all_the_same(there):
    pytest.importorskip("llguidance")
    tools = [{"type": "function", "function": {**WEATHER, "name": name}} for name in "ab"]
    (call,) = ask(there, tools=tools, tool_choice="required").choices[0].message.tool_calls
    assert call.function.name in "ab" and json.loads(call.function.arguments) == {"city": "Oslo"}


def test_no_tools_are_told_of_if_none_may_be_called(there):
    ask(there, tools=TOOLS, tool_choice="none")

    assert seen[-1] == rendered(USER)


def schema(of: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "number", "schema": of}}


def test_the_answer_follows_a_schema_after_free_thinking(there):
    pytest.importorskip("llguidance")
    messages = [{"role": "user", "content": "a number"}]
    found = ask(there, messages, response_format=schema(NUMBER)).choices[0]

    assert json.loads(found.message.content) == {"n": 5} and found.message.reasoning == "five"
    assert found.finish_reason == "stop"
    # Only the end of the answer is bound: "x" is no number, however much the model wants it.
    word = {**NUMBER, "properties": {"n": {"type": "string"}}}
    other = ask(there, messages, response_format=schema(word), max_tokens=80).choices[0]
    assert other.message.reasoning == "five" and other.message.content.startswith('{"n": "')


def test_a_strict_tool_is_called_by_its_schema(there):
    pytest.importorskip("llguidance")
    strict = [{"type": "function", "function": {**WEATHER, "strict": True}}]
    call = ask(there, [{"role": "user", "content": "weather?"}], tools=strict).choices[0]

    assert json.loads(call.message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    assert seen[-1].endswith("json<|message|>") and call.finish_reason == "tool_calls"


def test_a_stop_string_cuts_the_answer_and_not_the_thinking(there):
    question = [{"role": "user", "content": "a long stop here"}]
    found = ask(there, question, stop=["zzz", "stop"])
    streamed = ask(there, question, stop="stop", stream=True)
    content = "".join(c.choices[0].delta.content or "" for c in streamed)

    assert found.choices[0].message.content == content == "to a long "
    assert found.choices[0].message.reasoning == "a stop, no: hm"
    assert found.choices[0].finish_reason == "stop"
    there.idle()


def test_max_tokens_cut_the_text(there):
    found = ask(there, max_completion_tokens=5)

    assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 5
    huge = ask(there, max_tokens=131_072)  # of a client that wants no limit
    assert huge.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stop", [None, "zzz"])  # together, and one by one
def test_several_answers_to_one_question(there, stop):
    found = ask(there, n=3, stop=stop)

    assert [choice.message.content for choice in found.choices] == ["to one"] * 3
    assert [choice.index for choice in found.choices] == [0, 1, 2]


def test_logprobs_are_of_the_answers_tokens(there):
    content = ask(there, logprobs=True, top_logprobs=2).choices[0].logprobs.content

    assert "".join(entry.token for entry in content) == "to one"
    assert bytes(b for entry in content for b in entry.bytes) == b"to one"
    for entry in content:
        assert entry.logprob == pytest.approx(0, abs=1e-6) and len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[1].logprob == pytest.approx(-50, abs=1e-3)


def test_a_bias_and_a_frequency_penalty_change_the_answer(there):
    """The scripted model gives 0 to the token it wants and -50 to all others."""
    (digit,) = tokenizer().encode("2")
    asked = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 40, "temperature": 0}
    biased = ask(there, **asked, logit_bias={str(digit): 60}).choices[0]
    assert biased.message.content is None and biased.finish_reason == "length"
    create = there.client.completions.create
    text = create(model="toy", prompt="a", max_tokens=5, logit_bias={str(digit): 60})
    assert text.choices[0].text == "22222"
    tired = create(
        model="toy", prompt="a", max_tokens=3, logit_bias={str(digit): 60}, temperature=0,
        frequency_penalty=6,
    )  # fmt: skip
    assert tired.choices[0].text.startswith("22") and tired.choices[0].text != "222"


def test_responses(there):
    found = there.client.responses.create(
        model="toy", input="one", instructions="Be brief.", reasoning={"effort": "low"}
    )

    assert found.output_text == "to one" and found.status == "completed"
    assert [item.type for item in found.output] == ["reasoning", "message"]
    assert found.output[0].content[0].text == "a stop, no: hm"
    told = {"role": "developer", "content": "Be brief."}
    assert seen[-1] == rendered([told, *USER], reasoning_effort="low")
    assert found.usage.input_tokens == len(tokenizer().encode(seen[-1], special=True))
    cut = there.client.responses.create(model="toy", input="one", max_output_tokens=4)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_responses_are_streamed(there):
    with there.client.responses.stream(model="toy", input="one") as stream:
        events = list(stream)
        whole = stream.get_final_response()

    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    thought = "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
    assert (text, thought) == ("to one", "a stop, no: hm") and whole.output_text == "to one"
    assert [e.sequence_number for e in events] == list(range(len(events)))
    opened = [e.item.id for e in events if e.type == "response.output_item.added"]
    closed = [e.item.id for e in events if e.type == "response.output_item.done"]
    assert opened == closed == [item.id for item in whole.output]


def test_a_tool_through_responses(there):
    tools = [{"type": "function", **WEATHER}]
    create = there.client.responses.create
    items = [{"role": "user", "content": "weather?"}]
    first = create(model="toy", input=items, tools=tools)
    call = first.output[-1]

    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call", "weather", {"city": "Oslo"},
    )  # fmt: skip
    items += [item.model_dump(exclude_none=True) for item in first.output]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "clear"})
    second = create(model="toy", input=items, tools=tools)

    assert second.output_text == "It is clear."
    assert "<|start|>functions.weather to=assistant" in seen[-1]
    with there.client.responses.stream(model="toy", input=items[:1], tools=tools) as stream:
        deltas = [e for e in stream if e.type == "response.function_call_arguments.delta"]
    assert "".join(e.delta for e in deltas) == '{"city": "Oslo"}'


def test_an_evaluation_client_goes_on_with_all_it_was_given(there):
    """gpt-oss's own appends the thinking and the answer as messages of the assistant."""
    told = {"role": "developer", "content": "Be brief."}
    mine = [{"role": "assistant", "content": text} for text in ("hm", "to one")]
    items = [told, *USER, *mine, {"role": "user", "content": "two"}]
    found = there.client.responses.create(
        model="toy", input=items, temperature=1.0, max_output_tokens=131_072
    )
    chat = there.client.chat.completions.create(
        model="toy", messages=items, reasoning_effort=None, temperature=0.5, max_tokens=131_072
    )

    assert found.output_text == chat.choices[0].message.content == "to two"


def test_completions(there):
    create = there.client.completions.create
    found = create(model="toy", prompt="a", max_tokens=99, logprobs=1)
    streamed = create(model="toy", prompt="a", max_tokens=99, stream=True)
    ids = create(model="toy", prompt=tokenizer().encode("a"), max_tokens=99)

    whole = answer("to a").removesuffix("<|return|>").replace("hm", "a stop, no: hm")
    assert found.choices[0].text == whole == ids.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole
    assert "".join(found.choices[0].logprobs.tokens) == whole
    cut = create(model="toy", prompt="a", max_tokens=99, stop="no:")
    assert cut.choices[0].text == whole.partition("no:")[0]
    assert create(model="toy", prompt="a").choices[0].finish_reason == "length"  # after 16


def test_several_prompts_in_one_request(there):
    create = there.client.completions.create
    found = create(model="toy", prompt=["a", "b"], max_tokens=99, n=2)
    ids = [tokenizer().encode(text) for text in ("a", "b")]
    streamed = {n: "" for n in range(2)}
    for chunk in create(model="toy", prompt=ids, max_tokens=99, stream=True, stop="zzz"):
        streamed[chunk.choices[0].index] += chunk.choices[0].text

    texts = [choice.text for choice in found.choices]
    assert [text[-4:] for text in texts] == ["to a", "to a", "to b", "to b"]
    assert list(streamed.values()) == texts[::2]
    assert found.usage.prompt_tokens == 2


def test_models(there):
    assert [model.id for model in there.client.models.list()] == ["toy"]
    assert there.client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError, match="there is no 'other', only toy"):
        there.client.chat.completions.create(model="other", messages=USER)


def test_metrics_count_tokens(there):
    with there.http() as http:

        def value(name: str) -> float:
            lines = http.get("/metrics").text.splitlines()
            return float(next(line for line in lines if line.startswith(name)).split()[-1])

        before = value("ossature_generated_tokens_total")
        usage = ask(there).usage
        there.idle()
        assert value("ossature_generated_tokens_total") == before + usage.completion_tokens
        assert value("ossature_texts_running ") == 0 and value("ossature_texts_in_flight") == 0


MISTAKES = {
    "temperature": ({"temperature": -1}, "temperature (-1.0) must be 0 or more"),
    "type": ({"temperature": "hot"}, "temperature: Input should be a valid number"),
    "unknown": ({"extra_body": {"foo": 1}}, "foo: this server does not know the field"),
    "frequency": ({"frequency_penalty": 101}, "frequency_penalty (101.0) must be between"),
    "bias": ({"logit_bias": {"5": 101}}, "logit_bias: 101.0 of token 5 must be between"),
    "bias's token": ({"logit_bias": {"x": 1}}, "logit_bias: 'x' is no token's number"),
    "bias's tokens": ({"logit_bias": {"99999": 1}}, "logit_bias: token 99999 is not in"),
    "n": ({"n": 99}, "n (99) must be at most 4"),
    "tokens": ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    "both": ({"max_tokens": 1, "max_completion_tokens": 1}, "exclude each other"),
    "effort": ({"reasoning_effort": "max"}, "reasoning_effort: Input should be 'low'"),
    "stop": ({"stop": [""]}, "stop"),
    "role": ({"messages": [{"role": "x", "content": "a"}]}, "message 1: role 'x' must be"),
    "empty": ({"messages": []}, "messages must be a list of messages"),
    "order": ({"messages": [*USER, {"role": "system", "content": "a"}]}, "instructions must be"),
    "call's number": (
        {"messages": [*USER, {"role": "tool", "tool_call_id": [1], "content": "a"}]},
        "message 2: must be a text, not list",
    ),
    "stops": ({"stop": ["a"] * 17}, "stop: "),
    "stop's length": ({"stop": "a" * 1001}, "stop: "),
    "name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function."),
    "twice": ({"tools": [*TOOLS, *TOOLS]}, "tools: there are two of the name 'weather'"),
    "required": ({"tool_choice": "required"}, "tool_choice: 'required', but there are no tools"),
    "named": (
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice: there is no tool 'f': there are no tools",
    ),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "has content that is not text",
    ),
    "tool": ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
    "choice": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice: there is no tool 'f'",
    ),
    "result": ({"messages": [*USER, {"role": "tool", "content": "a"}]}, "before any call"),
    "long": ({"messages": [{"role": "user", "content": "what " * 1600}]}, "leaves no room"),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "json_schema without a schema",
    ),
    "top": ({"top_logprobs": 2}, "top_logprobs: only with logprobs"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_in_a_sentence(there, case):
    fields, words = MISTAKES[case]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(there, **{"messages": USER, **fields})

    assert words in caught.value.body["message"] and "\n" not in caught.value.body["message"]


def test_a_schema_that_is_none_is_told(there):
    pytest.importorskip("llguidance")
    wrong = schema({"type": "nonsense"})
    with pytest.raises(openai.BadRequestError, match="constraint"):
        ask(there, [{"role": "user", "content": "a number"}], response_format=wrong)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"input": [{"type": "item_reference", "id": "a"}]}, "type 'item_reference'"),
        ({"previous_response_id": "a"}, "previous_response_id: this server does not know"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "must be text"),
        ({"text": {"verbosity": "low"}}, "text"),
    ],
)
def test_mistakes_in_responses(there, fields, words):
    with pytest.raises(openai.BadRequestError, match=words):
        there.client.responses.create(**{"model": "toy", "input": "a", **fields})


@pytest.mark.parametrize(
    "fields", [{"echo": True}, {"suffix": "a"}, {"best_of": 3}, {"prompt": ""}]
)
def test_mistakes_in_completions(there, fields):
    with pytest.raises(openai.BadRequestError, match=next(iter(fields))):
        there.client.completions.create(**{"model": "toy", "prompt": "a", **fields})

"""Many requests at once: what each says is what it says alone, bounds hold, all is accounted for.

The model computes in float32, and texts are compared token by token, log-probabilities to the bit.
"""

import json
import random
import re
import threading
from collections import Counter

import pytest
import torch

from ossature.data.tokenizer import Tokenizer
from ossature.model.cache import cache_bytes
from ossature.model.config import ModelConfig
from ossature.model.prepacked import can_prepack, prepack
from ossature.model.transformer import Transformer
from ossature.sample.engine import Engine
from ossature.sample.options import Constraint, SamplingOptions
from ossature.sample.request import Completion, Event, Request
from tests.model.test_prepacked import prepackable_model
from tests.sample.test_command import byte_tokenizer
from tests.sample.test_generate import WINDOW, tiny_model
from tests.tiny import SHAPES, random_tokens

GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=3 * WINDOW)
SAMPLED = SamplingOptions(
    temperature=1.3, top_k=60, top_p=0.95, min_p=0.01, repetition_penalty=1.1,
    presence_penalty=0.3, frequency_penalty=0.2, logit_bias=((5, 1.5),), seed=11,
    max_new_tokens=3 * WINDOW,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model().eval()


@pytest.fixture(scope="module", params=["plain", "prepacked"])
def either(request, model) -> Transformer:
    """The model, or one whose matrices are in oneDNN's order."""
    if request.param == "plain":
        return model
    ordered = prepackable_model()
    if not can_prepack(ordered):
        pytest.skip("oneDNN's products depend on the number of rows here")
    prepack(ordered)
    return ordered


@pytest.fixture(scope="module")
def speller() -> tuple[Transformer, Tokenizer]:
    """A model of bytes, and its tokenizer."""
    model = Transformer(ModelConfig(**(SHAPES["oblong"] | {"vocab_size": 259})))
    generator = torch.Generator().manual_seed(6)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval(), byte_tokenizer()


def prompt(size: int, seed: int = 0) -> list[int]:
    return random_tokens(1, size, 96, seed=100 + seed)[0].tolist()


def alone(model, request: Request, **sizes) -> list[Completion]:
    return Engine(model, max_batch=request.options.samples, **sizes).generate([request])[0]


def changed(options: SamplingOptions, **fields) -> SamplingOptions:
    return SamplingOptions(**(vars(options) | fields))


def requests_of_many_kinds(count: int) -> list[Request]:
    """Lengths and options of all kinds, drawn; prompts from 1 token to far past the window."""
    draw = random.Random(4)
    made = []
    for n in range(count):
        kind = draw.choice((GREEDY, SAMPLED))
        options = changed(kind, seed=n, max_new_tokens=draw.choice((1, 2, 5, 9, 17, 30)))
        made.append(Request(prompt(draw.choice((1, 2, 3, 6, 11, 25, 60)), n), options))
    return made


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_texts_in_a_batch_are_those_said_alone(either, options: SamplingOptions):
    requests = [
        Request(prompt(size, size), changed(options, seed=size)) for size in (1, 40, 7, 3, 8, 20)
    ]
    # More rows than are filled up to, and than a vector holds; the first are compared.
    others = [Request(prompt(5, n), options) for n in range(17)]

    together = Engine(either, max_batch=23).generate([*requests, *others])[:6]

    assert together == [alone(either, request) for request in requests]
    assert len({tuple(text.tokens) for (text,) in together}) == 6


def test_sixty_four_requests_through_five_places_say_what_each_says_alone(either):
    """Some leave and others join all the time, in chunks, with a cache too small for five long."""
    requests = requests_of_many_kinds(64)
    engine = Engine(either, max_batch=5, max_tokens=200, prefill_chunk=16)

    together = engine.generate(requests)

    for request, texts in zip(requests, together, strict=True):
        assert texts == alone(either, request, prefill_chunk=16)
        assert len(texts[0].tokens) == request.options.max_new_tokens
    assert engine.used_tokens == 0 and not engine.busy


def test_a_request_that_comes_later_changes_nothing_for_those_that_run(either):
    first, second = (Request(prompt(size, size), SAMPLED) for size in (12, 30))
    engine = Engine(either, max_batch=2, prefill_chunk=8)
    number = engine.submit(first)
    events = [event for _ in range(9) for event in engine.step()]
    later = engine.submit(second)
    while engine.busy:
        events += engine.step()

    said = {n: [event.token for event in events if event.request == n] for n in (number, later)}
    assert said[number] == alone(either, first, prefill_chunk=8)[0].tokens
    assert said[later] == alone(either, second, prefill_chunk=8)[0].tokens


def test_running_texts_go_on_while_a_long_prompt_is_read(model):
    engine = Engine(model, max_batch=2, prefill_chunk=10)
    short = engine.submit(Request([5, 6], GREEDY))
    engine.step()
    engine.submit(Request(prompt(60), changed(GREEDY, max_new_tokens=2)))

    said = [[event.request for event in engine.step()] for _ in range(6)]

    assert said[:5] == [[short]] * 5 and len(said[5]) == 2


@pytest.mark.parametrize("chunk", [1, 3, WINDOW, WINDOW + 1, 64])
def test_a_prompt_in_chunks_says_what_the_whole_says(model, chunk: int):
    request = Request(prompt(5 * WINDOW), GREEDY)

    (text,) = alone(model, request, prefill_chunk=chunk)

    (whole,) = alone(model, request)
    assert text.tokens == whole.tokens
    assert text.logprobs == pytest.approx(whole.logprobs, abs=1e-4)


@torch.no_grad()
def test_log_probabilities_are_those_of_the_training_forward(model):
    request = Request(prompt(2 * WINDOW), changed(SAMPLED, logprobs=4))
    engine, events = Engine(model), []
    engine.submit(request)
    while engine.busy:
        events += engine.step()

    said = [event.token for event in events]
    rows = torch.tensor([[*request.prompt, *said]])
    true = model(rows)[0, len(request.prompt) - 1 : -1].log_softmax(-1)
    for event, row in zip(events, true, strict=True):
        assert event.logprob == pytest.approx(row[event.token].item(), abs=1e-4)
        most = row.topk(4)
        assert [token for token, _ in event.top] == most.indices.tolist()
        assert [value for _, value in event.top] == pytest.approx(most.values.tolist(), abs=1e-4)


def test_samples_of_a_prompt_share_its_reading_and_draw_each_their_own(model, monkeypatch):
    options = changed(SAMPLED, samples=4)
    engine, places = Engine(model, max_batch=4), Counter()
    monkeypatch.setattr(
        model, "forward", lambda tokens, **rest: count(places, tokens, type(model).forward, **rest)
    )

    def count(places, tokens, forward, **rest):
        places[tokens.shape[1] > 1] += 1
        return forward(model, tokens, **rest)

    (texts,) = engine.generate([Request(prompt(9), options)])

    assert places[True] == 1
    assert len({tuple(text.tokens) for text in texts}) == 4
    # The first of several is the one that would have come by itself.
    assert texts[0] == alone(model, Request(prompt(9), SAMPLED))[0]
    assert texts == alone(model, Request(prompt(9), options))


def test_the_same_seed_says_the_same_and_another_does_not(model):
    texts = [
        alone(model, Request(prompt(6), changed(SAMPLED, seed=seed)))[0].tokens
        for seed in (5, 5, 6)
    ]

    assert texts[0] == texts[1] != texts[2]


def test_texts_without_a_seed_follow_torchs_own(model):
    def drawn(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return alone(model, Request(prompt(6), changed(SAMPLED, seed=None)))[0].tokens

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_text_ends_with_its_first_stop_id_and_its_place_is_free_at_once(model):
    free = alone(model, Request(prompt(6), GREEDY))[0].tokens
    stop = free[4]
    assert stop not in free[:4], "choose another prompt"
    engine = Engine(model, max_batch=1, max_tokens=40)
    first = engine.submit(Request(prompt(6), changed(GREEDY, stop_ids=(95, stop))))
    second = engine.submit(Request(prompt(3), changed(GREEDY, max_new_tokens=1)))

    events = [event for _ in range(6) for event in engine.step()]

    assert [e.token for e in events if e.request == first] == free[:5]
    assert [(e.request, e.finished) for e in events[4:]] == [(first, "stop"), (second, "length")]


def test_a_stop_string_ends_the_text_before_it(speller):
    model, tokenizer = speller
    request = Request(tokenizer.encode("begin"), changed(GREEDY, max_new_tokens=40))
    engine = Engine(model, tokenizer=tokenizer)
    ((whole,),) = engine.generate([request])
    stop = whole.text[12:15]

    ((text,),) = engine.generate([Request(request.prompt, changed(request.options, stop=(stop,)))])

    assert text.text == whole.text[: whole.text.index(stop)] and text.finished == "stop"
    assert whole.finished == "length" and tokenizer.decode(whole.tokens) == whole.text
    assert whole.tokens[: len(text.tokens)] == text.tokens


def test_a_cancelled_request_ends_wherever_it_is_and_frees_its_place(model):
    engine = Engine(model, max_batch=2, max_tokens=100, prefill_chunk=8)
    runs = engine.submit(Request(prompt(5), GREEDY))
    reads = engine.submit(Request(prompt(40), GREEDY))
    waits = engine.submit(Request(prompt(5), changed(GREEDY, samples=2)))
    engine.step()
    assert (engine.running, engine.waiting) == (1, 1)
    for number in (runs, reads, waits, 77):
        engine.cancel(number)

    events = engine.step()

    assert events == [
        Event(number, sample, None, 0.0, (), "", "cancelled")
        for number, sample in ((runs, 0), (reads, 0), (waits, 0), (waits, 1))
    ]
    assert not engine.busy and engine.used_tokens == 0
    # And the engine is as good as new.
    assert engine.generate([Request(prompt(5), SAMPLED)])[0] == alone(
        model, Request(prompt(5), SAMPLED)
    )


def test_no_more_is_kept_than_was_said_and_no_text_is_thrown_out(model):
    engine = Engine(model, max_batch=5, max_tokens=120, prefill_chunk=16)
    for request in requests_of_many_kinds(40):
        engine.submit(request)
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine.used_tokens)
        assert engine.used_tokens <= 120 and engine.running <= 5

    assert most > 90, "the bound was never near"
    held = sum(x.numel() * x.element_size() for kept in engine.cache._layers.values() for x in kept)
    assert held == cache_bytes(model.config, max_batch=5, max_tokens=120, dtype_bytes=4)


def test_a_large_request_is_not_overtaken_for_ever(model):
    engine = Engine(model, max_batch=4, max_tokens=60)
    small = changed(GREEDY, max_new_tokens=4)
    for n in range(4):
        engine.submit(Request(prompt(3, n), changed(small, max_new_tokens=2 + n)))
    large = engine.submit(Request(prompt(50), changed(GREEDY, max_new_tokens=8)))
    last = [engine.submit(Request(prompt(3, n), small)) for n in range(6)]

    order = []
    while engine.busy:
        order += [event.request for event in engine.step() if event.finished]

    assert order.index(large) < min(order.index(n) for n in last)


def test_a_regular_expression_is_matched_by_the_whole_text(speller):
    pytest.importorskip("llguidance")
    model, tokenizer = speller
    engine = Engine(model, tokenizer=tokenizer)
    pattern = "(é|yes|no)[a-c]{2,4}(!|\\?)"
    constraint = Constraint("regex", pattern)

    texts = engine.generate(
        Request([n], SamplingOptions(seed=n, temperature=1.5, constraint=constraint))
        for n in range(20)
    )

    for (text,) in texts:
        assert re.fullmatch(pattern, text.text) and text.finished == "stop"
    assert len({text.text for (text,) in texts}) > 5


def test_a_json_schema_is_satisfied_beside_texts_that_are_free(speller):
    pytest.importorskip("llguidance")
    model, tokenizer = speller
    schema = {
        "type": "object", "additionalProperties": False, "required": ["name", "size"],
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "size": {"type": "integer", "minimum": 0, "maximum": 99},
        },
    }  # fmt: skip
    options = SamplingOptions(
        max_new_tokens=120, constraint=Constraint("json_schema", json.dumps(schema)),
        stop_ids=(tokenizer.end_of_document,),
    )  # fmt: skip
    free = Request([7], changed(SAMPLED, max_new_tokens=20))
    engine = Engine(model, tokenizer=tokenizer)

    *texts, (other,) = engine.generate(
        [*(Request([n], changed(options, seed=n)) for n in range(6)), free]
    )

    for (text,) in texts:
        value = json.loads(text.text)
        assert set(value) == {"name", "size"} and len(value["name"]) <= 5
        assert type(value["size"]) is int and 0 <= value["size"] < 100
    assert other.tokens == alone(model, free)[0].tokens


def test_where_a_text_may_end_a_stop_id_may_come_and_nowhere_else(speller):
    pytest.importorskip("llguidance")
    model, tokenizer = speller
    end = tokenizer.special["<|return|>"]
    options = SamplingOptions(
        temperature=3.0, constraint=Constraint("regex", "[ab]{2,6}"), stop_ids=(end,),
    )  # fmt: skip
    engine = Engine(model, tokenizer=tokenizer)

    texts = engine.generate(Request([n], changed(options, seed=n)) for n in range(12))

    for (text,) in texts:
        assert re.fullmatch("[ab]{2,6}", text.text)
        said = text.tokens[:-1] if text.tokens[-1] == end else text.tokens
        assert tokenizer.decode(said) == text.text
    assert any(text.tokens[-1] == end for (text,) in texts)


def test_a_constraint_that_no_token_can_follow_fails_its_own_text_only(speller, monkeypatch):
    pytest.importorskip("llguidance")
    from ossature.sample.constraint import Matcher

    model, tokenizer = speller
    allowed = Matcher.allowed

    def fails_later(matcher: Matcher):
        matcher.calls = getattr(matcher, "calls", 0) + 1
        if matcher.calls == 3:
            raise ValueError("too large")
        return allowed(matcher)

    monkeypatch.setattr(Matcher, "allowed", fails_later)
    engine = Engine(model, tokenizer=tokenizer)
    bound = SamplingOptions(constraint=Constraint("regex", "[ab]{9}"))
    ((text,), (free,)) = engine.generate([Request([5], bound), Request([6], GREEDY)])

    assert text.finished == "failed" and len(text.tokens) == 2
    assert free.finished == "length" and engine.used_tokens == 0


@pytest.mark.parametrize("kind", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_logits_that_are_no_numbers_fail_their_own_text_and_leave_nothing_behind(kind):
    """One embedding is not a number: whoever reads it fails, and no one after in the same place."""
    model = tiny_model().eval()
    with torch.no_grad():
        model.embedding.weight[95] = torch.nan
    bad = Request([5, 6, 9, 3, 95], changed(kind, samples=2))
    good = Request([7, 8], changed(kind, stop_ids=(95,)))
    engine = Engine(model, max_batch=3)
    numbers = [engine.submit(request) for request in (bad, good)]
    events = []
    while engine.busy:
        events += engine.step()

    failed = [event for event in events if event.request == numbers[0]]
    assert [(e.token, e.finished) for e in failed] == [(None, "failed")] * 2
    assert failed[0].problem == "the model's logits are not numbers"
    expected = alone(model, good)
    assert [e.token for e in events if e.request == numbers[1]] == expected[0].tokens
    # Its places in the cache are as good as new.
    assert engine.generate([good] * 3) == [expected] * 3


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([], GREEDY), "it is empty"),
        (Request([3, 96], GREEDY), "token 96 is not in the model's vocabulary of 96"),
        (Request([3], changed(GREEDY, stop_ids=(-1,))), "stop_ids: token -1"),
        (Request([3], changed(GREEDY, logit_bias=((96, 1.0),))), "logit_bias: token 96"),
        (Request([3], changed(GREEDY, samples=5)), r"samples \(5\) must be at most 4"),
        (Request([3] * 100, GREEDY), "need 120 tokens in the cache, which has 110"),
        (Request([3] * 30, changed(GREEDY, samples=3)), "need 150 tokens"),
        (Request([3], changed(GREEDY, stop=("a",))), "need the engine to have a tokenizer"),
    ],
)
def test_what_can_never_be_run_is_refused_in_a_sentence(model, request_: Request, words: str):
    engine = Engine(model, max_batch=4, max_tokens=110)

    with pytest.raises(ValueError, match=words) as error:
        engine.submit(request_)

    assert "\n" not in str(error.value) and not engine.busy


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("regex", "a(", "not a regex that can be followed"),
        ("json_schema", "{", "not a JSON schema: Expecting"),
        ("json_schema", "true}, {", "not a JSON schema: Extra data"),
        ("json_schema", '{"type": "strnig"}', "not a json_schema that can be followed"),
        ("json_schema", "[" * 100_000, "the JSON schema is nested too deeply"),
    ],
)
def test_a_wrong_constraint_is_refused_in_a_sentence(speller, kind, text: str, words: str):
    pytest.importorskip("llguidance")
    model, tokenizer = speller
    engine = Engine(model, tokenizer=tokenizer)

    with pytest.raises(ValueError, match=words) as error:
        engine.submit(Request([3], SamplingOptions(constraint=Constraint(kind, text))))

    assert "\n" not in str(error.value) and not engine.busy


@pytest.mark.parametrize("size", ["max_batch", "max_tokens", "prefill_chunk"])
def test_sizes_of_nothing_are_refused(model, size: str):
    with pytest.raises(ValueError, match=rf"{size} \(0\) must be 1 or more"):
        Engine(model, **{size: 0})


def test_requests_come_from_other_threads_while_one_steps(model):
    engine = Engine(model, max_batch=3)
    requests = requests_of_many_kinds(12)
    numbers: dict[int, int] = {}

    def send(part: int) -> None:
        for n in range(part, 12, 3):
            numbers[n] = engine.submit(requests[n])

    threads = [threading.Thread(target=send, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    said: dict[int, list[int]] = {}
    ended = 0
    while ended < 12:
        assert engine.wait(20.0)
        for event in engine.step():
            said.setdefault(event.request, []).append(event.token)
            ended += bool(event.finished)
    for thread in threads:
        thread.join()

    for n, request in enumerate(requests):
        assert said[numbers[n]] == alone(model, request)[0].tokens
    assert not engine.wait(0.01)

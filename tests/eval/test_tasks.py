"""Tasks made from a seed: what they ask, by hand, and that a model that knows gets it right."""

import json
import math
from dataclasses import replace
from random import Random

import pytest
import torch

from ossature.cli import main
from ossature.data import vocabulary
from ossature.data.harmony import Conversation, Message, Rendering, encode, render
from ossature.data.tokenizer import Tokenizer
from ossature.eval import bits, chat, needle, puzzles, tasks
from ossature.eval.likelihood import Score
from ossature.eval.options import TaskOptions
from ossature.eval.subject import Subject


@pytest.fixture
def asked(subject, monkeypatch):
    """Rows that a task asks; every one of them is answered right."""
    rows = []

    def scores(self, some, what=""):
        rows.extend(some)
        return [Score(-0.5 * len(row.continuation), 0) for row in some]

    monkeypatch.setattr(Subject, "scores", scores)
    return rows


def test_sums_are_right_and_shown_before_they_are_asked(subject, asked):
    found = puzzles.arithmetic(subject, TaskOptions(limit=10))
    assert len(asked) == 10
    for row in asked:
        lines = subject.tokenizer.decode([*row.context, *row.continuation]).splitlines()
        assert len(lines) == 5
        for line in lines:
            question, answer = line.split(" = ")
            assert eval(question) == int(answer)
        assert subject.tokenizer.decode(row.continuation) == f" {lines[-1].split(' = ')[1]}\n"
    assert found.metrics["accuracy"].summary()["value"] == 1
    assert found.metrics["nats_per_token"].summary()["value"] == 0.5
    assert len(found.metrics["accuracy, add 3 digits"].values) == 2


def test_the_same_seed_asks_the_same_and_another_does_not(subject, asked):
    prints = [
        task(subject, TaskOptions(limit=20, seed=seed)).fingerprint
        for task in (puzzles.arithmetic, puzzles.copying)
        for seed in (0, 0, 1)
    ]
    assert [prints[0] == prints[1], prints[1] == prints[2]] == [True, False]
    assert [prints[3] == prints[4], prints[4] == prints[5]] == [True, False]


def test_copies_are_of_random_tokens_that_have_text(subject, asked):
    puzzles.copying(subject, TaskOptions(limit=4))
    special = set(subject.tokenizer.special.values())
    for row, distance in zip(asked, puzzles.DISTANCES, strict=True):
        whole = [*row.context, *row.continuation]
        assert len(whole) == 2 * distance and whole[:distance] == whole[distance:]
        assert len(row.continuation) == distance - 1
        assert not special & set(whole)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("length", [300, 1111])
def test_a_haystack_has_its_needle_once_at_its_depth_and_is_as_long_as_asked(
    subject, depth, length
):
    row = needle.haystack(subject.tokenizer, length, depth, Random(3))
    assert len(row.context) + len(row.continuation) == length
    text = subject.tokenizer.decode(row.context)
    answer = subject.tokenizer.decode(row.continuation).strip(" .")
    assert int(answer) >= 10_000 and text.count(answer) == 1
    assert text.count("The number of the") == 2 + needle.OTHERS
    name = text.rpartition("The number of the ")[2].removesuffix(" is")
    assert f"The number of the {name} is {answer}." in text
    hay = text.rpartition(" What is")[0]
    place = hay.index(answer) / len(hay)
    assert abs(place - depth) < 0.16


def test_needles_of_all_lengths_and_depths(subject, asked, tmp_path):
    found = needle.needle(subject, TaskOptions(limit=10), "256,512")
    assert sorted(len(r.context) + len(r.continuation) for r in asked) == [256] * 5 + [512] * 5
    assert len(found.metrics) == 2 + 10
    needle.plot(found, tmp_path / "grid.svg")
    drawn = (tmp_path / "grid.svg").read_text()
    assert drawn.count("<rect") == 11 and drawn.count("100%</text>") == 10 + 1  # a depth too
    assert len(found.metrics["accuracy"].values) == 10
    some = needle.needle(subject, TaskOptions(limit=7), "256,512")
    assert len(some.metrics["accuracy"].values) == 7  # at most
    needle.plot(some, tmp_path / "grid.svg")
    assert (tmp_path / "grid.svg").read_text().count("<rect") == 8
    with pytest.raises(ValueError, match=r"needle: 4096 tokens are more than max_position_emb"):
        needle.needle(subject, TaskOptions(), "4096")
    for wrong in ("x", "12", "4096,"):
        with pytest.raises(ValueError, match=f"needle:{wrong}: give lengths"):
            needle.lengths_of(wrong)


def test_bits_per_byte_by_hand_from_whole_logits(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(bits, "WINDOW", 4)
    texts = ["the red lamp is blue and birds sit", "door é garden"]
    for n, text in enumerate(texts):
        (tmp_path / f"{n}.txt").write_text(text)
    found = bits.bits_per_byte(subject, TaskOptions(), str(tmp_path)).metrics["bits_per_byte"]
    end = subject.tokenizer.end_of_document
    nats = []
    for text in texts:
        tokens = [end, *subject.tokenizer.encode(text)]
        total = 0.0
        for start in range(0, len(tokens) - 1, 4):
            part = torch.tensor([tokens[start : start + 5]])
            with torch.no_grad():
                logits = subject.model(part[:, :-1]).log_softmax(-1)
            total -= float(logits.gather(2, part[:, 1:, None]).sum())
        nats.append(total)
    sizes = [len(text.encode()) for text in texts]
    assert list(found.weights) == sizes and sizes[1] == 14
    for value, nat, size in zip(found.values, nats, sizes, strict=True):
        assert value == pytest.approx(nat / math.log(2) / size, rel=1e-5)
    whole = sum(nats) / math.log(2) / sum(sizes)
    assert found.summary()["value"] == pytest.approx(whole, rel=1e-5)


def test_bits_per_byte_of_a_corpus_made_with_another_tokenizer_are_those_of_its_text(
    subject, tmp_path
):
    """As many tokens as the model's, and other ones."""
    texts = ["the red lamp is blue\n", "birds é sit in the garden\n"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    other = Tokenizer(vocabulary.train([" zzyx of wwvq" * 9], subject.tokenizer.vocab_size), "x")
    other.save(tmp_path / "other")
    subject.tokenizer.save(tmp_path / "same")
    found = []
    for name in ("same", "other"):
        argv = ["data", "build", str(tmp_path / "texts.jsonl"), "--split", "0,1,0"]
        argv += ["--output", str(tmp_path / f"data-{name}"), "--tokenizer", str(tmp_path / name)]
        assert main([*argv, "--workers", "1"]) == 0
        found.append(bits.bits_per_byte(subject, TaskOptions(), str(tmp_path / f"data-{name}")))
    plain = bits.bits_per_byte(subject, TaskOptions(), str(tmp_path / "texts.jsonl"))
    for outcome in found:
        order = sorted(range(2), key=outcome.metrics["bits_per_byte"].weights.__getitem__)
        values = [outcome.metrics["bits_per_byte"].values[n] for n in order]
        expected = plain.metrics["bits_per_byte"].values
        assert values == pytest.approx(expected, rel=1e-9)
    assert other.sha256() != subject.tokenizer.sha256()


def test_copying_needs_room_for_two_copies(subject):
    subject.model.config = replace(subject.model.config, max_position_embeddings=31)
    with pytest.raises(ValueError, match=r"copying: .* \(31\) must be at least 32"):
        puzzles.copying(subject, TaskOptions())


def answer(*messages: tuple[str, str], last: str = "<|return|>") -> Conversation:
    return Conversation(tuple(Message("assistant", text, channel) for channel, text in messages))


@pytest.mark.parametrize(
    ("messages", "drop", "expected"),
    [
        ([("analysis", "so"), ("final", "it")], 0, ("it", True, True, True)),
        ([("final", "it")], 0, ("it", True, True, True)),
        ([("final", "it"), ("analysis", "so")], 0, ("it", True, False, False)),
        ([("final", "it"), ("final", "so")], 0, ("so", True, True, False)),
        ([("analysis", "so"), ("final", "it")], 1, ("it", False, False, True)),
        ([("analysis", "so")], 0, ("", True, False, False)),
        ([("commentary", "x"), ("analysis", "so"), ("final", "it")], 0, ("it", True, True, False)),
    ],
)
def test_what_of_an_answer_is_harmony(subject, messages, drop, expected):
    rendering = Rendering("2025-06-28", analysis="all")
    pieces = render(answer(*messages), rendering)
    start = next(n for n, piece in enumerate(pieces) if piece.message == 0) + 2
    tokens, _ = encode(pieces[start:], [False] * (len(pieces) - start), subject.tokenizer)
    found = chat.read(tokens[: len(tokens) - drop], subject.tokenizer)
    assert (found.final, not found.problem, found.ended, found.ordered) == expected


def test_harmony_counts_the_answers_that_parse(subject):
    found = tasks.run(subject, ["harmony"], TaskOptions(limit=3, max_new_tokens=6))["harmony"]
    assert [len(metric.values) for metric in found.metrics.values()] == [3] * 4
    assert found.metrics["valid"].summary()["value"] == 0  # the weights are random
    assert all(entry["problem"] for entry in found.details)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["arithmetic", "arithmetic"], "tasks: arithmetic is given twice"),
        (["arithmetic:3"], "tasks: arithmetic takes nothing after a colon, not '3'"),
        (["needle:3"], "needle:3: give lengths"),
        (["bits_per_byte:nowhere"], "tasks: bits_per_byte:nowhere: no such file"),
        (["nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_tasks_that_there_are_not_are_named_before_a_model_is_loaded(names, message):
    with pytest.raises(ValueError, match=message):
        tasks.check(names, TaskOptions())

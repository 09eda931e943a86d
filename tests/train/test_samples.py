"""Samples of a run on chat data: what is asked, and what of the answer is shown."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ossature.config import DataConfig
from ossature.data.corpus import open_corpus
from ossature.data.harmony import Piece as P
from ossature.data.harmony import encode
from ossature.data.tokenizer import Tokenizer, load
from ossature.model.config import SIZES
from ossature.train.loop import train
from ossature.train.metrics import read_records
from ossature.train.samples import answer, asked, chat_folder, questions
from tests.data.chats import data_chat, small_tokenizer, write_records
from tests.small_runs import TINY, small_run, text_corpus

ASKED = [f"what is {word}" for word in ("one", "two", "it")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    for split, texts in {"train": ["say it", *ASKED[:1]], "validation": ASKED}.items():
        records = [
            {"messages": [{"role": "system", "content": "so"}] * (n % 2) + [
                {"role": "user", "content": text},
                {"role": "assistant", "thinking": "it is", "content": "so"},
                {"role": "user", "content": "and"}, {"role": "assistant", "content": "two"}]}
            for n, text in enumerate(texts)
        ]  # fmt: skip
        write_records(root / f"{split}.jsonl", records)
    tokenizer = small_tokenizer(root / "tokenizer")
    data_chat(root / "train.jsonl", "--validation", root / "validation.jsonl", "--output",
              root / "data", "--tokenizer", tokenizer, "--seq-len", 512, "--workers", 1,
              "--date", "2025-01-02")  # fmt: skip
    SIZES["tiny_chat"] = replace(TINY, vocab_size=load(root / "data").vocab_size)
    return root / "data"


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    parts = [P(text, text.startswith("<|")) for text in pieces]
    return encode(parts, [False] * len(parts), tokenizer)[0]


def test_questions_are_the_first_of_the_validation_split_up_to_the_answer(folder):
    tokenizer = load(folder)
    texts = [tokenizer.decode(ids) for ids in questions(folder, tokenizer)]
    assert len(texts) == 2
    for text, question in zip(texts, ASKED, strict=False):
        assert text.endswith(f"<|start|>user<|message|>{question}<|end|><|start|>assistant")
        assert "it is" not in text and "2025-01-02" in text
    assert "# Instructions" in texts[1] and "# Instructions" not in texts[0]


def test_conversations_cut_before_their_answer_are_passed_over(folder, tmp_path):
    """Here after its first token; where there is no other, that is said before the run begins."""
    tokenizer, long = load(folder), "what is it " * 9
    (prompt,) = asked(folder, [long], tokenizer)
    length = len(prompt) - len(tokenizer.encode("assistant"))

    def build(name: str, *questions: str) -> Path:
        answer = {"role": "assistant", "content": "so"}
        records = [{"messages": [{"role": "user", "content": q}, answer]} for q in questions]
        source = write_records(tmp_path / f"{name}.jsonl", records)
        data_chat(source, "--output", tmp_path / name, "--tokenizer", folder, "--seq-len", length,
                  "--workers", 1, "--split", "1", "--too-long", "cut", "--loss", "all",
                  "--date", "2025-01-02")  # fmt: skip
        return tmp_path / name

    (ids,) = questions(build("one", long, "it"), tokenizer)
    assert tokenizer.decode(ids).endswith("<|message|>it<|end|><|start|>assistant")
    changes = {"data__mock": False, "data__path": build("none", long), "model": "tiny_chat",
               "data__seq_len": length, "global_batch_tokens": length,
               "micro_batch_tokens": length, "sample__every_steps": 1}  # fmt: skip
    with pytest.raises(ValueError, match=r"no question to sample from: give sample\.prompts"):
        train(small_run(tmp_path / "run", **changes))


def test_a_prompt_is_written_as_the_data_is(folder):
    """The very ids that a conversation of that question begins with."""
    tokenizer, corpus = load(folder), open_corpus(folder, "validation")
    (prompt,) = asked(folder, ASKED[:1], tokenizer)
    assert corpus.file.tokens(0, len(prompt)).tolist() == prompt


@pytest.mark.parametrize(
    ("pieces", "text", "problem"),
    [
        (("<|channel|>", "analysis", "<|message|>", "it", "<|end|>", "<|start|>", "assistant",
          "<|channel|>", "final", "<|message|>", "so", "<|return|>"), "so", ""),
        (("<|channel|>", "final", "<|message|>", "so it"), "so it", "the last message has no end"),
        (("<|channel|>", "analysis", "<|message|>", "it", "<|return|>"), "",
         "nothing on the final channel"),
        (("so it is",), "", "the last header has no <|message|>"),
        ((" to=functions.f", "<|channel|>", "commentary", "<|message|>", "{}", "<|call|>"), "",
         "nothing on the final channel"),
    ],
)  # fmt: skip
def test_the_final_channel_is_shown_and_what_is_no_harmony_is_said(folder, pieces, text, problem):
    tokenizer = load(folder)
    found = answer(ids_of(tokenizer, *pieces), tokenizer)
    assert found == {"text": text, "harmony": "".join(pieces), "problem": problem}


def test_a_run_on_chat_data_is_asked_and_answers_in_harmony(folder, tmp_path, capsys):
    """An untrained model's tokens come from nowhere, and are said to be no harmony."""
    run = {"data__mock": False, "data__path": folder, "data__seq_len": 512, "steps": 1,
           "global_batch_tokens": 512, "micro_batch_tokens": 512, "model": "tiny_chat",
           "sample__every_steps": 1, "sample__max_new_tokens": 6}  # fmt: skip
    train(small_run(tmp_path / "own", **run))
    said = read_records(tmp_path / "own" / "samples.jsonl")
    assert [entry["prompt"] for entry in said] == ASKED[:2]
    assert all(entry["problem"] and entry["harmony"] for entry in said)
    assert f"step 1: 'what is one' -> {said[0]['text']!r} ({said[0]['problem']})" in (
        capsys.readouterr().out
    )
    train(small_run(tmp_path / "asked", **run, sample__prompts=("say so",)))
    (entry,) = read_records(tmp_path / "asked" / "samples.jsonl")
    assert entry["prompt"] == "say so"
    state = json.loads((tmp_path / "asked" / "run.json").read_text())
    assert state["sample.prompts"] == ["say so"]


def test_text_is_no_chat_data(folder, tmp_path):
    corpus = text_corpus(tmp_path)
    assert chat_folder(DataConfig(path=folder)) == folder
    assert chat_folder(DataConfig(blend=("1", str(folder), "2", str(corpus)))) == folder
    assert chat_folder(DataConfig(path=corpus)) is None
    assert chat_folder(DataConfig(mock=True)) is None

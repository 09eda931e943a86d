import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ossature.cli import main
from ossature.data import harmony
from ossature.data.conversations import conversation
from ossature.data.harmony import Rendering
from ossature.data.indexed import IndexedTokens
from ossature.data.tokenizer import load
from tests.data.chats import conversations, data_chat, small_tokenizer, write_records
from tests.data.corpora import as_megatron_reads, loader

SEQ = 384


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[Path]:
    """Three files of 60, 40 and 20 conversations, one of them compressed, one a table."""
    folder = tmp_path_factory.mktemp("inputs")
    second = write_records(folder / "b.jsonl", conversations(40, seed=1))
    packed = folder / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(second.read_bytes(), mtime=0))
    second.unlink()
    pq.write_table(pa.Table.from_pylist(conversations(20, seed=2)), folder / "c.parquet")
    return [write_records(folder / "a.jsonl", conversations(60)), packed, folder / "c.parquet"]


RECORDS = [*conversations(60), *conversations(40, seed=1), *conversations(20, seed=2)]


@pytest.fixture(scope="module")
def built(inputs, tokenizer, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("built") / "data"
    options = ("--tokenizer", tokenizer, "--seq-len", SEQ, "--split", "8,1,1", "--workers", 1)
    assert data_chat(*inputs, "--output", output, *options) == 0
    return output


def read(folder: Path, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """Tokens and mask of every document of a split, in the order of the file."""
    prefix = folder / f"{split}_text_document"
    file, mask = IndexedTokens(prefix), np.fromfile(f"{prefix}.mask", np.uint8)
    borders = [file.document_start(n) for n in range(file.num_documents + 1)]
    return [(file.tokens(a, b).tolist(), mask[a:b].tolist()) for a, b in pairwise(borders)]


def rendered(record: dict, tokenizer: Path, loss: harmony.Loss = "assistant"):
    """What a record should come to, piece by piece."""
    chat = conversation(record, "messages", frozenset())
    pieces = harmony.render(chat, Rendering("2025-06-28"))
    ids, mask = harmony.encode(pieces, harmony.targets(chat, pieces, loss), load(tokenizer))
    return ids, [int(learnt) for learnt in mask]


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def content(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
    }  # fmt: skip


def test_every_conversation_is_there_once_with_its_mask(built, tokenizer):
    splits = ("train", "validation", "test")
    found = [document for split in splits for document in read(built, split)]

    assert sorted(found) == sorted(rendered(record, tokenizer) for record in RECORDS)
    plain = [d for split in splits for d in as_megatron_reads(built / f"{split}_text_document")]
    assert plain == [ids for ids, _ in found]
    sizes = [manifest(built)["splits"][split]["documents"] for split in splits]
    assert sizes == [96, 12, 12]
    # Drawn at random: the files are in every split.
    order = {tuple(rendered(r, tokenizer)[0]): n for n, r in enumerate(RECORDS)}
    numbers = [order[tuple(ids)] for ids, _ in read(built, "validation")]
    assert numbers == sorted(numbers) and numbers[0] < 60 and numbers[-1] >= 60


def test_the_manifest_tells_what_was_made(built, inputs):
    told = manifest(built)

    assert [source["shape"] for source in told["sources"]] == ["messages"] * 3
    assert told["rows"] == {"seq_len": SEQ, "packed": True}
    for split, numbers in told["splits"].items():
        documents = read(built, split)
        assert numbers["tokens"] == sum(len(ids) for ids, _ in documents)
        assert numbers["learnt_tokens"] == sum(sum(mask) for _, mask in documents)
        raw = (built / f"{split}_text_document.mask").read_bytes()
        assert numbers["mask_sha256"] == hashlib.sha256(raw).hexdigest()
    assert told["chat"]["counts"]["conversations"] == 120


def test_the_number_of_workers_changes_no_byte(built, inputs, tokenizer, tmp_path):
    options = ("--tokenizer", tokenizer, "--seq-len", SEQ, "--split", "8,1,1", "--workers", 2)
    data_chat(*inputs, "--output", tmp_path / "two", *options)

    assert content(tmp_path / "two") == content(built)


def test_one_pass_of_training_sees_every_conversation_once(built):
    rows = manifest(built)["splits"]["train"]["rows"]
    train = loader(built, seq_len=SEQ, vocab_size=400, global_batch_rows=rows, micro_batch_rows=1)
    seen, learnt = [], 0
    for batch in train.micro_batches(0):
        tokens, document = batch.tokens[0], batch.document[0]
        for n in range(int(document.max()) + 1):
            place = (document == n).nonzero()[:, 0]
            seen.append(tokens[place].tolist())
            assert batch.position[0, place].tolist() == list(range(len(place)))
            assert not batch.loss_mask[0, place[0]]
        assert not batch.loss_mask[0, document < 0].any()
        learnt += int(batch.loss_mask.sum())

    assert sorted(seen) == sorted(ids for ids, _ in read(built))
    assert learnt == manifest(built)["splits"]["train"]["learnt_tokens"]


def test_the_next_pass_is_in_another_order_and_ranks_share_it(built):
    rows = manifest(built)["splits"]["train"]["rows"]
    assert rows % 2 == 0 or rows > 4
    one = loader(built, seq_len=SEQ, vocab_size=400, global_batch_rows=rows)
    passes = [[b.tokens[0].tolist() for b in one.micro_batches(step)] for step in (0, 1)]

    assert passes[0] != passes[1] and sorted(passes[0]) == sorted(passes[1])


def test_unpacked_each_conversation_has_a_row(inputs, tokenizer, tmp_path, built):
    options = ("--tokenizer", tokenizer, "--seq-len", SEQ, "--split", "8,1,1", "--pack", "false")
    data_chat(*inputs, "--output", tmp_path / "out", *options, "--workers", 1)
    numbers = manifest(tmp_path / "out")["splits"]["train"]
    batch = next(loader(tmp_path / "out", seq_len=SEQ, vocab_size=400).micro_batches(0))

    assert numbers["rows"] == numbers["documents"] == 96
    assert numbers["rows"] > 1.5 * manifest(built)["splits"]["train"]["rows"]
    assert set(batch.document.unique().tolist()) == {-1, 0}
    assert read(tmp_path / "out") == read(built)


def build(tmp_path: Path, tokenizer: Path, records: list, *options) -> Path:
    source = write_records(tmp_path / "in.jsonl", records)
    output = tmp_path / "out"
    given = ("--tokenizer", tokenizer, "--split", "1", "--workers", 1, *options)
    data_chat(source, "--output", output, *given)
    return output


def dialogue(*lengths: int) -> dict:
    """Turns whose answers have so many words, each a token."""
    messages = [{"role": "system", "content": "say"}]
    for n, length in enumerate(lengths):
        messages.append({"role": "user", "content": f"one {n}"})
        answer = {"role": "assistant", "content": " so" * length, "thinking": "it is"}
        messages.append(answer)
    return {"messages": messages}


def size(record: dict, tokenizer: Path) -> int:
    return len(rendered(record, tokenizer)[0])


def test_too_long_is_an_error_that_names_the_line(tokenizer, tmp_path):
    long, limit = dialogue(60), size(dialogue(5), tokenizer)
    with pytest.raises(ValueError, match=rf"in\.jsonl: line 2: {size(long, tokenizer)} tokens"):
        build(tmp_path, tokenizer, [dialogue(5), long], "--seq-len", limit)
    assert not (tmp_path / "out").exists()


def test_too_long_is_dropped_and_counted(tokenizer, tmp_path, capsys):
    long, limit = dialogue(60), size(dialogue(5), tokenizer)
    records = [dialogue(5), long, dialogue(4)]
    output = build(tmp_path, tokenizer, records, "--seq-len", limit, "--too-long", "drop")

    assert read(output) == [rendered(dialogue(5), tokenizer), rendered(dialogue(4), tokenizer)]
    counts = manifest(output)["chat"]["counts"]
    assert (counts["too_long"], counts["lost"]) == (1, 1)
    assert counts["lost_tokens"] == size(long, tokenizer)
    assert "1 of 3 conversations are longer than" in capsys.readouterr().out


def test_too_long_is_cut_and_counted(tokenizer, tmp_path):
    ids, mask = rendered(dialogue(5), tokenizer)
    first_learnt = mask.index(1)
    output = build(
        tmp_path, tokenizer, [dialogue(5)], "--seq-len", len(ids) - 3, "--too-long", "cut"
    )
    assert read(output) == [(ids[:-3], mask[:-3])]
    counts = manifest(output)["chat"]["counts"]
    assert (counts["too_long"], counts["lost"], counts["lost_tokens"]) == (1, 0, 3)

    (tmp_path / "b").mkdir()  # what is kept of it teaches nothing: it goes, and is counted
    records = [dialogue(5), {"messages": [{"role": "user", "content": ""}, ANSWER]}]
    output = build(
        tmp_path / "b", tokenizer, records, "--seq-len", first_learnt, "--too-long", "cut"
    )
    counts = manifest(output)["chat"]["counts"]
    assert counts["lost"] >= 1 and len(read(output)) == 2 - counts["lost"]


ANSWER = {"role": "assistant", "content": "so"}


def test_too_long_is_split_before_turns_each_with_the_instructions(tokenizer, tmp_path):
    """Turns of 30, 30, 5, 5 and 90 words: two and two fit, the last is cut."""
    whole = dialogue(30, 30, 5, 5, 90)

    def turns(start: int, stop: int) -> dict:
        return {
            "messages": [whole["messages"][0], *whole["messages"][1 + 2 * start : 1 + 2 * stop]]
        }

    limit = size(turns(0, 2), tokenizer)
    assert size(turns(0, 3), tokenizer) > limit >= size(turns(2, 4), tokenizer)
    assert size(turns(4, 5), tokenizer) > limit
    output = build(tmp_path, tokenizer, [whole], "--seq-len", limit, "--too-long", "split")

    ids, mask = rendered(turns(4, 5), tokenizer)
    expected = [rendered(turns(0, 2), tokenizer), rendered(turns(2, 4), tokenizer)]
    assert read(output) == [*expected, (ids[:limit], mask[:limit])]
    counts = manifest(output)["chat"]["counts"]
    assert (counts["conversations"], counts["documents"]) == (1, 3)
    assert counts["lost_tokens"] == len(ids) - limit


def test_pieces_of_one_conversation_stay_in_one_split(tokenizer, tmp_path):
    records = []
    for n in range(20):
        record = dialogue(30, 30)
        record["messages"][0]["content"] = f"say {n}"
        records.append(record)
    source = write_records(tmp_path / "in.jsonl", records)
    limit = size(dialogue(30, 30), tokenizer) - 5
    data_chat(source, "--output", tmp_path / "out", "--tokenizer", tokenizer, "--seq-len", limit,
              "--too-long", "split", "--split", "1,1,0", "--workers", 1)  # fmt: skip
    names = load(tokenizer)
    heads = [
        {names.decode(ids).split("say ")[1].split("<")[0] for ids, _ in read(tmp_path / "out", s)}
        for s in ("train", "validation")
    ]

    assert [len(head) for head in heads] == [10, 10]
    assert not heads[0] & heads[1]
    assert len(read(tmp_path / "out")) == 20


BAD = [
    '{"messages": [{"role": "user", "content": "q"}]}',
    "not json",
    '{"messages": [{"role": "alien", "content": "q"}]}',
    '{"prompt": "q", "completion": "a"}',
    '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}',
    '[1]',
]  # fmt: skip


def test_bad_records_are_skipped_up_to_a_bound_named_and_counted(tokenizer, tmp_path, capsys):
    good = [json.dumps(record) for record in conversations(6)]
    lines = [line for pair in zip(good, BAD, strict=True) for line in pair]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines) + "\n")
    given = (source, "--tokenizer", tokenizer, "--seq-len", SEQ, "--workers", 1, "--split", "1")
    with pytest.raises(ValueError, match=r"in\.jsonl: line 2: no message of the assistant"):
        data_chat(*given, "--output", tmp_path / "none")
    with pytest.raises(ValueError, match=r"line 12: it is no object.*5 .*allowed"):
        data_chat(*given, "--output", tmp_path / "few", "--skip-bad", 5)
    data_chat(*given, "--output", tmp_path / "all", "--skip-bad", 6)

    bad = manifest(tmp_path / "all")["chat"]["bad"]
    assert [line.split(": ")[1] for line in bad] == [f"line {n}" for n in (2, 4, 6, 8, 10, 12)]
    assert read(tmp_path / "all") == [rendered(json.loads(line), tokenizer) for line in good]
    assert f"left out: {source}: line 4: not JSON" in capsys.readouterr().out
    assert not (tmp_path / "none").exists() and not (tmp_path / "few").exists()


def test_a_byte_order_mark_loses_no_record_and_hides_no_bad_one(tokenizer, tmp_path):
    """At the start of a file it is nothing; a line of one elsewhere is a bad record."""
    good = [json.dumps(record) for record in conversations(3)]
    given = ("--tokenizer", tokenizer, "--seq-len", SEQ, "--workers", 1, "--split", "1")
    wanted = [rendered(json.loads(line), tokenizer) for line in good]
    for name, text in {
        "first": "\ufeff" + "\n".join(good),
        "alone": "\ufeff\n" + "\n".join(good),
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(text, "utf-8")
        data_chat(tmp_path / f"{name}.jsonl", "--output", tmp_path / name, *given)
        assert read(tmp_path / name) == wanted
        assert manifest(tmp_path / name)["chat"]["bad"] == []
    source = tmp_path / "between.jsonl"
    source.write_text("\n".join([good[0], "\ufeff", *good[1:]]), "utf-8")
    with pytest.raises(ValueError, match=r"between\.jsonl: line 2: not JSON"):
        data_chat(source, "--output", tmp_path / "none", *given)
    data_chat(source, "--output", tmp_path / "all", *given, "--skip-bad", 1)
    assert read(tmp_path / "all") == wanted
    assert len(manifest(tmp_path / "all")["chat"]["bad"]) == 1


def test_the_bound_of_bad_records_is_over_all_parts(tokenizer, tmp_path):
    for n in range(3):
        records = [*conversations(3, seed=n), {"messages": []}]
        write_records(tmp_path / f"{n}.jsonl", records)
    given = ("--tokenizer", tokenizer, "--seq-len", SEQ, "--workers", 1)
    with pytest.raises(ValueError, match=r"2\.jsonl: line 4: .*3 bad records so far, 2 allowed"):
        data_chat(tmp_path, "--output", tmp_path / "out", *given, "--skip-bad", 2)


def test_a_line_in_the_middle_of_a_file_that_is_cut_has_its_number(tokenizer, tmp_path):
    records = conversations(450, most=500)
    lines = [json.dumps(record) for record in records]
    lines[400] = "oh"
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    assert source.stat().st_size > 3 * 2**19  # several parts
    with pytest.raises(ValueError, match=r"in\.jsonl: line 401: not JSON"):
        data_chat(source, "--output", tmp_path / "out", "--tokenizer", tokenizer, "--seq-len",
                  8192, "--workers", 1)  # fmt: skip


@pytest.mark.parametrize(
    ("record", "shape"),
    [
        ({"messages": [{"role": "user", "content": "one"}, ANSWER]}, "messages"),
        ({"prompt": "one", "completion": "so"}, "completion"),
        ({"instruction": "one", "input": "", "output": "so"}, "alpaca"),
        ({"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "so"}]},
         "sharegpt"),
    ],
)  # fmt: skip
def test_the_shape_of_a_file_is_recognised_and_said(record, shape, tokenizer, tmp_path, capsys):
    output = build(tmp_path, tokenizer, [record], "--seq-len", SEQ)

    assert f"in.jsonl: {shape}" in capsys.readouterr().out
    chat = {"messages": [{"role": "user", "content": "one"}, ANSWER]}
    assert read(output) == [rendered(chat, tokenizer)]


def test_a_shape_that_is_forced_is_the_one_that_is_read(tokenizer, tmp_path):
    record = {"messages": [{"role": "user", "content": "a"}, ANSWER], "prompt": "one",
              "completion": "so"}  # fmt: skip
    options = ("--shape", "completion", "--ignore", "messages", "--seq-len", SEQ)
    output = build(tmp_path, tokenizer, [record], *options)
    chat = {"messages": [{"role": "user", "content": "one"}, ANSWER]}
    assert read(output) == [rendered(chat, tokenizer)]

    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="line 1: no key 'instruction'"):
        build(tmp_path / "b", tokenizer, [record], "--shape", "alpaca", "--seq-len", SEQ)


def test_what_is_learnt_can_be_chosen(tokenizer, tmp_path):
    for loss in ("final", "last_turn", "all"):
        (tmp_path / loss).mkdir()
        output = build(tmp_path / loss, tokenizer, RECORDS[:6], "--seq-len", SEQ, "--loss", loss)
        assert read(output) == [rendered(record, tokenizer, loss) for record in RECORDS[:6]]


def test_splits_can_be_files(tokenizer, tmp_path):
    files = [write_records(tmp_path / f"{n}.jsonl", conversations(5, seed=n)) for n in range(3)]
    data_chat(files[0], "--validation", files[1], "--test", files[2], "--output", tmp_path / "out",
              "--tokenizer", tokenizer, "--seq-len", SEQ, "--workers", 1)  # fmt: skip
    for n, split in enumerate(("train", "validation", "test")):
        expected = [rendered(record, tokenizer) for record in conversations(5, seed=n)]
        assert read(tmp_path / "out", split) == expected


def test_compressed_records_are_read(tokenizer, tmp_path):
    raw = write_records(tmp_path / "a.jsonl", conversations(5)).read_bytes()
    (tmp_path / "in.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(raw))
    data_chat(tmp_path / "in.jsonl.zst", "--output", tmp_path / "out", "--tokenizer", tokenizer,
              "--seq-len", SEQ, "--workers", 1, "--split", "1")  # fmt: skip

    assert read(tmp_path / "out") == [rendered(r, tokenizer) for r in conversations(5)]


def test_killed_and_started_again_it_gives_the_same_bytes(tokenizer, tmp_path, capsys):
    source = write_records(tmp_path / "in.jsonl", conversations(600, most=500))
    given = ("--tokenizer", tokenizer, "--seq-len", 8192, "--workers", 1)
    program = (
        "import sys\nfrom ossature.data.chat import chat\n"
        "if __name__ == '__main__':\n    sys.exit(chat(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, source, "--output", tmp_path / "out", *given]
    process = subprocess.Popen([str(word) for word in command])
    end = time.monotonic() + 60
    while not list((tmp_path / "out.partial/parts").glob("*.json")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    data_chat(source, "--output", tmp_path / "out", *given)

    assert "tokens found from an earlier start" in capsys.readouterr().out
    data_chat(source, "--output", tmp_path / "whole", *given)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_rows_of_another_length_are_refused(built):
    with pytest.raises(ValueError, match=rf"rows were made for data\.seq_len = {SEQ}, not 64"):
        loader(built, seq_len=64, vocab_size=400)


def test_files_that_are_damaged_or_missing_are_named(inputs, tokenizer, tmp_path):
    output = build(tmp_path, tokenizer, conversations(9), "--seq-len", SEQ)
    before = loader(output, seq_len=SEQ, vocab_size=400).fingerprint
    rows, mask = output / "train_text_document.rows", output / "train_text_document.mask"
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"\.rows: truncated or damaged"):
        loader(output, seq_len=SEQ, vocab_size=400)
    rows.write_bytes(whole[:-8] + (10**6).to_bytes(8, "little"))
    damaged = loader(output, seq_len=SEQ, vocab_size=400, global_batch_rows=8)
    with pytest.raises(ValueError, match=r"\.rows: damaged: row"):
        list(damaged.micro_batches(0))
    rows.write_bytes(whole)
    told = manifest(output)
    told["splits"]["train"]["mask_sha256"] = "0" * 64  # another mask: another corpus
    (output / "manifest.json").write_text(json.dumps(told))
    assert loader(output, seq_len=SEQ, vocab_size=400).fingerprint != before
    mask.unlink()
    with pytest.raises(ValueError, match=r"\.mask: missing"):
        loader(output, seq_len=SEQ, vocab_size=400)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "inputs is missing|at least one input"),
        (("missing.jsonl",), "missing.jsonl: no such file"),
        (("python-stdlib",), "no conversations in it"),
        (("in.jsonl", "--date", "today"), "YYYY-MM-DD"),
        (("in.jsonl", "--date", "2025-02-30"), "YYYY-MM-DD"),
        (("in.jsonl", "--seq-len", "1"), "at least 2"),
        (("in.jsonl", "--loss", "some"), "must be one of"),
        (("in.jsonl", "--split", "x"), "one to three numbers"),
        (("text.txt",), "text.txt: not a file of records"),
    ],
)
def test_options_without_sense_are_refused(given, message, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "in.jsonl", conversations(2))
    (tmp_path / "text.txt").write_text("a")
    options = ("--seq-len", "64") if "--seq-len" not in given else ()
    with pytest.raises(ValueError, match=message):
        data_chat(*given, *options, "--output", tmp_path / "out", "--tokenizer", tokenizer)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_an_empty_answer_is_a_bad_record(tokenizer, tmp_path, capsys):
    file = tmp_path / "x.jsonl"
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["data", "chat", str(file), "--output", str(tmp_path / "out"), "--seq-len", "200"]
    argv += ["--tokenizer", str(tokenizer), "--split", "1,0,0"]
    assert main(argv) == 2
    assert "line 2: an empty message of the assistant" in capsys.readouterr().err
    assert main([*argv, "--skip-bad", "1"]) == 0


def test_nothing_to_learn_from_is_an_error(tokenizer, tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n \n")
    write_records(tmp_path / "long.jsonl", conversations(2))
    output = ("--output", tmp_path / "out", "--tokenizer", tokenizer)
    with pytest.raises(ValueError, match=r"blank.jsonl: no conversations to learn from$"):
        data_chat(tmp_path / "blank.jsonl", "--seq-len", "64", *output)
    with pytest.raises(ValueError, match="to learn from, of which all 2 were left out"):
        data_chat(tmp_path / "long.jsonl", "--seq-len", "8", "--too-long", "drop", *output)
    assert not (tmp_path / "out").exists()


def test_the_help_imports_nothing_heavy():
    program = (
        "import sys, contextlib\nfrom ossature.data.chat import chat\n"
        "with contextlib.suppress(SystemExit): chat(['--help'])\n"
        "assert not {'torch', 'tokenizers', 'pyarrow', 'numpy'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, env=os.environ
    )

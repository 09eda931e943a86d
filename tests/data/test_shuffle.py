import hashlib
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ossature.data import shuffle, vocabulary
from ossature.data.build import build
from ossature.data.indexed import IndexedTokens
from ossature.data.permutation import random_keys
from ossature.data.shuffle import shuffled
from ossature.data.tokenizer import Tokenizer, load
from tests.data.corpora import numbered


def parts(lengths: list[list[int]]):
    """Documents in which every token has its own number."""
    first = 0
    for part in lengths:
        documents = numbered(part, first)
        first += sum(part)
        yield np.array([n for d in documents for n in d], np.int32), np.array(part, np.int32)


def order(stretches) -> list[list[int]]:
    found = []
    for tokens, lengths in stretches:
        borders = np.cumsum([0, *lengths]).tolist()
        assert borders[-1] == len(tokens)
        found += [tokens[a:b].tolist() for a, b in pairwise(borders)]
    return found


LENGTHS = np.random.default_rng(0).integers(1, 9, (10, 400)).tolist()
EVERY = numbered([length for part in LENGTHS for length in part])
TOKENS = sum(map(len, EVERY))


def shuffle_all(folder: Path, seed: int = 1) -> list[list[int]]:
    return order(shuffled(parts(LENGTHS), TOKENS, seed, folder))


def test_every_document_comes_out_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 4 * TOKENS // 6)
    found = shuffle_all(tmp_path / "buckets")

    assert sorted(found) == EVERY
    assert not (tmp_path / "buckets").exists()


def test_the_order_is_random_over_the_whole_input(tmp_path, monkeypatch):
    """Not only inside buckets: no correlation of places, and neighbours do not stay together."""
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 4 * TOKENS // 6)
    found = shuffle_all(tmp_path / "buckets")
    place = {document[0]: n for n, document in enumerate(EVERY)}
    places = np.array([place[document[0]] for document in found])
    count = len(EVERY)

    # The deviation of a correlation of independent places is 1 / sqrt(4000) = 0.016.
    assert abs(np.corrcoef(places, np.arange(count))[0, 1]) < 0.07
    assert np.abs(np.diff(places)).mean() == pytest.approx(count / 3, rel=0.05)
    # Every tenth of the output has its share of every tenth of the input: 40 each, deviation 6.
    table, _, _ = np.histogram2d(places, np.arange(count), bins=10)
    assert table.min() > 12 and table.max() < 75


def test_the_order_does_not_depend_on_buckets_or_chunks(tmp_path, monkeypatch):
    one = shuffle_all(tmp_path / "a")
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 4 * TOKENS // 40)
    monkeypatch.setattr(shuffle, "CHUNK_TOKENS", 100)

    assert shuffle_all(tmp_path / "b") == one
    assert shuffle_all(tmp_path / "c", seed=2) != one


def test_what_an_interrupted_shuffle_left_is_not_taken_up(tmp_path):
    one = shuffle_all(tmp_path / "a")
    rest = shuffled(parts(LENGTHS), TOKENS, 1, tmp_path / "b")
    next(rest)
    rest.close()
    assert list((tmp_path / "b").iterdir())

    assert shuffle_all(tmp_path / "b") == one


def test_keys_are_the_same_everywhere_and_never_coincide():
    keys = random_keys(0, 100_000, 7)

    assert len(np.unique(keys)) == 100_000
    assert (random_keys(5_000, 5_010, 7) == keys[5_000:5_010]).all()
    # Written down once: an order that changed with a version of numpy would change data sets.
    assert random_keys(0, 2, 0).tolist() == [16843095173907808463, 5147723596081193364]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer(vocabulary.train(["1 2 3 4 5 6 7 8 9 0"] * 9, 300), "toy").save(folder)
    return folder


def test_data_build_shuffles_over_files_before_it_splits(tokenizer, tmp_path):
    for n in range(3):
        lines = [json.dumps({"text": f"{1000 * n + k}"}) for k in range(300)]
        (tmp_path / f"{n}.jsonl").write_text("\n".join(lines))
    given = ["--tokenizer", str(tokenizer), "--split", "8,2,0", "--shuffle", "5"]
    inputs = [str(tmp_path / f"{n}.jsonl") for n in range(3)]
    for name, workers in (("a", "1"), ("b", "2")):
        output = ["--output", str(tmp_path / name), "--workers", workers]
        assert build([*inputs, *given, *output]) == 0

    texts = []
    for split in ("train", "validation"):
        file = IndexedTokens(tmp_path / "a" / f"{split}_text_document")
        borders = [file.document_start(n) for n in range(file.num_documents + 1)]
        decode = load(tokenizer).decode
        documents = [file.tokens(a, b - 1).tolist() for a, b in pairwise(borders)]  # without ends
        texts.append([int(decode(document)) for document in documents])
    everything = [1000 * n + k for n in range(3) for k in range(300)]
    assert sorted(texts[0] + texts[1]) == everything and texts[0] != sorted(texts[0])
    assert {number // 1000 for number in texts[1]} == {0, 1, 2}  # 180 of 900, from each file
    assert json.loads((tmp_path / "a/manifest.json").read_text())["shuffle"] == 5
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert not (tmp_path / "a.partial").exists()


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

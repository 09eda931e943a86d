import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers

from ossature.data import vocabulary
from ossature.data.encoder import RankEncoder, encoder, o200k_ranks, prepare
from ossature.data.sources import standard_library
from ossature.data.tokenizer import Tokenizer, load
from tests.golden import golden

TEXTS = [
    "def parse(line):\n    return line.split()\n\n",
    "for line in lines:\n    print(parse(line), 12345, 'naïve café')\n",
    "  The quick brown fox — it's 你好 🙂\r\n\r\n",
] * 3


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer(vocabulary.train(TEXTS, 320), "trained")


def test_any_text_comes_back(trained):
    for text in [*TEXTS, "", "\x00\x7f", "\ufeff\U0001d518 \u200d", " " * 50, "\n\t\r"]:
        assert trained.decode(trained.encode(text)) == text


def test_any_number_of_ids_without_a_text_are_spelled_out(trained):
    size = trained.vocab_size
    ids = [*trained.encode("a"), *[size, size + 7] * 3000, *trained.encode("b")]
    assert trained.decode(ids) == "a" + f"<|reserved_{size}|><|reserved_{size + 7}|>" * 3000 + "b"


@pytest.mark.parametrize("text", ["<|end|>", "a<|endoftext|>b", "<|start|>not special<|end|>"])
def test_a_special_token_in_raw_text_is_ordinary_text(trained, text):
    ids = trained.encode(text)

    assert not set(ids) & set(trained.special.values())
    assert trained.decode(ids) == text
    batch, lengths = trained.encode_documents([text])
    assert batch.tolist() == [*ids, trained.end_of_document]
    assert lengths.tolist() == [len(ids) + 1]


def test_special_tokens_are_read_when_asked_for(trained):
    ids = trained.encode("<|start|>user<|message|>", special=True)

    assert (ids[0], ids[-1]) == (trained.special["<|start|>"], trained.special["<|message|>"])
    assert trained.encode("<|start|>") != [trained.special["<|start|>"]]  # for that call only


def test_a_document_ends_with_endoftext_and_never_with_return(trained):
    ids, lengths = trained.encode_documents(TEXTS)
    ends = lengths.cumsum() - 1

    assert (ids[ends] == trained.special["<|endoftext|>"]).all()
    assert trained.special["<|return|>"] not in ids
    assert trained.end_of_document == trained.special["<|endoftext|>"]


def test_training_gives_the_size_asked_for_with_harmony_at_its_end(trained):
    assert trained.vocab_size == 320
    assert sorted(trained.special.values()) == list(range(310, 320))
    assert set(trained.special) == set(vocabulary.NAMED.values())
    with pytest.raises(ValueError, match=r"--train-tokenizer \(265\) must be at least 266"):
        vocabulary.train(TEXTS, 265)


def test_training_is_the_same_with_other_threads_and_hash_seeds(trained):
    program = (
        "import sys, json; from ossature.data import vocabulary as v\n"
        "sys.stdout.write(v.train(json.loads(sys.stdin.read()), 320).to_str(pretty=True))"
    )
    for threads, seed in [("1", "1"), ("4", "2")]:
        environment = os.environ | {
            "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": "true",
        }  # fmt: skip
        other = subprocess.run(
            [sys.executable, "-c", program], input=json.dumps(TEXTS), env=environment, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        assert other.stdout == trained.to_json()


def test_a_saved_folder_loads_here_and_in_transformers(trained, tmp_path):
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    ours, theirs = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)

    assert ours.sha256() == trained.sha256() == load(tmp_path / "tokenizer.json").sha256()
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text) == trained.encode(text)
    marked = "<|start|>user<|message|>hi<|end|>"
    assert theirs.encode(marked) == ours.encode(marked, special=True)
    assert theirs.decode(ours.encode(TEXTS[2])) == TEXTS[2]
    assert len(theirs) == ours.vocab_size
    assert (theirs.eos_token, theirs.pad_token) == ("<|return|>", "<|endoftext|>")


def test_saving_carries_along_what_lies_beside_it(trained, tmp_path):
    trained.save(tmp_path / "a")
    (tmp_path / "a/chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "a/special_tokens_map.json").write_text('{"eos_token": "<|call|>"}')
    load(tmp_path / "a").save(tmp_path / "b")

    for name in ("chat_template.jinja", "special_tokens_map.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_truncation_in_a_published_file_cuts_nothing(trained, tmp_path):
    cutting = tokenizers.Tokenizer.from_str(trained.to_json())
    cutting.enable_truncation(4)
    cutting.enable_padding(length=64)
    cutting.save(str(tmp_path / "tokenizer.json"))

    assert load(tmp_path).encode(TEXTS[0]) == trained.encode(TEXTS[0])


def test_merges_from_ranks_are_those_of_tiktoken():
    """Ranks of which many can be reached by more than one pair of halves."""
    ranks = [bytes([byte]) for byte in range(256)]
    for text in ["ab", "bc", "abc", "ca", "abca", "aa", "aaa", "aaaa", " a", " ab", "bcab", "de"]:
        ranks.append(text.encode())
    theirs = tiktoken.Encoding(
        "toy",
        pat_str=vocabulary.PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
        special_tokens={},
    )
    ours = Tokenizer(vocabulary.from_ranks(ranks, ["<|endoftext|>"]), "toy")
    words = ["".join("abcde "[n // 6**k % 6] for k in range(5)) for n in range(6**5)]

    for text in [*words, *TEXTS]:
        assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.end_of_document == len(ranks)


@pytest.fixture
def toy_o200k(monkeypatch, tmp_path):
    """The 256 bytes as if they were o200k: a file, and what makes it the right one."""
    lines = b"".join(base64.b64encode(bytes([n])) + b" %d\n" % n for n in range(256))
    monkeypatch.setattr(vocabulary, "SHA256", hashlib.sha256(lines).hexdigest())
    (tmp_path / "o200k_base.tiktoken").write_bytes(lines)
    return tmp_path / "o200k_base.tiktoken"


def test_the_vocabulary_is_checked_whatever_file_it_comes_from(toy_o200k, tmp_path):
    assert vocabulary.read_ranks(toy_o200k) == [bytes([n]) for n in range(256)]
    load("o200k_harmony", toy_o200k).save(tmp_path / "saved")
    as_json = tmp_path / "saved/tokenizer.json"
    assert vocabulary.read_ranks(as_json) == [bytes([n]) for n in range(256)]

    toy_o200k.write_bytes(toy_o200k.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not the vocabulary o200k_base: sha256"):
        load("o200k_harmony", toy_o200k)
    other = json.loads(as_json.read_text())
    other["model"]["vocab"] |= {"a": 98, "b": 97}
    as_json.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="not the vocabulary o200k_base: sha256"):
        load("o200k_harmony", as_json)


def test_the_cache_of_tiktoken_is_looked_into(toy_o200k, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    toy_o200k.rename(tmp_path / vocabulary.CACHE_NAME)

    assert load("o200k_harmony").encode("A") == [65]


def test_a_vocabulary_that_is_not_there_is_one_line_and_never_another(monkeypatch, tmp_path):
    monkeypatch.setattr(vocabulary, "_places", lambda: iter(()))
    with pytest.raises(ValueError, match="give --vocabulary FILE") as caught:
        load("o200k_harmony")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no such vocabulary file"):
        load("o200k_harmony", tmp_path / "none.tiktoken")


@pytest.mark.parametrize("name", ["no-such-tokenizer", "no/such-tokenizer", "./no/such/folder"])
def test_a_tokenizer_that_is_not_there_is_one_line(name):
    with pytest.raises(ValueError, match="no such file or folder") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer.json: it has no model"):
        load(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"no special token <\|endoftext\|> to end a document"):
        load(tmp_path)


def test_the_fast_encoder_gives_the_ids_of_the_tokenizer(toy_o200k, monkeypatch, tmp_path):
    """Also of a tokenizer.json; and it is not used where anything differs from o200k."""
    monkeypatch.setattr(vocabulary, "O200K_RANKS", 256)
    monkeypatch.setattr(vocabulary, "NAMED", {257: "<|endoftext|>", 258: "<|end|>"})
    load("o200k_harmony", toy_o200k).save(tmp_path / "a")
    prepare(tmp_path / "a")
    fast, slow = encoder(str(tmp_path / "a")), load(tmp_path / "a")
    texts = [*TEXTS, "<|endoftext|> \U0001d518"]

    assert isinstance(fast, RankEncoder)
    for ours, theirs in zip(
        fast.encode_documents(texts), slow.encode_documents(texts), strict=True
    ):
        assert (ours == theirs).all()
        assert ours.dtype == theirs.dtype == np.int32
    content = json.loads((tmp_path / "a/tokenizer.json").read_text())
    assert o200k_ranks(content) == [bytes([n]) for n in range(256)]
    swapped = content["model"]["vocab"] | {"a": 98, "b": 97}
    for change in (
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"model": content["model"] | {"vocab": swapped}},
        {"added_tokens": [token | {"special": False} for token in content["added_tokens"]]},
    ):
        assert o200k_ranks(content | change) is None


def test_o200k_harmony_is_the_published_tokenizer(tmp_path):
    """Against ids of openai-harmony; where this machine has the vocabulary."""
    if not any(path.is_file() for path in vocabulary._places()):
        pytest.skip("the vocabulary of o200k_harmony is not on this machine")
    expected = json.loads(golden("harmony.json").read_text())
    tokenizer = load("o200k_harmony")

    assert expected["pat_str"] == vocabulary.PATTERN
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (201088, 199999)
    assert all(tokenizer.special[token] == n for n, token in vocabulary.NAMED.items())
    for text, ids in expected["encode_ordinary"].items():
        assert tokenizer.encode(text) == ids
    tokenizer.save(tmp_path)
    prepare(tmp_path)
    fast = encoder(str(tmp_path))
    assert isinstance(fast, RankEncoder)
    sources = [Path(source.path).read_text("utf-8") for source in standard_library()[:40]]
    hard = ["a" * 9999, " " * 9999 + "x", "e\u0301\u200d" * 999, "\n\r\n" * 999, "=-" * 999]
    for batch in (list(expected["encode_ordinary"]), sources, hard):
        pairs = zip(fast.encode_documents(batch), tokenizer.encode_documents(batch), strict=True)
        assert all((ours == theirs).all() for ours, theirs in pairs)
    assert tokenizer.decode([13225, 201000, 0]) == "Hello<|reserved_201000|>!"

"""Where a byte-level BPE comes from: the published o200k ranks, or training on text.

o200k_harmony is o200k_base (199,998 ranks) with the special tokens of the harmony format after it.
The ranks are checked by the hash of OpenAI's file, whatever file they were read from: a vocabulary
that only looks alike never passes.

Source: tiktoken_ext/openai_public.py of openai/tiktoken; gpt_oss/tokenizer.py of openai/gpt-oss;
merges from ranks as in `TikTokenConverter` of transformers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

URL = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
CACHE_NAME = "fb374d419588a4632f3f557e76b4b70aebbca790"  # sha1 of URL: tiktoken's name for it
O200K_RANKS = 199_998
O200K_VOCABULARY = 201_088  # rows of the embedding; ids from 200,019 on are reserved, without text
PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""What a text is cut into before BPE."""

NAMED = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
}
"""Special tokens of the harmony format, by their id in o200k_harmony."""


def o200k_harmony(vocabulary: Path | None = None) -> Tokenizer:
    """The tokenizer of gpt-oss, from a file or from wherever its vocabulary lies on this machine.

    Args:
        vocabulary: o200k_base.tiktoken or a tokenizer.json of gpt-oss; none looks in the caches of
            openai-harmony, tiktoken and Hugging Face, then downloads it.

    Raises:
        ValueError: the file is missing or is not this vocabulary, or it cannot be had.
    """
    if vocabulary is not None:
        ranks = read_ranks(vocabulary)
    else:
        found = next((path for path in _places() if path.is_file()), None)
        ranks = read_ranks(found) if found else check_ranks(_download(), URL)
    reserved = range(O200K_RANKS, max(NAMED) + 1)  # as in the published tokenizer.json
    return from_ranks(ranks, [NAMED.get(n, f"<|reserved_{n}|>") for n in reserved])


def read_ranks(path: Path) -> list[bytes]:
    """The bytes of every token of o200k_base, in order, from a .tiktoken or tokenizer.json file.

    Raises:
        ValueError: no such file, or another vocabulary.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such vocabulary file")
    raw = path.read_bytes()
    if path.suffix == ".json":
        try:
            raw = ranks_file(json.loads(raw)["model"]["vocab"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no byte-level BPE tokenizer.json: {error!r}") from None
    return check_ranks(raw, path)


def ranks_file(table: dict[str, int]) -> bytes:
    """The .tiktoken file of the vocabulary in a byte-level tokenizer.json.

    Raises:
        ValueError: a token with characters that stand for no byte.
    """
    byte_of = {character: byte for byte, character in byte_alphabet().items()}
    try:
        ordered = sorted(table, key=lambda token: table[token])
        tokens = [bytes(map(byte_of.__getitem__, token)) for token in ordered]
    except KeyError as error:
        raise ValueError(f"not byte-level: {error}") from None
    lines = (b"%s %d\n" % (base64.b64encode(token), n) for n, token in enumerate(tokens))
    return b"".join(lines)


def check_ranks(raw: bytes, where: Path | str) -> list[bytes]:
    """The tokens of a .tiktoken file, if it is that of o200k_base."""
    found = hashlib.sha256(raw).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{where}: not the vocabulary o200k_base: sha256 {found[:12]}..., not {SHA256[:12]}..."
        )
    return [base64.b64decode(line.split()[0]) for line in raw.splitlines()]


def _places() -> Iterator[Path]:
    """Where openai-harmony, tiktoken and Hugging Face keep the vocabulary."""
    if folder := os.environ.get("TIKTOKEN_ENCODINGS_BASE"):
        yield Path(folder) / "o200k_base.tiktoken"
    if folder := os.environ.get("TIKTOKEN_RS_CACHE_DIR"):
        yield Path(folder) / CACHE_NAME
    yield _tiktoken_cache() / CACHE_NAME
    from huggingface_hub import try_to_load_from_cache

    for size in ("20b", "120b"):
        found = try_to_load_from_cache(f"openai/gpt-oss-{size}", "tokenizer.json")
        if isinstance(found, str):
            yield Path(found)


def _tiktoken_cache() -> Path:
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if folder := os.environ.get(variable):
            return Path(folder)
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def _download() -> bytes:
    """The file from OpenAI's server; kept where tiktoken keeps it."""
    try:
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(URL, timeout=30) as response:
            raw = response.read()
    except OSError as error:
        raise ValueError(
            f"the vocabulary of o200k_harmony is not on this machine ({error}): give --vocabulary "
            "FILE, the tokenizer.json beside any gpt-oss checkpoint or o200k_base.tiktoken from "
            f"{URL}"
        ) from None
    check_ranks(raw, URL)
    cache = _tiktoken_cache()
    cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f"{CACHE_NAME}.partial-{os.getpid()}"
    partial.write_bytes(raw)
    partial.rename(cache / CACHE_NAME)
    return raw


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level tokenizer.json.

    Source: `bytes_to_unicode` of openai/gpt-2 `src/encoder.py`.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }


def from_ranks(ranks: list[bytes], special: list[str]) -> Tokenizer:
    """A tokenizer that merges, as tiktoken does, the neighbours whose joint rank is lowest.

    The special tokens take the ids after the ranks.
    """
    alphabet = byte_alphabet()
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    text = ["".join(map(alphabet.__getitem__, token)) for token in ranks]
    merges = []
    for token in ranks:
        # Every way to halve it: which one BPE meets depends on the text around.
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(rank_of[a], rank_of[b]) for a, b in halves if a in rank_of and b in rank_of]
        merges += [(text[a], text[b]) for a, b in sorted(known)]
    vocabulary = {characters: rank for rank, characters in enumerate(text)}
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True)
    return _with_special(_byte_level(model), special)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of these texts; the last ids are the special tokens of harmony.

    Fewer tokens than `vocab_size` result when the texts have no pair left that occurs twice.
    """
    least = 256 + len(NAMED)
    if vocab_size < least:
        raise ValueError(
            f"--train-tokenizer ({vocab_size}) must be at least {least}: 256 bytes and "
            f"{len(NAMED)} special tokens"
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=vocab_size - len(NAMED),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_special(tokenizer, list(NAMED.values()))


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    cut = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer


def _with_special(tokenizer: Tokenizer, special: list[str]) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return tokenizer

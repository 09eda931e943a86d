"""tokenizer.json and a chat template -> the fields from which llama.cpp makes its tokenizer.

llama.cpp has the ways to cut a text before BPE built in, by name: that of o200k is "gpt-4o".
Whether a tokenizer cuts so is tried on text.  The ends of a turn it finds by their spelling,
<|return|> and <|call|>.

Source: `get_vocab_base` of conversion/base.py and src/llama-vocab.cpp of ggml-org/llama.cpp;
gguf/vocab.py (SpecialVocab) of its package gguf 0.19.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from ossature.convert.config import read_json
from ossature.data.tokenizer import TOKENIZER_FILE, Tokenizer, load
from ossature.data.vocabulary import PATTERN
from ossature.model.config import ModelConfig

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""GGUF's kinds of tokens."""
PRE = "gpt-4o"
PROBE = (
    "I'LL we've don'T HTTPServer éCOLE naïve 12 123 1234567 3.14 ... !!! a_b==c //x\r\n\r\n"
    "\n \n\n  two  spaces\t\ttabs \n trailing   \n你好世界 こんにちは नमस्ते 👍🏽🚀 "
    "e\u0301X \u00a0 end  "
)
"""Text on which other ways to cut differ."""


def tokenizer_fields(files: list[Path], where: Path, config: ModelConfig) -> dict[str, Any]:
    """Fields by key, of the files that lie beside the weights in `where`.

    Raises:
        ValueError: there is no tokenizer, or llama.cpp has none like it.
    """
    found = {file.name: file for file in files}
    if TOKENIZER_FILE not in found:
        raise ValueError(f"{where}: has no {TOKENIZER_FILE}, and a GGUF file holds its tokenizer")
    path = found[TOKENIZER_FILE]
    tokenizer, table = load(path), read_json(path)
    model = table["model"]
    if model.get("type") != "BPE" or not isinstance(model.get("merges"), list):
        raise ValueError(f"{path}: model ({model.get('type')}) must be BPE with merges")
    if table.get("normalizer") is not None:
        raise ValueError(f"{path}: has a normalizer, and llama.cpp none for {PRE}")
    _check_cuts(path, tokenizer.inner)
    tokens, kinds = _tokens(path, tokenizer, config.vocab_size)
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRE,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [_merge(path, pair) for pair in model["merges"]],
        "tokenizer.ggml.add_bos_token": False,
    }
    special = tokenizer.special
    ends = {
        "tokenizer.ggml.eos_token_id": (config.eos_token_id, "<|return|>", "<|endoftext|>"),
        "tokenizer.ggml.padding_token_id": (config.pad_token_id, "<|endoftext|>"),
        "tokenizer.ggml.bos_token_id": (config.bos_token_id, "<|startoftext|>"),
    }
    for key, (stated, *names) in ends.items():
        known = [special[name] for name in names if name in special]
        value = stated if stated is not None else next(iter(known), None)
        if value is not None:
            fields[key] = value
    template = chat_template(found)
    if template:
        fields["tokenizer.chat_template"] = template
    return fields


def chat_template(found: dict[str, Path]) -> str:
    """The text of chat_template.jinja, or of tokenizer_config.json; "" if there is none.

    Raises:
        ValueError: it is not a text: a list of several, say.
    """
    if "chat_template.jinja" in found:
        return found["chat_template.jinja"].read_text("utf-8")
    path = found.get("tokenizer_config.json")
    template = None if path is None else read_json(path).get("chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{path}: chat_template must be one text")
    return template or ""


def _check_cuts(path: Path, inner: tokenizers.Tokenizer) -> None:
    expected = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    cut = inner.pre_tokenizer
    if cut is None or cut.pre_tokenize_str(PROBE) != expected.pre_tokenize_str(PROBE):
        raise ValueError(f"{path}: cuts text in other ways than o200k, llama.cpp's {PRE}")


def _tokens(path: Path, tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and kind of every row of the embedding."""
    vocabulary = tokenizer.inner.get_vocab(with_added_tokens=True)
    if max(vocabulary.values()) >= vocab_size:
        raise ValueError(
            f"{path}: has id {max(vocabulary.values())}, the model {vocab_size} rows of embedding"
        )
    tokens = [f"[PAD{n}]" for n in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for text, n in vocabulary.items():
        tokens[n], kinds[n] = text, NORMAL
    for n, token in tokenizer.inner.get_added_tokens_decoder().items():
        tokens[n], kinds[n] = token.content, CONTROL if token.special else USER_DEFINED
    return tokens, kinds


def _merge(path: Path, pair: Any) -> str:
    """Two tokens with a space between; byte-level tokens have none of their own."""
    halves = pair.split(" ") if isinstance(pair, str) else pair
    if not isinstance(halves, list) or len(halves) != 2 or any(" " in half for half in halves):
        raise ValueError(f"{path}: {json.dumps(pair)} is no merge of two byte-level tokens")
    return " ".join(halves)

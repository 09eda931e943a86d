"""Text <-> token ids.

Text is encoded as ordinary text, even where it spells "<|end|>": special ids come from code, or
from callers who ask for them.  A document ends with <|endoftext|>, never with the eos of the chat
format, <|return|>.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from ossature.data import vocabulary

END_OF_DOCUMENT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
EXTRA_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Tokenizer:
    """A tokenizer.json and the special tokens it names.

    Args:
        inner: loses its truncation and padding here.
        file: the tokenizer.json it was read from; `save` copies it and what lies beside it.
    """

    def __init__(self, inner: tokenizers.Tokenizer, name: str, file: Path | None = None) -> None:
        inner.no_truncation()  # some published files cut every text to a length
        inner.no_padding()
        inner.encode_special_tokens = True  # spelled out, a special token is ordinary text
        self.inner, self.file = inner, file
        added = inner.get_added_tokens_decoder()
        self.special = {token.content: n for n, token in sorted(added.items()) if token.special}
        """Id of every special token."""
        if END_OF_DOCUMENT not in self.special:
            raise ValueError(f"{name}: has no special token {END_OF_DOCUMENT} to end a document")
        self.end_of_document = self.special[END_OF_DOCUMENT]
        largest = max(inner.get_vocab(with_added_tokens=True).values())
        self._known = largest + 1
        harmony = self.special.get("<|endofprompt|>") == vocabulary.O200K_RANKS + 20
        self.vocab_size = vocabulary.O200K_VOCABULARY if harmony else self._known
        """Rows a model needs: the largest id plus one; 201,088 for o200k_harmony, whose last
        1,069 ids are reserved and have no text."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text; nothing is put before or after it.

        Args:
            special: read "<|end|>" and its like as the special tokens they spell.

        Raises:
            ValueError: half of a surrogate pair, which bytes that are no UTF-8 may have become.
        """
        if not special:  # nothing is set here: threads may encode at the same time
            try:
                return self.inner.encode(text, add_special_tokens=False).ids
            except TypeError:
                raise ValueError(f"no Unicode text: {text[:100]!a}") from None
        self.inner.encode_special_tokens = False
        ids = self.inner.encode(text, add_special_tokens=False).ids
        self.inner.encode_special_tokens = True
        return ids

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of several documents, one after the other, each with its end; length of each."""
        ids = self.encode_all(texts)
        for document in ids:
            document.append(self.end_of_document)
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        count = int(lengths.sum(dtype=np.int64))
        return np.fromiter(chain.from_iterable(ids), np.int32, count), lengths

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, as `encode` gives them."""
        encodings = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out."""
        if all(n < self._known for n in ids):
            return self.inner.decode(list(ids), skip_special_tokens=False)
        parts = []
        for known, group in groupby(ids, lambda n: n < self._known):
            part = list(group)
            parts += [self.decode(part)] if known else [f"<|reserved_{n}|>" for n in part]
        return "".join(parts)

    def to_json(self) -> str:
        """Content of tokenizer.json; of the very file it was read from, if it was."""
        return self.file.read_text("utf-8") if self.file else self.inner.to_str(pretty=True)

    def sha256(self) -> str:
        """Hash of `to_json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and the files that transformers' AutoTokenizer wants beside it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_text(self.to_json(), "utf-8")
        for name, content in self._settings().items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        for name in EXTRA_FILES:
            if self.file is not None and (beside := self.file.with_name(name)).is_file():
                shutil.copyfile(beside, folder / name)

    def _settings(self) -> dict[str, dict[str, Any]]:
        roles = {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|return|>",
            "pad_token": END_OF_DOCUMENT,
        }
        roles = {role: token for role, token in roles.items() if token in self.special}
        roles.setdefault("eos_token", END_OF_DOCUMENT)
        config = roles | {
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 10**30,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        return {"tokenizer_config.json": config, "special_tokens_map.json": roles}


def load(spec: str | Path, vocabulary_file: Path | None = None) -> Tokenizer:
    """`o200k_harmony`, a tokenizer.json, a folder that has one, or a Hugging Face id.

    Args:
        vocabulary_file: for o200k_harmony, see `vocabulary.o200k_harmony`.

    Raises:
        ValueError: nothing of that name, or not a tokenizer.  Nothing else ever stands in for it.
    """
    if str(spec) == "o200k_harmony":
        return Tokenizer(vocabulary.o200k_harmony(vocabulary_file), str(spec))
    if vocabulary_file is not None:
        raise ValueError(f"--vocabulary is for the tokenizer o200k_harmony, not for {spec}")
    path = Path(spec)
    if path.is_dir():
        path /= TOKENIZER_FILE
    elif not path.exists():
        path = _from_hub(str(spec)) / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(f"{spec}: no {TOKENIZER_FILE} there")
    try:
        text = path.read_text("utf-8")
        if "model" not in json.loads(text):
            raise ValueError("it has no model")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a tokenizer.json: {error}") from None
    return Tokenizer(tokenizers.Tokenizer.from_str(text), str(path), path)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if name.count("/") != 1:
            raise ValueError("not of the form owner/name")
        return Path(snapshot_download(name, allow_patterns=[TOKENIZER_FILE, *EXTRA_FILES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ValueError(
            f"{name}: no such file or folder, and no Hugging Face tokenizer to be had: {reason}"
        ) from None

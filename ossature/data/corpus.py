"""One split of one corpus on disk, seen as one run of tokens with document borders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ossature.data.blend import DEFAULT_SPLIT, split_documents
from ossature.data.indexed import IndexedTokens, index_path, tokens_path

MANIFEST = "manifest.json"
SAMPLE_BYTES = 2**16
WHOLE = "whole"


class Packing(NamedTuple):
    """That the rows of a corpus were put together when it was made, by `ossature data chat`."""

    num_rows: int
    seq_len: int


class Corpus:
    """A range of documents of an indexed file.

    Nothing here takes time or memory in proportion to the file.
    """

    def __init__(
        self,
        file: IndexedTokens,
        documents: range,
        split: str,
        *,
        vocab_size: int = 0,
        sha256: str = "",
        packing: Packing | None = None,
    ) -> None:
        self.name = str(file.prefix)
        self.file, self.split = file, split
        self.vocab_size = vocab_size  # of the tokenizer that made it; 0: not known
        self.sha256 = sha256  # of its files, as the manifest has it; empty: not known
        self.packing = packing
        self.start = file.document_start(documents.start)
        self.num_tokens = file.document_start(documents.stop) - self.start
        self.num_documents = len(documents)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start .. stop - 1 of this split; the places among them that begin a document."""
        assert 0 <= start <= stop <= self.num_tokens
        start, stop = start + self.start, stop + self.start
        tokens, starts = self.file.tokens(start, stop), self.file.document_starts(start, stop)
        self.file.release()
        return tokens, starts - start

    def fingerprint(self) -> str:
        """Changes with the corpus; a sample of the bytes, in time that does not grow with it."""
        numbers = f"{self.start} {self.num_tokens} {self.num_documents} {self.sha256}"
        digest = hashlib.sha256(numbers.encode())
        for path in (index_path(self.file.prefix), tokens_path(self.file.prefix)):
            size = path.stat().st_size
            digest.update(f" {size}".encode())
            with path.open("rb") as file:
                for n in range(16):  # evenly from the first bytes to the last
                    file.seek(max(0, size - SAMPLE_BYTES) * n // 15)
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()


def open_corpus(path: Path | str, split: str, shares: str = "") -> Corpus:
    """A split of a folder of `ossature data build` or `data chat`, or of a prefix of .bin and .idx.

    Args:
        shares: such as "9999,8,2"; a prefix is split by it (empty: "9999,8,2"), a folder was split
            when it was built and takes no other.  "whole": a prefix is of this split as a whole.

    Raises:
        ValueError: nothing there, something else there, or files that contradict each other.  Mock
            data never stands in for a corpus that is missing.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, split, "" if shares == WHOLE else shares)
    if not index_path(path).exists() and not tokens_path(path).exists():
        if path.suffix in (".bin", ".idx") and path.is_file():
            raise ValueError(f"{path}: give the prefix {path.with_suffix('')}, without its suffix")
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(
            f"{path}: {what}; expected a folder made by `ossature data build` or `data chat`, or a "
            "prefix with .bin and .idx"
        )
    file = IndexedTokens(path)
    if shares == WHOLE:
        return Corpus(file, range(file.num_documents), split)
    return Corpus(file, split_documents(file.num_documents, shares or DEFAULT_SPLIT)[split], split)


def _open_folder(folder: Path, split: str, shares: str) -> Corpus:
    manifest = read_manifest(folder)
    if shares and shares != manifest["split"]:
        raise ValueError(
            f"data.split ({shares}) differs from the split that {folder} was built with "
            f"({manifest['split']}): leave it empty or build again"
        )
    file = IndexedTokens(split_prefix(folder, split))
    found = {"documents": file.num_documents, "tokens": file.num_tokens}
    for key, number in found.items():
        written = manifest["splits"][split][key]
        if number != written:
            raise ValueError(
                f"{file.prefix}: {number} {key}, but {folder / MANIFEST} says {written}"
            )
    numbers = manifest["splits"][split]
    sha256, packing = numbers.get("bin_sha256", ""), None
    if "rows" in manifest:
        packing = Packing(numbers["rows"], manifest["rows"]["seq_len"])
        sha256 = " ".join(numbers[f"{kind}_sha256"] for kind in ("bin", "mask", "rows"))
    return Corpus(
        file,
        range(file.num_documents),
        split,
        vocab_size=manifest["tokenizer"]["vocab_size"],
        sha256=sha256,
        packing=packing,
    )


def split_prefix(folder: Path, split: str) -> Path:
    """Where a data folder keeps a split."""
    return folder / f"{split}_text_document"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `ossature data build` wrote about a data folder.

    Raises:
        ValueError: no manifest, or one without the keys that are needed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder}: no {MANIFEST}: not a folder made by `ossature data build` or `data chat`"
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
        _ = manifest["split"], manifest["tokenizer"]["vocab_size"]
        needed = {"tokens", "documents"}
        if "rows" in manifest:  # of `ossature data chat`
            needed |= {"rows", "bin_sha256", "mask_sha256", "rows_sha256"}
            _ = manifest["rows"]["seq_len"]
        _ = [numbers[key] for numbers in manifest["splits"].values() for key in needed]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged: {error!r}") from None
    return manifest

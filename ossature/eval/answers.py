"""What a model has answered so far, in a file: an evaluation that was killed goes on from there.

A line is written when its answer is known, so that a kill loses what was being computed and no
more.  The first line says whose answers they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

OWNER = b'["owner", '
"""The first line begins so."""


class Answers:
    """Answers by a hash of what was asked; the same on all ranks, which make the same calls.

    Args:
        path: None keeps them in memory alone.
        owner: what the answers depend on besides the questions: weights, precision, tokenizer.

    Raises:
        ValueError: the file's answers are of another owner, or it is no such file.
    """

    def __init__(self, path: Path | None = None, owner: Mapping[str, Any] | None = None) -> None:
        self._known: dict[str, Any] = {}
        self._file = None
        several = dist.is_initialized() and dist.get_world_size() > 1
        box: list[Any] = [{}, ""]
        if path is not None and (not several or dist.get_rank() == 0):
            try:
                box = [self._open(path, dict(owner or {})), ""]
            except (ValueError, OSError) as error:
                box = [{}, str(error)]
        if several:
            dist.broadcast_object_list(box, src=0)
        self._known, problem = box
        if problem:
            raise ValueError(problem)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def keep(self, answers: Mapping[str, Any]) -> None:
        """Take in more answers, which JSON can hold."""
        self._known |= answers
        if self._file is not None:
            self._file.writelines(json.dumps([key, answers[key]]) + "\n" for key in answers)
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self, path: Path, owner: dict[str, Any]) -> dict[str, Any]:
        raw = path.read_bytes() if path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]  # a kill may have cut the last line short
        if not whole and not OWNER.startswith(raw[: len(OWNER)]):
            raise ValueError(f"{path}: not the answers of `ossature eval --cache`")
        known = {}
        for n, line in enumerate(whole.decode("utf-8", "replace").splitlines(), 1):
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):
                raise ValueError(f"{path}: line {n} is none of an eval's answers") from None
            if n > 1:
                known[key] = value
            elif key != "owner":
                raise ValueError(f"{path}: not the answers of `ossature eval --cache`")
            elif value != owner:
                differs = next(k for k in {**value, **owner} if value.get(k) != owner.get(k))
                raise ValueError(
                    f"{path}: answers of another model ({differs} is {value.get(differs)!r} there, "
                    f"{owner.get(differs)!r} here); give another --cache"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(whole) < len(raw):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        self._file = path.open("a", encoding="utf-8")
        if not whole:
            self._file.write(json.dumps(["owner", owner]) + "\n")
            self._file.flush()
        return known


def key_of(*question: Any) -> str:
    """A hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(question).encode()).hexdigest()

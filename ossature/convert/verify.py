"""`ossature verify A B`: compare two checkpoints, tensor by tensor, whatever their formats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro

from ossature.config import parse

if TYPE_CHECKING:
    from ossature.convert.source import Source


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Compare two checkpoints in any formats; exit 1 where they differ in anything."""

    a: tyro.conf.Positional[Path]
    """Checkpoint, or the folder of a run (its newest checkpoint)."""
    b: tyro.conf.Positional[Path]
    logits: bool = False
    """Also run both, in float32, and compare their logits."""
    bytes: bool = False
    """Two MXFP4 folders must agree in every byte, not only in the numbers the bytes stand for."""


class Difference(NamedTuple):
    name: str
    text: str
    weights: bool = True
    """Whether numbers differ; otherwise only the way they are coded."""


def main(argv: list[str]) -> int:
    options = parse(VerifyOptions, argv, prog="ossature verify")

    from ossature.convert.folder import open_source

    one, other = open_source(options.a), open_source(options.b)
    found = list(differences(one, other))
    for difference in found:
        print(f"{difference.name}: {difference.text}")
    count = len(set(one.names()) | set(other.names()))
    weights = sum(difference.weights for difference in found)
    coded = len(found) - weights
    bad = weights > 0 or (options.bytes and coded > 0)
    if coded:
        print(f"{coded} tensors hold the same numbers coded in other bytes")
    if options.logits and not any(d.text.startswith("only in") for d in found):
        largest = largest_logit_difference(options.a, options.b)
        print(f"largest difference of a logit: {largest:.3g}")
        bad = bad or largest > 0
    if bad:
        print(f"{one.folder} and {other.folder} differ")
    else:
        print(f"{count} tensors, all equal to the bit")
    return int(bad)


def differences(one: Source, other: Source) -> Iterator[Difference]:
    """Everything in which two sources differ: config, names, shapes, numbers, bytes."""
    yield from config_differences(one, other)
    theirs = set(other.names())
    for name in one.names():
        if name not in theirs:
            yield Difference(name, f"only in {one.folder}")
        elif one.spec(name).shape != other.spec(name).shape:
            shapes = f"{one.spec(name).shape} and {other.spec(name).shape}"
            yield Difference(name, f"shapes {shapes}")
    for name in other.names():
        if name not in set(one.names()):
            yield Difference(name, f"only in {other.folder}")
    yield from value_differences(one, other)


# What OpenAI's config.json has no place for, and no number depends on.
_ADVICE = {
    "initializer_range", "router_aux_loss_coef", "max_position_embeddings",
    "eos_token_id", "pad_token_id", "bos_token_id",
}  # fmt: skip


def config_differences(one: Source, other: Source) -> Iterator[Difference]:
    for entry in fields(one.config):
        ours, theirs = getattr(one.config, entry.name), getattr(other.config, entry.name)
        if ours != theirs and entry.name not in _ADVICE:
            yield Difference(f"config.json: {entry.name}", f"{ours} and {theirs}")


def value_differences(one: Source, other: Source) -> Iterator[Difference]:
    """Numbers are compared in float64, bit for bit: -0.0 is not 0.0."""
    import torch

    from ossature.convert.transfer import in_order, jobs

    def compare(job: tuple[str, int, int]) -> tuple[int, float, float, bool]:
        """How many numbers differ, by how much at most, of what size, and whether bytes do."""
        ours, theirs = one.packed(*job), other.packed(*job)
        if ours is not None and theirs is not None:
            if all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
                return 0, 0.0, 0.0, False
            recoded = True
        else:
            recoded = False
        a, b = one.read(*job), other.read(*job)
        if a.dtype == b.dtype == torch.bfloat16:
            same = torch.equal(a.view(torch.int16), b.view(torch.int16))
            if same:
                return 0, 0.0, 0.0, recoded
        a, b = a.double(), b.double()
        differ = a.view(torch.int64) != b.view(torch.int64)
        largest = (a - b).abs().nan_to_num(torch.inf).max().item() if differ.any() else 0.0
        return int(differ.sum()), largest, a.abs().max().item(), recoded

    theirs = set(other.names())

    def common() -> Iterator[tuple[str, int, int]]:
        for job in jobs(one):
            if job[0] in theirs and one.spec(job[0]).shape == other.spec(job[0]).shape:
                yield job

    found: dict[str, Any] = {}
    for (name, *_), (count, largest, size, recoded) in in_order(compare, common()):
        before = found.get(name, (0, 0.0, 0.0, False))
        found[name] = (
            before[0] + count,
            max(before[1], largest),
            max(before[2], size),
            before[3] or recoded,
        )
    for name, (count, largest, size, recoded) in found.items():
        if count:
            text = f"{count} numbers differ, by {largest:.4g} at most (largest number {size:.4g})"
            yield Difference(name, text)
        elif recoded:
            yield Difference(name, "same numbers, coded in other bytes", weights=False)


def largest_logit_difference(a: Path, b: Path) -> float:
    """Between the logits of two folders for the same 2 x 64 random tokens; one model at a time."""
    import torch

    from ossature.convert.model import load_model

    logits = []
    for folder in (a, b):
        model = load_model(folder)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.config.vocab_size, (2, 64), generator=generator)
        with torch.no_grad():
            logits.append(model(tokens))
        del model
    return (logits[0] - logits[1]).abs().nan_to_num(torch.inf).max().item()

"""`ossature verify A B`: compare two checkpoints, tensor by tensor, whatever their formats."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro

from ossature.config import ParallelConfig, parse

if TYPE_CHECKING:
    from ossature.convert.source import Source
    from ossature.parallel.launch import Ranks


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Compare two checkpoints in any formats, or one with what it is after a round trip over
    ranks; exit 1 where they differ in anything.  Under torchrun the ranks share the work."""

    a: tyro.conf.Positional[Path]
    """Checkpoint, a GGUF file, or the folder of a run (its newest checkpoint)."""
    b: tyro.conf.Positional[Path | None] = None
    """The other one."""
    logits: bool = False
    """Also run both, in float32, and compare their logits."""
    bytes: bool = False
    """Two MXFP4 folders must agree in every byte, not only in the numbers the bytes stand for."""
    round_trip: bool = False
    """Load A onto the ranks' shards, save it sharded, write that in A's own format, and compare
    every tensor to the bit."""
    output: Path | None = None
    """Where a round trip leaves its folder, on a disk that all ranks see; none leaves nothing."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How a model is divided over the ranks that torchrun starts."""


class Difference(NamedTuple):
    name: str
    text: str
    weights: bool = True
    """Whether numbers differ; otherwise only the way they are coded."""


def main(argv: list[str]) -> int:
    options = parse(VerifyOptions, argv, prog="ossature verify")
    if options.round_trip:
        if options.b is not None:
            raise ValueError("verify: --round-trip takes one checkpoint")
    elif options.b is None:
        raise ValueError("b is missing")
    elif options.output is not None:
        raise ValueError("verify: --output goes with --round-trip")

    from ossature.convert.folder import open_source
    from ossature.parallel.launch import first_prints, launched

    with launched() as ranks, first_prints(ranks):
        one = open_source(options.a)
        if options.round_trip and one.format == "gguf":
            raise ValueError(f"{options.a}: --round-trip takes a folder")
        if options.b is not None:
            return compare(one, open_source(options.b), options, ranks)

        from ossature.convert.round_trip import written_back

        with written_back(one, options.parallel, ranks, options.output) as back:
            return compare(one, open_source(back), options, ranks)


def compare(one: Source, other: Source, options: VerifyOptions, ranks: Ranks) -> int:
    """Print what differs; 1 if anything does that may not.  Each rank compares some tensors."""
    import torch.distributed as dist

    found = list(differences(one, other, ranks.rank, ranks.world))
    shares: list[list[Difference]] = [[] for _ in range(ranks.world)]
    dist.all_gather_object(shares, found)
    found = list(dict.fromkeys(difference for share in shares for difference in share))
    for name in one.names() if options.round_trip else []:
        pair = one.spec(name).dtype, other.spec(name).dtype
        if pair[0] != pair[1]:
            found.append(Difference(name, f"{pair[0]} and {pair[1]}"))
    for difference in found:
        print(f"{difference.name}: {difference.text}")
    count = len(set(one.names()) | set(other.names()))
    weights = sum(difference.weights for difference in found)
    coded = len(found) - weights
    bad = weights > 0 or ((options.bytes or options.round_trip) and coded > 0)
    if coded:
        print(f"{coded} tensors hold the same numbers coded in other bytes")
    if options.logits and not any(d.text.startswith("only in") for d in found):
        largest = largest_logit_difference((one, other), options.parallel, ranks)
        print(f"largest difference of a logit: {largest:.3g}")
        bad = bad or largest > 0
    if options.round_trip:
        for line in summary(one, {difference.name for difference in found}):
            print(line)
    if bad:
        print(f"{one.folder} and {other.folder} differ")
    elif options.round_trip:
        print(f"{count} tensors, all equal to the bit after a round trip over {ranks.world} ranks")
    else:
        print(f"{count} tensors, all equal to the bit")
    return int(bad)


def summary(source: Source, differ: set[str]) -> Iterator[str]:
    """A line for each kind of weight: shape, dtype, how many there are, and whether they came
    back."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name in source.names():
        dtype, shape = source.spec(name)
        stored = "mxfp4" if source.packed(name, 0, 0) is not None else str(dtype)[len("torch.") :]
        row = f"{' x '.join(map(str, shape)):>20} {stored:>9}"
        kinds.setdefault((re.sub(r"\.\d+\.", ".*.", name), row), []).append(name)
    for (kind, row), names in kinds.items():
        wrong = len(differ.intersection(names))
        verdict = f"{wrong} of {len(names)} differ" if wrong else f"{len(names)} equal"
        yield f"{kind:<42}{row}  {verdict}"


def differences(one: Source, other: Source, rank: int = 0, world: int = 1) -> Iterator[Difference]:
    """Everything in which two sources differ: config, names, shapes, numbers, bytes.

    Args:
        rank, world: numbers and bytes are compared of every `world`-th tensor only.
    """
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
    yield from value_differences(one, other, set(one.names()[rank::world]))


# What OpenAI's config.json and a GGUF file may have no place for, and no number depends on.
_ADVICE = {
    "initializer_range", "router_aux_loss_coef", "max_position_embeddings",
    "eos_token_id", "pad_token_id", "bos_token_id",
}  # fmt: skip


def config_differences(one: Source, other: Source) -> Iterator[Difference]:
    lacking = {"openai", "gguf"} & {one.format, other.format}
    for entry in fields(one.config):
        ours, theirs = getattr(one.config, entry.name), getattr(other.config, entry.name)
        # A token that only one of them names is filled in from a tokenizer on the way.
        told = entry.name.endswith("token_id") and not lacking and None not in (ours, theirs)
        if ours != theirs and (told or entry.name not in _ADVICE):
            yield Difference(f"config.json: {entry.name}", f"{ours} and {theirs}")


def value_differences(one: Source, other: Source, names: set[str]) -> Iterator[Difference]:
    """Of the named weights both have.  In float64, bit for bit: -0.0 is not 0.0."""
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

    theirs = names.intersection(other.names())

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


def largest_logit_difference(
    pair: tuple[Source, Source], parallel: ParallelConfig, ranks: Ranks
) -> float:
    """Between the logits of two folders for the same 2 x 64 random tokens; one model at a time.

    Rows are longer where the ranks could not share them.
    """
    import torch
    import torch.distributed as dist

    from ossature.convert.open import open_model

    unit = 2 * parallel.cp * parallel.tp
    logits = []
    for source in pair:
        model = open_model(source.folder, parallel, torch.float32, ranks)
        generator = torch.Generator().manual_seed(0)
        shape = (2, -(-64 // unit) * unit)
        tokens = torch.randint(0, model.config.vocab_size, shape, generator=generator)
        with torch.no_grad():
            logits.append(model(tokens.to(next(model.parameters()).device)))
        del model
    largest = (logits[0] - logits[1]).abs().nan_to_num(torch.inf).max().double().cpu()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()

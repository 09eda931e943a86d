"""`ossature plan RUN.toml --ranks N --memory 80GiB`: does it fit, and which layouts do?"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from ossature.config import ParallelConfig, TrainConfig, parse

if TYPE_CHECKING:
    from ossature.train.plan import DryRun, Found, Plan


@dataclass(frozen=True, kw_only=True)
class PlanOptions(TrainConfig):
    """Say what every rank of a run holds, moves and computes; exit 1 where it does not fit.

    Takes a run file and every key of a run.  Nothing is trained, and no device is asked: formulas
    follow the code of a step from one tensor to the next.  Not counted: what the libraries of the
    device take for themselves (on CUDA about a gigabyte or two, with what the allocator cannot
    use), and experts that are chosen more often than others.
    """

    ranks: int
    """Devices."""
    memory: str = "80GiB"
    """Of each device, such as 80GiB or 141GB."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Whose kernels."""
    search: bool = False
    """List layouts that fit, the one with the least time first."""
    dry_run: bool = False
    """Build mesh, divided model and optimizer by the code that trains, for the first rank of each
    stage, without memory and other ranks; compare the bytes with those of the formulas."""


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{prefix}i": 2 ** (10 * n) for n, prefix in enumerate("KMGT", 1)}


def main(argv: list[str]) -> int:
    """0 if it fits, 1 if not, 2 for a layout that there cannot be."""
    options = parse(PlanOptions, argv, prog="ossature plan")
    if options.ranks < 1:
        raise ValueError(f"ranks ({options.ranks}) must be at least 1")
    most = parse_bytes(options.memory)
    config = TrainConfig(**{f.name: getattr(options, f.name) for f in fields(TrainConfig)})

    from ossature.train import plan as plans

    if options.dry_run:
        return show_dry_run(plans.dry_run(config, options.ranks), config, options.ranks)
    if options.search:
        found, looked = plans.search(config, options.ranks, options.device, most)
        for line in list_layouts(found, looked, options):
            print(line)
        return int(not found)
    one = plans.plan(config, options.ranks, options.device)
    for line in describe(one, options, most):
        print(line)
    return int(one.worst.peak > most)


def parse_bytes(text: str) -> int:
    """80GiB is 80 x 2 ** 30, 141GB is 141 x 10 ** 9.

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?|)B", text)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"memory = {text}: must be a number and a unit, such as 80GiB or 141GB")
    return int(float(found[1]) * UNITS[found[2]])


def gib(size: int | float) -> str:
    return f"{size / 2**30:,.2f}" if size < 10 * 2**30 else f"{size / 2**30:,.1f}"


def layout_of(axes: ParallelConfig, sizes: dict[str, int]) -> str:
    words = {**sizes, "ep": axes.ep, "etp": axes.etp}
    text = " x ".join(f"{axis} {size}" for axis, size in words.items() if size > 1) or "one rank"
    return f"{text}, {axes.pp_schedule}" if axes.pp > 1 else text


def describe(one: Plan, options: PlanOptions, most: int) -> list[str]:
    config = one.config
    lines = [
        f"{config.model} on {options.ranks} ranks of {options.memory}: "
        f"{layout_of(config.parallel, one.sizes)}",
        f"{config.global_batch_tokens:,} tokens a step in rows of {config.data.seq_len:,}; each "
        f"rank has {one.micro_batches} micro-batches of {config.micro_batch_tokens:,}; "
        f"{config.precision}, recompute {config.recompute}",
        "",
    ]
    heads = [f"pp {n}" for n in range(len(one.uses))] if len(one.uses) > 1 else ["GiB a rank"]
    names = sorted(
        {name for use in one.uses for name, size in use.at_peak.items() if size >= 2**20},
        key=lambda name: -one.worst.at_peak.get(name, 0.0),
    )
    width = max(map(len, names)) + 2
    lines.append("at the peak".ljust(width) + "".join(head.rjust(12) for head in heads))
    for name in names:
        cells = [gib(use.at_peak.get(name, 0.0)).rjust(12) for use in one.uses]
        lines.append(name.ljust(width) + "".join(cells))
    lines.append("peak".ljust(width) + "".join(gib(use.peak).rjust(12) for use in one.uses))
    if len(one.uses) > 1:
        spans = [f"{len(use.layers)} layers".rjust(12) for use in one.uses]
        lines.append("".ljust(width) + "".join(spans))
    received = ", ".join(f"{axis} {gib(size)}" for axis, size in one.traffic.items()) or "nothing"
    worst = one.worst
    left = most - worst.peak
    where = f" on pp {one.uses.index(worst)}" if len(one.uses) > 1 else ""
    verdict = (
        f"fits: {gib(left)} GiB left of {gib(most)}{where}"
        if left >= 0
        else f"does not fit: {gib(worst.peak)} GiB{where}, {gib(-left)} more than {options.memory}"
    )
    return [
        *lines,
        "",
        f"received a step, GiB: {received}",
        f"work a step and rank: {one.flops / 1e12:,.1f} TFLOP",
        verdict,
    ]


def list_layouts(found: list[Found], looked: int, options: PlanOptions) -> list[str]:
    if not found:
        return [
            f"no layout of {options.model} on {options.ranks} ranks fits into {options.memory}: "
            + (f"{looked} have" if looked else "none has")
            + " room for weights, gradients and optimizer"
            + (", and not for a step" if looked else "")
        ]
    lines = [
        f"{options.model} on {options.ranks} ranks of {options.memory}: the least time first, of "
        f"layouts that fit ({looked} looked at)",
        "",
        "   GiB  seconds  layout, and where the time goes",
    ]
    for entry in found:
        one, time = entry.plan, entry.time
        config = one.config
        lines.append(
            f"{gib(one.worst.peak):>6}  {time.total:>7.2f}  "
            f"{layout_of(config.parallel, one.sizes)}; recompute {config.recompute}; micro-batches "
            f"of {config.micro_batch_tokens:,}"
        )
        parts = {"work": time.work, "bubble": time.bubble, **time.communication}
        spent = sorted(parts.items(), key=lambda item: -item[1])
        shares = [f"{name} {100 * part / time.total:.0f} %" for name, part in spent if part]
        lines.append(f"{'':>15}  {', '.join(shares)}")
    return lines


def show_dry_run(runs: list[DryRun], config: TrainConfig, ranks: int) -> int:
    print(f"{config.model} on {ranks} ranks, made by the code that trains, and by formula:")
    print("  rank          weights       by formula        optimizer       by formula  seconds")
    for run in runs:
        pairs = (run.weight_bytes, run.planned_weights, run.state_bytes, run.planned_states)
        cells = "".join(f"{size:>17,.0f}" for size in pairs)
        print(f"{run.rank:>6}{cells}{run.seconds:>9.2f}")
    equal = all(run.equal for run in runs)
    print(f"{'equal' if equal else 'NOT EQUAL'}; {gib(runs[-1].host_bytes)} GiB of this machine")
    return int(not equal)

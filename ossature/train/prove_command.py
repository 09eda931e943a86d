"""`ossature prove RUN.toml --ranks N`: does this layout compute what one process computes?"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ossature.config import TrainConfig, parse

if TYPE_CHECKING:
    from ossature.train.prove import Case


@dataclass(frozen=True, kw_only=True)
class ProveOptions(TrainConfig):
    """Compare a run's layout with one process; exit 1 where they differ.

    Takes a run file and every key of a run, of which it keeps the axes, the schedule of the
    pipeline, compile, recompute, the optimizer and which router losses there are.  The model and
    the batch are small ones of the same make; no data are read and nothing is written to the run.
    Under torchrun it uses the ranks there are, on their GPUs if they have some.
    """

    ranks: int = 0
    """Start so many ranks on this machine's CPU; 0 takes torchrun's, or as many as the axes say."""
    tolerance: float = 1e-4
    """Largest relative error of a loss, norm, gradient or weight."""
    all: bool = False
    """Print every parameter, and not the worst of each kind."""
    output: Path | None = None
    """Write the errors as JSON, too."""
    timeout_seconds: int = 900
    """The ranks are ended then."""


def main(argv: list[str]) -> int:
    """0 if the layout computes what one process computes, 1 if not or a rank fails, 2 for a layout
    that there cannot be."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        options = parse(ProveOptions, argv, prog="ossature prove")
        world = number_of_ranks(options)
        config = TrainConfig(**{f.name: getattr(options, f.name) for f in fields(TrainConfig)})

        from ossature.parallel.spawn import RanksFailed
        from ossature.train import reduced, setup

        sizes, shape = setup.check_layout(config, world)
    except ValueError:
        if first:
            raise
        return 2  # every rank has read the same words: one of them says so
    case = reduced.reduce(config, shape, sizes)
    if first:
        for line in introduction(case, sizes, list(reduced.changes(config))):
            print(line, flush=True)
    try:
        errors = compare(case, world, options.timeout_seconds)
    except RanksFailed as failure:
        print(f"{failure}\nnot proved: a rank failed", file=sys.stderr)
        return 1
    result = Result(errors, options.tolerance)
    if first:
        show(result, options.all)
        if options.output is not None:
            write(options.output, result, case, sizes)
    return int(bool(result.failed))


def number_of_ranks(options: ProveOptions) -> int:
    """As given, as torchrun says, or as the axes say.

    Raises:
        ValueError: two of them differ, or none says it.
    """
    launched = int(os.environ.get("WORLD_SIZE", "0")) if "RANK" in os.environ else 0
    if options.ranks and launched and options.ranks != launched:
        raise ValueError(
            f"--ranks ({options.ranks}) must be the number of ranks of torchrun ({launched})"
        )
    if options.ranks or launched:
        return options.ranks or launched
    axes = options.parallel
    if axes.dp_shard == 0:
        raise ValueError(
            "--ranks is needed: parallel.dp_shard (0) takes the ranks that other axes leave over"
        )
    return axes.pp * axes.dp_replicate * axes.dp_shard * axes.cp * axes.tp


def compare(case: Case, world: int, seconds: int) -> dict[str, float]:
    """The error of everything, on torchrun's ranks or on ranks of our own."""
    import pickle

    import torch.distributed as dist

    from ossature.parallel.launch import launched
    from ossature.parallel.spawn import preload, run_ranks
    from ossature.train import prove

    if "RANK" not in os.environ:
        true = prove.reference(case.alone())
        preload("ossature.train.prove")
        # As bytes: every tensor among the arguments of a process would be a file of shared memory.
        errors = run_ranks(world, errors_of_rank, case, pickle.dumps(true), seconds=seconds)
        return prove.largest_of_ranks(errors, true)
    with launched(seconds) as ranks:
        true = prove.reference(case.alone(), ranks.device)
        mine = prove.errors(prove.find(case, world, ranks.device), true)
        everyone = [mine] * world
        dist.all_gather_object(everyone, mine)
        return prove.largest_of_ranks(everyone, true)


def errors_of_rank(_rank: int, world: int, case: Case, true: bytes) -> dict[str, float]:
    import pickle

    from ossature.train import prove

    return prove.errors(prove.find(case, world), pickle.loads(true))


def introduction(case: Case, sizes: dict[str, int], changes: list[str]) -> list[str]:
    config, shape = case.config, case.shape
    axes = {**sizes, "ep": config.parallel.ep, "etp": config.parallel.etp}
    layout = " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1)
    switches = [f"recompute {config.recompute}"] if config.recompute != "none" else []
    switches += ["compile"] if config.compile else []
    if config.parallel.pp > 1:
        switches.insert(0, f"schedule {config.parallel.pp_schedule}")
    rows = config.global_batch_tokens // config.data.seq_len
    return [
        ", ".join([layout or "one rank", *switches]),
        f"model: {shape.num_hidden_layers} layers, hidden {shape.hidden_size}, "
        f"{shape.num_attention_heads} heads of {shape.head_dim}, {shape.num_key_value_heads} of "
        f"keys, {shape.num_local_experts} experts of {shape.intermediate_size}, vocabulary "
        f"{shape.vocab_size}, window {shape.sliding_window}; {rows} rows of "
        f"{config.data.seq_len} tokens, {case.micro_rows} a micro-batch",
        *changes,
    ]


class Result(NamedTuple):
    errors: dict[str, float]
    tolerance: float

    @property
    def failed(self) -> list[str]:
        """Names of what is not within the tolerance; NaN never is."""
        return [name for name, error in self.errors.items() if not error <= self.tolerance]

    @property
    def largest_gradient(self) -> tuple[float, str]:
        from ossature.train.prove import infinite

        named = ((infinite(error), name) for name, error in self.errors.items())
        return max((error, name) for error, name in named if name.startswith("gradients "))


def show(result: Result, everything: bool) -> None:
    """A table, what fails first; then the verdict."""
    from rich.console import Console
    from rich.table import Table

    from ossature.train.prove import infinite

    failed = set(result.failed)
    rows: dict[str, tuple[float, str]] = {name: (result.errors[name], name) for name in failed}
    for name, error in result.errors.items():
        if name not in failed:
            kind = name if everything else re.sub(r"\.\d+\.", ".*.", name)
            rows[kind] = max(rows.get(kind, (0.0, name)), (error, name))
    console = Console() if sys.stdout.isatty() else Console(width=132)
    table = Table("what", "relative error", "worst", "verdict", box=None, padding=(0, 2, 0, 0))
    for kind, (error, name) in sorted(
        rows.items(), key=lambda row: (row[0] not in failed, *place(row[0], infinite(row[1][0])))
    ):
        verdict = "[red]FAILS[/red]" if kind in failed else "[green]equal[/green]"
        number = "differs" if error != error else f"{error:.1e}"
        table.add_row(kind, number, "" if name == kind else name.partition(" ")[2], verdict)
    console.print(table)
    error, name = result.largest_gradient
    print(f"largest relative error of a gradient: {error:.1e} ({name.partition(' ')[2]})")
    if failed:
        print(f"NOT PROVED: {len(failed)} of {len(result.errors)} are not within "
              f"{result.tolerance:g}")  # fmt: skip
    else:
        print(f"proved: all {len(result.errors)} are within {result.tolerance:g}")


def place(name: str, error: float) -> tuple[int, float]:
    """In the table: what is not of one parameter first; then gradients, worst first; then more."""
    kinds = ("gradients ", "weights ", "biases ")
    number = next((n for n, kind in enumerate(kinds, 1) if name.startswith(kind)), 0)
    return number, -error if number else 0.0


def write(path: Path, result: Result, case: Case, sizes: dict[str, int]) -> None:
    from ossature.config import to_json

    axes = to_json(case.config.parallel) | sizes
    text = json.dumps(
        {
            "passed": not result.failed,
            "tolerance": result.tolerance,
            "largest_gradient_error": nothing(result.largest_gradient[0]),
            "parallel": axes,
            "errors": {name: nothing(error) for name, error in result.errors.items()},
        },
        indent=1,
    )
    beside = path.with_name(f"{path.name}.partial-{os.getpid()}")
    beside.write_text(f"{text}\n", encoding="utf-8")
    beside.replace(path)


def nothing(error: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return error if error - error == 0 else None

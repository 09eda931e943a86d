"""What a step measured -> metrics.jsonl, TensorBoard, Weights & Biases; only on the first rank.

`metrics.jsonl` has one JSON object a step.  Always there: step, loss (mean cross-entropy of the
counted tokens), grad_norm (before clipping), lr, tokens (processed since step 1, padding
included), counted_tokens (of these, targets with loss), tokens_per_second, seconds (of this step,
without validation, samples and saving), skipped_steps (so far), memory_bytes.  Where it applies:
mfu (only if the device's peak is known), validation_loss, router_loss, loss_scale, `eval` (the
value of every task/metric of eval.tasks), and on logged steps `router`: `load` (layers x experts,
share of the layer's tokens times experts; 1 is balance) and `entropy` (layers; nats).  A value that
is not finite is null.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ossature.config import TrainConfig, to_json
from ossature.eval.results import finite

Record = dict[str, Any]


class MetricsLog:
    """Open files and services of one run.

    Args:
        step: steps that are done; later lines, of a run that was killed, are cut off.
    """

    def __init__(self, config: TrainConfig, step: int) -> None:
        path = config.run / "metrics.jsonl"
        cut_after(path, step)
        self.file = path.open("a", encoding="utf-8")
        self.board = None
        self.wandb = None
        if config.log.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self.board = SummaryWriter(str(config.run / "tensorboard"), purge_step=step + 1)
        if config.log.wandb_project:
            self.wandb = _wandb().init(
                project=config.log.wandb_project,
                dir=str(config.run),
                name=config.log.wandb_name or config.run.name,
                entity=config.log.wandb_entity or None,
                config=to_json(config),
            )

    def write(self, record: Record) -> None:
        self.file.write(json.dumps(finite(record)) + "\n")
        self.file.flush()
        numbers = dict(_numbers(record))
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, record["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def check_services(config: TrainConfig) -> None:
    """Fail before anything is built when a service that is asked for is not installed."""
    if config.log.wandb_project:
        _wandb()


def _wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError:
        raise ValueError(
            "log.wandb_project is set and wandb is not installed: pip install 'ossature[wandb]', "
            "or leave the key empty"
        ) from None


def read_records(path: Path) -> list[Record]:
    """The objects of a JSON lines file, in order; a last line that was cut short is left out."""
    records = []
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for n, line in enumerate(lines):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if n < len(lines) - 1:  # it ends in a line feed: it was written like this
                raise ValueError(f"{path}: line {n + 1} is not JSON") from None
    return records


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, whole or not at all."""
    if not path.exists():
        return
    kept = [record for record in read_records(path) if record["step"] <= step]
    beside = path.with_name(path.name + ".partial")
    beside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    beside.replace(path)


def router_record(counts: list[list[float]], entropy: list[float]) -> Record:
    """Load and entropy of every layer, rounded: a look at balance needs no more digits."""
    load = [[_share(count, layer) for count in layer] for layer in counts]
    return {"load": load, "entropy": [round(value, 4) for value in entropy]}


def _share(count: float, layer: list[float]) -> float:
    return round(count * len(layer) / max(1.0, sum(layer)), 3)


def _numbers(record: Record) -> Iterable[tuple[str, float]]:
    """Scalars for the curves of a board; of the router, the worst load and the mean entropy."""
    for name, value in record.items():
        if name == "router":
            yield "router/largest_load", max(max(layer) for layer in value["load"])
            yield "router/entropy", sum(value["entropy"]) / len(value["entropy"])
        elif name == "eval":
            yield from ((f"eval/{task}", number) for task, number in value.items())
        elif name != "step" and value is not None:
            yield name, value

"""Where a run stands, beside its weights; and whether a config may go on from there."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ossature.config import TrainConfig, to_json

MAY_DIFFER = (
    "run", "steps", "micro_batch_tokens", "recompute", "compile", "deterministic",
    "gc_every_steps", "max_skipped_steps", "timeout_seconds", "resume", "data.path", "data.blend",
    "data.train_blend", "data.validation_blend", "data.test_blend",
    "lora.start", "eval.", "sample.", "checkpoint.", "log.", "parallel.",
)  # fmt: skip
"""Keys that change neither what is computed, up to the order of additions, nor on which data.
`steps` may grow: with optim.decay_steps = 0 that stretches the decay.  A corpus may have moved:
the loader's own state tells whether it is the same one.  lora.start counts at the first step."""

SKIP_WINDOW = 1000


@dataclass
class Progress:
    """Counters of a run.  All of it is in state.json."""

    step: int = 0
    """Optimizer steps that are done, skipped ones included."""
    tokens: int = 0
    counted_tokens: int = 0
    skipped_steps: int = 0
    recent_skips: list[int] = field(default_factory=list)
    """Steps skipped among the last SKIP_WINDOW, but for those that only lowered loss_scale."""
    loss_scale: float = 1.0
    steady_steps: int = 0
    """Steps since loss_scale last changed."""

    def note_skip(self) -> None:
        """The current step was skipped, and not because of the loss scale."""
        self.recent_skips = [s for s in self.recent_skips if s > self.step - SKIP_WINDOW]
        self.recent_skips.append(self.step)


def state_text(progress: Progress, data: dict[str, Any], config: TrainConfig) -> str:
    state = {"progress": asdict(progress), "data": data, "config": to_json(config)}
    return json.dumps(state, indent=1)


def read_state(folder: Path) -> tuple[Progress, dict[str, Any], dict[str, Any]]:
    """Counters, the loader's state and the config (dotted keys) of a checkpoint."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return Progress(**state["progress"]), state["data"], state["config"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the state of a run: {error}") from None


def check_config(before: dict[str, Any], config: TrainConfig, folder: Path) -> None:
    """Raises ValueError naming every key that differs and may not."""
    now = to_json(config)
    differ = [
        f"{key} ({before.get(key)}, now {now.get(key)})"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
        and not any(key == k or (k.endswith(".") and key.startswith(k)) for k in MAY_DIFFER)
        and not (key == "init" and config.lora.rank)  # the base may have moved: `check_base`
    ]
    if differ:
        raise ValueError(
            f"{folder}: cannot go on with other settings: {', '.join(differ)}; "
            "restore them, or give another run folder"
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step are a function of (seed, step, rank), so nothing has to be saved."""
    mixed = (seed * 1_000_003 + step) * 1_000_003 + rank
    torch.manual_seed(mixed % 2**63)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)

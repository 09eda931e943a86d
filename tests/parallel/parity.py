"""Layouts of ranks against one process in tests: many a spawn, by the code of `ossature prove`."""

import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.device_mesh import DeviceMesh

from ossature.config import ParallelConfig, RouterConfig
from ossature.data.loader import Batch
from ossature.model.config import ModelConfig
from ossature.parallel.mesh import data_rank
from ossature.train import prove
from ossature.train.prove import Case, Found, infinite
from tests.ranks import run_ranks
from tests.small_runs import DEEP as DEEP
from tests.small_runs import TINY, small_run

WIDE = replace(TINY, num_attention_heads=12, num_key_value_heads=4)
"""For tp 4: a key head for every rank."""


@dataclass(frozen=True)
class Layout:
    """What a run is, but for its data: axes and switches."""

    axes: dict[str, Any] = field(default_factory=dict)
    shape: ModelConfig = TINY
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the config, as `small_run` takes them."""
    fault: str = ""
    """Planted in the ranks, by the test's own `plant`."""

    def case(self) -> Case:
        """8 rows, 2 a micro-batch; router losses, balancing biases and clipping on."""
        rate = 0.0 if "lora" in self.changes else 0.01  # a bias that is frozen has none
        changes = {
            "global_batch_tokens": 256,
            "micro_batch_tokens": 64,
            "router": RouterConfig(aux_loss=0.3, z_loss=0.1, bias_update_rate=rate),
            "optim__clip": 0.5,
            "optim__lr": 1e-2,
            **self.changes,
        }
        parallel = ParallelConfig(**self.axes)
        return Case(small_run(Path("unused"), parallel=parallel, **changes), self.shape)


def built(layout: Layout, world: int):
    """This rank's part of the model with its mesh, its config and what runs its stages."""
    case = layout.case()
    model, mesh, pipeline = prove.divided(case, world)
    return model, mesh, case.config, pipeline


def mine(layout: Layout, mesh: DeviceMesh) -> list[Batch]:
    """This data rank's micro-batches."""
    return prove.batches(layout.case(), *data_rank(mesh))


def _compare(
    rank: int, world: int, layouts: list[Layout], pickled: bytes, plant
) -> list[dict[str, float]]:
    true: dict[Case, Found] = pickle.loads(pickled)
    results = []
    for layout in layouts:
        case = layout.case()
        with pytest.MonkeyPatch.context() as patch:
            change = plant(layout.fault, patch) if layout.fault else None
            found = prove.find(case, world, change=change)
        results.append(prove.errors(found, true[case.alone()]))
    return results


def worst(
    world: int, layouts: list[Layout], plant=None, seconds: int = 180
) -> list[dict[str, float]]:
    """For each layout, the error of everything, each the largest over the ranks.

    Args:
        plant: (fault, monkeypatch) -> what to do to the finished model, or None.
    """
    cases = [layout.case().alone() for layout in layouts]
    true = {case: prove.reference(case) for case in cases}
    # As bytes: every tensor among the arguments of a process would be a file of shared memory.
    ranks = run_ranks(world, _compare, layouts, pickle.dumps(true), plant, seconds=seconds)
    by_layout = zip(*ranks, strict=True)
    return [
        prove.largest_of_ranks(results, true[case])
        for case, results in zip(cases, by_layout, strict=True)
    ]


def largest(errors: dict[str, float]) -> tuple[float, str]:
    """The largest error with the name of what has it; NaN counts as infinite."""
    return max((infinite(error), name) for name, error in errors.items())

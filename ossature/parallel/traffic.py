"""Bytes that a rank receives from others in a step, axis by axis, by formula.

Of n parts put together a rank receives n - 1; of a sum over n ranks, scattered, as much; of one
that all get, twice that.  What is a number or a vector (norms, counts, biases) is left out.
"""

from __future__ import annotations

from ossature.config import TrainConfig
from ossature.model.config import ModelConfig
from ossature.parallel.activations import halo
from ossature.parallel.shards import Stage
from ossature.parallel.sizes import Bytes, Sizes


def traffic(
    config: TrainConfig,
    shape: ModelConfig,
    axis_sizes: dict[str, int],
    stages: list[Stage],
    micro_batches: int,
    device: str,
) -> dict[str, Bytes]:
    """Of one rank, by axis.

    Args:
        stages: those it has.
    """
    axes, s = config.parallel, Sizes(config, shape, device)
    layers = [layer for stage in stages for layer in stage.layers]
    # A block that is computed again communicates again; its gathered weights are there.
    passes = 3 if config.recompute != "none" else 2
    found: dict[str, Bytes] = {}

    def add(axis: str, ranks: int, size: Bytes) -> None:
        """Of one rank's part of what `ranks` parts make up."""
        if ranks > 1:
            found[axis] = found.get(axis, 0.0) + (ranks - 1) * size

    for stage in stages:
        for group in stage.groups:
            gathers = micro_batches * (1 + group.again) if group.dropped else 1
            reductions = micro_batches if axes.reduce_every_micro_batch else 1
            add("fsdp", group.ranks, group.whole / group.ranks * gathers)
            add("fsdp", group.ranks, group.reduced * reductions)
            copies = axis_sizes["dp_replicate"]
            add("dp_replicate", copies, 2 * group.reduced / copies)
        ends = stage.first + stage.last
        add("tp", axes.tp, 2 * s.x * micro_batches * ends)
        if axes.pp > 1:
            sides = (not stage.first) + (not stage.last)
            found["pp"] = found.get("pp", 0.0) + sides * micro_batches * s.x
    for layer in layers:
        times = micro_batches * passes
        # In every pass attention's input, or its gradient, goes there, and what comes out back.
        add("tp", axes.tp, (s.x + s.taken_x / axes.tp) * (times - micro_batches))
        add("tp", axes.tp, 2 * s.x * micro_batches)
        add("etp", axes.etp, 2 * s.x * times)
        add("ep", axes.ep, 2 * s.row / axes.ep * times)
        if axes.cp > 1 and s.slides(layer):
            found["cp"] = found.get("cp", 0.0) + 2 * s.k * halo(s) * times
        else:
            add("cp", axes.cp, 2 * s.k * times)
    return found

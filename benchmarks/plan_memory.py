"""Peaks that `ossature plan` says, against those that are measured, on gloo ranks of this machine.

None of these layouts was used while the formulas were written.  A measured peak is that of live
tensor bytes over a whole step, of the rank that has most (`ossature.train.peak`).

    python benchmarks/plan_memory.py [FIRST LAST]        rows of the table, from 1
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from ossature.config import DataConfig, ParallelConfig, RouterConfig, TrainConfig
from ossature.model.config import ModelConfig
from ossature.parallel import memory, spawn
from ossature.parallel import mesh as meshes
from ossature.train import optim, peak, setup

NARROW = ModelConfig(
    vocab_size=2560,
    hidden_size=256,
    intermediate_size=224,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    num_local_experts=8,
    num_experts_per_tok=3,
    sliding_window=96,
    eos_token_id=None,
    pad_token_id=None,
)
OTHER = replace(
    NARROW,
    vocab_size=3072,
    hidden_size=224,
    intermediate_size=192,
    num_attention_heads=12,
    head_dim=16,
    num_local_experts=12,
    num_experts_per_tok=4,
    sliding_window=128,
)

K = 1024
# Shape, axes, recompute, precision, tokens a step, a micro-batch and a row, other keys.
LAYOUTS: list[tuple[ModelConfig, dict, str, str, int, int, int, dict]] = [
    (NARROW, {"dp_shard": 4}, "none", "fp32", 4 * K, K, 512, {}),
    (NARROW, {"dp_replicate": 2, "dp_shard": 2}, "selective", "bf16", 8 * K, K, 512, {}),
    (NARROW, {"dp_shard": 2, "tp": 2, "ep": 2}, "none", "fp32", 4 * K, 2 * K, 512, {}),
    (NARROW, {"pp": 2, "tp": 2}, "none", "bf16", 4 * K, K, 512, {}),
    (NARROW, {"dp_shard": 2, "cp": 2, "etp": 2}, "full", "fp32", 8 * K, 2 * K, K, {}),
    (
        NARROW, {"pp": 2, "dp_shard": 2, "pp_schedule": "Interleaved1F1B"}, "full", "bf16",
        8 * K, K, 512, {},
    ),
    (NARROW, {"pp": 2, "cp": 2, "pp_schedule": "ZBVZeroBubble"}, "none", "fp32", 4 * K, K, 512, {}),
    (
        NARROW, {"dp_replicate": 2, "dp_shard": 2, "ep": 2}, "selective", "bf16",
        8 * K, 2 * K, 512, {"router": RouterConfig(aux_loss=0.01)},
    ),
    (OTHER, {"dp_shard": 4}, "full", "bf16", 8 * K, K, 512, {}),
    (OTHER, {"dp_replicate": 2, "dp_shard": 2}, "none", "fp32", 4 * K, K, 512, {}),
    (OTHER, {"dp_shard": 2, "tp": 2, "ep": 2}, "selective", "bf16", 8 * K, 2 * K, 512, {}),
    (OTHER, {"pp": 2, "dp_shard": 2, "ep": 2}, "none", "fp32", 8 * K, K, 512, {}),
    (OTHER, {"cp": 2, "tp": 2}, "none", "bf16", 4 * K, 4 * K, K, {}),
    (
        OTHER, {"pp": 2, "tp": 2, "pp_schedule": "Interleaved1F1B"}, "full", "bf16",
        4 * K, K, 512, {},
    ),
    (
        OTHER, {"pp": 2, "dp_shard": 2, "pp_schedule": "DualPipeV"}, "none", "bf16",
        8 * K, K, 512, {},
    ),
    (
        OTHER, {"dp_shard": 2, "cp": 2, "ep": 4, "prefetch_blocks": 1}, "full", "fp32",
        8 * K, 4 * K, 512, {},
    ),
]  # fmt: skip
WORLD = 4


def config_of(number: int) -> tuple[TrainConfig, ModelConfig]:
    shape, axes, recompute, precision, step, micro, row, others = LAYOUTS[number]
    config = TrainConfig(
        run=Path("unused"),
        global_batch_tokens=step,
        micro_batch_tokens=micro,
        recompute=recompute,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        data=DataConfig(mock=True, seq_len=row),
        parallel=ParallelConfig(**axes),
        **others,
    )
    return config, shape


def measured(_rank: int, world: int, number: int) -> int:
    config, shape = config_of(number)
    return peak.measure(config, shape, world)


def planned(number: int) -> float:
    config, shape = config_of(number)
    sizes = meshes.sizes(config.parallel, WORLD)
    found = memory.walks(
        setup.whole_model(config, shape), config, sizes, "cpu",
        lambda n, p: optim.state_bytes(config.optim, n, p),
    )  # fmt: skip
    return max(walk.use().peak for walk in found)


def main() -> None:
    first, last = map(int, sys.argv[1:]) if sys.argv[1:] else (1, len(LAYOUTS))
    spawn.preload("ossature.train.peak")
    print("| layout on 4 ranks | recompute | | micro-batches | plan, MB | measured, MB | error |")
    print("|---|---|---|---|---|---|---|")
    for number in range(first - 1, last):
        _, axes, recompute, precision, step, micro, row, others = LAYOUTS[number]
        most = max(spawn.run_ranks(WORLD, measured, number, seconds=170))
        plan = planned(number)
        data = axes.get("dp_replicate", 1) * axes.get("dp_shard", 1)
        words = [f"{key} {value}" for key, value in {**axes, **others}.items() if key != "router"]
        words += ["router loss"] if "router" in others else []
        print(
            f"| {', '.join(words)} | {recompute} | {precision} | {step // micro // data} x "
            f"{micro // row} rows of {row} | {plan / 1e6:.1f} | {most / 1e6:.1f} | "
            f"{100 * (plan / most - 1):+.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()

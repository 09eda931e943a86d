"""Adapters under every axis of parallelism against one process, on plain and packed bases."""

from dataclasses import replace

import pytest
import torch

from ossature.config import LORA_TARGETS, LoraConfig
from ossature.parallel import expert, tensor
from ossature.parallel.gradients import local
from tests.parallel import parity
from tests.parallel.parity import DEEP, TINY, Layout
from tests.parallel.test_expert import change_gradients
from tests.parallel.test_tensor import check

DORA = LoraConfig(rank=6, alpha=9.0, dora=True, targets=LORA_TARGETS)
PACKED = replace(DORA, base="mxfp4")
LORA = LoraConfig(rank=6, alpha=9.0, base="mxfp4")
BROAD = replace(TINY, intermediate_size=128)
"""Halves of the experts are still groups of 32."""


def layout(axes: dict, lora: LoraConfig, shape=TINY, **changes) -> Layout:
    return Layout(axes, shape, {"lora": lora, **changes})


def test_two_ranks_with_adapters_find_what_one_process_finds():
    check(
        2,
        [
            layout({"dp_shard": 2}, PACKED),
            layout({"dp_replicate": 2}, LORA),
            layout({"ep": 2}, DORA, recompute="selective"),
            layout({"ep": 2}, PACKED),
            layout({"etp": 2}, DORA),
            layout({"etp": 2}, PACKED, BROAD),
            layout({"tp": 2}, PACKED),
            layout({"tp": 2, "ep": 2}, DORA, recompute="full"),
            layout({"cp": 2}, PACKED),
            layout({"pp": 2}, PACKED),
            layout({"pp": 2, "pp_schedule": "ZBVZeroBubble"}, DORA, DEEP),
        ],
    )


@pytest.mark.slow
def test_four_ranks_with_adapters_find_what_one_process_finds():
    check(
        4,
        [
            layout({"dp_shard": 2, "tp": 2}, PACKED),
            layout({"dp_shard": 4, "ep": 2}, PACKED, recompute="selective"),
            layout({"dp_shard": 2, "tp": 2, "ep": 2, "etp": 2}, PACKED, BROAD),
            layout({"dp_replicate": 2, "ep": 2}, DORA),
            layout({"cp": 2, "tp": 2, "ep": 2}, PACKED),
            layout({"cp": 2, "ep": 4}, LORA),
            layout({"cp": 2, "etp": 2}, PACKED, BROAD),
            layout({"pp": 2, "tp": 2}, PACKED, DEEP),
            layout({"pp": 2, "dp_shard": 2, "ep": 2}, PACKED, DEEP),
            layout({"pp": 2, "cp": 2}, DORA, DEEP),
            layout({"pp": 2, "etp": 2}, DORA, DEEP),
            layout({"tp": 2, "dp_replicate": 2}, DORA, replace(TINY, vocab_size=97)),
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", LORA_TARGETS)
def test_each_target_alone_finds_on_two_ranks_what_one_process_finds(target):
    """Groups of FSDP without anything to train among them."""
    lora = replace(PACKED, targets=(target,))
    layouts = [layout({axis: 2}, lora) for axis in ("dp_shard", "tp", "ep")]
    check(2, layouts + [layout({"pp": 2}, lora)] * (target not in ("embedding", "lm_head")))


BLOCK = "gradients blocks.0."
FAULTS = {
    "gradients of A of q not added up over tp": ({"tp": 2}, f"{BLOCK}attention.q_proj.lora_a"),
    "gradients of B of o not added up over tp": ({"tp": 2}, f"{BLOCK}attention.o_proj.lora_b"),
    "norms of o of a rank's own columns": ({"tp": 2}, f"{BLOCK}attention.o_proj.lora_a"),
    "gradients of A of gate_up not added up over etp": (
        {"etp": 2},
        f"{BLOCK}moe.experts.gate_up_lora_a",
    ),
    "norms of down of a rank's own columns": ({"etp": 2}, f"{BLOCK}moe.experts.down_lora_b"),
    "one adapter for all experts of a rank": ({"ep": 2}, f"{BLOCK}moe.experts.down_lora_b"),
    "bytes of a pair exchanged": ({"dp_shard": 2}, f"{BLOCK}moe.experts.gate_up_lora_b"),
}


def plant(fault: str, patch: pytest.MonkeyPatch):
    if fault.startswith("gradients"):
        module = tensor if fault.endswith("over tp") else expert
        patch.setattr(module, "summed", lambda _group: lambda weight: weight)
    elif fault == "norms of o of a rank's own columns":
        patch.setattr(tensor, "sum_ranks", lambda squares, group: squares)
    elif fault == "norms of down of a rank's own columns":
        patch.setattr(expert, "sum_ranks", lambda squares, group: squares)
    elif fault == "one adapter for all experts of a rank":
        return lambda model: change_gradients(model, lambda g: g.mean(0, keepdim=True).expand_as(g))
    else:
        assert fault == "bytes of a pair exchanged"

        def exchange(model):
            for name, parameter in model.named_parameters():
                if name.endswith("scales"):
                    part = local(parameter.detach()).view(torch.uint8).unflatten(-1, (-1, 2))
                    part.copy_(part.flip(-1))

        return exchange
    return None


def test_the_comparison_sees_planted_faults():
    layouts = [
        replace(layout(axes, PACKED, BROAD), fault=fault) for fault, (axes, _) in FAULTS.items()
    ]
    for planted, errors in zip(layouts, parity.worst(2, layouts, plant), strict=True):
        _, broken = FAULTS[planted.fault]
        assert errors[broken] > 1e-3, planted.fault

"""Faults that were shipped somewhere, planted in the ranks: `ossature prove` must fail on each.

The numbers before the colon are those of a collection of bugs in stacks for gpt-oss: PAR of
parallelism and gradients, ATT of attention, DATA of packing.  Bugs that only cost time and show in
no number or count are tested elsewhere, and docs/parallelism.md says where.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from ossature.model.config import ModelConfig
from ossature.model.moe import Experts, Router
from ossature.model.transformer import Transformer
from ossature.parallel import collectives, context, exchange, fsdp, pipeline, recompute
from ossature.train import step as steps
from ossature.train.prove_command import Result
from tests.parallel import parity, test_context, test_expert, test_pipeline, test_tensor
from tests.parallel.parity import DEEP, TINY, Layout

TP, EP, ETP, CP, FSDP = ({axis: 2} for axis in ("tp", "ep", "etp", "cp", "dp_shard"))
PP = {"pp": 2}
ZBV = {"pp": 2, "pp_schedule": "ZBVZeroBubble"}


@dataclass(frozen=True)
class Fault:
    axes: dict[str, Any]
    """On which it shows."""
    recompute: str = "none"
    shape: ModelConfig = TINY


FAULTS = {
    "PAR-1: the down bias added by every rank of etp": Fault(ETP),
    "PAR-1: the bias of o_proj added by every rank": Fault(TP),
    "PAR-1: the down bias times the ranks of tp": Fault(TP),
    "PAR-2: gradients below the experts not added up": Fault(ETP),
    "PAR-2: a rank's own gradient of the whole sequence": Fault(TP),
    "PAR-2: gradients of the norms not added up": Fault(TP),
    "PAR-3: a norm of a rank's own shards": Fault(TP),
    "PAR-3: a norm over the dense weights' ranks alone": Fault(EP),
    "PAR-4: experts on tp reduced with the dense weights": Fault(TP),
    "PAR-5: one update for all experts of a rank": Fault(EP),
    "PAR-6: gradients reduced in bf16": Fault(FSDP),
    "PAR-7: the divisor of gradients set once more": Fault(FSDP),
    "PAR-10: experts computed again by selective recomputation": Fault(EP, "selective"),
    "PAR-10: a block computed again for each of its weights": Fault(ZBV, "full", DEEP),
    "PAR-11: other experts chosen when the block runs again": Fault(FSDP, "full"),
    "PAR-13: gradients reduced for every micro-batch": Fault(FSDP),
    "PAR-14: the ranks' number of heads written into the config": Fault(TP),
    "ATT-5: no sinks": Fault(CP),
    "ATT-6, DATA-3: documents see each other": Fault(CP),
    "ATT-18: keys in the order of the ranks": Fault(CP),
    "ATT-18: a halo one token short": Fault(CP),
    "sinks of the wrong heads": Fault(TP),
    "expert gradients averaged": Fault(EP),
    "rows sent back in another order": Fault(EP),
    "statistics of all tokens on every rank": Fault(TP),
    "the loss is not passed on": Fault(PP, shape=DEEP),
    "router losses of the last stage alone": Fault(PP, shape=DEEP),
}

FAST = [
    "PAR-1: the down bias times the ranks of tp",
    "PAR-6: gradients reduced in bf16",
    "PAR-10: a block computed again for each of its weights",
    "PAR-11: other experts chosen when the block runs again",
    "PAR-13: gradients reduced for every micro-batch",
    "ATT-6, DATA-3: documents see each other",
    "ATT-18: keys in the order of the ranks",
]
if not pipeline.SPLITS_BACKWARD:  # before torch 2.13 it ends in an error, which nobody could ship
    del FAULTS[FAST.pop(2)]


def plant(fault: str, patch: pytest.MonkeyPatch):
    name = fault.partition(": ")[2] or fault
    if name in test_tensor.FAULTS:
        return test_tensor.plant(name, patch)
    if name in test_expert.FAULTS:
        return test_expert.plant(name, patch)
    if name in ("no sinks", "a halo one token short"):
        return test_context._plant(name, patch)
    if name == "the loss is not passed on":
        return test_pipeline._plant(name, patch)
    return OTHERS[name](patch)


def times_tp(_patch: pytest.MonkeyPatch):
    def before(experts: Experts, _args: tuple) -> None:
        vars(experts)["down_bias"] = 2 * experts.down_bias  # hides the parameter

    def after(experts: Experts, *_: Any) -> None:
        del vars(experts)["down_bias"]

    def change(model: Transformer) -> None:
        for module in model.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(before)
                module.register_forward_hook(after, always_call=True)

    return change


def in_bf16(patch: pytest.MonkeyPatch) -> None:
    def policy(**kwargs) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(**{**kwargs, "reduce_dtype": torch.bfloat16})

    patch.setattr(fsdp, "MixedPrecisionPolicy", policy)


def divided_again(_patch: pytest.MonkeyPatch):
    def change(model: Transformer) -> None:
        for module in fsdp.sharded(model):
            module.set_gradient_divide_factor(2.0)

    return change


def not_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recompute, "KEPT", tuple(k for k in recompute.KEPT if "experts" not in k))


def in_two_halves(patch: pytest.MonkeyPatch) -> None:
    stage = pipeline.PipelineStage
    patch.setattr(
        pipeline, "PipelineStage", lambda *args, dw_builder, **kwargs: stage(*args, **kwargs)
    )


def chosen_anew(patch: pytest.MonkeyPatch) -> None:
    select = Router.select

    def other(self: Router, logits: Tensor) -> Tensor:
        again = torch._C._current_graph_task_id() != -1  # inside of a backward pass
        return select(self, -logits if again else logits)

    patch.setattr(Router, "select", other)


def every_time(patch: pytest.MonkeyPatch) -> None:
    now = steps.reduce_gradients_now
    patch.setattr(steps, "reduce_gradients_now", lambda model, _last, axes: now(model, True, axes))


def fewer_heads(_patch: pytest.MonkeyPatch):
    def change(model: Transformer) -> None:
        heads = model.config.num_attention_heads
        model.config = replace(model.config, num_attention_heads=heads // 2, num_key_value_heads=1)

    return change


def one_document(patch: pytest.MonkeyPatch) -> None:
    layout = context.Context.layout
    patch.setattr(
        context.Context, "layout", lambda self, document: layout(self, document.clamp(max=0))
    )


def unordered(patch: pytest.MonkeyPatch) -> None:
    def gathered(x: Tensor, split: exchange.Split, group: collectives.Group) -> Tensor:
        return collectives.gather(x, 1, group)

    patch.setattr(context, "gather_row", gathered)


def only_the_last(patch: pytest.MonkeyPatch) -> None:
    """Statistics do not travel: each stage starts anew."""
    pack = pipeline.Stage.forward

    def forward(self, x: Tensor, sums: Tensor | None = None, **inputs):
        return pack(self, x, None if sums is None else sums * 0, **inputs)

    patch.setattr(pipeline.Stage, "forward", forward)


OTHERS = {
    "a block computed again for each of its weights": in_two_halves,
    "the down bias times the ranks of tp": times_tp,
    "gradients reduced in bf16": in_bf16,
    "the divisor of gradients set once more": divided_again,
    "experts computed again by selective recomputation": not_kept,
    "other experts chosen when the block runs again": chosen_anew,
    "gradients reduced for every micro-batch": every_time,
    "the ranks' number of heads written into the config": fewer_heads,
    "documents see each other": one_document,
    "keys in the order of the ranks": unordered,
    "router losses of the last stage alone": only_the_last,
}


def verdicts(faults: list[str]) -> dict[str, list[str]]:
    """What the verdict finds wrong with each, by name of the fault."""
    layouts = [
        Layout(
            FAULTS[fault].axes, FAULTS[fault].shape, {"recompute": FAULTS[fault].recompute}, fault
        )
        for fault in faults
    ]
    found = parity.worst(2, layouts, plant)
    return {f: Result(errors, 1e-4).failed for f, errors in zip(faults, found, strict=True)}


def test_faults_that_were_shipped_are_seen():
    assert [fault for fault, wrong in verdicts(FAST).items() if not wrong] == []


@pytest.mark.slow
def test_every_fault_is_seen():
    for fault, wrong in verdicts(list(FAULTS)).items():
        print(f"{fault}: {len(wrong)} wrong, {wrong[:1]}")
        assert wrong, fault


def test_where_no_fault_is_planted_nothing_is_wrong():
    """The verdict of the same layouts, so that it is the faults that are seen above."""
    axes = {str(fault): fault for fault in FAULTS.values()}.values()
    layouts = [Layout(f.axes, f.shape, {"recompute": f.recompute}) for f in axes]
    for layout, errors in zip(layouts, parity.worst(2, layouts), strict=True):
        assert Result(errors, 1e-4).failed == [], layout

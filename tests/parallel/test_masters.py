"""One rank without FSDP, against FSDP on one rank: the same bits."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from ossature.config import RouterConfig
from ossature.model.transformer import Transformer
from ossature.parallel import fsdp, plan, weights
from ossature.parallel import mesh as meshes
from ossature.parallel.masters import MastersModule
from ossature.train import step as steps
from tests.ranks import run_ranks
from tests.small_runs import TINY, part, ragged_batch, small_run


def _two_steps(_rank: int, world: int, precision: str, recompute: str, without: bool) -> list:
    """Gradients of two micro-batches, and again after the weights have changed."""
    config = small_run(Path("unused"), precision=precision, recompute=recompute)
    mesh = meshes.build(meshes.sizes(config.parallel, world), "cpu")
    with torch.device("meta"):
        model = Transformer(TINY)
    model.norm.weight.requires_grad_(False)
    if without:
        plan.parallelize(model, mesh, config)
    else:
        for block in model.blocks.values():
            plan.recompute(block, recompute)
        fsdp.shard(model, mesh, config)
    assert isinstance(model, MastersModule) is without
    model.to_empty(device="cpu")
    weights.initialise(model, seed=5)
    batch = ragged_batch(4)
    batches = [part(batch, 0, 2), part(batch, 2, 4)]
    masters, found = dict(model.named_parameters()), []
    for _ in range(2):
        sums = steps.accumulate(model, batches, 100, mesh, RouterConfig(), log_router=False)
        assert all(a is b for a, b in zip(masters.values(), model.parameters(), strict=True))
        found.append(sums.loss.item())
        for name, master in masters.items():
            assert master.dtype == torch.float32
            if master.grad is None:
                assert name == "norm.weight"
                continue
            gradient = _local(master.grad)
            found.append((name, gradient.dtype, gradient.clone().numpy()))
            with torch.no_grad():
                _local(master).sub_(gradient)
            master.grad = None

    return found


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(
    ("precision", "recompute"), [("bf16", "none"), ("bf16", "full"), ("fp32", "none")]
)
def test_one_rank_without_fsdp_has_its_gradients_to_the_bit(precision, recompute):
    (ours,) = run_ranks(1, _two_steps, precision, recompute, True)
    (theirs,) = run_ranks(1, _two_steps, precision, recompute, False)
    assert len(ours) == len(theirs) > 40
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, float):
            assert mine == other
        else:
            assert mine[:2] == other[:2]
            assert (mine[2] == other[2]).all(), mine[0]


def _copies(_rank: int, world: int, precision: str) -> list[tuple]:
    config = small_run(Path("unused"), precision=precision)
    mesh = meshes.build(meshes.sizes(config.parallel, world), "cpu")
    model = Transformer(TINY)
    model.lm_head.requires_grad_(False)
    plan.parallelize(model, mesh, config)
    head = model.lm_head.weight
    with torch.no_grad():
        if precision == "bf16":
            model.lm_head.bfloat16()
        model(ragged_batch(2).tokens)
    assert isinstance(model, MastersModule)
    assert model.lm_head.weight.data_ptr() == head.data_ptr()
    return [(name, copy.dtype) for _module, name, _master, copy in model.copied]


def test_what_is_in_the_compute_dtype_or_frozen_is_not_copied():
    ((fp32,), (bf16,)) = (run_ranks(1, _copies, "fp32"), run_ranks(1, _copies, "bf16"))
    assert fp32 == []
    assert len(bf16) == len(list(Transformer(TINY).parameters())) - 1
    assert {dtype for _, dtype in bf16} == {torch.bfloat16}

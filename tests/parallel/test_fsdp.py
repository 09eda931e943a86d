"""Shards against one process: same weights, same loss, same gradient of every parameter."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ossature.config import ParallelConfig, RouterConfig
from ossature.model.transformer import Transformer
from ossature.parallel import fsdp, plan, weights
from ossature.parallel import mesh as meshes
from ossature.parallel.gradients import global_norm, scale_and_clip
from ossature.train import step as steps
from ossature.train.loss import language_model_loss
from tests.ranks import run_ranks
from tests.small_runs import TINY, part, ragged_batch, small_run

ROWS = 8
NO_ROUTER_LOSS = RouterConfig()


def sharded_model(world: int, precision: str = "fp32", **axes: int):
    config = small_run(Path("unused"), precision=precision, parallel=ParallelConfig(**axes))
    mesh = meshes.build(meshes.sizes(config.parallel, world), "cpu")
    with torch.device("meta"):
        model = Transformer(TINY)
    plan.parallelize(model, mesh, config)
    model.to_empty(device="cpu")
    weights.initialise(model, seed=5)
    return model, mesh


def my_micro_batches(mesh, micro: int) -> list:
    """This rank's rows of one global batch, in micro-batches."""
    rank, world = meshes.data_rank(mesh)
    batch, stride = ragged_batch(ROWS), micro * world
    starts = range(rank * micro, ROWS, stride)
    return [part(batch, start, start + micro) for start in starts]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reference() -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one process on the whole batch, through the public loss."""
    model = Transformer(TINY)
    model.init_weights(5)
    tokens, position, document, mask = ragged_batch(ROWS)
    loss = language_model_loss(model, tokens, mask, position=position, document=document)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def _gradients(rank: int, world: int, axes: dict, micro: int, fault: str = "") -> tuple:
    model, mesh = sharded_model(world, **axes)
    if fault == "mean over ranks":
        for module in fsdp.sharded(model):
            module.set_gradient_divide_factor(float(world))
    batches = my_micro_batches(mesh, micro)
    counted = steps.count(batches, False, mesh).tokens
    if fault == "mean of means":
        counted = sum(int((steps.targets(b) >= 0).sum()) for b in batches) * world
    sums = steps.accumulate(model, batches, counted, mesh, NO_ROUTER_LOSS)
    norm = global_norm(model.parameters())
    scale_and_clip(model.parameters(), norm, clip=0.5, scale=1.0)
    clipped = {name: whole(p.grad).numpy() for name, p in model.named_parameters()}
    return sums.loss.item(), norm.item(), sums.counts.tolist(), clipped


LAYOUTS = [
    (1, {}, 8),
    (2, {"dp_shard": 2}, 1),
    (2, {"dp_replicate": 2, "dp_shard": 1}, 2),
]


def worst_error(result, expected) -> float:
    """The largest relative error over loss, norm and every parameter's clipped gradient."""
    loss, norm, _counts, clipped = result
    true_loss, gradients = expected
    true_norm = torch.stack([g.double().norm() for g in gradients.values()]).norm().item()
    errors = [abs(loss - true_loss) / true_loss, abs(norm - true_norm) / true_norm]
    assert true_norm > 0.5  # so that it clips
    for name, gradient in gradients.items():
        truth = gradient * (0.5 / true_norm)
        error = (torch.from_numpy(clipped[name]) - truth).norm() / truth.norm().clamp(min=1e-9)
        errors.append(error.item())
    return max(errors)


@pytest.mark.parametrize(("world", "axes", "micro"), LAYOUTS)
def test_loss_norm_and_every_gradient_equal_one_process(world, axes, micro):
    """With ragged masks, whatever the split into ranks and micro-batches."""
    expected = reference()
    results = run_ranks(world, _gradients, axes, micro)
    for result in results:
        assert worst_error(result, expected) < 2e-5
        assert result[2] == results[0][2]


@pytest.mark.parametrize(
    ("world", "axes", "micro"),
    [(4, {}, 2), (4, {"dp_replicate": 2}, 1), (4, {"dp_replicate": 4}, 2), (8, {}, 1)],
)
def test_more_ranks_equal_one_process(world, axes, micro):
    expected = reference()
    for result in run_ranks(world, _gradients, axes, micro):
        assert worst_error(result, expected) < 2e-5


@pytest.mark.parametrize("fault", ["mean over ranks", "mean of means"])
def test_the_comparison_sees_a_wrong_divisor(fault):
    result = run_ranks(2, _gradients, {"dp_shard": 2}, 1, fault)[0]
    assert worst_error(result, reference()) > 1e-2


def _weights(rank: int, world: int) -> dict:
    model, _mesh = sharded_model(world)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return {name: whole(p.detach()).numpy() for name, p in model.named_parameters()}


def test_initial_weights_do_not_depend_on_the_number_of_ranks():
    alone = Transformer(TINY)
    alone.init_weights(5)
    for weights_of in run_ranks(3, _weights):
        for name, parameter in alone.named_parameters():
            assert torch.equal(torch.from_numpy(weights_of[name]), parameter), name


class Communication(TorchDispatchMode):
    """Names of the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.dtypes: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = str(op)
        if "c10d" in name:
            self.calls.append(name)
            for arg in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(arg, torch.Tensor):
                    self.dtypes.add((name, arg.dtype))
        return op(*args, **(kwargs or {}))


def _reductions(rank: int, world: int, micro: int) -> list[str]:
    model, mesh = sharded_model(world)
    batches = my_micro_batches(mesh, micro)
    with Communication() as seen:
        steps.accumulate(model, batches, 10, mesh, NO_ROUTER_LOSS, log_router=False)
    return [name for name in seen.calls if "reduce" in name]


def test_gradients_are_reduced_once_a_step_however_many_micro_batches():
    one, four = (run_ranks(2, _reductions, micro)[0] for micro in (4, 1))
    assert len(one) == len(four)
    assert len(one) == TINY.num_hidden_layers + 2  # the blocks, the root, and the loss


def _dtypes(rank: int, world: int) -> dict[str, set]:
    model, mesh = sharded_model(world, "bf16")
    with Communication() as seen:
        steps.accumulate(model, my_micro_batches(mesh, 4), 10, mesh, NO_ROUTER_LOSS)
    return {
        "gathered": {d for name, d in seen.dtypes if "allgather" in name},
        "reduced": {d for name, d in seen.dtypes if "reduce" in name},
        "kept": {p.grad.dtype for p in model.parameters()} | {p.dtype for p in model.parameters()},
    }


def test_bf16_computes_in_bf16_and_reduces_and_keeps_in_fp32():
    (seen, _) = run_ranks(2, _dtypes)
    assert seen["reduced"] == {torch.float32}
    assert seen["kept"] == {torch.float32}
    # FSDP gathers bytes; that they are those of bf16 numbers shows in what the blocks compute.
    assert torch.float32 not in seen["gathered"]


def _rotation_dtype(rank: int, world: int) -> set:
    model, mesh = sharded_model(world, "bf16")
    seen = set()

    def note(_module, args):
        seen.update((type(x).__name__, t.dtype) for x in args[1:2] for t in x)
        seen.add(("x", args[0].dtype))

    model.blocks["0"].register_forward_pre_hook(note)
    steps.accumulate(model, my_micro_batches(mesh, 8)[:1], 10, mesh, NO_ROUTER_LOSS)
    return {f"{name} {dtype}" for name, dtype in seen}


def test_the_angles_of_rope_stay_fp32_in_bf16():
    (seen,) = run_ranks(1, _rotation_dtype)
    assert seen == {"x torch.bfloat16", "Rotation torch.float32"}


def test_the_config_of_the_model_is_untouched_by_parallelize():
    (same, _) = run_ranks(2, _config_after)
    assert same


def _config_after(rank: int, world: int) -> bool:
    return sharded_model(world)[0].config == TINY

"""A layout of ranks against one process: loss, counts, every gradient, weights after two steps.

The weights are random where training starts from zeros: sinks, biases and norms too.  Rows are
packed from unequal documents, their loss masks are ragged, and router losses are on.
"""

import logging
import pickle
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from ossature.config import ParallelConfig, RouterConfig, TrainConfig
from ossature.model.config import ModelConfig
from ossature.model.moe import RouterLog
from ossature.model.transformer import Transformer
from ossature.parallel import mesh as meshes
from ossature.parallel import plan, weights
from ossature.parallel.gradients import global_norm, scale_and_clip
from ossature.train import optim
from ossature.train import step as steps
from ossature.train.loss import router_loss
from tests.ranks import run_ranks
from tests.small_runs import TINY, part, ragged_batch, small_run

# full_tensor gathers shards of shards in two steps and says so.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

ROWS, MICRO = 8, 2
ROUTER = RouterConfig(aux_loss=0.3, z_loss=0.1)
CLIP = 0.5
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

    def config(self) -> TrainConfig:
        changes = {"router": ROUTER, "optim__clip": CLIP, "optim__lr": 1e-2, **self.changes}
        return small_run(Path("unused"), parallel=ParallelConfig(**self.axes), **changes)


@dataclass
class Found:
    """What one rank knows at the end, all of it global."""

    numbers: dict[str, float]
    counts: torch.Tensor
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    """After two steps of AdamW with clipping."""


@cache
def drawn(shape: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights of a model, none of them zero or one."""
    model = Transformer(shape)
    model.init_weights(5)
    g = torch.Generator().manual_seed(7)
    noise = {name: torch.randn(p.shape, generator=g) for name, p in model.named_parameters()}
    return {
        name: p.detach() + (0.3 if p.dim() == 1 or "bias" in name else 0.0) * noise[name]
        for name, p in model.named_parameters()
    }


def batches(rank: int, world: int, vocab: int) -> list:
    """This data rank's micro-batches of one global batch."""
    batch = ragged_batch(ROWS, vocab=vocab)
    starts = range(rank * MICRO, ROWS, MICRO * world)
    return [part(batch, start, start + MICRO) for start in starts]


@cache
def reference(shape: ModelConfig) -> Found:
    """One process, no mesh: the model, its public loss and AdamW, written out."""
    model = Transformer(shape)
    model.load_state_dict(drawn(shape))
    config = Layout(shape=shape).config()
    optimizer = torch.optim.AdamW(optim.build(model.named_parameters(), config.optim).param_groups)
    mine = batches(0, 1, shape.vocab_size)
    counted = sum(int((steps.targets(b) >= 0).sum()) for b in mine)
    for step in range(2):
        loss, extra, counts = 0.0, 0.0, 0
        for batch in mine:
            log = RouterLog()
            total = model(
                batch.tokens,
                position=batch.position,
                document=batch.document,
                targets=steps.targets(batch),
                router_log=log,
            )
            added = router_loss(
                log,
                aux_loss=ROUTER.aux_loss,
                z_loss=ROUTER.z_loss,
                num_experts_per_tok=shape.num_experts_per_tok,
            )
            (total / counted + added / len(mine)).backward()
            loss, extra = loss + total.item() / counted, extra + added.item() / len(mine)
            counts = counts + torch.stack([layer.counts for layer in log.layers])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf).item()
        if step == 0:
            numbers = {"loss": loss, "router_loss": extra, "norm": norm}
            found = Found(
                numbers, counts, {n: p.grad.clone() for n, p in model.named_parameters()}, {}
            )
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    found.weights = {name: p.detach() for name, p in model.named_parameters()}
    return found


def built(layout: Layout, world: int):
    """This rank's part of the model with its mesh, filled with `drawn`."""
    config = layout.config()
    sizes = meshes.sizes(config.parallel, world)
    meshes.check_model(config.parallel, layout.shape, config.data.seq_len)
    mesh = meshes.build(sizes, "cpu")
    with torch.device("meta"):
        model = Transformer(layout.shape)
    pipeline = plan.parallelize(model, mesh, config)
    model.to_empty(device="cpu")
    weights.fill(model, drawn(layout.shape).__getitem__)
    return model, mesh, config, pipeline


def find(layout: Layout, world: int, damage=None) -> Found:
    """The same through the parallel code, on this rank."""
    model, mesh, config, pipeline = built(layout, world)
    if damage is not None:
        damage(model)
    mine = batches(*meshes.data_rank(mesh), layout.shape.vocab_size)
    parameters = dict(model.named_parameters())
    optimizer = optim.build(parameters.items(), config.optim)
    counted = steps.count(mine, False, mesh).tokens
    for step in range(2):
        sums = steps.accumulate(model, mine, counted, mesh, config.router, pipeline=pipeline)
        norm = global_norm(parameters.values(), mesh)
        if step == 0:
            numbers = {
                "loss": sums.loss.item(),
                "router_loss": sums.router_loss.item(),
                "norm": norm.item(),
            }
            gradients = {name: whole(p.grad).clone() for name, p in parameters.items()}
            found = Found(numbers, sums.counts.long(), gradients, {})
        scale_and_clip(parameters.values(), norm, CLIP, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found.weights = {name: whole(p.detach()).clone() for name, p in parameters.items()}
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, by the places its parts say they have."""
    if not isinstance(tensor, DTensor):
        return tensor
    part, mesh = tensor.to_local(), tensor.device_mesh
    return tensor.full_tensor() if mesh.size() > 1 else part


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    return ((found - true).norm() / true.norm().clamp(min=1e-9)).item()


def errors(found: Found, true: Found) -> dict[str, float]:
    """Relative error of everything; NaN where names or counts differ."""
    out = {name: abs(found.numbers[name] - x) / abs(x) for name, x in true.numbers.items()}
    out["counts"] = 0.0 if torch.equal(found.counts, true.counts) else torch.nan
    for kind in ("gradients", "weights"):
        mine, theirs = getattr(found, kind), getattr(true, kind)
        # A pipeline's ranks name some; a name that no rank has is missed in `worst`.
        out[f"names of {kind}"] = 0.0 if mine.keys() <= theirs.keys() else torch.nan
        out |= {f"{kind} {n}": relative(mine[n], theirs[n]) for n in mine.keys() & theirs.keys()}
    return out


def _compare(
    rank: int, world: int, layouts: list[Layout], pickled: bytes, plant
) -> list[dict[str, float]]:
    true: dict[ModelConfig, Found] = pickle.loads(pickled)
    results = []
    for layout in layouts:
        with pytest.MonkeyPatch.context() as patch:
            damage = plant(layout.fault, patch) if layout.fault else None
            results.append(errors(find(layout, world, damage), true[layout.shape]))
    return results


def worst(world: int, layouts: list[Layout], plant=None) -> list[dict[str, float]]:
    """For each layout, the error of everything, each the largest over the ranks.

    Args:
        plant: (fault, monkeypatch) -> what to do to the finished model, or None.
    """
    true = {layout.shape: reference(layout.shape) for layout in layouts}
    # As bytes: every tensor among the arguments of a process would be a file of shared memory.
    ranks = run_ranks(world, _compare, layouts, pickle.dumps(true), plant, seconds=180)
    found = []
    for layout, results in zip(layouts, zip(*ranks, strict=True), strict=True):
        names = [f"{kind} {n}" for kind in ("gradients", "weights") for n in drawn(layout.shape)]
        everything = dict.fromkeys(names, torch.nan)
        for name in {name for result in results for name in result}:
            seen = (result[name] for result in results if name in result)
            everything[name] = max(seen, key=lambda e: e if e == e else torch.inf)
        found.append(everything)
    return found


def largest(errors: dict[str, float]) -> tuple[float, str]:
    """The largest error with the name of what has it; NaN counts as infinite."""
    return max((e if e == e else torch.inf, name) for name, e in errors.items())

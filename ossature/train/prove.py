"""A layout of ranks against one process: loss, expert counts, every gradient, weights after steps.

The one process is the specification: eager forms, no mesh, one micro-batch after the other, and
clipping and balancing written out.  The ranks go through the code that trains.  Weights are random
where training starts from zeros (sinks, biases), rows are packed from unequal documents, loss masks
are ragged, and both sides step twice with the gradient clipped.

Things that cost time and change no number are held too: gradients are reduced over the ranks
as often as the run asks for, experts run no more often than recomputation asks for, blocks that are
to be compiled are, and not given up after too many recompilations, and the model's config stays as
it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ossature.config import LoraConfig, ParallelConfig, TrainConfig
from ossature.data.loader import Batch
from ossature.model.config import ModelConfig
from ossature.model.lora import adapt, init_adapters, is_adapter
from ossature.model.moe import RouterLog
from ossature.model.transformer import Transformer
from ossature.parallel import mesh as meshes
from ossature.parallel import weights
from ossature.parallel.fsdp import sharded
from ossature.parallel.gradients import global_norm, scale_and_clip
from ossature.parallel.pipeline import Pipeline
from ossature.train import optim, setup
from ossature.train import step as steps
from ossature.train.loss import router_loss

CPU = torch.device("cpu")
EXPERT_RUNS = {"none": 1, "selective": 1, "full": 2}
"""How often the experts of a block compute each micro-batch, by `recompute`."""


@dataclass(frozen=True)
class Case:
    """What is compared: a run's layout and switches, on a model of any shape."""

    config: TrainConfig
    """In fp32; its data are those of `batch`."""
    shape: ModelConfig

    def alone(self) -> Case:
        """The same for one process."""
        one = replace(self.config, parallel=ParallelConfig(), recompute="none", compile=False)
        return Case(one, self.shape)

    @property
    def micro_rows(self) -> int:
        return self.config.micro_batch_tokens // self.config.data.seq_len


@dataclass
class Found:
    """What one rank knows at the end, all of it global."""

    numbers: dict[str, float]
    """Of the first step: loss, router_loss, norm."""
    counts: Tensor
    """(layers, experts) of the first step."""
    gradients: dict[str, Tensor]
    """Of the first step, whole, before clipping; on the CPU, as are the others."""
    weights: dict[str, Tensor]
    """After two steps; those that are trained."""
    biases: dict[str, Tensor]
    """That balance the experts, after the first step."""
    odd: list[str] = field(default_factory=list)
    """Things that are not as they should be, and not numbers of the model."""


@cache
def drawn(shape: ModelConfig, lora: LoraConfig | None = None) -> dict[str, Tensor]:
    """Weights of a model, none of them zero or one; and of adapters, if there are any."""
    model = Transformer(shape)
    model.init_weights(5)
    g = torch.Generator().manual_seed(7)
    noise = {name: torch.randn(p.shape, generator=g) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.detach().add_((0.3 if p.dim() == 1 or "bias" in name else 0.0) * noise[name])
    if lora is not None and lora.rank:
        adapt(model, lora)
        init_adapters(model, seed=5)
    for name, p in model.named_parameters():
        if is_adapter(name):
            more = torch.randn(p.shape, generator=g)
            p.detach().add_((0.2 * p.detach() if name.endswith("magnitude") else 0.2) * more)
    return {name: p.detach() for name, p in model.named_parameters()}


def packed_rows(
    rows: int, seq: int, vocab: int, *, seed: int = 0, separate: bool = True, documents: int = 2
) -> Batch:
    """Rows of unequal documents and some padding; loss masks of very unequal density.

    Args:
        separate: whether documents see one another; then each row is one.
    """
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (rows, seq), generator=g)
    document, position = torch.zeros(rows, seq).long(), torch.arange(seq).repeat(rows, 1)
    mask = torch.zeros(rows, seq, dtype=torch.bool)
    for row in range(rows):
        cuts = torch.randint(3, seq - 6, (documents - 1,), generator=g).sort().values.tolist()
        mask[row] = torch.rand(seq, generator=g) < (0.1, 0.9, 0.4, 0.7)[row % 4]
        mask[row, 0] = False
        for cut in cuts if separate else []:
            document[row, cut:] += 1
            position[row, cut:] = torch.arange(seq - cut)
            mask[row, cut] = False
        pad = row % 3
        if pad:
            document[row, -pad:], mask[row, -pad:] = -1, False
    return Batch(tokens, position, document, mask)


def batches(case: Case, rank: int = 0, world: int = 1) -> list[Batch]:
    """A data rank's micro-batches of the one global batch of a case."""
    config, micro = case.config, case.micro_rows
    seq = config.data.seq_len
    rows = config.global_batch_tokens // seq
    separate = config.data.separate_documents
    batch = packed_rows(rows, seq, case.shape.vocab_size, separate=separate, documents=3)
    starts = range(rank * micro, rows, micro * world)
    return [Batch(*(x[start : start + micro] for x in batch)) for start in starts]


@cache
def reference(case: Case, device: torch.device = CPU) -> Found:
    """What one process finds.

    Args:
        case: as `Case.alone` gives it.
    """
    config, shape = case.config, case.shape
    model = setup.whole_model(config, shape, attention_form="eager", moe_form="eager")
    model.to_empty(device=device)
    weights.fill(model, drawn(shape, config.lora).__getitem__)
    router, rate = config.router, config.router.bias_update_rate
    if rate:
        setup.add_balance(model, device)
    optimizer = optim.build(model.named_parameters(), config.optim)
    mine = [Batch(*(x.to(device) for x in batch)) for batch in batches(case)]
    counted = sum(int((steps.targets(batch) >= 0).sum()) for batch in mine)
    found = None
    for _ in range(2):
        loss, extra = 0.0, 0.0
        counts = torch.zeros(shape.num_hidden_layers, shape.num_local_experts, device=device).long()
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
                aux_loss=router.aux_loss,
                z_loss=router.z_loss,
                num_experts_per_tok=shape.num_experts_per_tok,
            )
            (total / counted + added / len(mine)).backward()
            loss, extra = loss + total.item() / counted, extra + added.item() / len(mine)
            counts += torch.stack([layer.counts for layer in log.layers])
        if found is None:
            found = _first_step(model, {"loss": loss, "router_loss": extra}, counts)
            squares = [g.double().square().sum() for g in found.gradients.values()]
            found.numbers["norm"] = torch.stack(squares).sum().sqrt().item()
        if config.optim.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        for layer, bias in steps.balance_biases(model).items():
            load = counts[layer].float()
            bias += rate * torch.sign(load.mean() - load)
        found.biases = found.biases or _whole(model.named_buffers())
    assert found is not None
    found.weights = _whole((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return found


def divided(
    case: Case, world: int, device: torch.device = CPU
) -> tuple[Transformer, DeviceMesh, Pipeline | None]:
    """This rank's part of the model with its mesh, filled with `drawn`."""
    config, shape = case.config, case.shape
    mesh = meshes.build(meshes.sizes(config.parallel, world), device.type)
    meshes.check_model(config.parallel, shape, config.data.seq_len)
    model, pipeline = setup.divided_model(config, shape, mesh, device)
    weights.fill(model, drawn(shape, config.lora).__getitem__)
    return model, mesh, pipeline


def find(
    case: Case,
    world: int,
    device: torch.device = CPU,
    change: Callable[[Transformer], None] | None = None,
) -> Found:
    """What this rank finds, with all others, by the code that trains.

    Args:
        change: done to the finished model; tests plant faults so.
    """
    if case.config.compile:  # forget what this process has compiled before
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    model, mesh, pipeline = divided(case, world, device)
    if change is not None:
        change(model)
    config, rate = case.config, case.config.router.bias_update_rate
    mine = batches(case, *meshes.data_rank(mesh))
    parameters = dict(model.named_parameters())
    optimizer = optim.build(parameters.items(), config.optim)
    counted = steps.count(mine, False, mesh).tokens
    every = config.parallel.reduce_every_micro_batch and mesh["dp_replicate"].size() == 1
    reductions = _count_reductions(model, len(mine) if every else 1)
    operators = Operators()
    counts_operators = device.type == "cpu" and not config.compile
    found = None
    for _ in range(2):
        with (
            torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
            operators if found is not None and counts_operators else nullcontext(),
        ):
            sums = steps.accumulate(
                model, mine, counted, mesh, config.router, pipeline=pipeline, axes=config.parallel
            )
        norm = global_norm(parameters.values(), mesh)
        if found is None:
            numbers = {"loss": sums.loss.item(), "router_loss": sums.router_loss.item()}
            found = _first_step(model, numbers | {"norm": norm.item()}, sums.counts.long())
            found.odd += reductions()
        scale_and_clip(parameters.values(), norm, config.optim.clip, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rate:
            steps.update_balance(model, sums.counts, rate)
        found.biases = found.biases or _whole(model.named_buffers())
    assert found is not None
    found.weights = _whole((n, p) for n, p in parameters.items() if p.requires_grad)
    runs, most = operators.count / (len(mine) * len(model.blocks)), EXPERT_RUNS[config.recompute]
    if runs > most:
        found.odd.append(f"experts are computed {runs:g} times, not {most}")
    if config.compile and not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        found.odd.append("nothing was compiled")
    if model.config != case.shape:
        found.odd.append("the config of the model was changed")
    return found


def _first_step(model: Transformer, numbers: dict[str, float], counts: Tensor) -> Found:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Found(numbers, counts.cpu(), _whole(gradients.items()), {}, {})


def _whole(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: whole(tensor.detach()).to("cpu", copy=True) for name, tensor in tensors}


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, by the places its parts say they have."""
    if not isinstance(tensor, DTensor):
        return tensor
    # full_tensor gathers shards of shards in two steps and says so.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    return tensor.full_tensor() if tensor.device_mesh.size() > 1 else tensor.to_local()


def _count_reductions(model: Transformer, right: int) -> Callable[[], list[str]]:
    """Counts the reductions of every FSDP group from now on; what it returns judges them.

    With copies of the model, those are counted that add up over the copies.
    """
    counts = dict.fromkeys(sharded(model), 0)

    def count(module):
        def hook(_gradients: Tensor) -> None:
            counts[module] += 1

        return hook

    for module in counts:
        module.set_all_reduce_hook(count(module))

    def judge() -> list[str]:
        most = max(counts.values(), default=right)
        return [f"gradients are reduced {most} times a step, not {right}"] if most != right else []

    return judge


class Operators(TorchDispatchMode):
    """Counts how often experts are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.ossature.experts.default
        self.count += op is torch.ops.ossature.adapted_linear.default and 0.5  # of gate_up or down
        return op(*args, **(kwargs or {}))


def errors(found: Found, true: Found) -> dict[str, float]:
    """Relative error of everything; NaN where names or counts differ, or something is odd."""
    out = {
        name: abs(found.numbers[name] - x) / abs(x) if x else abs(found.numbers[name])
        for name, x in true.numbers.items()
    }
    out["counts"] = 0.0 if torch.equal(found.counts, true.counts) else math.nan
    for kind in ("gradients", "weights", "biases"):
        mine, theirs = getattr(found, kind), getattr(true, kind)
        # A pipeline's ranks name some; a name that no rank has is missed in `largest_of_ranks`.
        out[f"names of {kind}"] = 0.0 if mine.keys() <= theirs.keys() else math.nan
        out |= {f"{kind} {n}": relative(mine[n], theirs[n]) for n in mine.keys() & theirs.keys()}
    return out | dict.fromkeys(found.odd, math.nan)


def relative(found: Tensor, true: Tensor) -> float:
    if found.shape != true.shape:
        return math.nan
    return ((found - true).norm() / true.norm().clamp(min=1e-9)).item()


def largest_of_ranks(ranks: Iterable[dict[str, float]], true: Found) -> dict[str, float]:
    """The error of everything, each the largest over the ranks; NaN for what no rank has."""
    kinds = ("gradients", "weights", "biases")
    out = dict.fromkeys((f"{kind} {n}" for kind in kinds for n in getattr(true, kind)), math.nan)
    seen: dict[str, float] = {}
    for mine in ranks:
        for name, error in mine.items():
            seen[name] = max(seen.get(name, 0.0), error, key=infinite)
    return out | seen


def infinite(error: float) -> float:
    """What is not a number is worse than any."""
    return math.inf if math.isnan(error) else error

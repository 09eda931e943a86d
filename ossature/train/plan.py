"""What a run takes on every rank: memory, communication, work; and which layouts fit.

`ossature.parallel.memory` has the formulas.  Here they are put to a run, to the layouts a search
tries, and, in a dry run, to the real code.
"""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ossature.config import TrainConfig
from ossature.model.config import ModelConfig
from ossature.model.flops import active_adapters, flops_per_token
from ossature.model.transformer import Transformer
from ossature.parallel import memory
from ossature.parallel import mesh as meshes
from ossature.parallel.float8 import check_device
from ossature.parallel.gradients import local
from ossature.parallel.sizes import Bytes
from ossature.parallel.stages import stages_per_rank
from ossature.parallel.traffic import traffic
from ossature.train import optim, setup


@dataclass(frozen=True)
class Plan:
    """Of one layout."""

    config: TrainConfig
    sizes: dict[str, int]
    """Ranks along every axis."""
    micro_batches: int
    """Of each rank in a step."""
    uses: list[memory.Use]
    """Of each rank of the axis pp."""
    traffic: dict[str, Bytes]
    """Bytes a step that a rank receives, by axis; the most of any rank."""
    flops: float
    """Of a rank in a step, what is computed again included."""

    @property
    def worst(self) -> memory.Use:
        return max(self.uses, key=lambda use: use.peak)


def plan(config: TrainConfig, world: int, device: str, model: Transformer | None = None) -> Plan:
    """Of a run's own layout.

    Args:
        device: whose kernels, "cpu" or "cuda".
        model: the run's, on the meta device, if it is there already.

    Raises:
        ValueError: the layout cannot be; as training says it.
    """
    walks, outline = _outline(config, world, device, model)
    return replace(outline, uses=[walk.use() for walk in walks])


def _outline(
    config: TrainConfig, world: int, device: str, model: Transformer | None
) -> tuple[list[memory.Walk], Plan]:
    """What is found at once; walks that are still to be gone, and the plan without them."""
    sizes, shape = setup.check_layout(config, world)
    if device == "cpu":
        check_device(config, torch.device(device))
    model = setup.whole_model(config, shape) if model is None else model
    optim.check_states(model, config, sizes)
    walks = memory.walks(model, config, sizes, device, lambda n, p: state_bytes(config, n, p))
    count = setup.micro_batches(config, sizes)
    moved = [
        traffic(config, shape, sizes, list(walk.stages.values()), count, device) for walk in walks
    ]
    most = max(moved, key=lambda by_axis: sum(by_axis.values()))
    return walks, Plan(config, sizes, count, [], most, work(config, shape, world))


def state_bytes(config: TrainConfig, name: str, parameter: torch.nn.Parameter) -> float:
    return optim.state_bytes(config.optim, name, parameter)


def work(config: TrainConfig, shape: ModelConfig, world: int) -> float:
    """FLOPs of a rank in a step; a forward pass more where blocks are computed again as a whole."""
    row, lora = config.data.seq_len, config.lora
    token = flops_per_token(shape, row, lora)
    if config.recompute == "full":
        token += flops_per_token(shape, row) / 3  # nothing of it is for gradients
        token += 2 * active_adapters(shape, lora) if lora.rank else 0
    return token * config.global_batch_tokens / world


# For the order of layouts only: a rank's share of an eight-GPU H100 or H200 machine, by the makers'
# data sheets.  NVLink and InfiniBand in bytes a second, one way.
FLOPS, INSIDE, BETWEEN, MACHINE = 989.4e12, 450e9, 50e9, 8


@dataclass(frozen=True)
class Time:
    """The least seconds a step can take, each part on its own: nothing overlaps, nothing stalls."""

    work: float
    bubble: float
    communication: dict[str, float]

    @property
    def total(self) -> float:
        return self.work + self.bubble + sum(self.communication.values())


def least_time(config: TrainConfig, found: Plan, world: int) -> Time:
    axes, sizes = config.parallel, found.sizes
    inner = {"tp": axes.tp, "etp": axes.etp, "ep": axes.ep * axes.etp}
    inner |= {"cp": axes.tp * axes.cp, "fsdp": axes.tp * sizes["cp"] * sizes["dp_shard"]}
    inner |= {"dp_replicate": inner["fsdp"] * sizes["dp_replicate"], "pp": world}
    seconds = {
        axis: size / (INSIDE if inner[axis] <= MACHINE else BETWEEN)
        for axis, size in found.traffic.items()
    }
    work_seconds = found.flops / FLOPS
    return Time(work_seconds, work_seconds * bubble(config, found.micro_batches), seconds)


def bubble(config: TrainConfig, micro_batches: int) -> float:
    """Idle time of a pipeline, as a share of its work (arXiv 2104.04473, 2401.10241)."""
    axes = config.parallel
    if axes.pp == 1:
        return 0.0
    share = (axes.pp - 1) / (micro_batches * stages_per_rank(axes))
    return share / 3 if axes.pp_schedule in ("ZBVZeroBubble", "DualPipeV") else share


def layouts(config: TrainConfig, shape: ModelConfig, world: int) -> Iterator[TrainConfig]:
    """Other ways to run the same steps on as many ranks: axes, recomputation, micro-batches.

    The schedule, etp and everything that changes a number of the run stay as they are; so does cp
    = 1, for rows shorter than 32,768 tokens.
    """
    given = config.parallel
    ranks = [n for n in range(1, world + 1) if world % n == 0]
    cps = ranks if config.data.seq_len >= 2**15 else [given.cp]
    row = config.data.seq_len
    micros = sorted({config.micro_batch_tokens, row})
    for pp, tp, cp in itertools.product(ranks, ranks, cps):
        if world % (pp * tp * cp) or pp > shape.num_hidden_layers or tp > shape.num_key_value_heads:
            continue
        data = world // (pp * tp * cp)
        for copies in (n for n in ranks if data % n == 0):
            lent = data // copies * cp * tp
            for ep in (n for n in ranks if lent % (n * given.etp) == 0):
                axes = replace(
                    given, pp=pp, tp=tp, cp=cp, ep=ep, dp_replicate=copies, dp_shard=data // copies
                )
                for mode, micro in itertools.product(("none", "selective", "full"), micros):
                    changed = {"recompute": mode, "micro_batch_tokens": micro}
                    try:
                        candidate = replace(config, parallel=axes, **changed)
                    except ValueError:  # other keys of the run do not go with these
                        continue
                    yield candidate


@dataclass(frozen=True)
class Found:
    plan: Plan
    time: Time


def search(
    config: TrainConfig, world: int, device: str, memory_bytes: Bytes, most: int = 10
) -> tuple[list[Found], int]:
    """The layouts that fit, the one with the least time first; and how many were gone through."""
    shape = setup.model_config(config.model, config.num_layers)
    model = setup.whole_model(config, shape)
    tried: list[tuple[float, TrainConfig]] = []
    for candidate in layouts(config, shape, world):
        try:
            walks, outline = _outline(candidate, world, device, model)
        except ValueError:
            continue
        if max(walk.standing for walk in walks) <= memory_bytes:
            tried.append((least_time(candidate, outline, world).total, candidate))
    tried.sort(key=lambda pair: pair[0])
    found: list[Found] = []
    looked = 0
    for _, candidate in tried:
        if any(candidate.parallel == better.plan.config.parallel for better in found):
            continue  # what recomputes more, or has smaller micro-batches, takes longer
        looked += 1
        one = plan(candidate, world, device, model)
        if one.worst.peak <= memory_bytes:
            found.append(Found(one, least_time(candidate, one, world)))
            if len(found) == most:
                break
    return found, looked


@dataclass(frozen=True)
class DryRun:
    """What the real code made of one rank's part of the model, without memory and other ranks."""

    rank: int
    weight_bytes: int
    state_bytes: int
    planned_weights: Bytes
    planned_states: Bytes
    seconds: float
    host_bytes: int
    """The most that this process has taken so far."""

    @property
    def equal(self) -> bool:
        made = self.weight_bytes, self.state_bytes
        return made == (self.planned_weights, self.planned_states)


def dry_run(config: TrainConfig, world: int) -> list[DryRun]:
    """Build mesh, divided model and optimizer as `world` ranks would: the first of each stage.

    One process stands for all: torch's fake process group does no communication, and tensors are
    on the meta device.

    Raises:
        ValueError: the layout cannot be; as training says it.
    """
    sizes, shape = setup.check_layout(config, world)
    walks, _ = _outline(config, world, "cuda", None)
    found = []
    for stage, walk in enumerate(walks):
        began = time.monotonic()
        rank = stage * (world // len(walks))
        weights, states = made(config, sizes, shape, rank, world)
        groups = [group for part in walk.stages.values() for group in part.groups]
        found.append(
            DryRun(
                rank,
                weights,
                states,
                sum(group.weights for group in groups),
                sum(group.states for group in groups),
                time.monotonic() - began,
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            )
        )
    return found


def made(
    config: TrainConfig, sizes: dict[str, int], shape: ModelConfig, rank: int, world: int
) -> tuple[int, int]:
    """Bytes of weights and of moments that the code which trains makes on a rank."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        mesh = meshes.build(sizes, "cpu")
        model, _ = setup.divided_model(config, shape, mesh, torch.device("meta"))
        weights = dict(model.named_parameters())
        states = optim.state(optim.build(weights.items(), config.optim, config.seed))
        moments = (tensor for name, tensor in states.items() if not name.endswith(".step"))
        return sum(local(p).nbytes for p in weights.values()), sum(local(t).nbytes for t in moments)
    finally:
        dist.destroy_process_group()

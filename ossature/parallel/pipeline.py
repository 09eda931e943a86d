"""Pipeline parallelism: the blocks of the model divided over the ranks of the axis `pp`.

A step runs its micro-batches through torch's schedules.  Shapes of what goes from stage to stage
are given and not found out, so that nothing is computed twice.  The loss is found by the last
stage alone; router losses too, from statistics that travel along with the activations, and their
gradients travel back.  Validation and sampling pass one batch on from stage to stage, and every
rank gets the result.

Names of parameters are those of the whole model: what a rank does not have, it does not name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torch.torch_version import TorchVersion

from ossature.config import TrainConfig
from ossature.model.attention import Layout
from ossature.model.cache import Prompt, Step
from ossature.model.moe import RouterLog, RouterStatistics
from ossature.model.transformer import Transformer, lay_out
from ossature.parallel.context import Context
from ossature.parallel.fsdp import COMPUTE_DTYPE
from ossature.parallel.stages import (
    V_SCHEDULES,
    Stage,
    View,
    stage_layers,
    stages_of,
    stages_per_rank,
    unpack,
)

SPLITS_BACKWARD = TorchVersion(torch.__version__) >= "2.13"
"""Whether torch can find gradients of activations first and those of weights later, as the
zero-bubble schedules want it.  Before 2.13 that fails on custom operators, and adds up the
gradients of operators with several outputs."""


def splits_backward(config: TrainConfig) -> bool:
    """Whether zero-bubble schedules do so.

    Not where blocks are computed again: each weight would ask for that anew.
    """
    return SPLITS_BACKWARD and config.recompute == "none"


class Inputs(NamedTuple):
    """One micro-batch, of whole rows: (batch, seq) each."""

    tokens: Tensor
    position: Tensor
    document: Tensor
    targets: Tensor


Loss = Callable[[Tensor, RouterLog | None], Tensor]
"""Summed cross-entropy, and the statistics of all layers as one -> what to differentiate."""


class Pipeline:
    """This rank's stages of a model, and what runs them together with the other ranks'.

    The model is left with only this rank's modules, and with a forward that goes through all
    stages of all ranks (`forward` below).
    """

    def __init__(self, model: Transformer, mesh: DeviceMesh, config: TrainConfig) -> None:
        self.config, self.shape, self.mesh = config, model.config, mesh
        self.group = mesh.get_group("pp")
        self.rank = mesh.get_local_rank("pp")
        layout = config.parallel
        self.count = layout.pp * stages_per_rank(layout)
        """Stages in all."""
        self.owner = [0] * self.count
        for rank in range(layout.pp):
            for number in stages_of(rank, layout):
                self.owner[number] = rank
        layers = stage_layers(model.config, self.count)
        last = self.count - 1
        self.stages = {
            number: Stage(model, layers[number], number == 0, number == last)
            for number in stages_of(self.rank, layout)
        }
        """By number, those of this rank."""
        _keep_only(model, list(self.stages.values()))
        # After the model's own modules, whose names go first: a stage's parameters have names of
        # the model, but whoever goes through all modules meets the stages too.
        by_number = {str(number): stage for number, stage in self.stages.items()}
        model.add_module("stages", nn.ModuleDict(by_number))
        view = _view(mesh)
        for stage in self.stages.values():
            stage.view = view
        self.view = view
        self.carries = bool(config.router.aux_loss or config.router.z_loss)
        """Whether router statistics travel along."""
        self._loss: Loss | None = None
        self._schedules: dict[tuple[int, ...], Any] = {}
        model.forward = self.forward  # pyright: ignore[reportAttributeAccessIssue]

    def step(
        self,
        batches: list[Inputs],
        loss: Loss,
        note: Callable[[int, RouterStatistics], None] | None,
    ) -> None:
        """Forward and backward of all micro-batches of a step; gradients are added up.

        Args:
            loss: called by the rank of the last stage alone, once a micro-batch.
            note: told the statistics of this rank's layers, once a micro-batch.
        """
        whole = Inputs(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
        schedule = self._schedule(len(batches), *batches[0].tokens.shape)
        self._loss = loss
        for stage in self.stages.values():
            stage.note = note
        cut = self.view.cut
        first, last = 0 in self.stages, self.count - 1 in self.stages
        inputs = (cut(whole.tokens).contiguous(),)
        if self.carries:
            sums = torch.zeros(len(batches) * self._sums_size, device=whole.tokens.device)
            inputs = (*inputs, sums)
        schedule.step(
            *(inputs if first else ()),
            document=whole.document,
            position=cut(whole.position).contiguous(),
            **({"targets": cut(whole.targets).contiguous()} if last else {}),
            target=whole.targets if last else None,
        )
        self._loss = None
        for stage in self.stages.values():
            stage.note = None

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        *,
        position: Tensor | None = None,
        document: Tensor | None = None,
        targets: Tensor | None = None,
        cache: Prompt | Step | None = None,
    ) -> Tensor:
        """As `Transformer.forward`, without gradients; every rank of the axis has the result."""
        document = torch.zeros_like(tokens) if document is None else document
        cut = self.view.cut if cache is None else _whole
        if cache is None:
            layout = self.view.layout(document)
            position = layout.position if position is None else position
        else:
            layout, position = lay_out(document, position, cache)
        inputs = {
            "document": document,
            "position": cut(position),
            "targets": None if targets is None else cut(targets),
            "layout": layout,
        }
        x = cut(tokens)
        for number in range(self.count):
            if number in self.stages:
                x = self.stages[number](x, **inputs)
            here, there = self.owner[number], self.owner[min(number + 1, self.count - 1)]
            if here != there and self.rank == here:
                self._send(x, there)
            elif here != there and self.rank == there:
                x = self._receive(here, tokens.device)
        out = self._from_last(x, tokens.device)
        return out if targets is None else out.reshape(())

    def _send(self, x: Tensor, there: int) -> None:
        dist.send(torch.tensor(x.shape), group=self.group, group_dst=there)
        dist.send(x.contiguous(), group=self.group, group_dst=there)

    def _receive(self, here: int, device: torch.device) -> Tensor:
        shape = torch.empty(3, dtype=torch.int64)
        dist.recv(shape, group=self.group, group_src=here)
        x = torch.empty(shape.tolist(), dtype=self._dtype(), device=device)
        dist.recv(x, group=self.group, group_src=here)
        return x

    def _from_last(self, x: Tensor, device: torch.device) -> Tensor:
        """The result of the last stage, on every rank."""
        owner = self.owner[-1]
        wide = x.dtype if self.rank == owner else torch.float32
        shape = torch.zeros(4, dtype=torch.int64)
        if self.rank == owner:
            shape[: x.dim()] = torch.tensor(x.shape)
            shape[3] = x.element_size()
        dist.broadcast(shape, group=self.group, group_src=owner)
        if self.rank != owner:
            *sizes, size = shape.tolist()
            wide = {2: self._dtype(), 4: torch.float32, 8: torch.float64}[size]
            x = torch.empty([n for n in sizes if n], dtype=wide, device=device)
        x = x.contiguous()
        dist.broadcast(x, group=self.group, group_src=owner)
        return x

    @property
    def _sums_size(self) -> int:
        return 2 * self.shape.num_local_experts + 2

    def _dtype(self) -> torch.dtype:
        """Of the activations between stages."""
        if self.config.precision != "fp32":
            return COMPUTE_DTYPE[self.config.precision]
        return next(next(iter(self.stages.values())).parameters()).dtype

    def _schedule(self, micro_batches: int, rows: int, seq: int) -> Any:
        """torch's schedule for steps of this shape; made once."""
        key = micro_batches, rows, seq
        if key not in self._schedules:
            kind = get_schedule_class(self.config.parallel.pp_schedule)
            stages = [self._torch_stage(number, rows, seq) for number in self.stages]
            self._schedules[key] = kind(
                stages if issubclass(kind, PipelineScheduleMulti) else stages[0],  # type: ignore[arg-type]
                n_microbatches=micro_batches,
                loss_fn=self._loss_of,
                scale_grads=False,
            )
        return self._schedules[key]

    def _loss_of(self, output: Tensor | tuple[Tensor, Tensor], _target: Tensor) -> Tensor:
        assert self._loss is not None
        if isinstance(output, Tensor):
            return self._loss(output.squeeze(0), None)
        log = RouterLog()
        log.layers.append(unpack(output[1]))
        return self._loss(output[0].squeeze(0), log)

    def _torch_stage(self, number: int, rows: int, seq: int) -> PipelineStage:
        cp, tp = self.mesh["cp"].size(), self.mesh["tp"].size()
        hidden = self.shape.hidden_size
        x = torch.empty(rows, seq // cp // tp, hidden, dtype=self._dtype(), device="meta")
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        sums = torch.empty(self._sums_size, device="meta")
        loss = torch.empty(1, dtype=wide, device="meta")
        tokens = torch.empty(rows, seq // cp, dtype=torch.int64, device="meta")
        along = (sums.requires_grad_(),) if self.carries else ()
        stage = PipelineStage(
            self.stages[number],
            number,
            self.count,
            torch.device(self.mesh.device_type),
            input_args=(tokens if number == 0 else x.requires_grad_(), *along),
            output_args=(loss if number == self.count - 1 else x.requires_grad_(), *along),
            group=self.group,
            dw_builder=None if splits_backward(self.config) else _whole_backward,
        )
        if self.config.parallel.pp_schedule in V_SCHEDULES:
            # torch 2.11 warms up by sending to every neighbour, and in a V one neighbour is the
            # rank itself, which gloo refuses.
            stage._get_init_p2p_neighbors_ops = list
        return stage


def _whole_backward() -> Callable[[], None]:
    """Asks a stage for its whole backward at once; what is left for later is nothing."""
    return lambda: None


def _keep_only(model: Transformer, stages: list[Stage]) -> None:
    """Take out of the model what is in none of the stages."""
    if all(stage.embedding is None for stage in stages):
        model.register_module("embedding", None)
    if all(stage.norm is None for stage in stages):
        model.register_module("norm", None)
        model.register_module("lm_head", None)
    kept = {number for stage in stages for number in stage.blocks}
    for number in set(model.blocks) - kept:
        del model.blocks[number]


def _view(mesh: DeviceMesh) -> View:
    if mesh["cp"].size() == 1:
        return View(Layout, _whole)
    context = Context(mesh)
    return View(context.layout, lambda x: context.split(x.shape[1]).cut(x))


def _whole(x: Tensor) -> Tensor:
    return x

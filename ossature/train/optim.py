"""Which optimizer steps which parameters, by name, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ossature.config import OptimConfig, TrainConfig
from ossature.parallel import shards
from ossature.parallel.gradients import local, square_norm
from ossature.train.adamw import GROUP, LeanAdamW


def decays(name: str) -> bool:
    """Weight decay acts on matrices; not on norms, biases, sinks, magnitudes and the embedding."""
    *_, module, leaf = name.split(".")
    vector = "norm" in module or leaf.endswith(("bias", "magnitude"))
    return not (vector or module in ("sinks", "embedding"))


def is_hidden_matrix(name: str) -> bool:
    """Weights that Muon steps: attention's and the experts' matrices."""
    *_, module, leaf = name.split(".")
    return (module.endswith("_proj") and leaf == "weight") or (
        module == "experts" and leaf.endswith("weight")
    )


def build(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer of a config on named parameters, in groups by weight decay.

    torch's fused AdamW where moments and weights are fp32, else `LeanAdamW`.
    """
    named = [(name, p) for name, p in parameters if p.requires_grad]
    muon = config.name == "muon"
    groups = []
    for decay, hidden in [(True, True), (True, False), (False, False)]:
        chosen = [
            (name, p)
            for name, p in named
            if decays(name) is decay and (muon and is_hidden_matrix(name)) is hidden
        ]
        group: dict[str, Any] = {"weight_decay": config.weight_decay if decay else 0.0}
        if not chosen:  # adapters are all matrices, for one
            continue
        groups.append({"params": chosen, **group, **({"muon": True} if hidden else {})})
    rates = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    plain = config.states == "fp32" and config.weights == "fp32" and not config.in_backward
    if plain and not muon:
        return torch.optim.AdamW(groups, **rates, fused=True)
    return LeanAdamW(groups, **rates, states=config.states, seed=seed)


def state_bytes(config: OptimConfig, name: str, parameter: nn.Parameter) -> float:
    """Of the moments, for one number of a parameter."""
    moments = 1 if config.name == "muon" and is_hidden_matrix(name) else 2
    if config.states == "8bit" and parameter.dim() > 1 and parameter.shape[-1] % GROUP == 0:
        return moments * (1 + 4 / GROUP)
    return moments * (2.0 if config.states == "bf16" else 4.0)


def check_states(model: nn.Module, config: TrainConfig, sizes: dict[str, int]) -> None:
    """Refuse to split the rows of a weight so that a group of 8-bit moments lies on two ranks.

    Args:
        model: before it is divided.
        sizes: ranks along every axis.

    Raises:
        ValueError: they are split so; names the weight.
    """
    if config.optim.states != "8bit":
        return
    axes = config.parallel
    efsdp = math.prod(sizes[a] for a in ("dp_shard", "cp", "tp")) // (axes.ep * axes.etp)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if not parameter.requires_grad or len(shape) < 2 or shape[-1] % GROUP:
            continue
        mine = shards.part(name, shape, axes)
        columns = mine[-1]
        if len(mine) == 2 and ".experts." in name and shards.inside(mine, efsdp):
            columns //= efsdp
        if columns % GROUP:
            raise ValueError(
                f"optim.states = 8bit: a rank's part of {name} {shape} has rows of {columns}, "
                f"which must be a multiple of {GROUP}; split fewer ways"
            )


def describe(optimizer: torch.optim.Optimizer) -> list[str]:
    """One line a group: what it holds, and its weight decay."""
    lines = []
    for group in optimizer.param_groups:
        leaves: dict[str, None] = {}
        for name in group["param_names"]:
            leaves[name.split(".", 2)[-1] if name.startswith("blocks.") else name] = None
        total = sum(p.numel() for p in group["params"])
        kind = "Muon, weight decay" if group.get("muon") else "weight decay"
        lines.append(f"{kind} {group['weight_decay']:g}: {total:,} in {', '.join(leaves)}")
    return lines


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step`, counted from 1, of a run of `steps`.

    Rises linearly to the peak, which step `warmup_steps` has (the first step is not at zero), then
    decays to min_lr, which the last step has.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        decay = config.decay_steps or max(1, steps // 5)
        start = max(config.warmup_steps, steps - decay)
        decay = steps - start
    else:
        start = config.warmup_steps
        decay = config.decay_steps or steps - start
    done = min(1.0, max(0.0, (step - start) / max(1, decay)))
    left = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.min_lr + (config.lr - config.min_lr) * left


def state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of the optimizer, flat: `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`, ...

    A parameter that was never stepped has zeros, as the first step would make them.  Rates and
    decays are no state: they come from the config.
    """
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if isinstance(optimizer, LeanAdamW):
                optimizer.state_of(group, parameter)
            elif not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }
            for key, tensor in optimizer.state[parameter].items():
                tensors[f"{name}.{key}"] = tensor
    return tensors


class InBackward:
    """Steps every weight as soon as backward has found its gradient, and lets go of the gradient.

    Only ever one gradient is held.  It cannot be clipped by the norm of all, nor skipped.
    """

    def __init__(self, optimizer: LeanAdamW) -> None:
        self.squares: list[Tensor] = []
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                hook = self._hook(optimizer, group, name)
                parameter.register_post_accumulate_grad_hook(hook)

    def _hook(
        self, optimizer: LeanAdamW, group: dict[str, Any], name: str
    ) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def step(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.squares.append(square_norm([local(parameter.grad)]))
            optimizer.step_one(group, name, parameter)  # type: ignore[arg-type]
            parameter.grad = None

        return step

    def norm(self) -> Tensor:
        """Of all gradients since the last call; every one has been stepped already."""
        total = torch.stack(self.squares).sum().sqrt().float()
        self.squares.clear()
        return total

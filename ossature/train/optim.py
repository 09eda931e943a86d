"""AdamW with two groups of parameters by name, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ossature.config import OptimConfig


def decays(name: str) -> bool:
    """Weight decay acts on matrices; not on norms, biases, sinks and the embedding."""
    *_, module, leaf = name.split(".")
    return not ("norm" in module or leaf.endswith("bias") or module in ("sinks", "embedding"))


def build(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW on named parameters; moments are fp32, as the master weights are."""
    named = [(name, p) for name, p in parameters if p.requires_grad]
    groups = [
        {
            "params": [(name, p) for name, p in named if decays(name) is decay],
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def describe(optimizer: torch.optim.Optimizer) -> list[str]:
    """One line a group: what it holds, and its weight decay."""
    lines = []
    for group in optimizer.param_groups:
        leaves: dict[str, None] = {}
        for name in group["param_names"]:
            leaves[name.split(".", 2)[-1] if name.startswith("blocks.") else name] = None
        total = sum(p.numel() for p in group["params"])
        lines.append(f"weight decay {group['weight_decay']:g}: {total:,} in {', '.join(leaves)}")
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
    """All tensors of the optimizer, flat: `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`.

    A parameter that was never stepped has zeros, as AdamW would make them.  Rates and decays are
    no state: they come from the config.
    """
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }
            for key, tensor in optimizer.state[parameter].items():
                tensors[f"{name}.{key}"] = tensor
    return tensors

"""Mixed precision on one rank: fp32 masters, and copies in the compute dtype that blocks use.

What FSDP does for a group of one rank, without its buffers: a weight is cast once a step, and a
gradient goes to its master, in fp32, as soon as backward has it.  Where masters have the compute
dtype there is nothing to do, and nothing there twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class MastersModule(nn.Module):
    """Mixed into the class of a model by `keep_masters`, as `FSDPModule` is by `fully_shard`.

    From a forward to `use_masters`, the model's parameters are the copies.
    """

    compute_dtype: torch.dtype
    copied: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]]
    """Where a weight is: module, name, master, copy.  Made by the first forward, then kept."""
    copies_in_use: bool

    @torch.no_grad()
    def use_copies(self, _model: nn.Module, _inputs: Any) -> None:
        if self.copies_in_use:
            return
        if not self.copied:
            copies: dict[nn.Parameter, nn.Parameter] = {}
            for module in self.modules():
                for name, master in module.named_parameters(recurse=False):
                    if master.requires_grad and master.dtype != self.compute_dtype:
                        if master not in copies:
                            copies[master] = _copy(master, self.compute_dtype)
                        self.copied.append((module, name, master, copies[master]))
        for module, name, master, copy in self.copied:
            copy.copy_(master)
            module._parameters[name] = copy
        self.copies_in_use = True

    def use_masters(self) -> None:
        """The next forward casts them anew."""
        for module, name, master, _copy in self.copied:
            module._parameters[name] = master
        self.copies_in_use = False


def keep_masters(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Compute with copies from the next forward on, in place; frozen weights are used as they are.

    Gradients are those of `torch.distributed.fsdp.fully_shard` on one rank with the same dtypes.
    """
    kind = type(model)
    model.__class__ = type(f"Masters{kind.__name__}", (MastersModule, kind), {})
    assert isinstance(model, MastersModule)
    model.compute_dtype, model.copied, model.copies_in_use = compute_dtype, [], False
    model.register_forward_pre_hook(model.use_copies)


def _copy(master: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    copy = nn.Parameter(torch.empty_like(master, dtype=dtype))

    @torch.no_grad()
    def pass_on(copy: Tensor) -> None:
        assert copy.grad is not None
        if master.grad is None:
            master.grad = copy.grad.to(master.dtype)
        else:
            master.grad += copy.grad
        copy.grad = None

    copy.register_post_accumulate_grad_hook(pass_on)
    return copy

"""AdamW in less memory, and Muon: moments in fp32, bf16 or 8 bits, weights in fp32 or bf16.

Every step is computed in fp32, a block of rows at a time, on this rank's part of a weight; only
what is kept between steps is narrow.  Two ways of keeping it lose nothing on average:

- bf16 values are rounded at random, up or down in proportion (stochastic rounding).  To nearest,
  a weight would not see updates below 1/256 of it, and with beta2 = 0.999 the second moment would
  never fall.
- 8-bit moments are codes into a table that is dense near zero, times the greatest magnitude of
  their group of 32 along a row (arXiv 2110.02861).  Of the second moment the root is kept, never
  rounded to zero: where it vanished, the first moment would be divided by eps alone.  Vectors,
  and rows that are no multiple of 32, stay in fp32.

Rounding depends on the seed, the name of the weight, the step and the place of this rank's part:
a run that goes on from a checkpoint does so bit for bit.

Muon (kellerjordan.github.io/posts/muon, arXiv 2502.16982) replaces the two moments of a matrix by
one, the momentum, and steps along its nearest orthogonal matrix.  Groups marked `muon` use it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ossature.parallel.gradients import local
from ossature.parallel.weights import own_part

GROUP = 32
"""Numbers along a row that share a scale in 8-bit moments: a divisor of 2880 / 2."""

BLOCK = 2**22
"""Numbers of one weight that are in fp32 at once."""


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) and Muon on parameters of any dtype, plain or sharded.

    Groups have the keys of torch.optim.AdamW, `param_names`, and `muon`.

    Args:
        states: "fp32", "bf16" or "8bit": how moments are kept.
        seed: of stochastic rounding.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float,
        states: str, seed: int = 0,
    ) -> None:  # fmt: skip
        self.states, self.seed = states, seed
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "muon": False}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None:
                    self.step_one(group, name, parameter)

    def step_one(self, group: dict[str, Any], name: str, parameter: nn.Parameter) -> None:
        """Step one parameter; its gradient stays."""
        state = self.state_of(group, parameter)
        state["step"] += 1
        step = int(state["step"])
        assert parameter.grad is not None
        parts = {key: local(tensor) for key, tensor in state.items() if key != "step"}
        coins = _coins(self.seed, name, step, parameter)
        if group["muon"]:
            _step_muon(group, parameter, parts["momentum"], coins)
            return
        weight, gradient = local(parameter), local(parameter.grad)
        for rows in _blocks(weight):
            block = {key: _rows(part)[rows] for key, part in parts.items()}
            _step_adamw(group, step, _rows(weight)[rows], _rows(gradient)[rows], block, coins)

    def state_of(self, group: dict[str, Any], parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of a parameter, zero at first: step, and moments that are sharded as it is."""
        state = self.state[parameter]
        if not state:
            # On the CPU: it is read in every step.
            state["step"] = torch.zeros((), dtype=torch.float32)
            for moment in ("momentum",) if group["muon"] else ("exp_avg", "exp_avg_sq"):
                state |= self._moment(moment, parameter)
        return state

    def _moment(self, key: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        if self.states == "8bit" and parameter.dim() > 1 and parameter.shape[-1] % GROUP == 0:
            part = local(parameter)
            if part.shape[-1] % GROUP:
                raise ValueError(
                    f"optim.states = 8bit: a rank's part of a weight {tuple(parameter.shape)} has "
                    f"rows of {part.shape[-1]}, which must be a multiple of {GROUP}; split fewer "
                    "ways"
                )
            shape = (*part.shape[:-1], part.shape[-1] // GROUP)
            scale = torch.zeros(shape, dtype=torch.float32, device=part.device)
            zero = _code_of_zero(signed=key != "exp_avg_sq")
            codes = torch.full_like(part, zero, dtype=torch.uint8)
            return {
                f"{key}_codes": _sharded_as(codes, parameter, parameter.shape[-1]),
                f"{key}_scale": _sharded_as(scale, parameter, parameter.shape[-1] // GROUP),
            }
        dtype = torch.bfloat16 if self.states == "bf16" else torch.float32
        return {key: torch.zeros_like(parameter, dtype=dtype, requires_grad=False)}


def _step_adamw(
    group: dict[str, Any],
    step: int,
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    coins: torch.Generator,
) -> None:
    """One block of rows, in place."""
    beta1, beta2 = group["betas"]
    gradient = gradient.float()
    mean = read_moment(state, "exp_avg").lerp_(gradient, 1 - beta1)
    square = read_moment(state, "exp_avg_sq").mul_(beta2)
    square.addcmul_(gradient, gradient, value=1 - beta2)
    new = weight.float() if weight.dtype != torch.float32 else weight.clone()
    new.mul_(1 - group["lr"] * group["weight_decay"])
    size = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    new.addcdiv_(mean, size, value=-group["lr"] / (1 - beta1**step))
    write(weight, new, coins)
    write_moment(state, "exp_avg", mean, coins)
    write_moment(state, "exp_avg_sq", square, coins)


def _step_muon(
    group: dict[str, Any], parameter: nn.Parameter, momentum: Tensor, coins: torch.Generator
) -> None:
    """Momentum is kept by every rank for its part; its direction is found on whole matrices."""
    assert parameter.grad is not None
    weight, gradient = local(parameter), local(parameter.grad).float()
    beta = group["betas"][0]
    mean = momentum.float().lerp_(gradient, 1 - beta)
    write(momentum, mean, coins)
    direction = _whole_matrices(gradient.lerp(mean, beta), parameter, orthogonal)
    # So that the step has the size of one of AdamW's, and learning rates carry over.
    size = 0.2 * math.sqrt(max(parameter.shape[-2:]))
    new = weight.float() * (1 - group["lr"] * group["weight_decay"])
    write(weight, new.add_(direction, alpha=-group["lr"] * size), coins)


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """U V^T of the matrix U S V^T, nearly: singular values end between about 0.7 and 1.2.

    Five steps of a quintic Newton-Schulz iteration, in bf16 on CUDA and fp32 elsewhere.

    Args:
        matrix: (..., rows, columns), every matrix on its own.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


def _whole_matrices(
    part: Tensor, parameter: nn.Parameter, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """`function` of the matrices this rank has part of; gathers them if they are split."""
    split_inside = isinstance(parameter, DTensor) and any(
        not place.is_replicate() and place.dim >= parameter.dim() - 2  # type: ignore[attr-defined]
        for place in parameter.placements
    )
    if not split_inside:
        return function(part)
    whole = _like(part, parameter, parameter.shape)
    assert isinstance(whole, DTensor)
    whole = whole.full_tensor()
    return own_part(function(whole), parameter)


def read_moment(state: dict[str, Tensor], key: str) -> Tensor:
    """A moment in fp32, a copy."""
    if key in state:
        return state[key].to(torch.float32, copy=True)
    table = _table(key != "exp_avg_sq", state[f"{key}_codes"].device)
    values = table[state[f"{key}_codes"].int()].unflatten(-1, (-1, GROUP))
    values = values.mul_(state[f"{key}_scale"][..., None]).flatten(-2)
    return values if key != "exp_avg_sq" else values.square_()


def write_moment(
    state: dict[str, Tensor], key: str, moment: Tensor, coins: torch.Generator
) -> None:
    """Keep a moment in the form that it has in `state`."""
    if key in state:
        write(state[key], moment, coins)
        return
    signed = key != "exp_avg_sq"
    groups = (moment if signed else moment.sqrt()).unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1)
    table = _table(signed, moment.device)
    shares = groups / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = torch.bucketize(shares, (table[1:] + table[:-1]) / 2, right=True)
    if not signed:
        codes += (codes == 0) & (groups > 0)
    state[f"{key}_codes"].copy_(codes.flatten(-2))
    state[f"{key}_scale"].copy_(scale)


def write(target: Tensor, value: Tensor, coins: torch.Generator) -> None:
    """Copy fp32 numbers; into bf16 they are rounded up or down at random, right on average."""
    if target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    noise = torch.randint(
        0, 2**16, value.shape, dtype=torch.int32, device=value.device, generator=coins
    )
    bits = (value.view(torch.int32) + noise).bitwise_and_(-(2**16))
    target.copy_(bits.view(torch.float32))  # exact: the low half is zero


@cache
def _table(signed: bool, device: torch.device) -> Tensor:
    """256 numbers in [-1, 1] or [0, 1], ascending: seven powers of ten, each evenly divided.

    Source: arXiv 2110.02861, section 1.3, "dynamic (tree) quantization".
    """
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1)
        means = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += means + [-x for x in means] if signed else means
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _code_of_zero(signed: bool) -> int:
    return int((_table(signed, torch.device("cpu")) == 0).nonzero())


def _coins(seed: int, name: str, step: int, parameter: nn.Parameter) -> torch.Generator:
    place: list[int] = []
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        place = [
            0 if parameter.placements[axis].is_replicate() else mesh.get_local_rank(axis)
            for axis in range(mesh.ndim)
        ]
    digest = hashlib.blake2b(f"{seed}:{name}:{step}:{place}".encode(), digest_size=8).digest()
    generator = torch.Generator(local(parameter).device)
    return generator.manual_seed(int.from_bytes(digest, "little") >> 1)


def _rows(x: Tensor) -> Tensor:
    """(..., columns) -> (rows, columns), a view; a vector is one row."""
    return x.view(-1, x.shape[-1]) if x.dim() > 1 else x.view(1, -1)


def _blocks(weight: Tensor) -> Iterator[slice]:
    if weight.numel() == 0:
        return
    rows = _rows(weight)
    size = max(1, BLOCK // rows.shape[1])
    for start in range(0, len(rows), size):
        yield slice(start, start + size)


def _sharded_as(part: Tensor, parameter: nn.Parameter, columns: int) -> Tensor:
    """A tensor with the parameter's shape, but for its columns, of which this rank has `part`."""
    return _like(part, parameter, torch.Size((*parameter.shape[:-1], columns)))


def _like(part: Tensor, parameter: nn.Parameter, shape: torch.Size) -> Tensor:
    if not isinstance(parameter, DTensor):
        return part
    stride = torch.empty(shape, device="meta").stride()
    mesh, places = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, places, run_check=False, shape=shape, stride=stride)

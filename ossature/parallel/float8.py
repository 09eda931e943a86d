"""Matrix products in 8 bits, by torchao: attention's projections and the experts.

Weights, gradients and whatever goes between layers stay as they are: both factors of a product are
rounded to float8 just before it, forward and backward, with scales found anew each time.

tensorwise: one scale a tensor; gradients in e5m2.  Experts: as rowwise, there is no other product.
rowwise: one scale a row of the one and a column of the other factor, powers of two.
mxfp8: one scale for each 32 numbers along the summed dim (OCP Microscaling Formats v1.0).

Router, head, embedding and norms are left alone.  Emulated, the same numbers are rounded the same
way, and multiplied in fp32: slow, on any device.

Source: torchao 0.18, float8/float8_linear.py and prototype/moe_training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ossature.config import TrainConfig
from ossature.kernels.experts import expert_of_rows
from ossature.kernels.frozen_experts import weighted_swiglu
from ossature.model.attention import Attention
from ossature.model.config import ModelConfig
from ossature.model.moe import Experts
from ossature.model.transformer import Transformer
from ossature.parallel.collectives import gathered, reduced

CAPABILITY = {"tensorwise": (9, 0), "rowwise": (9, 0), "mxfp8": (10, 0)}
"""The least that has the products of experts; single products of tensorwise run from 8.9 on."""
MULTIPLE = {"tensorwise": 16, "rowwise": 16, "mxfp8": 32}
"""Of every dim of a product."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows sorted by expert, counts, weight (experts, out, in)) -> (rows, out)."""


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Refuse a device that has no such products.

    Raises:
        ValueError: it has none; in one sentence.
    """
    if not config.float8 or config.float8_emulate:
        return
    need = CAPABILITY[config.float8]
    have = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if have is None or have < need:
        found = device.type if have is None else f"CUDA {have[0]}.{have[1]}"
        raise ValueError(
            f"float8 = {config.float8} needs a CUDA device of compute capability {need[0]}."
            f"{need[1]} or more, and this one is {found}; float8_emulate = true runs anywhere"
        )


def check_float8(config: TrainConfig, shape: ModelConfig) -> None:
    """Refuse sizes that cannot be multiplied in 8 bits.

    Raises:
        ValueError: a dim is no multiple; in one sentence.
    """
    if not config.float8:
        return
    axes, multiple = config.parallel, MULTIPLE[config.float8]
    heads, key_heads = shape.num_attention_heads, shape.num_key_value_heads
    sizes = [
        ("hidden_size", shape.hidden_size),
        ("intermediate_size / etp", shape.intermediate_size // axes.etp),
        ("num_attention_heads x head_dim / tp", heads * shape.head_dim // axes.tp),
        ("num_key_value_heads x head_dim / tp", key_heads * shape.head_dim // axes.tp),
        ("micro_batch_tokens / cp", config.micro_batch_tokens // axes.cp),
    ]
    for name, size in sizes:
        if size % multiple:
            raise ValueError(
                f"float8 = {config.float8} needs {name} ({size}) to be a multiple of {multiple}"
            )


def use_float8(model: Transformer, config: TrainConfig) -> None:
    """Let the model's projections and experts multiply in 8 bits, in place; before it is split."""
    products: Callable[[str, bool], tuple[Multiply, Callable[[nn.Linear], nn.Linear]]]
    products = _mx if config.float8 == "mxfp8" else _float8
    multiply, linear = products(config.float8, config.float8_emulate)
    for block in model.blocks.values():
        attention, experts = block.get_submodule("attention"), block.get_submodule("moe.experts")
        for name in PROJECTIONS:
            plain = attention.get_submodule(name)
            assert isinstance(plain, nn.Linear)
            attention.register_module(name, linear(plain))
        assert isinstance(experts, Experts)
        experts.compute = partial(_experts, multiply)


def gather_rounded(attention: Attention, mesh: DeviceMesh, x: Tensor) -> Tensor:
    """`gather` of an attention's input along the sequence, rounded before it travels (tensorwise).

    One byte a number, and to the bit what the projections would round the whole to: its scale is
    that of the largest number on any rank.
    """
    return _GatherRounded.apply(x, attention.q_proj, mesh)


class _GatherRounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, projection: Any, mesh: DeviceMesh) -> Tensor:
        from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
        from torchao.float8.float8_training_tensor import Float8TrainingTensor

        ctx.group = mesh.get_group()
        products, dtype = projection.linear_mm_config, projection.config.cast_config_input
        part = hp_tensor_to_float8_dynamic(
            x, dtype.target_dtype, products, reduce_amax=True, device_mesh=mesh
        )
        numbers = gathered(part._data.view(torch.uint8), 1, ctx.group).view(part._data.dtype)
        role = part._gemm_input_role
        return Float8TrainingTensor(numbers, part._scale, x.dtype, products, role)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return reduced(grads[0], 1, ctx.group), None, None


def _experts(
    multiply: Multiply, rows: Tensor, weights: Tensor, counts: Tensor, gate_up_weight: Tensor,
    gate_up_bias: Tensor, down_weight: Tensor, down_bias: Tensor, alpha: float, limit: float,
) -> Tensor:  # fmt: skip
    """As `grouped_experts`, with the products of `multiply`."""
    expert = expert_of_rows(counts, len(rows))
    gate_up = multiply(rows, counts, gate_up_weight) + gate_up_bias[expert]
    inner = weighted_swiglu(gate_up, weights, alpha, limit)
    return multiply(inner, counts, down_weight) + down_bias[expert] * weights[:, None]


def _aligned(
    multiple: int, product: Callable[..., Tensor], rows: Tensor, counts: Tensor, weight: Tensor
) -> Tensor:
    """The product with each expert's rows filled up to a multiple; the host never sees counts."""
    experts, total = len(counts), len(rows)
    room = -(-(total + experts * (multiple - 1)) // multiple) * multiple
    padded = (counts + multiple - 1) // multiple * multiple
    ends = padded.cumsum(0)
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    place = torch.arange(total, device=rows.device) + shift[expert_of_rows(counts, total)]
    ends[-1] = room  # what is left over is the last expert's: every row of the result is written
    filled = rows.new_zeros(room, rows.shape[1]).index_copy(0, place, rows)
    return product(filled, weight.mT, ends.to(torch.int32))[place]


def _one_by_one(
    multiple: int, product: Callable[..., Tensor], rows: Tensor, counts: Tensor, weight: Tensor
) -> Tensor:
    """The products of the experts that have rows, one after the other."""
    parts = [rows.new_empty(0, weight.shape[1])]
    for x, matrix in zip(rows.split(counts.tolist()), weight.unbind(), strict=True):
        if len(x):
            filled = F.pad(x, (0, 0, 0, -len(x) % multiple))
            parts.append(product(filled, matrix)[: len(x)])
    return torch.cat(parts)


def _float8(recipe: str, emulate: bool) -> tuple[Multiply, Callable[[nn.Linear], nn.Linear]]:
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args
    from torchao.prototype.moe_training.fp8_grouped_mm import (
        _to_fp8_rowwise_then_scaled_grouped_mm as grouped,
    )

    def linear(plain: nn.Linear) -> nn.Linear:
        how = Float8LinearConfig.from_recipe_name(recipe)
        object.__setattr__(how, "emulate", emulate)
        return Float8Linear.from_float(plain, how)

    rowwise = Float8LinearConfig.from_recipe_name("rowwise")
    object.__setattr__(rowwise, "emulate", True)
    products = Float8Linear(1, 1, bias=False, config=rowwise, device="meta").linear_mm_config

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return matmul_with_hp_or_float8_args.apply(x, weight.t(), products, rowwise)

    if emulate:
        return partial(_one_by_one, 1, product), linear
    return partial(_aligned, 16, partial(grouped, pad_token_groups_for_grouped_mm=False)), linear


def _mx(_recipe: str, emulate: bool) -> tuple[Multiply, Callable[[nn.Linear], nn.Linear]]:
    from torchao.prototype.moe_training.mxfp8_grouped_mm import (
        _to_mxfp8_then_scaled_grouped_mm as grouped,
    )
    from torchao.prototype.moe_training.mxfp8_linear import mx_mm
    from torchao.prototype.mx_formats.config import (
        MXFP8Dim0CastKernelChoice,
        MXFP8Dim1CastKernelChoice,
        ScaleCalculationMode,
    )
    from torchao.quantization.quantize_.common import KernelPreference

    kernels = KernelPreference.EMULATED if emulate else KernelPreference.AUTO
    along = MXFP8Dim0CastKernelChoice.TORCH if emulate else MXFP8Dim0CastKernelChoice.TRITON
    across = MXFP8Dim1CastKernelChoice.TORCH if emulate else MXFP8Dim1CastKernelChoice.CUDA
    e4m3, round_up = torch.float8_e4m3fn, ScaleCalculationMode.RCEIL

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return mx_mm.apply(x, weight, e4m3, e4m3, e4m3, 32, kernels, along, across, round_up, False)

    def linear(plain: nn.Linear) -> nn.Linear:
        return MXLinear.from_plain(plain, product)

    def multiply(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return grouped(rows, weight, offs=ends, out_dtype=rows.dtype, kernel_preference=kernels)

    return partial(_one_by_one, 32, product) if emulate else partial(_aligned, 32, multiply), linear


class MXLinear(nn.Linear):
    """A linear layer with another product."""

    product: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def from_plain(cls, plain: nn.Linear, product: Callable[[Tensor, Tensor], Tensor]) -> Any:
        plain.__class__ = cls  # FSDP does the same  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(plain, cls)
        plain.product = product
        return plain

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight) + self.bias

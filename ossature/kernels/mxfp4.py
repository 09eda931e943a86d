"""MXFP4: 4-bit numbers in groups of 32 that share a power of two.

A number is a sign and a code 0...7 for 0, 0.5, 1, 1.5, 2, 3, 4, 6.  A byte holds two numbers, the
low nibble first; a group is 32 numbers along the input dim of a weight, 16 bytes, and one scale
byte s that stands for 2 ** (s - 127).

All work is done on the bits of bfloat16 or float32 as integers, in pieces that fit a cache:
`v > t` compares magnitudes when bits are compared, and taking n exponents off a number divides it
by 2 ** n.  Numbers or scales at the ends of the range, where that fails, go through float64.

The `_transposed` forms take and give the weight as (columns, rows), which is how Hugging Face
stores experts in bfloat16: they transpose packed bytes, a quarter of the weight.

Source: OCP Microscaling Formats v1.0; gpt_oss/torch/weights.py of openai/gpt-oss@7b58334; the
rounding of `downcast_to_mxfp` in triton_kernels (ROUND_UP).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of each code."""
GROUP = 32
NOT_A_NUMBER = 255
"""Scale byte that makes a group no numbers, by the standard (E8M0).  The published decoders, and
`dequantize` to the bit, take it for 2 ** 128; whoever reads a file refuses it."""
PIECE = 2**19
"""Numbers worked on at a time on a CPU: a few copies of them fit its cache."""


def dequantize(
    blocks: UInt8[Tensor, "*rows groups 16"], scales: UInt8[Tensor, "*rows groups"]
) -> Float[Tensor, "*rows columns"]:
    """Value of every number times its group's power of two, in bfloat16.

    Exact for scale bytes 0...252; above, numbers too large for bfloat16 become infinite.
    """
    *rows, groups, _ = blocks.shape
    blocks, scales = blocks.reshape(-1, groups, 16), scales.reshape(-1, groups, 1)
    weight = blocks.new_empty(blocks.shape[0], groups, 16, 2, dtype=torch.int16)
    pairs = _pairs() if blocks.device.type == "cpu" else None
    for part in pieces(blocks.shape[0], groups * GROUP, blocks.device):
        if pairs is None or not _in_range(scales[part]):
            _decode(blocks[part], scales[part], weight[part].unbind(-1))
            continue
        values = pairs.index_select(0, blocks[part].flatten().int()).view(torch.bfloat16)
        power = scales[part].to(torch.int16).bitwise_left_shift_(7).view(torch.bfloat16)
        torch.mul(
            values.view(-1, groups, GROUP), power,
            out=weight[part].view(torch.bfloat16).flatten(-2),
        )  # fmt: skip
    return weight.view(torch.bfloat16).view(*rows, groups * GROUP)


def dequantize_transposed(
    blocks: UInt8[Tensor, "*experts rows groups 16"], scales: UInt8[Tensor, "*experts rows groups"]
) -> Float[Tensor, "*experts columns rows"]:
    """`dequantize` with the last two dims exchanged; contiguous."""
    *experts, rows, groups, _ = blocks.shape
    blocks = blocks.reshape(-1, rows, groups * 16)
    scales = scales.reshape(-1, rows, groups)
    weight = blocks.new_empty(blocks.shape[0], groups, 16, 2, rows, dtype=torch.int16)
    for e in range(blocks.shape[0]):
        turned = blocks[e].t().contiguous().view(groups, 16, rows)
        scale = scales[e].t().contiguous().view(groups, 1, rows)
        for part in pieces(groups, rows * GROUP, blocks.device):
            _decode(turned[part], scale[part], weight[e, part].unbind(2))
    return weight.view(torch.bfloat16).view(*experts, groups * GROUP, rows)


def quantize(
    weight: Float[Tensor, "*rows columns"],
    scales: UInt8[Tensor, "*rows groups"] | None = None,
) -> tuple[UInt8[Tensor, "*rows groups 16"], UInt8[Tensor, "*rows groups"]]:
    """Blocks and scales nearest to a weight: `dequantize` gives back what can be held exactly.

    The scale is the least power of two that keeps a group's largest magnitude within 6, the codes
    are rounded to nearest, ties to even; zeros keep their sign.  Groups made of codes whose
    largest is 4 or 6, with a scale byte in 3...252, come back bit for bit.

    Args:
        scales: of the groups the weight came from.  A group keeps its old scale where the numbers
            are at least as near to the codes on it, above all where all of them are exact.  A
            number that grew a little beyond 6 would double the scale of its whole group.

    Raises:
        ValueError: columns are no multiple of 32, or the weight has a number that is not finite.
    """
    *rows, columns = weight.shape
    groups = _groups(columns)
    numbers = _wide(weight).reshape(-1, groups, GROUP)
    old = None if scales is None else scales.reshape(-1, groups, 1)
    blocks = weight.new_empty(numbers.shape[0], groups, 16, dtype=torch.uint8)
    new = weight.new_empty(numbers.shape[0], groups, 1, dtype=torch.uint8)
    for part in pieces(numbers.shape[0], columns, weight.device):
        codes, new[part] = _encode(numbers[part], -1, None if old is None else old[part])
        low, high = codes.view(*codes.shape[:-1], 16, 2).unbind(-1)
        blocks[part] = high.bitwise_left_shift(4).bitwise_or_(low)
    return blocks.view(*rows, groups, 16), new.view(*rows, groups)


def quantize_transposed(
    weight: Float[Tensor, "*experts columns rows"],
    scales: UInt8[Tensor, "*experts rows groups"] | None = None,
) -> tuple[UInt8[Tensor, "*experts rows groups 16"], UInt8[Tensor, "*experts rows groups"]]:
    """`quantize` of the weight with its last two dims exchanged."""
    *experts, columns, rows = weight.shape
    groups = _groups(columns)
    numbers = _wide(weight).reshape(-1, groups, GROUP, rows)
    old = None if scales is None else scales.reshape(-1, rows, groups)
    blocks = weight.new_empty(numbers.shape[0], rows, groups * 16, dtype=torch.uint8)
    new = weight.new_empty(numbers.shape[0], rows, groups, dtype=torch.uint8)
    for e in range(numbers.shape[0]):
        turned = weight.new_empty(groups, 16, rows, dtype=torch.uint8)
        scale = weight.new_empty(groups, 1, rows, dtype=torch.uint8)
        before = None if old is None else old[e].t().contiguous().view(groups, 1, rows)
        for part in pieces(groups, rows * GROUP, weight.device):
            kept = None if before is None else before[part]
            codes, scale[part] = _encode(numbers[e, part], 1, kept)
            low, high = codes.view(-1, 16, 2, rows).unbind(2)
            turned[part] = high.bitwise_left_shift(4).bitwise_or_(low)
        blocks[e].copy_(turned.view(groups * 16, rows).t())
        new[e].copy_(scale.view(groups, rows).t())
    return blocks.view(*experts, rows, groups, 16), new.view(*experts, rows, groups)


def pieces(count: int, numbers: int, device: torch.device) -> Iterator[slice]:
    """Parts of `count` items of `numbers` each that fit a CPU's cache; elsewhere larger ones."""
    step = max(1, (PIECE if device.type == "cpu" else 64 * PIECE) // max(1, numbers))
    for start in range(0, count, step):
        yield slice(start, start + step)


def _groups(columns: int) -> int:
    if columns % GROUP:
        raise ValueError(f"mxfp4: {columns} columns are not a multiple of {GROUP}")
    return columns // GROUP


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype in (torch.bfloat16, torch.float32) else weight.float()


def _pairs() -> Tensor:
    """The two bfloat16 values of each byte, the low nibble's first, as one 32-bit number."""
    values = torch.tensor(VALUES + tuple(-v for v in VALUES), dtype=torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], -1).view(torch.int32)[:, 0]


def _in_range(scale: Tensor) -> bool:
    """Whether bfloat16 holds all codes on these scales, none of them below its normal numbers."""
    least, most = (int(end) for end in scale.aminmax()) if scale.numel() else (127, 127)
    return least >= 2 and most <= 252


def _decode(packed: Tensor, scale: Tensor, out: tuple[Tensor, ...]) -> None:
    """Bits of the bfloat16 values of low and high nibbles; `scale` broadcasts against `packed`."""
    if not _in_range(scale):
        _decode_any(packed, scale, out)
        return
    # Code c >= 2 at scale s has the bits ((s - 1) << 7) + (c << 6): one mantissa bit is c's last.
    # 0.5 (c = 1) has no mantissa bit, and 0 has no exponent either.
    base = (scale.to(torch.int16) - 1) << 7
    for nibbles, bits in zip((packed & 15, packed >> 4), out, strict=True):
        n = nibbles.to(torch.int16)
        code = n & 7
        zero, half = torch.empty_like(n), torch.empty_like(n)
        torch.gt(code, 0, out=zero)
        torch.eq(code, 1, out=half)
        code.sub_(half).bitwise_left_shift_(6).add_(base).mul_(zero)
        torch.bitwise_or(code, n.bitwise_and_(8).bitwise_left_shift_(12), out=bits)


def _decode_any(packed: Tensor, scale: Tensor, out: tuple[Tensor, ...]) -> None:
    values = torch.tensor(VALUES + tuple(-v for v in VALUES), device=packed.device).double()
    power = torch.exp2(scale.double() - 127)
    for nibbles, bits in zip((packed & 15, packed >> 4), out, strict=True):
        bits.copy_((values[nibbles.int()] * power).bfloat16().view(torch.int16))


# Magnitudes at which the code goes up by one, and whether the tie itself does (to the even code).
_STEPS = ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0))


def _encode(x: Tensor, dim: int, old: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes with their signs (as x, in uint8) and scales (size 1 at `dim`) of groups along `dim`.

    Args:
        old: scales to keep where the group loses no more on them.
    """
    kind, mantissa = (torch.int16, 7) if x.dtype == torch.bfloat16 else (torch.int32, 23)
    bits = x.view(kind) & torch.iinfo(kind).max
    largest = bits.amax(dim, keepdim=True)
    if bits.numel() and int(largest.max()) >= 255 << mantissa:
        raise ValueError("mxfp4: the weight has numbers that are not finite")
    sixth = (largest.view(x.dtype).float() / 6).view(torch.int32)
    scale = (sixth + 0x7FFFFF) >> 23  # the exponent, and one more unless it is a power of two
    if old is not None:
        old = old.int()
        keeps = _exact(x, bits, old, mantissa).all(dim, keepdim=True)
        if not bool(keeps.all()):
            keeps |= _loss(x, old, dim) <= _loss(x, scale, dim)
        scale = torch.where(keeps, old, scale)
    nonzero = largest > 0
    if bool(((scale < 3) & nonzero).any()):
        codes = _codes_any(x, scale)
    else:
        codes = _codes(x.view(kind), bits, torch.where(nonzero, scale, 130), mantissa)
    return codes, scale.to(torch.uint8)


def _loss(x: Tensor, scale: Tensor, dim: int) -> Tensor:
    """Sum of the squares of what groups lose on a scale."""
    power = torch.exp2(scale.double() - 127)
    codes = _codes_any(x, scale)
    values = torch.tensor(VALUES + tuple(-v for v in VALUES), device=x.device).double()
    return (values[codes.int()] * power - x.double()).square_().sum(dim, keepdim=True)


def _codes(signed: Tensor, bits: Tensor, scale: Tensor, mantissa: int) -> Tensor:
    """Codes of the numbers with these bits, with and without their sign; overwrites `bits`."""
    ratio = bits.sub_(((scale - 127) << mantissa).to(bits.dtype))  # bits of |x| / 2 ** power
    code = (signed >> (mantissa + 8)).bitwise_and_(8)
    above = torch.empty_like(ratio)
    for magnitude, tie in _STEPS:
        code.add_(torch.gt(ratio, _bits(magnitude, mantissa) - tie, out=above))
    return code.to(torch.uint8)


def _codes_any(x: Tensor, scale: Tensor) -> Tensor:
    y = x.double() * torch.exp2(127.0 - scale.double())
    code = y.signbit().to(torch.uint8) << 3
    for magnitude, tie in _STEPS:
        code += (y.abs() >= magnitude) if tie else (y.abs() > magnitude)
    return code


def _exact(x: Tensor, bits: Tensor, scale: Tensor, mantissa: int) -> Tensor:
    """True where a number is one of the values times 2 ** (scale - 127)."""
    least, most = (int(end) for end in scale.aminmax())
    if least < 3 or most > 252:
        y = (x.double() * torch.exp2(127.0 - scale.double())).abs()
        return torch.stack([y == value for value in VALUES]).any(0)
    ratio = bits.long() - ((scale - 127).long() << mantissa)
    one_bit = ratio & ((1 << (mantissa - 1)) - 1) == 0  # no mantissa bit but the first
    one_bit &= (ratio >= _bits(0.5, mantissa)) & (ratio <= _bits(6.0, mantissa))
    return (one_bit & (ratio != _bits(0.75, mantissa))) | (bits == 0)


def _bits(value: float, mantissa: int) -> int:
    """Of a number in bfloat16 or float32, as an integer; the value has few mantissa bits."""
    fraction, exponent = math.frexp(value)
    return ((exponent + 126) << mantissa) + int((2 * fraction - 1) * (1 << mantissa))

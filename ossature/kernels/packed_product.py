"""Rows times their expert's matrix, straight from its MXFP4 bytes, on CUDA: a kernel in Triton.

A step of sampling multiplies few rows with few of the experts.  To unpack a layer first would read
and write all of its matrices for that; here a program reads the bytes of one expert that it needs
for a tile of the result, once, and unpacks them in registers.

The experts' rows are cut into tiles on the device: the host never learns how many rows each has.

Its eager twin is the product with `ossature.kernels.mxfp4.dequantize`, in
tests/kernels/test_packed_product.py, under Triton's interpreter where there is no GPU.
"""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

ROWS = 16
"""Rows of a tile: the fewest that a tensor core takes."""
OUT = 64
"""Columns of a tile of the result."""
GROUPS = 4
"""Groups of 32 numbers that are unpacked at a time."""


def packed_product(rows: Tensor, counts: Tensor, blocks: Tensor, scales: Tensor) -> Tensor:
    """(rows, in) -> (rows, out), in the dtype of the rows; sums are in fp32.

    Args:
        rows: (rows, in), sorted by expert; counts: (experts,) rows of each.
        blocks: (experts, out, groups, 16) and scales: (experts, groups, out), both contiguous, as
            in `ossature.model.frozen_experts`.
    """
    experts, out, groups, _ = blocks.shape
    assert rows.is_contiguous() and blocks.is_contiguous() and scales.is_contiguous()
    assert scales.shape == (experts, groups, out) and rows.shape[1] == groups * 32
    result = rows.new_empty(len(rows), out)
    expert, first, end = _tiles(counts, len(rows))
    # The interpreter cannot multiply bfloat16; in float32 the same numbers are multiplied.
    kind = tl.bfloat16 if rows.is_cuda and rows.dtype == torch.bfloat16 else tl.float32
    _multiply[(len(expert), triton.cdiv(out, OUT))](  # pyright: ignore[reportIndexIssue]
        rows, result, blocks, scales, expert, first, end, out,
        groups, kind, ROWS, OUT, GROUPS,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    return result


def _tiles(counts: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert, first row, and the end of the expert's rows, of every tile.

    As many as there can be whatever the counts; those that are not needed have no rows.
    """
    most = min(len(counts), rows) + rows // ROWS
    tile = torch.arange(most, device=counts.device)
    number = (counts + ROWS - 1) // ROWS
    after = number.cumsum(0)
    expert = torch.searchsorted(after, tile, right=True).clamp_(max=len(counts) - 1)
    end = counts.cumsum(0)[expert]
    first = end - counts[expert] + (tile - after[expert] + number[expert]) * ROWS
    return expert, first, end


@triton.jit
def _value(code):
    """The fp32 number that a code of four bits stands for: its bits are the code's, in place."""
    size = code & 7
    bits = (((size >> 1) + 126) << 23) | ((size & 1) << 22)
    bits = tl.where(size == 1, 126 << 23, tl.where(size == 0, 0, bits))
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def _multiply(
    rows, result, blocks, scales, experts, firsts, ends, out,
    groups: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    expert = tl.load(experts + tile)  # 64 bits: what follows is too large for 32
    first, end = tl.load(firsts + tile), tl.load(ends + tile)
    if first < end:
        row = first + tl.arange(0, ROWS)
        column = tl.program_id(1) * OUT + tl.arange(0, OUT)
        byte = tl.arange(0, GROUPS * 16)
        sums = tl.zeros((ROWS, OUT), tl.float32)
        row_there, column_there = (row < end)[:, None], (column < out)[None, :]
        numbers = rows + row[:, None] * (groups * 32)
        for start in range(0, groups, GROUPS):
            place = start * 16 + byte
            there = place < groups * 16
            both = there[:, None] & column_there
            packed = tl.load(
                blocks + (expert * out + column)[None, :] * (groups * 16) + place[:, None],
                mask=both, other=0,
            ).to(tl.int32)  # fmt: skip
            scale = tl.load(
                scales + (expert * groups + place // 16)[:, None] * out + column[None, :],
                mask=both, other=127,
            ).to(tl.int32)  # fmt: skip
            # 2 ** (scale - 127); the least has no exponent.
            power = tl.where(scale == 0, 1 << 22, scale << 23).to(tl.float32, bitcast=True)
            wanted = row_there & there[None, :]
            even = tl.load(numbers + 2 * place[None, :], mask=wanted, other=0.0).to(KIND)
            odd = tl.load(numbers + 2 * place[None, :] + 1, mask=wanted, other=0.0).to(KIND)
            low = (_value(packed & 15) * power).to(KIND)
            high = (_value(packed >> 4) * power).to(KIND)
            sums = tl.dot(even, low, sums, input_precision="ieee")
            sums = tl.dot(odd, high, sums, input_precision="ieee")
        tl.store(
            result + row[:, None] * out + column[None, :],
            sums.to(result.dtype.element_ty),
            mask=row_there & column_there,
        )

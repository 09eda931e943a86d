"""The MXFP4 codec against exact arithmetic, hand-made numbers, a numpy reference and its laws."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from ossature.kernels import mxfp4
from ossature.kernels.mxfp4 import (
    VALUES,
    dequantize,
    dequantize_transposed,
    quantize,
    quantize_transposed,
)
from tests.golden import golden


def pack(codes: Tensor) -> Tensor:
    """Codes (..., 32) -> bytes (..., 16), the low nibble first."""
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def all_codes() -> tuple[Tensor, Tensor]:
    """Every code, in both nibbles, at every scale byte: (256, 1, 16) and (256, 1)."""
    codes = torch.cat([torch.arange(16), torch.arange(16).flip(0)])
    blocks = pack(codes).expand(256, 1, 16).contiguous()
    return blocks, torch.arange(256, dtype=torch.uint8).view(256, 1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """-0.0 is not 0.0 here."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))


def canonical(rows: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random groups whose largest code is 6 or 7, at scale bytes 3...252."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, groups, 32), generator=generator)
    at = torch.randint(0, 32, (rows, groups, 1), generator=generator)
    largest = torch.tensor([6, 7, 14, 15])[torch.randint(0, 4, at.shape, generator=generator)]
    codes.scatter_(-1, at, largest)
    scales = torch.randint(3, 253, (rows, groups), generator=generator, dtype=torch.uint8)
    return pack(codes), scales


def test_every_code_at_every_scale_is_its_value_times_a_power_of_two():
    blocks, scales = all_codes()
    weight = dequantize(blocks, scales).double()

    for byte in range(256):
        for place in range(32):
            code = place if place < 16 else 31 - place
            exact = Fraction(VALUES[code & 7]) * Fraction(2) ** (byte - 127)
            value = weight[byte, place].item()
            assert math.copysign(1, value) == (-1 if code & 8 else 1), (byte, code)
            if exact >= 2**128:  # more than bfloat16 can say
                assert math.isinf(value), (byte, code)
            else:
                assert Fraction(abs(value)) == exact, (byte, code)


@pytest.mark.parametrize("scales_of_a_call", ["one", "all"])
def test_ordinary_and_extreme_scales_take_different_roads_to_the_same_bits(scales_of_a_call: str):
    """Extreme scales anywhere in a piece send all of it through float64."""
    blocks, scales = all_codes()
    together = dequantize(blocks, scales)
    if scales_of_a_call == "one":
        alone = [dequantize(b[None], s[None]) for b, s in zip(blocks, scales, strict=True)]
        assert same_bits(torch.cat(alone), together)
    else:
        assert same_bits(dequantize(blocks[2:253], scales[2:253]), together[2:253])


def test_decodes_like_transformers_and_in_its_orientation():
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 48, 5, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 253, (3, 48, 5), dtype=torch.uint8, generator=generator)

    theirs = _convert_moe_packed_tensors(blocks, scales)  # (experts, in, out)

    assert same_bits(dequantize_transposed(blocks, scales), theirs)
    assert same_bits(dequantize(blocks, scales), theirs.mT.contiguous())


def test_a_byte_holds_the_even_number_in_its_low_nibble():
    block = torch.zeros(1, 16, dtype=torch.uint8)
    block[0, 0], block[0, 15] = 0x72, 0xF1  # 1.0, 6.0 ... 0.5, -6.0
    weight = dequantize(block, torch.tensor([128], dtype=torch.uint8))

    assert weight[:2].tolist() == [2.0, 12.0]
    assert weight[-2:].tolist() == [1.0, -12.0]


def test_canonical_groups_come_back_bit_for_bit():
    blocks, scales = canonical(rows=300, groups=7)
    again = quantize(dequantize(blocks, scales))

    assert torch.equal(again[0], blocks)
    assert torch.equal(again[1], scales)


def test_groups_that_are_not_canonical_keep_their_values_and_settle_after_one_pass():
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (200, 4, 32), generator=generator)
    codes = torch.where(codes & 7 > 5, codes & 8 | 5, codes)  # largest is 3.0
    blocks, scales = pack(codes), torch.full((200, 4), 120, dtype=torch.uint8)
    weight = dequantize(blocks, scales)
    once = quantize(weight)

    assert not torch.equal(once[0], blocks)
    assert same_bits(dequantize(*once), weight)
    twice = quantize(dequantize(*once))
    assert torch.equal(once[0], twice[0]) and torch.equal(once[1], twice[1])


def test_groups_of_zeros_keep_the_sign_of_each():
    weight = torch.zeros(1, 64, dtype=torch.bfloat16)
    weight[0, 5::7] = -0.0
    blocks, scales = quantize(weight)

    assert scales.tolist() == [[0, 0]]
    assert same_bits(dequantize(blocks, scales), weight)


TIES = [  # a number, and what it becomes in a group whose largest is 6
    (0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0),
    (0.2490234375, 0.0), (0.251953125, 0.5), (0.74609375, 0.5), (0.75390625, 1.0),
    (1.2421875, 1.0), (1.2578125, 1.5), (1.7421875, 1.5), (1.7578125, 2.0), (2.484375, 2.0),
    (2.515625, 3.0), (3.484375, 3.0), (3.515625, 4.0), (4.96875, 4.0), (5.03125, 6.0),
    (1e-30, 0.0), (6.0, 6.0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exponent", [-120, -10, 0, 9, 120])
def test_numbers_are_rounded_to_nearest_and_ties_to_the_even_code(
    dtype: torch.dtype, exponent: int
):
    group = torch.zeros(32, dtype=torch.float64)
    expected = torch.zeros(32, dtype=torch.float64)
    for n, (number, rounded) in enumerate(TIES):
        sign = -1.0 if n % 2 else 1.0
        group[n], expected[n] = sign * number, sign * rounded
    weight = (group * 2.0**exponent).to(dtype)
    blocks, scales = quantize(weight)

    assert scales.tolist() == [127 + exponent]
    assert same_bits(dequantize(blocks, scales), (expected * 2.0**exponent).bfloat16())


@pytest.mark.parametrize(
    ("largest", "byte"),
    [(6.0, 127), (6.03125, 128), (3.0, 126), (3.015625, 127), (4.0, 127), (1.0, 125), (0.75, 124)],
)
def test_the_scale_is_the_least_power_of_two_that_keeps_the_largest_within_6(largest, byte):
    weight = torch.zeros(32, dtype=torch.bfloat16)
    weight[3] = -largest

    assert quantize(weight)[1].tolist() == [byte]


def exact_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rule in exact arithmetic, a number at a time."""
    codes, scales = [], []
    for group in weight.double().view(-1, 32).tolist():
        largest = Fraction(max(map(abs, group)))
        byte = 0
        while largest > 6 * Fraction(2) ** (byte - 127):
            byte += 1
        byte = byte if largest == 0 else max(byte, 1)
        scales.append(byte)
        for number in group:
            y = Fraction(abs(number)) / Fraction(2) ** (byte - 127)
            distance = [abs(y - Fraction(value)) for value in VALUES]
            near = [code for code in range(8) if distance[code] == min(distance)]
            code = next(c for c in near if c % 2 == 0) if len(near) > 1 else near[0]
            codes.append(code | (8 if math.copysign(1, number) < 0 else 0))
    return (
        pack(torch.tensor(codes).view(*weight.shape[:-1], -1, 32)),
        torch.tensor(scales, dtype=torch.uint8).view(*weight.shape[:-1], -1),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("exponent", [0, -14])
def test_quantizes_random_weights_like_exact_arithmetic(dtype: torch.dtype, exponent: int):
    weight = (torch.randn(40, 96) * torch.randn(40, 1).exp() * 2.0**exponent).to(dtype)
    ours, exact = quantize(weight), exact_quantize(weight)

    assert torch.equal(ours[0], exact[0])
    assert torch.equal(ours[1], exact[1])


def test_the_smallest_and_largest_numbers_are_quantized_like_exact_arithmetic():
    """Below 2 ** -122 the bits are those of subnormal numbers, or of scales under 3."""
    exponents = [-133, -130, -127, -126, -125, -124, -123, -122, -121, 100, 120, 125]
    rows = [torch.randint(-8, 9, (96,)).double() / 2 * 2.0**e for e in exponents]
    weight = torch.stack(rows).bfloat16()
    assert weight.isfinite().all()
    ours, exact = quantize(weight), exact_quantize(weight)

    assert torch.equal(ours[1], exact[1])
    assert torch.equal(ours[0], exact[0])


def test_a_source_scale_is_kept_where_the_group_loses_no_more_on_it():
    weight = torch.zeros(5, 32, dtype=torch.bfloat16)
    weight[0, :3] = torch.tensor([1.5, -0.5, 2.0])  # on the grid of 2 ** 0
    weight[1, :3] = torch.tensor([1.5, -0.5, 2.5])  # 2.5 is not; nor is it on that of 2 ** -1
    weight[2, :3] = torch.tensor([1.5, -0.5, 0.75])  # 0.75 is not, but is exact at 2 ** -1
    weight[3, 0] = 8.0  # too large for it
    weight[4, :3] = torch.tensor([6.03125, 1.5, 0.5])  # a little too large; 2 ** 1 has no 0.5
    own = quantize(weight)[1]
    blocks, scales = quantize(weight, torch.full((5, 1), 127, dtype=torch.uint8))

    assert own.flatten().tolist() == [126, 126, 125, 128, 128]
    assert scales.flatten().tolist() == [127, 127, 125, 128, 127]
    assert dequantize(blocks, scales)[0, :3].tolist() == [1.5, -0.5, 2.0]
    assert dequantize(blocks, scales)[4, :3].tolist() == [6.0, 1.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("low", "high"), [(3, 252), (0, 252)])
def test_with_the_source_scales_every_group_comes_back_bit_for_bit(low, high, dtype):
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (200, 6, 16), dtype=torch.uint8, generator=generator)
    blocks[::9] &= 0x33  # not canonical
    blocks[::11] &= 0x88  # zeros of both signs
    scales = torch.randint(low, high + 1, (200, 6), dtype=torch.uint8, generator=generator)
    weight = dequantize(blocks, scales).to(dtype)

    for again in (quantize(weight, scales), quantize_transposed(weight.mT.contiguous(), scales)):
        assert torch.equal(again[0], blocks)
        assert torch.equal(again[1], scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_two_scales_a_group_takes_the_one_that_loses_less(dtype: torch.dtype):
    weight = torch.randn(64, 64).to(dtype)

    def losses(pair: tuple[Tensor, Tensor]) -> Tensor:
        lost = dequantize(*pair).double() - weight.double()
        return lost.view(64, 2, 32).square().sum(-1)

    own = quantize(weight)
    for byte in (3, 120, 125, 126, 127, 128, 130, 252):
        old = torch.full((64, 2), byte, dtype=torch.uint8)
        kept = quantize(weight, old)
        assert (losses(kept) <= losses(own)).all(), byte
        chosen = kept[1] == old
        assert torch.equal(kept[1][~chosen], own[1][~chosen]), byte
        if byte in (3, 252):  # nowhere near
            assert torch.equal(kept[0], own[0]) and not chosen.any()
        if byte in (125, 126):
            assert chosen.any()


@pytest.mark.parametrize("kept", [False, True])
def test_the_transposed_forms_are_the_same_codec(kept: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mxfp4, "PIECE", 3 * 40 * 32)  # several pieces, the last one shorter
    weight = torch.randn(3, 40, 160).bfloat16()
    blocks, scales = quantize(weight)
    old = scales + torch.randint(0, 2, scales.shape, dtype=torch.uint8) if kept else None
    one, two = quantize(weight, old), quantize_transposed(weight.mT.contiguous(), old)

    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert one[0].shape == (3, 40, 5, 16)
    assert same_bits(dequantize_transposed(blocks, scales), dequantize(blocks, scales).mT)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_numbers_that_are_not_finite_are_refused(bad: float, dtype: torch.dtype):
    weight = torch.zeros(3, 64, dtype=dtype)
    weight[2, 40] = bad

    with pytest.raises(ValueError, match="not finite"):
        quantize(weight)
    with pytest.raises(ValueError, match="not finite"):
        quantize_transposed(weight.mT.contiguous())


def test_columns_must_be_whole_groups():
    with pytest.raises(ValueError, match="48 columns are not a multiple of 32"):
        quantize(torch.zeros(2, 48))


def vectors() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(golden("mxfp4_vectors.safetensors"))


def test_decodes_the_golden_vectors():
    v = vectors()

    assert same_bits(dequantize(v["deq.blocks"], v["deq.scales"]), v["deq.values_bf16"])


@pytest.mark.parametrize("kind", ["normal", "small", "heavy", "ties", "zeros"])
def test_quantizes_the_golden_vectors(kind: str):
    v = vectors()
    for weight in (v[f"q.{kind}.input"], v[f"q.{kind}.input"].float()):
        blocks, scales = quantize(weight)
        assert torch.equal(scales, v[f"q.{kind}.up.scales"])
        assert torch.equal(blocks, v[f"q.{kind}.up.blocks"])


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits():
    weight = torch.randn(4, 96, 320).bfloat16()
    ours, theirs = quantize(weight), quantize(weight.cuda())
    blocks, scales = all_codes()

    assert torch.equal(ours[0], theirs[0].cpu()) and torch.equal(ours[1], theirs[1].cpu())
    assert same_bits(dequantize(blocks.cuda(), scales.cuda()).cpu(), dequantize(blocks, scales))
    turned = quantize_transposed(weight.mT.contiguous().cuda())
    assert torch.equal(ours[0], turned[0].cpu())

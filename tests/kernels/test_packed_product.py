"""The kernel on packed experts = the product with the unpacked ones; interpreted without a GPU.

In child processes: Triton reads the source of a kernel, and the hook that checks shapes puts a
function of its own in the kernel's place.
"""

import os
import subprocess
import sys

import pytest
import torch

from ossature.kernels import mxfp4
from ossature.kernels.frozen_experts import unpack
from tests.ranks import run_ranks

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def experts(count: int, out: int, groups: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """All codes, and scales from 2 ** -3 to 2 ** 3; no dim equals another."""
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (count, out, groups, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(124, 131, (count, groups, out), generator=draw, dtype=torch.uint8)
    return blocks.to(DEVICE), scales.to(DEVICE)


def rows_for(counts: list[int], width: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(sum(counts), width, generator=draw).to(DEVICE, dtype)


def twin(rows: torch.Tensor, counts: list[int], blocks: torch.Tensor, scales: torch.Tensor):
    whole = unpack(blocks, scales, torch.float64)
    parts = rows.double().split(counts)
    return torch.cat([part @ whole[e].mT for e, part in enumerate(parts)])


CASES = [
    ([1, 0, 0], 40, 1),
    ([0, 3, 17, 0, 1], 96, 3),
    ([16, 33, 2], 130, 5),
    ([0, 0, 32, 0], 64, 4),
]


def test_packed_rows_equal_unpacked_ones():
    run_ranks(1, multiply_rows)


def multiply_rows(rank: int, world: int) -> None:
    from ossature.kernels.packed_product import packed_product

    for counts, out, groups in CASES:
        blocks, scales = experts(len(counts), out, groups)
        rows = rows_for(counts, groups * 32, torch.float32)
        found = packed_product(rows, torch.tensor(counts, device=DEVICE), blocks, scales)
        expected = twin(rows, counts, blocks, scales)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_bfloat16_loses_its_last_bits_once_at_the_end():
    run_ranks(1, multiply_bfloat16)


def multiply_bfloat16(rank: int, world: int) -> None:
    from ossature.kernels.packed_product import packed_product

    counts = [2, 0, 5]
    blocks, scales = experts(3, 48, 6)
    rows = rows_for(counts, 6 * 32, torch.bfloat16)
    found = packed_product(rows, torch.tensor(counts, device=DEVICE), blocks, scales)
    assert found.dtype == torch.bfloat16
    expected = twin(rows, counts, blocks, scales)
    last = 2**-8 if DEVICE == "cuda" else 2**-7  # a GPU rounds, the interpreter cuts off
    torch.testing.assert_close(found.double(), expected, rtol=last, atol=1e-4)


def test_every_code_on_every_scale_is_the_number_it_stands_for():
    run_ranks(1, unpack_by_products)


def unpack_by_products(rank: int, world: int) -> None:
    from ossature.kernels.packed_product import packed_product

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 253, 16, 16)
    scales = torch.arange(253, dtype=torch.uint8).view(1, 1, 253).expand(1, 16, 253)
    blocks, scales = blocks.contiguous().to(DEVICE), scales.contiguous().to(DEVICE)
    whole = mxfp4.dequantize(blocks, scales.mT)[0].float()
    # One number of each row at a time: what comes out is that number.
    rows = torch.eye(512, device=DEVICE)
    found = packed_product(rows, torch.tensor([512], device=DEVICE), blocks, scales)
    torch.testing.assert_close(found.mT, whole, rtol=0, atol=0)


def test_few_rows_of_packed_experts_take_the_kernel_and_many_do_not():
    run_ranks(1, adapt_rows)


def adapt_rows(rank: int, world: int) -> None:
    from ossature.kernels import frozen_experts, packed_product

    calls = []
    kernel = packed_product.packed_product
    packed_product.packed_product = lambda *args: calls.append(1) or kernel(*args)
    draw = torch.Generator().manual_seed(2)
    for counts in ([3, 0, 8], [30, 2, 31]):
        blocks, scales = experts(3, 48, 2)
        rows = rows_for(counts, 64, torch.float32)
        bias, weights = (torch.randn(*shape, generator=draw) for shape in ((3, 48), (len(rows),)))
        a, b = (torch.randn(*shape, generator=draw) for shape in ((3, 5, 64), (3, 48, 5)))
        bias, weights, a, b = (x.to(DEVICE) for x in (bias, weights, a, b))
        same = blocks, scales, bias, weights, None, a, b, None, 0.5
        numbers = torch.tensor(counts, device=DEVICE)
        found = frozen_experts._grouped(rows, numbers, *same)[0]
        expected = frozen_experts._loop(rows, numbers, *same)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert len(calls) == 1, "eleven rows of three experts are few, sixty-three are not"


def test_tiles_cover_every_row_once():
    run_ranks(1, cover_rows)


def cover_rows(rank: int, world: int) -> None:
    from ossature.kernels import packed_product

    counts = torch.tensor([0, 16, 1, 0, 40, 7, 0])
    expert, first, end = packed_product._tiles(counts, int(counts.sum()))
    covered = []
    for e, start, stop in zip(expert.tolist(), first.tolist(), end.tolist(), strict=True):
        covered += [(e, row) for row in range(start, min(start + packed_product.ROWS, stop))]
    owner = torch.repeat_interleave(torch.arange(7), counts).tolist()
    assert sorted(covered) == sorted(zip(owner, range(64), strict=True))


COMPILE = """
import sys
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ossature.kernels.packed_product import _multiply
types = {"rows": sys.argv[1], "result": sys.argv[1], "blocks": "*u8", "scales": "*u8",
         "experts": "*i64", "firsts": "*i64", "ends": "*i64", "out": "i32"}
fixed = {"groups": 90, "KIND": tl.bfloat16 if sys.argv[1] == "*bf16" else tl.float32,
         "ROWS": 16, "OUT": 64, "GROUPS": 4}
source = ASTSource(_multiply, types | dict.fromkeys(fixed, "constexpr"), constexprs=fixed)
made = compile(source, target=GPUTarget("cuda", int(sys.argv[2]), 32))
print("mma" in made.asm["ptx"], len(made.asm["cubin"]) > 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tensor_cores"), [("*bf16", True), ("*fp32", False)])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernel_compiles_for_gpus_that_are_not_here(dtype, tensor_cores, capability, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, dtype, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tensor_cores), "True"]

"""The activation of frozen experts, worked on in parts, against the eager form."""

import pytest
import torch

from ossature.kernels.frozen_experts import PART_ROWS, weighted_swiglu
from ossature.model.moe import swiglu


@pytest.mark.parametrize("rows", [0, 1, PART_ROWS, 2 * PART_ROWS + 7])
def test_parts_of_rows_are_the_eager_form_with_its_gradients(rows: int):
    """Gates and ups on both sides of the limit; the last part is shorter than the others."""
    generator = torch.Generator().manual_seed(0)
    gate_up = 4 * torch.randn(rows, 10, generator=generator, dtype=torch.float64)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    dout = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    found = []
    for form in (
        lambda x, w: weighted_swiglu(x, w, 1.702, 7.0),
        lambda x, w: swiglu(x, 1.702, 7.0) * w[:, None],
    ):
        inputs = gate_up.clone().requires_grad_(), weights.clone().requires_grad_()
        out = form(*inputs)
        out.backward(dout)
        found.append((out.detach(), *(tensor.grad for tensor in inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

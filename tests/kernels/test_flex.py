"""FlexAttention with sinks against the eager form: forward on CPU, gradients on a GPU."""

import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from ossature.kernels import flex
from ossature.kernels.flex import flex_attend, flex_mask
from ossature.model.attention import Layout, attend


def make(device: str, dtype: torch.dtype):
    shapes = [(2, 200, n, 16) for n in (6, 2, 2)] + [(6,)]
    tensors = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    document = torch.zeros(2, 200, dtype=torch.int64, device=device)
    document[0, 50:] = 1
    document[1, 130:] = -1
    return tensors, Layout(document)


@pytest.mark.parametrize("window", [None, 33])
def test_forward_equals_the_eager_form(window):
    (q, k, v, sinks), layout = make("cpu", torch.float32)
    with warnings.catch_warnings():
        # "flex_attention called without torch.compile": here that is what we want.
        warnings.simplefilter("ignore")
        out = flex_attend(q, k, v, sinks=sinks, block_mask=flex_mask(layout.run, window))

    want = attend(q, k, v, sinks=sinks, mask=layout.mask(window))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_mask_is_the_same_when_its_making_is_compiled(monkeypatch):
    """As it is on CUDA, without a number for each pair of a query and a key."""
    _, layout = make("cpu", torch.float32)
    plain = flex_mask(layout.run, 33)
    monkeypatch.setattr(flex, "_create_block_mask", lambda _: torch.compile(create_block_mask))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own parts
        compiled = flex_mask(layout.run, 33)

    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(compiled, name), getattr(plain, name)), name


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 33])
def test_gradients_of_q_k_v_and_sinks_equal_those_of_the_eager_form(window):
    inputs, layout = make("cuda", torch.float32)
    for x in inputs:
        x.requires_grad_()
    q, k, v, sinks = inputs
    want = attend(q, k, v, sinks=sinks, mask=layout.mask(window))
    upstream = torch.randn_like(want)
    want_gradients = torch.autograd.grad(want, inputs, upstream)

    out = flex_attend(q, k, v, sinks=sinks, block_mask=flex_mask(layout.run, window))

    torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3)
    for got, expected in zip(torch.autograd.grad(out, inputs, upstream), want_gradients,
                             strict=True):  # fmt: skip
        assert (got - expected).norm() <= 2e-3 * expected.norm()

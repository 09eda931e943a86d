"""RMSNorm against transformers' and against autograd of the formula."""

import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

from ossature.kernels.norm import rms_norm


def test_bfloat16_is_bit_equal_to_transformers():
    """The weight is multiplied in fp32, before the cast; Llama's order differs in the last bit."""
    theirs = GptOssRMSNorm(64, eps=1e-5)
    theirs.weight.data = torch.randn(64)
    x = torch.randn(500, 64).bfloat16()

    out = rms_norm(x, theirs.weight.data, 1e-5)

    assert out.dtype == torch.bfloat16
    assert torch.equal(out, theirs(x))


def test_gradients_are_those_of_the_formula():
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))
    plain = weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), plain)

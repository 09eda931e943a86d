"""Head and loss in chunks against torch's cross_entropy on whole logits."""

import pytest
import torch
import torch.nn.functional as F

from ossature.kernels.cross_entropy import linear_cross_entropy


def make(tokens=29, hidden=12, vocab=97, dtype=torch.float64):
    x = torch.randn(tokens, hidden, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,))
    targets[torch.rand(tokens) < 0.3] = -100
    return x, weight, targets


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 29, 64])
def test_chunks_change_neither_loss_nor_gradients(chunk_tokens):
    """29 tokens are divisible by none of the chunks but their own number and one."""
    x, weight, targets = make()
    want = F.cross_entropy(x @ weight.mT, targets, ignore_index=-100, reduction="sum")
    want_gradients = torch.autograd.grad(want * 0.7, (x, weight))

    loss = linear_cross_entropy(x, weight, targets, chunk_tokens)

    torch.testing.assert_close(loss, want)
    for got, expected in zip(torch.autograd.grad(loss * 0.7, (x, weight)), want_gradients,
                             strict=True):  # fmt: skip
        torch.testing.assert_close(got, expected)


def test_the_softmax_of_bfloat16_logits_is_float32():
    x, weight, targets = make(tokens=300, hidden=64, vocab=5000, dtype=torch.bfloat16)
    logits = (x @ weight.mT).float()
    want = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")

    loss = linear_cross_entropy(x, weight, targets)

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    got = torch.autograd.grad(loss, (x, weight))
    expected = torch.autograd.grad(want, (x, weight))
    for a, b in zip(got, expected, strict=True):
        assert (a - b).float().norm() < 0.01 * b.float().norm()


def test_nothing_counted_is_a_loss_of_zero_with_zero_gradients():
    x, weight, targets = make()
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, -100))

    assert loss.item() == 0.0
    assert not any(g.any() for g in torch.autograd.grad(loss, (x, weight)))


def test_a_very_unlikely_target_has_a_finite_loss():
    x = torch.tensor([[1.0]])
    weight = torch.tensor([[200.0], [0.0]])

    assert linear_cross_entropy(x, weight, torch.tensor([1])).item() == 200.0


def test_a_frozen_head_gets_no_gradient_and_the_input_does():
    x, weight, targets = make()
    loss = linear_cross_entropy(x, weight.detach(), targets)

    (dx,) = torch.autograd.grad(loss, (x,))
    want = F.cross_entropy(x @ weight.detach().mT, targets, reduction="sum")
    torch.testing.assert_close(dx, torch.autograd.grad(want, (x,))[0])


def test_only_a_chunk_of_the_logits_exists_at_a_time():
    x, weight, targets = make(tokens=512, vocab=1000, dtype=torch.float32)
    seen = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in [out] if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        linear_cross_entropy(x, weight, targets, chunk_tokens=32).backward()

    assert max(seen) <= 32 * 1000

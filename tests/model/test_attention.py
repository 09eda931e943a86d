"""Attention: each form against explicit softmax in fp64, forward and every gradient."""

import pytest
import torch

from ossature.model.attention import Layout, attend, attention_mask, fast_attend


def make_qkv(batch=2, seq=23, heads=6, kv_heads=2, head_dim=16, dtype=torch.float64):
    """Random q, k, v and sinks that are not zero; 3 queries per key-value head is not 2 heads."""
    shapes = [(batch, seq, n, head_dim) for n in (heads, kv_heads, kv_heads)] + [(heads,)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def explicit(q, k, v, sinks, mask):
    """The formula, head by head and query by query, with nothing clever."""
    rows = []
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            heads = []
            for h in range(q.shape[2]):
                kv = h // (q.shape[2] // k.shape[2])
                seen = mask[b, i].nonzero().flatten()
                logits = k[b, seen, kv] @ q[b, i, h] / q.shape[3] ** 0.5
                weights = logits.exp() / (logits.exp().sum() + sinks[h].exp())
                heads.append(weights @ v[b, seen, kv])
            rows.append(torch.stack(heads))
    return torch.stack(rows).view(q.shape)


def gradients(out, inputs):
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, inputs, upstream)


DOCUMENTS = {
    "one document": torch.zeros(2, 23, dtype=torch.int64),
    "packed": torch.tensor([[0] * 5 + [1] * 1 + [2] * 17, [0] * 13 + [1] * 6 + [-1] * 4]),
}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("window", [None, 1, 4, 7, 23, 100])
@pytest.mark.parametrize("form", ["eager", "fast"])
def test_attention_is_softmax_with_one_more_logit(form, window, documents):
    inputs = make_qkv()
    layout = Layout(DOCUMENTS[documents])
    q, k, v, sinks = inputs
    expected = explicit(*inputs, layout.mask(window))

    if form == "eager":
        out = attend(q, k, v, sinks=sinks, mask=layout.mask(window))
    else:
        out = fast_attend(q, k, v, sinks=sinks, layout=layout, window=window)

    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("window", [None, 64])
def test_long_rows_agree_in_float32(window):
    """Several blocks of the flash kernel and of the band, and a last one that is not full."""
    inputs = make_qkv(batch=1, seq=700, dtype=torch.float32)
    layout = Layout(torch.arange(700).ge(333).long()[None])
    q, k, v, sinks = inputs
    expected = attend(q, k, v, sinks=sinks, mask=layout.mask(window))

    out = fast_attend(q, k, v, sinks=sinks, layout=layout, window=window)

    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("window", [None, 8])
def test_the_sink_factor_is_computed_in_float32_for_bfloat16(window):
    """A factor from a bfloat16 logsumexp is off by 0.4 % on average."""
    q, k, v, sinks = make_qkv(seq=64, dtype=torch.float32)
    narrow = [x.detach().bfloat16() for x in (q, k, torch.ones_like(v), sinks)]
    layout = Layout(torch.zeros(2, 64, dtype=torch.int64))
    wide = [x.float() for x in narrow]

    # With all values one, the output is the factor itself, rounded to bfloat16 once or twice.
    got = fast_attend(*narrow[:3], sinks=narrow[3], layout=layout, window=window).float()
    want = attend(*wide[:3], sinks=wide[3], mask=layout.mask(window))

    error = (got - want) / want
    assert error.abs().mean() < 1.5e-3  # rounding to 8 bits alone is 1e-3
    assert abs(error.mean()) < 3e-4


def test_window_counts_the_query_itself():
    mask = attention_mask(torch.zeros(1, 7, dtype=torch.int64), window=3)

    assert mask[0].sum(dim=-1).tolist() == [1, 2, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("form", ["eager", "fast"])
def test_the_oldest_key_of_the_window_counts_and_the_one_before_does_not(form):
    q, k, v, sinks = (x.detach() for x in make_qkv(seq=40))
    layout = Layout(torch.zeros(2, 40, dtype=torch.int64))

    def last_query(changed: int) -> torch.Tensor:
        values = v.clone()
        values[:, changed] += 1.0
        if form == "eager":
            return attend(q, k, values, sinks=sinks, mask=layout.mask(8))[:, -1]
        return fast_attend(q, k, values, sinks=sinks, layout=layout, window=8)[:, -1]

    unchanged = last_query(0)
    assert torch.equal(last_query(40 - 1 - 8), unchanged)
    assert not torch.equal(last_query(40 - 1 - 7), unchanged)


def test_no_token_sees_another_document():
    document = torch.tensor([[0, 0, 0, 1, 1]])

    assert not attention_mask(document, window=None)[0, 3:, :3].any()


def test_an_id_that_comes_back_is_a_new_document():
    layout = Layout(torch.tensor([[5, 5, 2, 5], [5, -1, -1, -1]]))

    assert layout.run.tolist() == [[0, 0, 1, 2], [3, 4, 4, 4]]
    assert layout.position.tolist() == [[0, 1, 0, 0], [0, 0, 1, 2]]
    assert layout.bounds.tolist() == [0, 2, 3, 4, 5, 8]
    assert layout.longest == 3


def test_a_sink_scales_the_output_by_the_share_the_keys_keep():
    """Softmax with a sink = softmax without it, times sigmoid(logsumexp(logits) - sink)."""
    q, k, v, sinks = make_qkv(seq=9)
    mask = attention_mask(torch.zeros(2, 9, dtype=torch.int64), window=4)
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, keys) / q.shape[-1] ** 0.5
    lse = logits.masked_fill(~mask[:, None], -torch.inf).logsumexp(dim=-1)  # (batch, heads, seq)
    kept = torch.sigmoid(lse - sinks[:, None]).mT[..., None]  # (batch, seq, heads, 1)

    without = attend(q, k, v, sinks=torch.full_like(sinks, -torch.inf), mask=mask)

    torch.testing.assert_close(attend(q, k, v, sinks=sinks, mask=mask), without * kept)


@pytest.mark.parametrize("window", [None, 32])
def test_memory_of_fast_attention_grows_with_the_length_and_not_its_square(window):
    """The largest tensor that exists for 4 x the tokens is 4 x as large, not 16 x."""

    def largest(seq: int) -> int:
        q, k, v, sinks = make_qkv(batch=1, seq=seq, dtype=torch.float32)
        layout = Layout(torch.zeros(1, seq, dtype=torch.int64))
        with _LargestTensor() as mode:
            out = fast_attend(q, k, v, sinks=sinks, layout=layout, window=window)
            gradients(out, (q, k, v, sinks))
        return mode.numel

    assert largest(2048) <= 4.2 * largest(512)


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out

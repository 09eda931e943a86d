"""Router and experts: hand-made numbers, laws, and the fast form against the eager one."""

import pytest
import torch

from ossature.kernels.experts import few_experts, sort_by_expert
from ossature.model.config import ModelConfig
from ossature.model.moe import Experts, MoE, Router, RouterLog, eager_experts, swiglu
from ossature.train.loss import router_loss

CONFIG = ModelConfig(
    hidden_size=24, intermediate_size=16, num_local_experts=5, num_experts_per_tok=3,
    num_hidden_layers=1,
)  # fmt: skip


def filled(module: torch.nn.Module, scale: float = 1.0) -> torch.nn.Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return module


def make(tokens=37, dtype=torch.float64, **changes):
    """Rows past the clamps on every side, and expert 4 without a token."""
    experts = filled(Experts(CONFIG, "eager")).to(dtype)
    x = (2 * torch.randn(tokens, 24, dtype=dtype)).requires_grad_()
    chosen = torch.stack([torch.randperm(4)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3, dtype=dtype).requires_grad_()
    return experts, x, chosen, weights


@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_sorted_experts_equal_one_expert_after_the_other(tokens):
    experts, x, chosen, weights = make(tokens)
    inputs = [x, weights, *experts.parameters()]
    upstream = torch.randn(tokens, 24, dtype=torch.float64)
    want = experts(x, chosen, weights)
    want_gradients = torch.autograd.grad(want, inputs, upstream)

    experts.form = "fast"
    got = experts(x, chosen, weights)

    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, inputs, upstream), want_gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_grouped_product_of_the_gpu_equals_the_loop_of_the_cpu():
    """F.grouped_mm runs on CPU too, so the kernel written for CUDA is compared here."""
    from ossature.kernels import experts as kernel

    experts, x, chosen, weights = make(dtype=torch.float32)
    order, counts = sort_by_expert(chosen, 5)
    rows = x.detach()[order // 3]
    tensors = (
        rows,
        weights.detach().flatten()[order],
        counts,
        *map(torch.detach, experts.parameters()),
    )
    for_cuda = kernel._grouped(*tensors, 1.702, 7.0)
    loop = torch.ops.ossature.experts(*tensors, 1.702, 7.0)
    for got, want in zip(for_cuda, loop, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    dout = torch.randn_like(rows)
    arguments = dout, *tensors, *loop[1:], 1.702, 7.0, False
    for_cuda = kernel._grouped_backward(*arguments)
    for got, want in zip(for_cuda, torch.ops.ossature.experts_backward(*arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_custom_operators_keep_torchs_rules():
    experts, x, chosen, weights = make(tokens=4)
    order, counts = sort_by_expert(chosen, 5)
    rows = x.detach()[order // 3].requires_grad_()
    tensors = rows, weights.detach().flatten()[order], counts, *experts.parameters()

    torch.library.opcheck(torch.ops.ossature.experts.default, (*tensors, 1.702, 7.0))


def test_frozen_experts_pass_the_gradient_on_and_get_none():
    experts, x, chosen, weights = make()
    want = torch.autograd.grad(experts(x, chosen, weights).square().sum(), (x, weights))
    experts.requires_grad_(False)
    experts.form = "fast"

    got = torch.autograd.grad(experts(x, chosen, weights).square().sum(), (x, weights))

    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_the_gate_is_clamped_from_above_only():
    gate_up = torch.tensor([[-20.0, 1.0, 9.0, -9.0]], dtype=torch.float64)

    out = swiglu(gate_up, alpha=1.702, limit=7.0)

    # A gate clamped at -7 would give -4.7e-5 x 2; the limit acts on what goes in.
    torch.testing.assert_close(out[0, 0].item(), -20 / (1 + 2.718281828459045**34.04) * 2)
    torch.testing.assert_close(out[0, 1].item(), 7 / (1 + 2.718281828459045**-11.914) * -6)


def test_gate_and_up_alternate_and_up_has_one_added():
    out = swiglu(torch.tensor([[0.5, 0.25, 2.0, -1.0]], dtype=torch.float64), 1.702, 7.0)

    sigmoid = 1 / (1 + 2.718281828459045 ** (-1.702 * 0.5))
    torch.testing.assert_close(out[0].tolist(), [0.5 * sigmoid * 1.25, 0.0])


def test_clamps_pass_the_gradient_at_the_limit_as_torch_clamp_does():
    experts, _, chosen, weights = make(tokens=6)
    with torch.no_grad():
        experts.gate_up_weight.zero_()
        experts.gate_up_bias.copy_(torch.tensor([7.0, -7.0, 7.5, 7.0, -7.0, 3.0, 7.0, 7.5] * 4))
    x = torch.randn(6, 24, dtype=torch.float64)
    upstream = torch.randn(6, 24, dtype=torch.float64)
    want = torch.autograd.grad(
        experts(x, chosen, weights), experts.gate_up_bias, upstream, retain_graph=True
    )
    experts.form = "fast"
    for dtype in (torch.float64, torch.float32):
        experts.to(dtype)
        got = torch.autograd.grad(
            experts(x.to(dtype), chosen, weights.to(dtype)), experts.gate_up_bias,
            upstream.to(dtype),
        )  # fmt: skip
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-5)


def test_weights_are_the_softmax_of_the_chosen_logits():
    router = Router(CONFIG)
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0]))

    chosen, weights, _ = router(torch.randn(2, 24), None)

    assert chosen.tolist() == [[1, 3, 2]] * 2
    expected = torch.tensor([3.0, 2.0, 1.0]).softmax(0)
    torch.testing.assert_close(weights, expected.expand(2, 3))


def test_the_router_bias_has_a_gradient():
    router = filled(Router(CONFIG))
    _, weights, _ = router(torch.randn(9, 24), None)
    weights.square().sum().backward()

    assert router.bias.grad is not None and router.bias.grad.abs().max() > 1e-3


def test_router_logits_are_float32_in_a_bfloat16_model():
    """Logits that bfloat16 cannot tell apart are told apart."""
    router = Router(CONFIG).bfloat16()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
        router.weight[:, 1] = torch.tensor([1, 2, 3, 4, 5]) * 2**-10
        router.bias.zero_()
    x = torch.zeros(1, 24, dtype=torch.bfloat16)
    x[0, :2] = 1.0

    assert router(x, None)[0].tolist() == [[4, 3, 2]]


def test_the_balancing_bias_changes_the_choice_and_not_the_weights():
    router = Router(CONFIG)
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0]))
    router.balance_bias = torch.tensor([0.0, -10.0, 0.0, 0.0, 0.0])

    chosen, weights, _ = router(torch.randn(1, 24), None)

    assert chosen.tolist() == [[3, 2, 0]]
    torch.testing.assert_close(weights[0], torch.tensor([2.0, 1.0, 0.0]).softmax(0))


def test_statistics_count_experts_and_leave_padding_out():
    moe = filled(MoE(CONFIG, "fast"), 0.3)
    x = torch.randn(2, 9, 24)
    counted = torch.ones(2, 9, dtype=torch.bool)
    counted[1, 6:] = False
    chosen, _, _ = moe.router(x[counted], None)

    _, with_padding = moe(x, counted)
    _, changed = moe(torch.where(counted[..., None], x, 100 * x), counted)

    assert with_padding is not None and changed is not None
    assert torch.equal(with_padding.counts, torch.bincount(chosen.flatten(), minlength=5))
    assert with_padding.counts.sum() == 15 * 3 and with_padding.tokens == 15
    for a, b in zip(with_padding, changed, strict=True):
        torch.testing.assert_close(a, b)


def test_perfect_balance_is_worth_k_and_imbalance_more():
    log = RouterLog()
    router = Router(CONFIG)
    with torch.no_grad():
        router.weight.zero_()
        router.bias.zero_()
    log.layers.append(router(torch.randn(4, 24), torch.ones(4, dtype=torch.bool))[2])

    uniform = router_loss(log, aux_loss=1.0, z_loss=0.0, num_experts_per_tok=3)
    z = router_loss(log, aux_loss=0.0, z_loss=1.0, num_experts_per_tok=3)
    with torch.no_grad():
        router.bias[:3] = 9.0
    log.layers[0] = router(torch.randn(4, 24), torch.ones(4, dtype=torch.bool))[2]
    skewed = router_loss(log, aux_loss=1.0, z_loss=0.0, num_experts_per_tok=3)

    torch.testing.assert_close(uniform.item(), 3.0)
    torch.testing.assert_close(z.item(), torch.tensor(5.0).log().square().item())
    assert skewed > 4.9  # all on 3 of 5 experts: 5/3 of it


def test_the_auxiliary_loss_is_that_of_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    log, logits = RouterLog(), []
    for _ in range(2):
        router = filled(Router(CONFIG))
        x = torch.randn(11, 24)
        logits.append(torch.nn.functional.linear(x, router.weight, router.bias))
        log.layers.append(router(x, torch.ones(11, dtype=torch.bool))[2])

    got = router_loss(log, aux_loss=0.9, z_loss=0.0, num_experts_per_tok=3)

    want = load_balancing_loss_func(tuple(logits), num_experts=5, top_k=3)
    torch.testing.assert_close(got, 0.9 * want)


def test_no_expert_weight_is_copied_per_token():
    """The largest tensor of the fast form is a row per chosen expert, whatever the weights."""
    experts, x, chosen, weights = make(tokens=64)
    experts.form = "fast"
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            outs = out if isinstance(out, (tuple, list)) else [out]
            sizes.extend(t.numel() for t in outs if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        experts(x, chosen, weights).square().sum().backward()

    assert max(sizes) <= 64 * 3 * 24  # rows x hidden


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
@torch.no_grad()
def test_few_tokens_find_what_the_eager_form_finds(tokens: int):
    x, chosen, weights, matrices = few_case(tokens)

    found = few_experts(x, chosen, weights, *matrices, 1.702, 7.0)

    expected = eager_experts(x, chosen, weights, *matrices, 1.702, 7.0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_a_token_among_few_finds_the_same_bits_whatever_the_others():
    x, chosen, weights, matrices = few_case(40)
    together = few_experts(x, chosen, weights, *matrices, 1.702, 7.0)
    for n in (0, 17, 39):
        one = slice(n, n + 1)
        found = few_experts(x[one], chosen[one], weights[one], *matrices, 1.702, 7.0)
        assert torch.equal(found, together[one])


def few_case(tokens: int):
    """Tokens, their experts of 8 and the weights, and the experts' matrices, past the limits."""
    draw = torch.Generator().manual_seed(1)
    shapes = (8, 96, 64), (8, 96), (8, 64, 48), (8, 64)
    matrices = [torch.randn(shape, generator=draw) for shape in shapes]
    chosen = torch.rand(tokens, 8, generator=draw).argsort(-1)[:, :3]
    weights = torch.rand(tokens, 3, generator=draw).softmax(-1)
    return torch.randn(tokens, 64, generator=draw), chosen, weights, matrices

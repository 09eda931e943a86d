"""Adapters against the matrices they stand for, written out in fp64."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ossature.config import LORA_TARGETS, LoraConfig
from ossature.kernels import frozen_experts as kernels
from ossature.kernels.mxfp4 import dequantize, quantize
from ossature.model import frozen_experts, lora
from ossature.model.lora import (
    Adapted,
    adapt,
    init_adapters,
    is_adapter,
    merged,
    merged_weights,
    table,
)
from ossature.model.moe import RouterLog
from ossature.model.transformer import Transformer
from tests.small_runs import TINY, ragged_batch

ALL = LoraConfig(rank=5, alpha=7.0, targets=LORA_TARGETS)
EAGER = {"attention_form": "eager", "moe_form": "eager"}
BATCH = ragged_batch(2)
TARGETS = BATCH.tokens.roll(-1, 1).masked_fill(~BATCH.loss_mask.roll(-1, 1), -100)


def adapted(config: LoraConfig, dtype=torch.float32, **forms) -> Transformer:
    """A model without a zero or a one among its weights, and adapters that matter."""
    g = torch.Generator().manual_seed(11)
    model = Transformer(TINY, **forms)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += (0.3 if p.dim() == 1 or "bias" in name else 0.02) * torch.randn(
                p.shape, generator=g
            )
        model.to(dtype)
        adapt(model, config)
        init_adapters(model, seed=3)
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if name.endswith("magnitude"):
                p *= 1 + 0.2 * noise
            elif is_adapter(name):
                p.copy_(0.2 * noise)
    return model


def loss_of(call: Callable[..., Tensor], log: RouterLog | None = None) -> Tensor:
    position, document = BATCH.position, BATCH.document
    return call(BATCH.tokens, position=position, document=document, targets=TARGETS, router_log=log)


def by_the_specification(model: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a plain eager model with W' for its weights, and the adapters' gradients."""
    plain = Transformer(TINY, **EAGER)
    weights = {name: w.double() for name, w in merged_weights(model).items()}
    loss = loss_of(lambda *a, **k: torch.func.functional_call(plain, weights, a, k))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss, dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def largest_error(model: Transformer) -> float:
    true, gradients = by_the_specification(model)
    loss = loss_of(model)
    loss.backward()
    errors = [abs(loss.item() / true.item() - 1)]
    for name, p in model.named_parameters():
        assert (p.grad is not None) == is_adapter(name) == p.requires_grad, name
        if p.grad is not None:
            assert gradients[name].norm() > 1e-4, name
            errors.append(((p.grad - gradients[name]).norm() / gradients[name].norm()).item())
    return max(errors)


@pytest.mark.parametrize("base", ["plain", "mxfp4"])
@pytest.mark.parametrize("dora", [False, True])
def test_loss_and_every_gradient_are_those_of_the_matrices_written_out(dora, base):
    config = replace(ALL, dora=dora, base=base, rank_stabilised=dora)
    assert largest_error(adapted(config)) < 1e-5


@pytest.mark.parametrize("target", LORA_TARGETS)
def test_each_target_alone_is_right_and_adapts_nothing_else(target):
    model = adapted(replace(ALL, dora=True, targets=(target,)))
    assert {target in name for name, p in model.named_parameters() if p.requires_grad} == {True}
    assert largest_error(model) < 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_fast_and_eager_experts_agree(dora):
    config = replace(ALL, dora=dora, base="mxfp4")
    fast, eager = adapted(config), adapted(config, **EAGER)
    losses = [loss_of(model) for model in (fast, eager)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for (name, mine), theirs in zip(fast.named_parameters(), eager.parameters(), strict=True):
        if mine.grad is not None:
            assert (mine.grad - theirs.grad).norm() < 1e-5 * theirs.grad.norm(), name


def test_a_packed_base_gives_the_gradients_of_the_dequantised_one():
    """Every adapter's, in fp32, where the base is what the packed one unpacks to."""
    packed, plain = adapted(replace(ALL, dora=True, base="mxfp4")), adapted(replace(ALL, dora=True))
    for block, other in zip(packed.blocks.values(), plain.blocks.values(), strict=True):
        for name in ("gate_up", "down"):
            blocks, scales = (
                block.moe.experts.get_parameter(f"{name}_{end}") for end in ("blocks", "scales")
            )
            assert (blocks.nbytes + scales.nbytes) * 8 == 4.25 * 2 * blocks.numel()
            weight = other.moe.experts.get_parameter(f"{name}_weight")
            with torch.no_grad():
                assert all(map(torch.equal, quantize(weight), (blocks, scales.mT)))
                weight.copy_(dequantize(blocks, scales.mT.contiguous()))
    with torch.no_grad():
        for mine, theirs in zip(adapters(packed), adapters(plain), strict=True):
            theirs.copy_(mine)
    losses = [loss_of(packed), loss_of(plain)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for mine, theirs in zip(adapters(packed), adapters(plain), strict=True):
        assert (mine.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()


def adapters(model: Transformer) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if is_adapter(name)]


@pytest.mark.parametrize("base", ["plain", "mxfp4"])
@pytest.mark.parametrize("dora", [False, True])
def test_fresh_adapters_change_nothing(dora, base):
    plain, model = Transformer(TINY), Transformer(TINY)
    adapt(model, replace(ALL, dora=dora, base=base))
    init_adapters(model, seed=3)
    if base == "mxfp4":
        weights = {n: w.float() for n, w in merged_weights(model).items() if "experts" in n}
        plain.load_state_dict(plain.state_dict() | weights)
    assert torch.allclose(model(BATCH.tokens), plain(BATCH.tokens), rtol=1e-5, atol=1e-5)


def test_dora_keeps_the_lengths_of_rows_and_lora_does_not():
    """By hand: one row (3, 4) plus (1, -4) is (4, 0); DoRA gives it the magnitude 10."""
    weight, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0]])
    a = torch.tensor([[0.5, -2.0]])
    assert merged(weight, a, b, None, 2.0).tolist() == [[4.0, 0.0]]
    assert merged(weight, a, b, torch.tensor([10.0]), 2.0).tolist() == [[10.0, 0.0]]


def test_scale_is_alpha_over_rank_or_over_its_root():
    assert LoraConfig(rank=16, alpha=32.0).scale == 2.0
    assert LoraConfig(rank=16, alpha=32.0, rank_stabilised=True).scale == 8.0


def test_adapters_begin_as_xavier_times_zero():
    model = Transformer(TINY)
    adapt(model, replace(ALL, rank=8))
    init_adapters(model, seed=3)
    found = dict(model.named_parameters())
    for name, p in found.items():
        if name.endswith("lora_b") and name != "embedding.lora_b":
            assert not p.any(), name
    a = found["blocks.0.moe.experts.gate_up_lora_a"]
    assert a.shape == (8, 8, 64)
    assert a.std().item() == pytest.approx(math.sqrt(2 / (8 + 64)), rel=0.05)
    assert not torch.equal(a[0], a[1])
    assert not found["embedding.lora_a"].any()
    assert found["embedding.lora_b"].std().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("base", ["plain", "mxfp4"])
def test_dropout_acts_on_what_goes_into_an_adapter_and_on_nothing_else(monkeypatch, base):
    """Dropping the same columns of every input is dropping those of A."""
    factor = torch.arange(1024).remainder(3).float()  # drops every third, and doubles another

    def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
        assert p == 0.25
        return x * factor[: x.shape[-1]] if training else x

    for module in (lora, frozen_experts):  # DoRA's norms are those of all of A
        monkeypatch.setattr(
            module, "row_squares", lambda _w, _s, _a, b, *_: 9 * torch.ones_like(b[..., 0])
        )
    everything_else = tuple(target for target in LORA_TARGETS if target != "embedding")
    config = replace(ALL, base=base, dora=True, dropout=0.25, targets=everything_else)
    found, true = adapted(config), adapted(config).eval()
    with torch.no_grad():
        for name, p in true.named_parameters():
            if name.endswith("lora_a"):
                p *= factor[: p.shape[-1]]
    monkeypatch.setattr(F, "dropout", dropout)
    losses = [loss_of(found), loss_of(true)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for (name, mine), theirs in zip(found.named_parameters(), true.parameters(), strict=True):
        if is_adapter(name):
            columns = factor[: mine.shape[-1]] if name.endswith("lora_a") else 1.0
            expected = theirs.grad * columns
            assert (mine.grad - expected).norm() < 1e-5 * expected.norm(), name


def test_dropout_is_drawn_from_the_seed_and_not_in_evaluation():
    model = adapted(replace(ALL, dropout=0.5))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(loss_of(model).item())
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    assert loss_of(model).item() == pytest.approx(by_the_specification(model)[0].item(), rel=1e-6)


def test_one_expert_is_unpacked_at_a_time(monkeypatch):
    """In the forward pass, the backward pass and for DoRA's norms."""
    seen = []
    unpack = kernels.unpack

    def watched(weight, scales, dtype):
        seen.append(weight.shape)
        return unpack(weight, scales, dtype)

    monkeypatch.setattr(kernels, "unpack", watched)
    loss_of(adapted(replace(ALL, dora=True, base="mxfp4"))).backward()
    experts = {shape for shape in seen if shape[-1] == 16}
    assert experts == {(64, 2, 16), (64, 1, 16)}  # gate_up and down: rows, groups, bytes


def test_the_table_counts_what_is_trained_and_what_is_frozen():
    """By hand: rank 5 on q (64 in, 96 out) and down (8 experts, 32 in, 64 out), in 2 layers."""
    model = Transformer(TINY)
    adapt(model, replace(ALL, targets=("q_proj", "down"), base="mxfp4"))
    q, down = 2 * 5 * (64 + 96), 2 * 8 * 5 * (32 + 64)
    lines = [line.split() for line in table(model)]
    assert lines[0][:2] == ["trained:", f"{q + down:,}"]
    assert lines[1] == ["attention.q_proj", "adapter", f"{q:,}"]
    assert lines[2] == ["moe.experts.down", "adapter", f"{down:,}"]
    assert ["moe.experts.gate_up_weight,", "MXFP4", f"{2 * 8 * 64 * 64:,}"] in lines
    frozen = sum(p.numel() for p in Transformer(TINY).parameters())
    assert lines[3][:2] == ["frozen:", f"{frozen:,}"]
    assert lines[0][-1] == f"{(q + down) / (q + down + frozen):.3%}"


def test_norms_over_a_wide_vocabulary_are_of_all_its_columns():
    """They are added up some thousand columns at a time."""
    model = Transformer(replace(TINY, vocab_size=9000))
    model.init_weights(seed=1)
    adapt(model, LoraConfig(rank=2, dora=True, targets=("embedding",)))
    init_adapters(model, seed=3)
    leaf = model.get_submodule("embedding")
    assert isinstance(leaf, Adapted)
    torch.nn.init.normal_(leaf.lora_b)
    whole = leaf.matrix() + leaf.lora.scale * leaf.lora_b @ leaf.lora_a
    torch.testing.assert_close(leaf.squares(), whole.square().sum(-1))


def test_settings_that_fit_nothing_are_refused():
    with pytest.raises(ValueError, match=r"lora.targets: k_norm matches nothing; there are q_proj"):
        LoraConfig(rank=4, targets=("q_proj", "k_norm"))
    with pytest.raises(ValueError, match="names one twice"):
        LoraConfig(rank=4, targets=("q_proj", "q_proj"))
    with pytest.raises(ValueError, match="needs at least one of"):
        LoraConfig(rank=4, targets=())
    with pytest.raises(ValueError, match=r"lora.dropout \(1.0\)"):
        LoraConfig(rank=4, dropout=1.0)
    with pytest.raises(ValueError, match=r"lora.alpha \(0.0\) must be more than 0"):
        LoraConfig(rank=4, alpha=0.0)
    with pytest.raises(
        ValueError, match=r"lora.quantize_base does nothing when lora.base is plain"
    ):
        LoraConfig(rank=4, quantize_base=True)
    with torch.device("meta"):
        model = Transformer(replace(TINY, intermediate_size=48))
    with pytest.raises(ValueError, match=r"intermediate_size \(48\) to be a multiple of 32"):
        adapt(model, LoraConfig(rank=4, base="mxfp4"))


def test_frozen_weights_take_the_dtype_that_is_asked_for():
    model = Transformer(TINY)
    adapt(model, replace(ALL, base="mxfp4"), torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtypes[name] for name in dtypes if is_adapter(name)} == {torch.float32}
    packed = {name for name, dtype in dtypes.items() if dtype == torch.uint8}
    assert len(packed) == 2 * 4
    rest = {dtypes[name] for name in dtypes if not is_adapter(name) and name not in packed}
    assert rest == {torch.bfloat16}

"""Products in 8 bits, emulated: as near as the rounding of float8 says, and nowhere else."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from ossature.model.transformer import Transformer
from ossature.parallel import collectives, float8, tensor
from ossature.train import prove
from ossature.train.loop import train
from ossature.train.step import targets
from tests.parallel import parity
from tests.parallel.parity import Layout
from tests.ranks import run_ranks
from tests.small_runs import TINY, ragged_batch, small_run

pytest.importorskip("torchao")

RECIPES = ("tensorwise", "rowwise", "mxfp8")
ALL = replace(TINY, num_experts_per_tok=TINY.num_local_experts)
"""Every expert is chosen: no choice can flip."""
ROUNDING = 2**-4
"""Of a number in e4m3, which has 3 bits after the first, at most; e5m2 has 2: twice as much."""


def setting(recipe: str, **changes):
    return small_run(Path("unused"), float8=recipe, float8_emulate=True, **changes)


def products(recipe: str):
    return (float8._mx if recipe == "mxfp8" else float8._float8)(recipe, True)


def bound(x: torch.Tensor, y: torch.Tensor, rounding: float = ROUNDING) -> torch.Tensor:
    """How far x @ y.T can be off, each number of it: both factors are rounded.

    What is below the normal range of e4m3, 2 ** -6, is off by 2 ** -10 of it; the greatest number
    is scaled to more than 224.
    """
    small = [2**-10 / 224 * z.abs().amax() for z in (x, y)]
    far = [
        z.abs() + r * z.abs() + s
        for z, r, s in zip((x, y), (rounding, ROUNDING), small, strict=True)
    ]
    return far[0] @ far[1].mT - x.abs() @ y.abs().mT


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_number_of_a_product_is_within_the_rounding_of_its_factors(recipe):
    """And of its gradients; the projection's bias is added in full precision."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(96, 64)
    layer = products(recipe)[1](torch.nn.Linear(96, 64))
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(64, 96, requires_grad=True)
    dy = torch.randn(64, 64)
    y = layer(x)
    y.backward(dy)
    weight = plain.weight.detach()
    steep = 2 * ROUNDING if recipe == "tensorwise" else ROUNDING  # gradients are e5m2
    off = [
        (y, plain(x), bound(x, weight)),
        (x.grad, dy @ weight, bound(dy, weight.mT, steep)),
        (layer.weight.grad, dy.mT @ x, bound(dy.mT, x.mT, steep)),
    ]
    for found, true, most in off:
        assert ((found - true).abs() <= most).all()
        assert prove.relative(found, true) > 2**-8  # more than bf16 would round
    torch.testing.assert_close(layer.bias.grad, dy.sum(0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_product_of_experts_is_that_of_each_on_its_rows(recipe):
    """One has no row at all, and no gradient."""
    torch.manual_seed(0)
    counts = torch.tensor([5, 0, 33, 2])
    rows = torch.randn(40, 64, requires_grad=True)
    weight = torch.randn(4, 96, 64, requires_grad=True)
    dy = torch.randn(40, 96)
    y = products(recipe)[0](rows, counts, weight)
    y.backward(dy)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        part = slice(start, start + count)
        x, w, d = rows[part].detach(), weight[expert].detach(), dy[part]
        start += count
        if not count:
            assert not weight.grad[expert].any()
            continue
        assert ((y[part] - x @ w.mT).abs() <= bound(x, w)).all()
        assert ((rows.grad[part] - d @ w).abs() <= bound(d, w.mT)).all()
        assert ((weight.grad[expert] - d.mT @ x).abs() <= bound(d.mT, x.mT)).all()


def test_grouped_products_find_what_single_ones_find():
    """torchao's grouped product of aligned rows, as on a GPU, against one product an expert."""
    from torchao.prototype.moe_training.mxfp8_grouped_mm import _to_mxfp8_then_scaled_grouped_mm
    from torchao.quantization.quantize_.common import KernelPreference

    def grouped(rows, weight, ends):
        assert not (ends % 32).any()
        how = {"offs": ends, "kernel_preference": KernelPreference.EMULATED}
        return _to_mxfp8_then_scaled_grouped_mm(rows, weight, **how)

    torch.manual_seed(0)
    counts = torch.tensor([5, 0, 33, 2])
    found = []
    for multiply in (partial(float8._aligned, 32, grouped), products("mxfp8")[0]):
        torch.manual_seed(1)
        rows = torch.randn(40, 64).bfloat16().requires_grad_()
        weight = torch.randn(4, 96, 64).bfloat16().requires_grad_()
        y = multiply(rows, counts, weight)
        y.backward(torch.randn(40, 96).bfloat16())
        found.append((y, rows.grad, weight.grad))
    for one, other in zip(*found, strict=True):
        assert torch.isfinite(one).all()
        assert prove.relative(one.float(), other.float()) < 2**-7  # bf16's rounding of the results


def computed(config=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of a model with and without."""
    model = Transformer(ALL)
    model.load_state_dict(prove.drawn(ALL))
    if config is not None:
        float8.use_float8(model, config)
    batch = ragged_batch(2)
    loss = model(batch.tokens, document=batch.document, targets=targets(batch))
    loss.backward()
    with torch.no_grad():
        logits = model(batch.tokens, document=batch.document)
    return logits, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_and_gradients_are_as_near_as_roundings_add_up(recipe):
    """Roundings are independent and each at most r: of two factors, spread evenly, a product is off
    by sqrt(2 / 3) r.  On the way to the logits are 4 products a layer, on the way back as many,
    and one for the weight; their squares add up."""
    one = (2 / 3) ** 0.5 * ROUNDING
    steep = ((ROUNDING**2 + (2 * ROUNDING) ** 2) / 3) ** 0.5 if recipe == "tensorwise" else one
    there = 4 * ALL.num_hidden_layers * one**2
    back = (4 * ALL.num_hidden_layers + 1) * steep**2
    logits, gradients = computed()
    logits_found, found = computed(setting(recipe))
    assert 0.1 * one < prove.relative(logits_found, logits) < there**0.5
    for name, gradient in gradients.items():
        assert prove.relative(found[name], gradient) < (there + back) ** 0.5, name


def test_only_projections_and_experts_multiply_in_8_bits():
    model, plain = Transformer(TINY), Transformer(TINY)
    names = [name for name, _ in model.named_parameters()]
    float8.use_float8(model, setting("rowwise"))
    changed = {
        name
        for (name, one), other in zip(model.named_modules(), plain.modules(), strict=True)
        if type(one) is not type(other)
    }
    blocks, kinds = range(TINY.num_hidden_layers), float8.PROJECTIONS
    assert changed == {f"blocks.{n}.attention.{kind}" for n in blocks for kind in kinds}
    assert [name for name, _ in model.named_parameters()] == names
    x, chosen = torch.randn(9, TINY.hidden_size), torch.randint(0, 8, (9, 3))
    inputs = x, chosen, torch.rand(9, 3)
    for block, other in zip(model.blocks.values(), plain.blocks.values(), strict=True):
        pair = [one.get_submodule("moe.experts")(*inputs) for one in (block, other)]
        assert prove.relative(*pair) > 2**-8


def test_what_is_rounded_before_it_is_gathered_is_the_same_to_the_bit():
    """Outputs and gradients of tp2, beside a gather in full precision that is rounded after."""
    run_ranks(2, gather_both_ways)


def gather_both_ways(rank: int, world: int) -> None:
    sizes, found = [], []
    case = Layout({"tp": 2}, ALL, {"float8_emulate": True, "float8": "tensorwise"}).case()

    def watched(x: torch.Tensor, dim: int, group) -> torch.Tensor:
        sizes.append(x.element_size())
        return collectives.gathered(x, dim, group)

    def rounded_after(_attention, mesh, x: torch.Tensor) -> torch.Tensor:
        return collectives.gather(x, 1, mesh.get_group())

    for change in [(float8, "gathered", watched), (tensor, "gather_rounded", rounded_after)]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*change)
            found.append(prove.find(case, world))
    passes = len(prove.batches(case, 0, 1)) * ALL.num_hidden_layers
    assert sizes == [1] * 2 * passes, "two steps, one byte a number"
    one, other = found
    assert one.numbers == other.numbers
    assert len(one.gradients) > 20
    for name, gradient in one.gradients.items():
        assert torch.equal(gradient, other.gradients[name]), name


@pytest.mark.slow
def test_ranks_find_nearly_what_one_process_finds():
    changes = {"float8_emulate": True, "float8": "rowwise", "recompute": "full"}
    layouts = [
        Layout({"tp": 2, "ep": 2}, ALL, changes),
        Layout({"dp_shard": 2, "etp": 2}, ALL, changes),
        Layout({"cp": 2}, ALL, {**changes, "float8": "mxfp8"}),
        Layout({"tp": 2}, ALL, {**changes, "float8": "tensorwise"}),
    ]
    for layout, errors in zip(layouts, parity.worst(2, layouts), strict=True):
        numbers = {name: error for name, error in errors.items() if not name.startswith("weights")}
        assert parity.largest(numbers) < (0.22, ""), layout


@pytest.mark.parametrize(
    ("recipe", "capability", "line"),
    [
        ("rowwise", None, "float8 = rowwise needs a CUDA device of compute capability 9.0 "
         "or more, and this one is cpu; float8_emulate = true runs anywhere"),
        ("tensorwise", (8, 9), "float8 = tensorwise needs .* 9.0 or more, .* is CUDA 8.9"),
        ("mxfp8", (9, 0), "float8 = mxfp8 needs .* 10.0 or more, and this one is CUDA 9.0"),
    ],
)  # fmt: skip
def test_hardware_that_lacks_it_is_refused(recipe, capability, line, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    device = torch.device("cpu" if capability is None else "cuda")
    config = small_run(Path("unused"), float8=recipe, precision="bf16")
    with pytest.raises(ValueError, match=line):
        float8.check_device(config, device)
    float8.check_device(replace(config, float8_emulate=True), device)


def test_a_run_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="needs a CUDA device"):
        train(small_run(tmp_path / "run", float8="mxfp8", precision="bf16"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"float8": "rowwise"}, "float8 (rowwise) needs precision bf16, not fp32"),
        ({"float8_emulate": True}, "float8_emulate (True) needs float8"),
        (
            {"float8": "mxfp8", "precision": "bf16", "lora__rank": 2},
            "float8 (mxfp8) must be empty with lora.rank (2): products of frozen weights are "
            "others",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(change, line):
    with pytest.raises(ValueError) as error:
        small_run(Path("unused"), **change)
    assert str(error.value) == line


def test_sizes_that_do_not_divide_are_refused():
    config = setting("mxfp8")
    line = r"float8 = mxfp8 needs intermediate_size / etp \(24\) to be a multiple of 32"
    with pytest.raises(ValueError, match=line):
        float8.check_float8(config, replace(TINY, intermediate_size=24))

"""Tensor and sequence parallelism against one process, and what each collective is for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ossature.model.transformer import Transformer
from ossature.parallel import collectives, gradients, local, sequence, tensor, vocabulary
from ossature.train import prove
from tests.parallel import parity
from tests.parallel.parity import TINY, WIDE, Layout
from tests.ranks import run_ranks

ODD = replace(TINY, vocab_size=97)
"""A vocabulary that divides by nothing."""


def check(world: int, layouts: list[Layout], seconds: int = 180) -> None:
    for layout, errors in zip(layouts, parity.worst(world, layouts, seconds=seconds), strict=True):
        assert parity.largest(errors) < (1e-4, ""), layout


def test_two_ranks_of_tp_find_what_one_process_finds():
    """With and without the parallel loss; with an odd vocabulary; with everything recomputed."""
    layouts = [
        Layout({"tp": 2}),
        Layout({"tp": 2, "loss_parallel": False}, ODD),
        Layout({"tp": 2}, changes={"recompute": "selective"}),
    ]
    check(2, layouts)


def test_tp_and_shards_find_what_one_process_finds():
    check(4, [Layout({"tp": 2, "dp_shard": 2}, ODD)])


@pytest.mark.slow
def test_more_layouts_with_tp_find_what_one_process_finds():
    layouts = [
        Layout({"tp": 4}, WIDE),
        Layout({"tp": 4, "loss_parallel": False}, replace(WIDE, vocab_size=97)),
        Layout({"tp": 2, "dp_replicate": 2}, ODD),
        Layout({"tp": 2}, changes={"recompute": "full"}),
    ]
    check(4, layouts)


@pytest.mark.slow
def test_eight_ranks_with_tp_find_what_one_process_finds():
    layouts = [
        Layout({"tp": 2, "dp_replicate": 2, "dp_shard": 2}),
        Layout({"tp": 4, "dp_shard": 2}, WIDE),
        Layout({"tp": 2, "dp_shard": 4}),
    ]
    check(8, layouts)


# Each with the first thing to break.
FAULTS = {
    "the bias of o_proj added by every rank": "weights blocks.0.attention.o_proj.bias",
    "gradients of the norms not added up": "gradients blocks.0.attention_norm.weight",
    "a rank's own gradient of the whole sequence": "gradients blocks.0.attention.q_proj.weight",
    "sinks of the wrong heads": "gradients blocks.1.attention.sinks.weight",
    "statistics of all tokens on every rank": "counts",
    "a norm of a rank's own shards": "norm",
}


def plant(fault: str, patch: pytest.MonkeyPatch):
    if fault == "the bias of o_proj added by every rank":
        patch.setattr(tensor, "added_once", local.summed)
    elif fault == "gradients of the norms not added up":
        patch.setattr(tensor, "summed", lambda group: lambda weight: weight)
    elif fault == "a rank's own gradient of the whole sequence":
        patch.setattr(sequence, "gather", collectives.gather_same)
    elif fault == "statistics of all tokens on every rank":
        everything = lambda self, x: torch.ones_like(collectives.own_part(x, 1, self.group))  # noqa: E731
        patch.setattr(sequence.Sequence, "own", everything)
    elif fault == "a norm of a rank's own shards":
        patch.setattr(gradients, "dist", SimpleNamespace(all_reduce=lambda *_, **__: None))
    else:
        assert fault == "sinks of the wrong heads"
        return swap_sinks
    return None


def swap_sinks(model: Transformer) -> None:
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            part = parameter.to_local()
            part.detach().copy_(part.detach().flip(0))


def test_the_comparison_sees_planted_faults():
    layouts = [Layout({"tp": 2}, fault=fault) for fault in FAULTS]
    for layout, errors in zip(layouts, parity.worst(2, layouts, plant), strict=True):
        assert not errors[FAULTS[layout.fault]] < 1e-3, layout.fault  # NaN where counts differ


def _loss(rank: int, world: int, vocab: int, form: str) -> tuple:
    """Loss and gradients of a rank's rows of logits."""
    torch.manual_seed(3)
    logits = torch.randn(11, vocab) * 4
    targets = torch.randint(0, vocab, (11,))
    targets[::4] = -100
    size = -(-vocab // world)
    part = logits[:, rank * size : (rank + 1) * size].clone()
    group = torch.distributed.group.WORLD
    how = {"group": group, "first": rank * size, "vocab": vocab}
    loss = getattr(vocabulary, form)(part, targets, torch.float32, **how)
    return logits, targets, loss.item(), part


@pytest.mark.parametrize("form", ["parallel_loss", "gathered_loss"])
@pytest.mark.parametrize("vocab", [12, 10, 4])
def test_the_loss_of_divided_logits_is_that_of_whole_ones(vocab, form):
    """3 ranks: even parts, a last part that is smaller, and a rank with nothing."""
    results = run_ranks(3, _loss, vocab, form)
    logits, targets = results[0][:2]
    logits.requires_grad_()
    true = F.cross_entropy(logits, targets, reduction="sum")
    true.backward()
    for result in results:
        assert result[2] == pytest.approx(true.item(), rel=1e-6)
    parts = torch.cat([result[3] for result in results], dim=1)
    torch.testing.assert_close(parts, logits.grad, atol=1e-6, rtol=1e-5)


def _adjoints(rank: int, world: int) -> list[float]:
    """<forward(x), y> - <x, backward(y)>, over all ranks, for each linear collective."""
    group, off = torch.distributed.group.WORLD, []
    torch.manual_seed(rank)
    cases = [
        (lambda x: collectives.gather(x, 1, group), (2, 3, 4)),
        (lambda x: collectives.gather(x, 0, group), (2, 3)),
        (lambda x: collectives.reduce_scatter(x, 1, group), (2, 6, 4)),
        (lambda x: collectives.all_to_all(
            x, [[1, 0], [2, 3]][rank], [[1, 2], [0, 3]][rank], group), (3, 4)),
    ]  # fmt: skip
    for function, shape in cases:
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        out = function(x)
        y = torch.randn_like(out)
        (dx,) = torch.autograd.grad(out, x, y)
        products = torch.stack([(out * y).sum(), (x * dx).sum()]).detach()
        torch.distributed.all_reduce(products)
        off.append(float(products.diff().abs()))
    return off


def test_the_backward_of_a_collective_is_its_adjoint():
    """The definition of the gradient of a linear map, summed over the ranks."""
    for off in run_ranks(2, _adjoints):
        assert max(off) < 1e-12


def _odd_row(rank: int, world: int) -> str:
    model, *_ = parity.built(Layout({"tp": 2}), world)
    try:
        model(torch.zeros(1, 31, dtype=torch.int64), targets=torch.zeros(1, 31, dtype=torch.int64))
    except ValueError as error:
        return str(error)
    return ""


def test_rows_that_do_not_divide_are_refused():
    assert set(run_ranks(2, _odd_row)) == {"parallel.tp (2) must divide the row length (31)"}


def _logits(rank: int, world: int, axes: dict) -> tuple:
    """Logits of whole rows, and what is sampled token by token."""
    from ossature.sample.generate import generate

    model, *_ = parity.built(Layout(axes, ODD), world)
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        logits = model(tokens)
    return logits, generate(model, tokens[:, :7], max_new_tokens=9)


@pytest.mark.parametrize("axes", [{"tp": 2}, {"tp": 2, "ep": 2}, {"ep": 2}, {"tp": 2, "etp": 2}])
def test_logits_and_samples_are_those_of_one_process(axes):
    """A prompt of 7 tokens, which two ranks cannot divide, then one token at a time."""
    from ossature.sample.generate import generate

    model = Transformer(ODD)
    model.load_state_dict(prove.drawn(ODD))
    tokens = torch.arange(60).view(2, 30)
    true = model(tokens).detach()
    said = generate(model, tokens[:, :7], max_new_tokens=9)
    for logits, rows in run_ranks(2, _logits, axes):
        torch.testing.assert_close(logits, true, atol=2e-5, rtol=1e-5)
        assert torch.equal(rows, said)

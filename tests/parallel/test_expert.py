"""Experts divided over ranks against one process: every layout of ep, etp and what they borrow."""

from types import SimpleNamespace

import pytest
import torch

from ossature.model.transformer import Transformer
from ossature.parallel import collectives, expert, gradients, local, plan
from ossature.parallel.expert import AllToAll
from ossature.train import prove
from ossature.train import step as steps
from tests.parallel import parity
from tests.parallel.parity import TINY, WIDE, Layout
from tests.parallel.test_tensor import check
from tests.ranks import run_ranks


def test_two_ranks_of_experts_find_what_one_process_finds():
    """ep and etp, alone and on the ranks of tp, selective recomputation included."""
    layouts = [
        Layout({"ep": 2}, changes={"recompute": "selective"}),
        Layout({"etp": 2}),
        Layout({"tp": 2, "ep": 2}),
        Layout({"tp": 2, "etp": 2}),
    ]
    check(2, layouts)


def test_four_ranks_of_experts_find_what_one_process_finds():
    layouts = [
        Layout({"dp_shard": 2, "tp": 2, "ep": 4}),  # ep takes all there are
        Layout({"dp_replicate": 2, "dp_shard": 2, "ep": 2}),
        Layout({"dp_shard": 2, "tp": 2, "ep": 2, "etp": 2}),
    ]
    check(4, layouts)


@pytest.mark.slow
def test_more_layouts_of_experts_find_what_one_process_finds():
    layouts = [
        Layout({"ep": 2}),  # sharded over the other two
        Layout({"ep": 4}),
        Layout({"etp": 2}),
        Layout({"etp": 4}),
        Layout({"ep": 2, "etp": 2}),
        Layout({"dp_replicate": 2, "etp": 2}),
        Layout({"tp": 2, "ep": 2}),
        Layout({"tp": 2, "etp": 2}),
        Layout({"dp_replicate": 2, "tp": 2, "ep": 2}),
        Layout({"ep": 2, "etp": 2}, changes={"recompute": "full"}),
        Layout({"tp": 4, "ep": 2}, WIDE),
        Layout({"tp": 4, "ep": 4}, WIDE),
        Layout({"tp": 4, "etp": 4}, WIDE),
        Layout({"tp": 4, "ep": 2, "etp": 2}, WIDE),
    ]
    check(4, layouts)


@pytest.mark.slow
def test_eight_ranks_of_experts_find_what_one_process_finds():
    layouts = [
        Layout({"dp_shard": 4, "tp": 2, "etp": 2}),
        Layout({"dp_shard": 4, "tp": 2, "ep": 2, "etp": 2}),
        Layout({"dp_replicate": 2, "dp_shard": 2, "tp": 2, "ep": 4}),
        Layout({"dp_shard": 4, "tp": 2, "ep": 8}),
        Layout({"dp_shard": 2, "tp": 4, "ep": 8}, WIDE),
        Layout({"dp_replicate": 2, "tp": 4, "ep": 2, "etp": 2}, WIDE),
    ]
    check(8, layouts)


# Each with the axes it breaks and the first thing to break.
DOWN_BIAS = "blocks.0.moe.experts.down_bias"
FAULTS = {
    "the down bias added by every rank of etp": ({"etp": 2}, f"weights {DOWN_BIAS}"),
    "gradients below the experts not added up": (
        {"etp": 2},
        "gradients blocks.0.attention.q_proj.weight",
    ),
    "experts on tp reduced with the dense weights": ({"tp": 2}, f"gradients {DOWN_BIAS}"),
    "expert gradients averaged": ({"ep": 2}, f"gradients {DOWN_BIAS}"),
    "one update for all experts of a rank": ({"ep": 2}, f"gradients {DOWN_BIAS}"),
    "rows sent back in another order": ({"ep": 2}, "loss"),
    "a norm over the dense weights' ranks alone": ({"ep": 2}, "norm"),
}


def plant(fault: str, patch: pytest.MonkeyPatch):
    if fault == "the down bias added by every rank of etp":
        patch.setattr(expert, "added_once", local.summed)
    elif fault == "gradients below the experts not added up":
        patch.setattr(expert, "gather", collectives.gather_same)
    elif fault == "experts on tp reduced with the dense weights":
        shard = plan.shard
        patch.setattr(plan, "shard", lambda model, mesh, how, _experts: shard(model, mesh, how))
    elif fault == "rows sent back in another order":
        combine = AllToAll.combine
        patch.setattr(AllToAll, "combine", lambda self, x, sent: combine(self, x.flip(0), sent))
    elif fault == "a norm over the dense weights' ranks alone":
        # On two ranks of ep the experts' shards are those of ep alone.
        reduce = gradients.dist.all_reduce
        calls = []

        def first_only(tensor, group):
            calls.append(group)
            if len(calls) % 2:
                reduce(tensor, group=group)

        patch.setattr(gradients, "dist", SimpleNamespace(all_reduce=first_only))
    elif fault == "expert gradients averaged":
        return lambda model: change_gradients(model, lambda gradient: gradient / 2)
    else:
        assert fault == "one update for all experts of a rank"
        return lambda model: change_gradients(
            model, lambda gradient: gradient.mean(0, keepdim=True).expand_as(gradient)
        )
    return None


def change_gradients(model: Transformer, change) -> None:
    """Change the experts' gradients when they are done."""

    def hook(parameter):
        part = parameter.grad.to_local()
        part.copy_(change(part))

    for name, parameter in model.named_parameters():
        if "experts" in name and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(hook)


def test_the_comparison_sees_planted_faults():
    layouts = [Layout(axes, fault=fault) for fault, (axes, _) in FAULTS.items()]
    for layout, errors in zip(layouts, parity.worst(2, layouts, plant), strict=True):
        _, broken = FAULTS[layout.fault]
        assert errors[broken] > 1e-3, layout.fault


def _dispatched(rank: int, world: int) -> list:
    """Tokens to experts that multiply by their global number, and back."""
    dispatcher = AllToAll(torch.distributed.group.WORLD, num_experts=6)
    chosen = [
        torch.tensor([[4, 5], [5, 4], [4, 5]]),  # rank 0 sends all to rank 2
        torch.tensor([[0, 5]]),
        torch.zeros(0, 2, dtype=torch.int64),  # rank 2 has no tokens, and rank 1 gets none
    ][rank]
    x = torch.full((len(chosen), 4), float(rank + 1))
    weights = torch.tensor([0.25, 0.75]).expand(chosen.shape)
    sent = dispatcher.dispatch(x, chosen, weights)
    number = (sent.expert + 2 * rank)[:, None]
    out = dispatcher.combine(sent.rows * number * sent.weights[:, None], sent)
    return [len(sent.rows), out.tolist()]


def test_rows_go_to_their_expert_and_come_back_weighted():
    """By hand: 3 ranks of 2 experts, one without tokens and one without rows."""
    results = run_ranks(3, _dispatched)
    assert [rows for rows, _ in results] == [1, 0, 7]
    first = [4 * 0.25 + 5 * 0.75, 5 * 0.25 + 4 * 0.75, 4 * 0.25 + 5 * 0.75]
    assert results[0][1] == [[value] * 4 for value in first]
    assert results[1][1] == [[2 * 5 * 0.75] * 4]
    assert results[2][1] == []


def _unused(rank: int, world: int) -> tuple:
    """Gradients when every token of every rank chooses the experts of rank 0."""
    layout = Layout({"ep": 2})
    model, mesh, config, _ = parity.built(layout, world)
    for block in model.blocks.values():
        block.moe.router.register_buffer("balance_bias", torch.tensor([50.0] * 4 + [0.0] * 4))
    sums = steps.accumulate(model, parity.mine(layout, mesh), 10, mesh, config.router)
    gradients = {n: prove.whole(p.grad) for n, p in model.named_parameters() if "experts" in n}
    return sums.counts, gradients


def test_a_rank_whose_experts_nobody_chose_has_zero_gradients():
    for counts, found in run_ranks(2, _unused):
        assert counts[:, 4:].sum() == 0 and counts.sum() > 0
        for name, gradient in found.items():
            assert gradient[:3].norm() > 0, name
            assert gradient[4:].norm() == 0, name


def _names(rank: int, world: int) -> list[str]:
    model, *_ = parity.built(Layout({"ep": 2, "tp": 2}), world)
    return [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters()]


def test_names_and_shapes_of_parameters_are_those_of_the_whole_model():
    true = [f"{name} {tuple(p.shape)}" for name, p in prove.drawn(TINY).items()]
    assert run_ranks(2, _names)[0] == true

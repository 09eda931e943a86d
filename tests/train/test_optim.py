"""Parameter groups by name, AdamW's state, and the learning rate of every step."""

import pytest
import torch

from ossature.config import OptimConfig
from ossature.model.transformer import Transformer
from ossature.train import optim
from tests.small_runs import TINY

SETTINGS = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4)


def test_decay_acts_on_matrices_alone():
    model = Transformer(TINY)
    decaying = {name for name, _ in model.named_parameters() if optim.decays(name)}
    assert {name.removeprefix("blocks.0.") for name in decaying if "blocks.1." not in name} == {
        "attention.q_proj.weight", "attention.k_proj.weight", "attention.v_proj.weight",
        "attention.o_proj.weight", "moe.router.weight", "moe.experts.gate_up_weight",
        "moe.experts.down_weight", "lm_head.weight",
    }  # fmt: skip


def test_the_stated_decay_is_the_one_that_acts():
    """With no gradient, AdamW only decays: w -> w * (1 - lr * decay), and only in one group."""
    model = Transformer(TINY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optim.build(model.named_parameters(), OptimConfig(lr=0.5, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.5 * 0.1) if optim.decays(name) else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


def test_the_groups_are_told_with_their_parameters():
    lines = optim.describe(optim.build(Transformer(TINY).named_parameters(), SETTINGS))
    assert lines[0].startswith("weight decay 0.1: ") and "moe.experts.down_weight" in lines[0]
    assert lines[1].startswith("weight decay 0: ") and "attention.sinks.weight" in lines[1]


def rates(schedule: str, steps: int = 24, **changes) -> list[float]:
    """Rate of step 1, 2, ...; the list begins with a place for step 0, which does not exist."""
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4, schedule=schedule, **changes)
    return [0.0, *(optim.learning_rate(config, n, steps) for n in range(1, steps + 1))]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_the_first_step_is_not_at_zero_and_the_warm_up_ends_at_the_peak(schedule):
    rate = rates(schedule)
    assert rate[1:5] == [0.25, 0.5, 0.75, 1.0]
    assert max(rate) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_least_rate(schedule):
    assert rates(schedule)[24] == pytest.approx(0.1)


def test_values_in_the_middle_of_the_decay():
    assert rates("cosine")[14] == pytest.approx(0.55)  # half way of 20: cos is 0
    assert rates("cosine")[9] == pytest.approx(0.1 + 0.9 * (1 + 0.5**0.5) / 2)  # a quarter: 45 deg
    assert rates("linear")[9] == pytest.approx(0.1 + 0.9 * 0.75)
    assert rates("constant")[24] == 1.0


def test_wsd_is_stable_until_its_decay():
    rate = rates("wsd", decay_steps=10)
    assert rate[4:15] == [1.0] * 11
    assert rate[19] == pytest.approx(0.55)
    assert rates("wsd", steps=50)[40:42] == pytest.approx([1.0, 0.91])  # the last fifth


def test_a_given_decay_ends_before_the_run():
    rate = rates("linear", decay_steps=10)
    assert rate[14] == rate[24] == pytest.approx(0.1)


def test_no_warm_up_begins_at_the_peak():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=0, schedule="linear")
    assert optim.learning_rate(config, 1, 10) == pytest.approx(0.91)


def test_the_state_is_flat_tensors_by_the_names_of_the_parameters():
    model = Transformer(TINY)
    state = optim.state(optim.build(model.named_parameters(), SETTINGS))
    names = [name for name, _ in model.named_parameters()]
    assert set(state) == {f"{n}.{key}" for n in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert all(not tensor.any() for tensor in state.values())


def test_state_made_before_the_first_step_changes_nothing():
    """Otherwise saving at step 0, or resuming, would not be exact."""
    models = [Transformer(TINY) for _ in range(2)]
    for n, model in enumerate(models):
        optimizer = optim.build(model.named_parameters(), SETTINGS)
        if n:
            optim.state(optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(one, other)

"""The norm of the whole gradient, and clipping by it."""

import pytest
import torch
from torch import nn

from ossature.parallel.gradients import global_norm, scale_and_clip


def parameters(*gradients: torch.Tensor) -> list[nn.Parameter]:
    made = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient.clone()
        made.append(parameter)
    return made


def test_the_norm_is_of_all_gradients_together():
    assert global_norm(parameters(torch.tensor([3.0]), torch.tensor([[0.0, 4.0]]))) == 5.0


def test_the_norm_of_many_numbers_is_exact():
    """One fp32 sum of 16 million squares is off by 7e-4 on CPU, more or less with the ranks."""
    gradient = torch.randn(32, 512, 1024) * 1e-3
    exact = gradient.double().square().sum().sqrt().item()
    assert global_norm(parameters(gradient)).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("clip", "scale", "expected"),
    [
        (10.0, 1.0, [3.0, 4.0]),  # below the limit: untouched
        (1.0, 1.0, [0.6, 0.8]),
        (0.0, 1.0, [3.0, 4.0]),  # 0 does not clip
        (0.0, 2.0, [1.5, 2.0]),  # the loss scale is taken out
        (1.0, 2.0, [0.6, 0.8]),  # and the limit holds for what is left
    ],
)
def test_clipping_keeps_the_direction_and_limits_the_norm(clip, scale, expected):
    made = parameters(torch.tensor([3.0]), torch.tensor([4.0]))
    scale_and_clip(made, global_norm(made), clip, scale)
    assert [p.grad.item() for p in made] == pytest.approx(expected, rel=1e-5)


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    assert global_norm(parameters(torch.tensor([1.0, float("nan")]))).isnan()
    assert global_norm(parameters(torch.tensor([float("inf")]))).isinf()

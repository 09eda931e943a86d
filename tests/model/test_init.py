"""Parts of initial weights, as a rank draws them."""

import pytest
import torch

from ossature.model import init
from ossature.model.config import ModelConfig

CONFIG = ModelConfig()
EXPERTS = "blocks.0.moe.experts.gate_up_weight"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (EXPERTS, (6, 8, 4)),
        ("blocks.0.moe.experts.gate_up_bias", (6, 8)),
        ("blocks.0.moe.experts.gate_up_lora_a", (6, 8, 4)),
        ("blocks.1.attention.q_proj.weight", (6, 8)),
        ("blocks.1.attention_norm.weight", (6,)),
        ("blocks.1.attention.sinks.weight", (6,)),
        ("embedding.lora_b", (6, 8)),
    ],
)
def test_a_part_is_cut_from_the_whole(name: str, shape: tuple[int, ...]):
    part = (slice(2, 5), slice(1, 7), slice(0, 3))[: len(shape)]
    whole = init.initial_weight(CONFIG, name, shape, 3)

    assert torch.equal(init.initial_weight(CONFIG, name, shape, 3, part), whole[part])
    nothing = (slice(6, 6), *part[1:])
    found = init.initial_weight(CONFIG, name, shape, 3, nothing)
    assert found.shape == whole[nothing].shape


def test_only_the_experts_of_a_part_are_drawn(monkeypatch: pytest.MonkeyPatch):
    drawn, normal = [], init._normal
    monkeypatch.setattr(init, "_normal", lambda name, *a: drawn.append(name) or normal(name, *a))
    init.initial_weight(CONFIG, EXPERTS, (6, 8, 4), 3, (slice(2, 5), slice(0, 8), slice(0, 4)))

    assert drawn == [f"{EXPERTS}.{expert}" for expert in (2, 3, 4)]

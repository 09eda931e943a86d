"""A folder -> a model in memory, and back."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ossature.convert.model import load_model, save_model
from tests.convert.folders import assert_same_bits, logits


def test_a_model_is_loaded_in_the_dtype_asked_for(bf16: Path):
    assert {p.dtype for p in load_model(bf16).parameters()} == {torch.float32}
    half = load_model(bf16, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert all(p.is_leaf and p.requires_grad for p in half.parameters())


def test_forms_are_passed_on(bf16: Path):
    model = load_model(bf16, attention_form="eager", moe_form="eager")

    assert model.get_submodule("blocks.0.moe.experts").form == "eager"
    torch.testing.assert_close(logits(model, 96), logits(load_model(bf16), 96), atol=1e-4, rtol=0)


def test_native_keeps_every_bit_of_a_model_in_training(bf16: Path, tmp_path: Path):
    model = load_model(bf16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)  # more bits than bfloat16 has
    save_model(model, tmp_path / "native", format="native")
    again = load_model(tmp_path / "native")

    assert_same_bits(dict(again.state_dict()), dict(model.state_dict()))


def test_a_balancing_bias_has_no_place_in_a_folder(bf16: Path, tmp_path: Path):
    model = load_model(bf16)
    router = model.get_submodule("blocks.1.moe.router")
    router.register_buffer("balance_bias", torch.zeros(8))
    save_model(model, tmp_path / "zero")
    router.register_buffer("balance_bias", torch.tensor([0.0] * 7 + [0.01]))

    with pytest.raises(ValueError, match=r"blocks\.1\.moe\.router\.balance_bias is not zero"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_lacks_a_weight_is_not_saved(bf16: Path, tmp_path: Path):
    """Or has one too many: nothing is filled in and nothing left out."""
    model = load_model(bf16)
    extra = torch.nn.Parameter(torch.zeros(2))
    model.get_submodule("blocks.0").register_parameter("gain", extra)
    with pytest.raises(KeyError, match=r"no row in the table of names for blocks\.0\.gain"):
        save_model(model, tmp_path / "out")
    del model.get_submodule("blocks.0").gain
    del model.get_submodule("blocks.2.attention.k_proj").bias
    with pytest.raises(ValueError, match=r"lacks blocks\.2\.attention\.k_proj\.bias"):
        save_model(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_format_that_there_is_not_is_refused(tmp_path: Path):
    """In a process of its own: here the types are checked already."""
    program = (
        "import ossature\n"
        "config = ossature.ModelConfig(vocab_size=8, hidden_size=32, intermediate_size=32,\n"
        "    num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)\n"
        f"ossature.save_model(ossature.Transformer(config), {str(tmp_path / 'out')!r}, 'hf')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert "ValueError: format ('hf') must be one of bf16, mxfp4, openai, native" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_model_is_saved_to_a_new_folder_only(bf16: Path, tmp_path: Path):
    model = load_model(bf16)
    (tmp_path / "note.txt").touch()

    with pytest.raises(ValueError, match="is not empty; give a new folder"):
        save_model(model, tmp_path)


def test_loading_leaves_the_number_of_threads_alone(bf16: Path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        load_model(bf16)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)

"""Which folder holds weights, and one line for everything that can be wrong with one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ossature.convert.folder import detect, open_source, resolve
from ossature.convert.names import UnknownTensor
from tests.convert.folders import convert, edit, edit_config, native, weights

NORM = "model.layers.1.input_layernorm.weight"
BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"


def test_every_format_is_recognised(bf16: Path, mxfp4: Path, openai: Path, tmp_path: Path):
    assert detect(bf16) == "bf16"
    assert detect(mxfp4) == "mxfp4"
    assert detect(openai) == "openai"
    assert detect(convert(bf16, tmp_path / "native", "native")) == "native"


def test_a_run_stands_for_its_newest_whole_checkpoint(bf16: Path, tmp_path: Path):
    run = tmp_path / "run"
    for step in ("step_00000100", "step_00000200"):
        convert(bf16, run / "checkpoints" / step, "native")
    (run / "checkpoints" / "step_00000300.partial").mkdir()

    assert resolve(run) == run / "checkpoints" / "step_00000200"
    assert detect(run) == "native"


def test_a_repository_stands_for_itself_and_not_for_its_original(mxfp4, openai, tmp_path: Path):
    shutil.copytree(mxfp4, tmp_path / "repository")
    shutil.copytree(openai, tmp_path / "repository" / "original")

    assert detect(tmp_path / "repository") == "mxfp4"
    assert detect(tmp_path / "repository" / "original") == "openai"


def message(folder: Path) -> str:
    with pytest.raises((ValueError, UnknownTensor)) as error:
        open_source(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_holds_no_weights_is_said_to(tmp_path: Path):
    assert message(tmp_path / "no") == f"{tmp_path / 'no'}: no such folder"
    assert message(tmp_path).startswith(f"{tmp_path}: holds no weights: ")
    (tmp_path / "checkpoints" / "step_00000100.partial").mkdir(parents=True)
    assert message(tmp_path) == f"{tmp_path}: a run without a whole checkpoint yet"


def test_a_folder_without_config_is_said_to_have_none(bf16: Path, tmp_path: Path):
    folder = edit(bf16, tmp_path / "in")
    (folder / "config.json").unlink()

    assert message(folder) == f"{folder}: has no config.json"


@pytest.mark.parametrize("name", [NORM, "lm_head.weight", BLOCKS])
def test_a_missing_tensor_is_named(name: str, mxfp4: Path, tmp_path: Path):
    """The output head too: nothing is tied or filled in."""
    folder = edit(mxfp4, tmp_path / "in", **{name: None})

    assert message(folder) == f"{folder}: lacks {name}"


@pytest.mark.parametrize(
    "name",
    ["model.layers.4.input_layernorm.weight", "model.layers.0.mlp.experts.gate_up_projs.0.weight",
     "model.layers.0.mlp.experts.down_proj"],
)  # fmt: skip
def test_an_unknown_tensor_is_named(name: str, mxfp4: Path, tmp_path: Path):
    """A layer too many, another project's names, or bfloat16 beside MXFP4."""
    folder = edit(mxfp4, tmp_path / "in", **{name: torch.zeros(64)})

    assert message(folder) == f"{folder}: no row in the table of names for {name}"


def test_a_layer_too_few_is_missing_and_a_layer_too_many_unknown(bf16: Path, tmp_path: Path):
    folder = edit(bf16, tmp_path / "in")
    edit_config(folder, num_hidden_layers=5, layer_types=None)
    assert message(folder).startswith(f"{folder}: lacks model.layers.4.")
    assert message(folder).endswith(" and 14 more")
    edit_config(folder, num_hidden_layers=3)
    assert "no row in the table of names for model.layers.3." in message(folder)


def test_a_shape_off_is_named_with_both_shapes(bf16: Path, tmp_path: Path):
    folder = edit(bf16, tmp_path / "in", **{NORM: torch.zeros(63, dtype=torch.bfloat16)})

    file = folder / "model.safetensors"
    assert message(folder) == f"{file}: {NORM} has shape (63,), config.json makes it (64,)"


def test_an_expert_matrix_the_wrong_way_round_is_a_shape_off(bf16: Path, tmp_path: Path):
    name = "model.layers.0.mlp.experts.down_proj"
    turned = weights(bf16)[name].mT.contiguous()
    folder = edit(bf16, tmp_path / "in", **{name: turned})

    assert "has shape (8, 64, 32), config.json makes it (8, 32, 64)" in message(folder)


@pytest.mark.parametrize(
    ("name", "dtype"), [(NORM, torch.int8), (NORM, torch.float64), (BLOCKS, torch.int8)]
)
def test_a_dtype_off_is_named(name: str, dtype: torch.dtype, mxfp4: Path, tmp_path: Path):
    tensor = weights(mxfp4)[name]
    folder = edit(mxfp4, tmp_path / "in", **{name: tensor.to(dtype)})
    wanted = "uint8" if name == BLOCKS else "bfloat16"

    file = folder / "model.safetensors"
    assert message(folder) == f"{file}: {name} has dtype {str(dtype)[6:]}, not {wanted}"


def test_another_quantisation_is_refused_by_name(bf16: Path, tmp_path: Path):
    folder = edit(bf16, tmp_path / "in")
    edit_config(folder, quantization_config={"quant_method": "gptq"})

    assert message(folder).startswith(f"{folder / 'config.json'}: quant_method ('gptq') must be")


def test_a_file_cut_short_is_named(mxfp4: Path, tmp_path: Path):
    folder = edit(mxfp4, tmp_path / "in")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])

    assert message(folder).startswith(f"{file}: cut short: ")


def test_numbers_that_are_not_finite_cannot_be_quantised(bf16: Path, tmp_path: Path):
    name = "model.layers.2.mlp.experts.gate_up_proj"
    bad = weights(bf16)[name]
    bad[1, 2, 3] = torch.nan
    folder = edit(bf16, tmp_path / "in", **{name: bad})

    with pytest.raises(ValueError, match=r"gate_up_weight: mxfp4: .* not finite"):
        convert(folder, tmp_path / "out", "mxfp4")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_a_width_of_no_whole_groups_cannot_be_packed(tmp_path: Path):
    from tests.convert.folders import theirs

    theirs(tmp_path / "in", intermediate_size=40)
    with pytest.raises(ValueError, match=r"intermediate_size \(40\) must be a multiple of 32"):
        convert(tmp_path / "in", tmp_path / "out", "mxfp4")
    assert native(open_source(convert(tmp_path / "in", tmp_path / "fine", "native")))


def test_openais_format_refuses_a_model_it_cannot_say(tmp_path: Path):
    from tests.convert.folders import theirs

    theirs(tmp_path / "in", rms_norm_eps=1e-6)
    with pytest.raises(ValueError, match=r"rms_norm_eps \(1e-06\) has no place"):
        convert(tmp_path / "in", tmp_path / "out", "openai")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_a_checkpoint_of_a_run_loses_a_balancing_bias_of_zero_only(bf16: Path, tmp_path: Path):
    """It lies with the optimizer, where training keeps it."""
    from ossature.checkpoint.store import save_weights
    from ossature.convert.model import load_model

    run = tmp_path / "run"
    step = convert(bf16, run / "checkpoints" / "step_00000100", "native")
    name = "blocks.2.moe.router.balance_bias"
    save_weights(step / "optimizer", {name: torch.zeros(8), "norm.weight.exp_avg": torch.ones(64)})
    assert open_source(run).names()
    shutil.rmtree(step / "optimizer")
    save_weights(step / "optimizer", {name: torch.full((8,), 1e-3)})

    assert message(run).startswith(f"{step}: {name} is not zero, and no format has a place")
    router = load_model(run).get_submodule("blocks.2.moe.router")
    assert torch.equal(router.get_buffer("balance_bias"), torch.full((8,), 1e-3))


def test_a_native_folder_is_checked_like_the_others(bf16: Path, tmp_path: Path):
    from ossature.checkpoint.store import save_weights

    folder = convert(bf16, tmp_path / "native", "native")
    state = native(open_source(folder))

    def spoil(**changes: torch.Tensor | None) -> Path:
        target = tmp_path / f"spoilt{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        shutil.copy(folder / "config.json", target)
        spoilt = {**state, **changes}
        save_weights(target, {name: t for name, t in spoilt.items() if t is not None})
        return target

    assert message(spoil(**{"norm.weight": None})).endswith(": lacks norm.weight")
    assert message(spoil(**{"norm.gain": torch.zeros(2)})).endswith("for norm.gain")
    assert "shape (5,)" in message(spoil(**{"norm.weight": torch.zeros(5)}))
    assert "dtype int64" in message(spoil(**{"norm.weight": torch.zeros(64).long()}))


def test_a_native_index_says_nothing_of_where_it_was_written(bf16: Path, tmp_path: Path):
    folder = convert(bf16, tmp_path / "native", "native")

    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"

"""config.json in three styles, against the published files and against transformers."""

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoConfig, GptOssConfig

from ossature.convert.config import hugging_face_config, original_config, read_config
from ossature.model.config import DEBUG, GPT_OSS_20B, GPT_OSS_120B, ModelConfig
from tests.golden import golden
from tests.tiny import hugging_face_config as tiny_config
from tests.tiny import native_config

SIZES = [("20b", GPT_OSS_20B), ("120b", GPT_OSS_120B)]
# A model that differs from the published one, and from GptOssConfig's defaults, in every number.
ODD = ModelConfig(
    vocab_size=96, hidden_size=64, intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, head_dim=16, num_local_experts=8,
    num_experts_per_tok=3, sliding_window=7, swiglu_limit=5.5, rms_norm_eps=2e-6,
    layer_types=("full_attention", "full_attention", "sliding_attention"),
    rope_theta=10_000.0, rope_factor=8.0, rope_beta_fast=24.0, rope_beta_slow=2.0,
    rope_original_context=512, rope_truncate=True, max_position_embeddings=4096,
    initializer_range=0.05, router_aux_loss_coef=0.25, eos_token_id=3, pad_token_id=4,
    bos_token_id=5,
)  # fmt: skip


def written(table: dict, folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(table))
    return path


@pytest.mark.parametrize(("size", "config"), SIZES)
@pytest.mark.parametrize("style", ["config_v4", "config_v5", "config_v5_bf16", "original_config"])
def test_reads_the_published_files_in_every_style(size: str, config: ModelConfig, style: str):
    assert read_config(golden(f"configs/{size}_{style}.json")) == config


@pytest.mark.parametrize(("size", "config"), SIZES)
def test_writes_the_published_files_byte_for_byte(size: str, config: ModelConfig):
    theirs = golden(f"configs/{size}_config_v4.json").read_text()
    assert json.dumps(hugging_face_config(config, mxfp4=True), indent=2) + "\n" == theirs
    original = golden(f"configs/{size}_original_config.json").read_text()
    assert json.dumps(original_config(config)) == original


def test_bf16_differs_from_the_published_file_in_its_dtype_and_quantization_alone():
    published = hugging_face_config(GPT_OSS_20B, mxfp4=True)
    ours = hugging_face_config(GPT_OSS_20B, dtype="bfloat16")

    assert published.pop("quantization_config")["quant_method"] == "mxfp4"
    assert (ours.pop("dtype"), ours.pop("torch_dtype")) == ("bfloat16", "bfloat16")
    assert ours == published
    assert ours["architectures"] == ["GptOssForCausalLM"]


@pytest.mark.parametrize("config", [ODD, DEBUG, GPT_OSS_20B, dataclasses.replace(
    ODD, swiglu_alpha=1.5, eos_token_id=None, bos_token_id=None)])  # fmt: skip
@pytest.mark.parametrize("mxfp4", [False, True])
def test_what_is_written_is_read_back(config: ModelConfig, mxfp4: bool, tmp_path: Path):
    path = written(hugging_face_config(config, mxfp4=mxfp4), tmp_path)

    assert read_config(path) == config


@pytest.mark.parametrize("config", [ODD, DEBUG, GPT_OSS_120B])
def test_transformers_reads_what_is_written_in_every_field(config: ModelConfig, tmp_path: Path):
    written(hugging_face_config(config), tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path)

    for name in (f.name for f in dataclasses.fields(config) if not f.name.startswith("rope_")):
        value = getattr(config, name)
        assert getattr(theirs, name) == (list(value) if name == "layer_types" else value), name
    rope = theirs.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"]) == ("yarn", config.rope_theta)
    assert rope["factor"] == config.rope_factor
    assert (rope["beta_fast"], rope["beta_slow"]) == (config.rope_beta_fast, config.rope_beta_slow)
    assert rope["original_max_position_embeddings"] == config.rope_original_context
    assert rope["truncate"] is config.rope_truncate
    assert not theirs.tie_word_embeddings


@pytest.mark.parametrize("shape", ["oblong", "square"])
def test_reads_what_transformers_writes(shape: str, tmp_path: Path):
    theirs = tiny_config(shape, rms_norm_eps=3e-6, swiglu_limit=6.0, swiglu_alpha=1.5)
    theirs.save_pretrained(tmp_path)
    expected = dataclasses.replace(
        native_config(theirs), router_aux_loss_coef=0.001, swiglu_limit=6.0, swiglu_alpha=1.5
    )

    assert read_config(tmp_path / "config.json") == expected


def test_absent_keys_are_transformers_defaults(tmp_path: Path):
    """Not the 20B: its own file says all it needs."""
    ours = read_config(written({"model_type": "gpt_oss"}, tmp_path))
    theirs = native_config(GptOssConfig())

    assert dataclasses.replace(ours, router_aux_loss_coef=theirs.router_aux_loss_coef) == theirs
    assert ours.router_aux_loss_coef == GptOssConfig().router_aux_loss_coef
    assert (ours.num_hidden_layers, ours.num_local_experts) == (36, 128)


def test_a_rope_table_that_does_not_say_truncates(tmp_path: Path):
    """As transformers reads it; the published files say false."""
    table = hugging_face_config(GPT_OSS_20B)
    assert table["rope_scaling"].pop("truncate") is False

    assert read_config(written(table, tmp_path)).rope_truncate is True


def test_plain_rope_is_yarn_without_extension(tmp_path: Path):
    table = hugging_face_config(ODD) | {"rope_scaling": {"rope_type": "default"}}

    assert read_config(written(table, tmp_path)).rope_factor == 1.0


def test_aliases_stand_for_their_keys(tmp_path: Path):
    table = hugging_face_config(ODD)
    experts, k = table.pop("num_local_experts"), table.pop("num_experts_per_tok")
    assert table["experts_per_token"] == k

    assert read_config(written(table | {"num_experts": experts}, tmp_path)) == ODD


BAD = {
    "an unknown key": ({"attention_chunk_size": 8192}, "unknown key attention_chunk_size"),
    "another model": ({"model_type": "llama"}, 'model_type must be "gpt_oss"'),
    "another method": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quant_method ('gptq') must be mxfp4",
    ),
    "no method": ({"quantization_config": {}}, "quant_method (None) must be mxfp4"),
    "an option of the method": (
        {"quantization_config": {"quant_method": "mxfp4", "bits": 3}},
        "unknown key bits of quantization_config",
    ),
    "tied embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings must be false"),
    "no biases": ({"attention_bias": False}, "attention_bias must be true"),
    "another activation": ({"hidden_act": "gelu"}, 'hidden_act must be "silu"'),
    "aliases at odds": (
        {"experts_per_token": 2},
        "experts_per_token (2) contradicts num_experts_per_tok (3)",
    ),
    "contexts at odds": (
        {"initial_context_length": 4096},
        "initial_context_length (4096) contradicts original_max_position_embeddings (512)",
    ),
    "text for a number": ({"head_dim": "64"}, 'head_dim ("64") must be a whole number'),
    "a fraction": ({"head_dim": 64.5}, "head_dim (64.5) must be a whole number"),
    "null": ({"sliding_window": None}, "sliding_window (null) must be a whole number"),
    "several ends": ({"eos_token_id": [1, 2]}, "eos_token_id ([1, 2]) must be a whole number"),
    "layers": ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    "a word": ({"layer_types": ["linear"] * 3}, "layer_types must be a list of sliding"),
    "heads": ({"num_key_value_heads": 4}, "num_key_value_heads (4) must divide"),
    "no key-value heads": ({"num_key_value_heads": 0}, "num_key_value_heads (0) must be at least"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads (0) must be at least 1"),
    "no types": ({"layer_types": []}, "layer_types has 0 entries"),
    "a rope list": ({"rope_scaling": [1, 2]}, "rope_scaling ([1, 2]) must be a table"),
    "a rope word": ({"rope_parameters": "yarn"}, 'rope_parameters ("yarn") must be a table'),
    "theta 0": ({"rope_theta": 0}, "rope_theta (0.0) must be positive"),
    "theta infinite": ({"rope_theta": float("inf")}, "rope_theta (inf) must be positive"),
    "theta too long": ({"rope_theta": 10**400}, "rope_theta must be a number that a float can"),
    "epsilon": ({"rms_norm_eps": -1e-5}, "rms_norm_eps (-1e-05) must be positive"),
    "another rope": ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type ('llama3') must be"),
    "no factor": ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling has no factor"),
    "a rope key": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "mscale": 2.0,
                          "original_max_position_embeddings": 512}},
        "unknown key mscale of the RoPE table",
    ),
    "two ropes": ({"rope_parameters": {"rope_type": "default"}}, "rope_scaling contradicts"),
    "two thetas": (
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}},
        "rope_theta (10000) contradicts rope_theta (5.0)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_gpt_oss_is_one_line_that_names_file_and_key(case: str, tmp_path: Path):
    changes, message = BAD[case]
    path = written(hugging_face_config(ODD) | changes, tmp_path)

    with pytest.raises(ValueError) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_ntk_gamma": 1}, "unknown key rope_ntk_gamma"),
        ({"head_dim": None}, "head_dim (null) must be a whole number"),
    ],
)
def test_openais_file_is_read_totally_too(changes: dict, message: str, tmp_path: Path):
    path = written(original_config(GPT_OSS_20B) | changes, tmp_path)

    with pytest.raises(ValueError) as error:
        read_config(path)
    assert str(error.value) == f"{path}: {message}"


def test_a_table_of_neither_style_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="has neither model_type, as Hugging Face's, nor num_hid"):
        read_config(written({"hidden_size": 64}, tmp_path))


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "num_local_experts", "max_position_embeddings"]
)
def test_a_number_that_no_network_has_is_refused_before_memory_is_taken_for_it(
    key: str, tmp_path: Path
):
    table = hugging_face_config(ODD) | {key: 10**12}
    del table["layer_types"]
    path = written(table, tmp_path)
    with pytest.raises(ValueError) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: {key} (1000000000000) must be at most ")


def test_a_key_that_is_there_twice_is_named(tmp_path: Path):
    """Which of the two another reader takes is its own business."""
    path = tmp_path / "config.json"
    text = json.dumps(hugging_face_config(ODD))
    path.write_text('{"swiglu_limit": 3.0, ' + text[1:])

    with pytest.raises(ValueError, match=rf"^{path}: swiglu_limit is there twice$"):
        read_config(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{",
        '{"head_dim": ' + "9" * 5000 + "}",
        '{"a": "\ud800'.encode("utf-8", "replace"),
    ],
)
def test_a_damaged_file_is_one_line(text: str | bytes, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)

    with pytest.raises(ValueError, match=rf"^{path}: not (valid JSON|a JSON object)"):
        read_config(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": 1e-6}, r"rms_norm_eps \(1e-06\) has no place"),
        ({"rope_truncate": True}, r"rope_truncate \(True\) has no place"),
        ({"swiglu_alpha": 1.0}, r"swiglu_alpha \(1.0\) has no place"),
        ({"layer_types": ("full_attention",) * 24}, r"layer_types .* has no place"),
    ],
)
def test_openais_file_cannot_say_everything(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        original_config(dataclasses.replace(GPT_OSS_20B, **changes))


def test_openais_file_of_another_vocabulary_has_no_token_ids(tmp_path: Path):
    config = read_config(written(original_config(DEBUG), tmp_path))

    assert config == dataclasses.replace(DEBUG, initializer_range=0.02)

"""The table of names: total, both ways, and the published layouts from shapes alone."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import GptOssForCausalLM

from benchmarks.make_checkpoint import (
    MAX_SHARD_BYTES,
    PUBLISHED_INDEX,
    in_published_order,
    published_name,
)
from ossature.checkpoint.safetensors import deal
from ossature.convert import from_hugging_face, to_hugging_face
from ossature.convert.layout import layout, specs
from ossature.convert.names import UnknownTensor, rows, shapes
from ossature.model.config import DEBUG, GPT_OSS_20B, GPT_OSS_120B, ModelConfig
from ossature.model.transformer import Transformer
from tests.golden import golden
from tests.tiny import hugging_face_config, hugging_face_model, native_config


@pytest.mark.parametrize("config", [DEBUG, GPT_OSS_20B, GPT_OSS_120B])
def test_the_native_column_is_the_models_state_with_its_shapes(config: ModelConfig):
    with torch.device("meta"):
        model = Transformer(config)

    assert {n: tuple(p.shape) for n, p in model.state_dict().items()} == shapes(config)


@pytest.mark.parametrize("shape", ["oblong", "square"])
def test_the_hugging_face_column_is_transformers_state_with_its_shapes(shape: str):
    theirs = hugging_face_config(shape)
    with torch.device("meta"):
        model = GptOssForCausalLM(theirs)
    ours = {name: spec.shape for name, spec in specs(native_config(theirs), "bf16").items()}

    assert {n: tuple(p.shape) for n, p in model.state_dict().items()} == ours


@pytest.mark.parametrize(
    ("config", "format", "count", "payload"),
    [
        (GPT_OSS_20B, "openai", 363, 13_761_264_768),
        (GPT_OSS_20B, "mxfp4", 459, 13_761_264_768),
        (GPT_OSS_20B, "bf16", 411, 41_829_514_368),
        (GPT_OSS_120B, "openai", 543, 65_248_815_744),
        (GPT_OSS_120B, "mxfp4", 687, 65_248_815_744),
        (GPT_OSS_120B, "bf16", 615, 233_658_313_344),
    ],
)
def test_the_published_models_have_so_many_tensors_and_bytes(config, format, count, payload):
    tensors = specs(config, format)

    assert len(tensors) == count
    assert sum(spec.num_bytes for spec in tensors.values()) == payload


def test_the_names_are_those_of_the_published_index():
    """By hash: every name, and which file it is in, in the order of the published 20B index."""
    tensors = in_published_order(GPT_OSS_20B)
    shards = deal(tensors, MAX_SHARD_BYTES)
    weight_map = {
        name: published_name(n, len(shards)) for n, names in enumerate(shards) for name in names
    }
    total = sum(spec.num_bytes for spec in tensors.values())
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})

    assert hashlib.sha256(index.encode()).hexdigest() == PUBLISHED_INDEX


@pytest.mark.parametrize(
    ("folder", "format"), [("hf_bf16", "bf16"), ("hf_mxfp4", "mxfp4"), ("original", "openai")]
)
def test_the_golden_folders_have_these_tensors(folder, format):
    from ossature.convert.config import read_config

    tensors = load_file(golden(folder) / "model.safetensors")
    ours = specs(read_config(golden(folder) / "config.json"), format)

    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
        n: tuple(spec) for n, spec in ours.items()
    }


def test_there_and_back_is_the_same_and_experts_are_turned():
    state = {n: torch.randn(s) for n, s in shapes(native_config(hugging_face_config())).items()}
    theirs = to_hugging_face(state)
    back = from_hugging_face(theirs)

    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    ours = state["blocks.1.moe.experts.down_weight"]  # (experts, out, in)
    assert torch.equal(theirs["model.layers.1.mlp.experts.down_proj"], ours.mT)


def test_transformers_names_come_through_unchanged():
    state = hugging_face_model().state_dict()

    assert list(to_hugging_face(from_hugging_face(state))) == list(state)


def test_any_subset_will_do_gradients_too():
    weight = torch.randn(3, 4, 5, requires_grad=True)
    named = to_hugging_face({"blocks.11.moe.experts.gate_up_weight": weight})
    named["model.layers.11.mlp.experts.gate_up_proj"].sum().backward()

    assert weight.grad is not None and weight.grad.shape == weight.shape
    assert to_hugging_face({}) == {}


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.moe.experts.gate_up_weights",
        "blocks.00.moe_norm.weight",
        "blocks.moe_norm.weight",
        "blocks.{n}.moe_norm.weight",
        "blocks.0.moe.router.balance_bias",
        "model.norm.weight",
        "module.norm.weight",
        "",
    ],
)
def test_an_unknown_name_raises_a_plain_sentence(name: str):
    with pytest.raises(UnknownTensor) as error:
        to_hugging_face({"norm.weight": torch.zeros(2), name: torch.zeros(2)})

    assert isinstance(error.value, KeyError)
    assert str(error.value) == f"no row in the table of names for {name}"


@pytest.mark.parametrize(
    "name", ["norm.weight", "model.layers.0.mlp.experts.down_proj_blocks", "lm_head.bias"]
)
def test_an_unknown_hugging_face_name_raises(name: str):
    with pytest.raises(UnknownTensor, match=name):
        from_hugging_face({name: torch.zeros(2)})


def test_every_stored_tensor_belongs_to_a_weight_and_none_to_two():
    """q, k and v share a tensor in OpenAI's format, by rows that follow one another."""
    config = native_config(hugging_face_config())
    for format in ("bf16", "mxfp4", "openai"):
        taken: dict[str, list[tuple[int, int]]] = {}
        for native, stored in layout(config, format).items():
            length = shapes(config)[native][0]
            for name in stored.names:
                taken.setdefault(name, []).append((stored.first, stored.first + length))
        assert taken.keys() == specs(config, format).keys()
        for name, parts in taken.items():
            assert [a for a, _ in parts] == [0, *(b for _, b in parts[:-1])], name
            assert parts[-1][1] == specs(config, format)[name].shape[0], name


def test_every_row_is_in_the_document_of_weights():
    from tests.golden import ROOT

    text = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    for row in rows(ModelConfig(num_hidden_layers=1)).values():
        for name in row[:3]:
            generic = name.replace(".0.", ".{n}.")
            assert f"`{generic}`" in text, generic

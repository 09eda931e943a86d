"""Every format from and to every other, against transformers and by hand-made numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ossature
from ossature.checkpoint.safetensors import INDEX
from ossature.convert.folder import detect, open_source, write_folder
from ossature.convert.layout import FORMATS
from ossature.convert.model import load_model, save_model
from ossature.kernels.mxfp4 import dequantize
from ossature.model.transformer import Transformer
from tests.convert.folders import (
    assert_same_bits,
    convert,
    edit,
    edit_config,
    loaded_by_transformers,
    logits,
    native,
    theirs,
    weights,
)
from tests.golden import golden

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"


# With transformers as the oracle.


@pytest.mark.parametrize("shape", ["oblong", "square"])
@pytest.mark.parametrize("to", FORMATS)
def test_a_folder_of_transformers_has_equal_logits_in_every_format(shape, to, tmp_path: Path):
    """In square shapes a transposed matrix fits: only the numbers tell."""
    model = theirs(tmp_path / "theirs", shape, seed=3)
    vocab = model.config.vocab_size
    ours = load_model(tmp_path / "theirs")
    torch.testing.assert_close(logits(ours, vocab), logits(model, vocab), atol=1e-4, rtol=0)

    again = load_model(convert(tmp_path / "theirs", tmp_path / to, to))
    assert detect(tmp_path / to) == to
    if to in ("mxfp4", "openai"):
        packed = loaded_by_transformers(convert(tmp_path / to, tmp_path / "hf", "mxfp4"))
        torch.testing.assert_close(logits(again, vocab), logits(packed, vocab), atol=1e-4, rtol=0)
        assert (logits(again, vocab) - logits(ours, vocab)).abs().max() > 1e-3  # it is 4 bits
    else:
        assert torch.equal(logits(again, vocab), logits(ours, vocab))


@pytest.mark.parametrize("shape", ["oblong", "square"])
@pytest.mark.parametrize("to", ["bf16", "mxfp4"])
def test_transformers_loads_what_is_saved_with_equal_logits(shape, to, tmp_path: Path):
    model = theirs(tmp_path / "theirs", shape, seed=4)
    ours = load_model(tmp_path / "theirs")
    save_model(ours, tmp_path / "ours", format=to)
    again = loaded_by_transformers(tmp_path / "ours")
    reference = ours if to == "bf16" else load_model(tmp_path / "ours")

    vocab = model.config.vocab_size
    torch.testing.assert_close(logits(again, vocab), logits(reference, vocab), atol=1e-4, rtol=0)


def test_transformers_loads_many_shards(tmp_path: Path, bf16: Path):
    convert(bf16, tmp_path / "out", "mxfp4", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = set(index["weight_map"].values())

    assert len(files) > 3
    assert {f.name for f in (tmp_path / "out").glob("*.safetensors")} == files
    model = loaded_by_transformers(tmp_path / "out")
    ours = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(ours, 96), logits(model, 96), atol=1e-4, rtol=0)


def test_the_golden_model_has_its_logits_in_every_format():
    io = load_file(golden("io.safetensors"))
    for folder in ("hf_bf16", "hf_mxfp4", "original"):
        with torch.no_grad():
            out = load_model(golden(folder))(io["input_ids"])
        torch.testing.assert_close(out, io["logits"], atol=1e-4, rtol=0)


# By the bit.


GOLDEN = {"hf_bf16": "bf16", "hf_mxfp4": "mxfp4", "original": "openai"}


@pytest.mark.parametrize("source", GOLDEN)
@pytest.mark.parametrize("target", GOLDEN)
def test_the_golden_folders_become_each_other_byte_for_byte(source, target, tmp_path: Path):
    """From bfloat16 with the source's scales: 2,962 of its groups are not canonical."""
    scales = open_source(golden("original")) if source == "hf_bf16" else None
    convert(golden(source), tmp_path / "out", GOLDEN[target], scales=scales)

    ours = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert ours == (golden(target) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("source", GOLDEN)
def test_the_golden_folders_become_native_and_come_back(source, tmp_path: Path):
    convert(golden(source), tmp_path / "native", "native")
    assert_same_bits(
        native(open_source(tmp_path / "native")), native(open_source(golden("hf_bf16")))
    )


def test_without_the_sources_scales_bytes_change_and_no_number_does(tmp_path: Path):
    convert(golden("hf_bf16"), tmp_path / "out", "mxfp4")
    ours, reference = weights(tmp_path / "out"), weights(golden("hf_mxfp4"))
    changed = 0
    for name in reference:
        if name.endswith("_blocks"):
            scales = name.replace("_blocks", "_scales")
            changed += int((ours[name] != reference[name]).any(-1).sum())
            pair = [dequantize(w[name], w[scales]).view(torch.int16) for w in (ours, reference)]
            assert torch.equal(*pair), name

    assert changed == 2962


def test_canonical_mxfp4_comes_back_from_bf16_bit_for_bit(mxfp4: Path, tmp_path: Path):
    """A first pass makes the groups canonical; nothing but tensors and config is passed on."""
    once = convert(convert(mxfp4, tmp_path / "a", "bf16"), tmp_path / "b", "mxfp4")
    twice = convert(convert(once, tmp_path / "c", "bf16"), tmp_path / "d", "mxfp4")

    small = {"config.json", "generation_config.json"}
    assert {f.name for f in (tmp_path / "c").iterdir()} == {*small, "model.safetensors"}
    assert_same_bits(weights(twice), weights(once))


def test_packed_bytes_go_between_the_two_packed_formats_unchanged(mxfp4: Path, tmp_path: Path):
    """Groups that no encoder would write, scale bytes 0 and 254 among them; 255 is no number."""
    state = weights(mxfp4)
    blocks, scales = state[f"{GATE_UP}_blocks"], state[f"{GATE_UP}_scales"]
    odd = edit(mxfp4, tmp_path / "odd", **{
        f"{GATE_UP}_blocks": torch.randint(0, 256, blocks.shape, dtype=torch.uint8),
        f"{GATE_UP}_scales": torch.randint(0, 255, scales.shape, dtype=torch.uint8),
    })  # fmt: skip
    convert(odd, tmp_path / "openai", "openai")
    back = convert(tmp_path / "openai", tmp_path / "back", "mxfp4")

    assert_same_bits(weights(back), weights(odd))


def test_openais_qkv_is_q_then_k_then_v(openai: Path, bf16: Path):
    ours, reference = weights(openai), weights(bf16)
    for kind in ("weight", "bias"):
        parts = [reference[f"model.layers.2.self_attn.{p}_proj.{kind}"] for p in "qkv"]
        assert torch.equal(ours[f"block.2.attn.qkv.{kind}"], torch.cat(parts))


def test_experts_by_hand(tmp_path: Path, bf16: Path):
    """One number that is not zero, followed through all four formats."""
    state = weights(bf16)
    gate_up = torch.zeros_like(state[GATE_UP])  # (8 experts, 64 in, 64 out)
    gate_up[5, 33, 7] = 1.5  # expert 5, input 33, row 7: the up of inner 3
    down = torch.zeros_like(state[DOWN])  # (8 experts, 32 in, 64 out)
    down[2, 30, 41] = -0.5
    folder = edit(bf16, tmp_path / "bf16", **{GATE_UP: gate_up, DOWN: down})

    source = open_source(folder)
    assert source.read("blocks.0.moe.experts.gate_up_weight")[5, 7, 33] == 1.5
    assert source.read("blocks.1.moe.experts.down_weight", 2, 3)[0, 41, 30] == -0.5
    packed = weights(convert(folder, tmp_path / "mxfp4", "mxfp4"))
    # 33 is number 1 of group 1: the high nibble of byte 0.  1.5 = 6 * 2 ** -2 has code 7.
    assert packed[f"{GATE_UP}_blocks"][5, 7, 1].tolist() == [0x70] + [0] * 15
    assert packed[f"{GATE_UP}_scales"][5, 7].tolist() == [0, 125]
    # 30 is the low nibble of byte 15.  -0.5 = -4 * 2 ** -3 has sign and code 6.
    assert packed[f"{DOWN}_blocks"][2, 41, 0].tolist() == [0] * 15 + [0x0E]
    assert packed[f"{DOWN}_scales"][2, 41].tolist() == [124]
    original = weights(convert(tmp_path / "mxfp4", tmp_path / "openai", "openai"))
    assert original["block.0.mlp.mlp1_weight.blocks"][5, 7, 1, 0] == 0x70
    assert original["block.1.mlp.mlp2_weight.scales"][2, 41].tolist() == [124]


def test_saved_experts_are_those_of_the_model_and_not_of_where_it_came_from(mxfp4, tmp_path: Path):
    """A fine-tuned model in MXFP4 is near itself, and far from its base."""
    model = load_model(mxfp4)
    base = logits(model, 96)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_up_weight"):
                parameter.mul_(-1.37)
    tuned = logits(model, 96)
    report = save_model(model, tmp_path / "tuned", format="mxfp4")
    again = logits(load_model(tmp_path / "tuned"), 96)

    assert (again - tuned).abs().mean() < 0.5 * (again - base).abs().mean()
    error = report.inexact["blocks.0.moe.experts.gate_up_weight"].relative
    assert 0.03 < error < 0.2
    exact = {f"blocks.{n}.moe.experts.down_weight" for n in range(4)}
    assert not exact & report.inexact.keys()
    assert report.recoded == 8 and report.cast == {"float32": 63}


def test_the_reported_error_is_that_of_the_written_numbers(bf16: Path, tmp_path: Path):
    report = write_folder(open_source(bf16), tmp_path / "out", "mxfp4")
    before, after = native(open_source(bf16)), native(open_source(tmp_path / "out"))
    for name, error in report.inexact.items():
        difference = after[name].double() - before[name].double()
        assert error.largest == difference.abs().max()
        expected = (difference.norm() / before[name].double().norm()).item()
        assert error.relative == pytest.approx(expected, rel=1e-9)
    assert len(report.inexact) == report.recoded == 8


def test_groups_that_training_left_alone_keep_their_bytes(tmp_path: Path):
    """Of the golden model with two numbers changed, two groups change: one keeps its scale."""
    state = weights(golden("hf_bf16"))
    name = "model.layers.0.mlp.experts.down_proj"  # (expert, in, out)
    state[name][3, 32:64, 9] *= -1.0
    state[name][5, 0, 2] = 1000.0
    folder = edit(golden("hf_bf16"), tmp_path / "tuned", **{name: state[name]})
    convert(folder, tmp_path / "out", "mxfp4", scales=open_source(golden("hf_mxfp4")))
    ours, reference = weights(tmp_path / "out"), weights(golden("hf_mxfp4"))
    blocks, scales = f"{name}_blocks", f"{name}_scales"

    changed = (ours[blocks] != reference[blocks]).any(-1)
    assert changed.nonzero().tolist() == [[3, 9, 1], [5, 2, 0]]
    assert torch.equal(ours[blocks][3, 9, 1], reference[blocks][3, 9, 1] ^ 0x88)
    assert (ours[scales] != reference[scales]).nonzero().tolist() == [[5, 2, 0]]
    for other in reference.keys() - {blocks, scales}:
        assert torch.equal(ours[other], reference[other]), other


# What a folder consists of.


def test_a_bf16_folder_says_nothing_of_quantization(mxfp4: Path, tmp_path: Path):
    table = json.loads((convert(mxfp4, tmp_path / "out", "bf16") / "config.json").read_text())

    assert "quantization_config" not in table
    assert (table["dtype"], table["architectures"]) == ("bfloat16", ["GptOssForCausalLM"])
    assert table["model_type"] == "gpt_oss"
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_an_mxfp4_folder_says_it_as_published(mxfp4: Path):
    table = json.loads((mxfp4 / "config.json").read_text())

    assert table["quantization_config"]["quant_method"] == "mxfp4"
    assert "lm_head" in table["quantization_config"]["modules_to_not_convert"]


@pytest.mark.parametrize("to", FORMATS)
def test_tokenizer_and_generation_config_are_carried_along(to, bf16: Path, tmp_path: Path):
    folder = edit(bf16, tmp_path / "in")
    small = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "generation_config.json": ""}
    for name, text in small.items():
        (folder / name).write_text(text)
    (folder / "notes.txt").write_text("stay")
    convert(folder, tmp_path / "out", to)

    for name, text in small.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert not (tmp_path / "out" / "notes.txt").exists()


def test_a_published_vocabulary_without_generation_config_gets_the_published_one(tmp_path: Path):
    config = ossature.ModelConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    save_model(Transformer(config), tmp_path / "out")
    theirs = loaded_by_transformers(tmp_path / "out").generation_config

    assert theirs.eos_token_id == [200002, 199999, 200012]
    assert (theirs.bos_token_id, theirs.pad_token_id) == (199998, 199999)


def test_original_beside_a_repository_takes_its_tokenizer_along(openai: Path, tmp_path: Path):
    """A download of `original/*` and the tokenizer alone is a folder with weights too."""
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "tokenizer.json").write_text("{}")
    edit(openai, tmp_path / "repository" / "original")

    assert detect(tmp_path / "repository") == "openai"
    convert(tmp_path / "repository", tmp_path / "out", "bf16")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_dtypes_json_says_what_bytes_stand_for(openai: Path):
    table = json.loads((openai / "dtypes.json").read_text())

    assert table.keys() == weights(openai).keys()
    assert table["block.0.mlp.mlp1_weight.blocks"] == "FP4"
    assert table["block.0.mlp.mlp1_weight.scales"] == "UE8"
    assert table["block.0.attn.sinks"] == "BF16"


# Folders that others made.


def test_shards_scattered_as_published_are_read_by_the_index(mxfp4: Path, tmp_path: Path):
    """Numbered from 0, "of" the last number, every bias in another file than its blocks."""
    state = weights(mxfp4)
    folder = edit(mxfp4, tmp_path / "scattered")
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{n}-of-00002.safetensors" for n in range(3)]
    shards: dict[str, dict[str, torch.Tensor]] = {file: {} for file in files}
    for n, name in enumerate(sorted(state, reverse=True)):
        last = name.endswith(("_blocks", "_scales"))
        shards[files[2] if last else files[n % 2]][name] = state[name]
    for file, part in shards.items():
        save_file(part, folder / file)  # without metadata, as published
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    assert_same_bits(native(open_source(folder)), native(open_source(mxfp4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_in_other_floats_are_read_and_written_as_bf16(dtype, bf16: Path, tmp_path: Path):
    names = ["model.norm.weight", "model.layers.3.input_layernorm.weight"]
    state = weights(bf16)
    folder = edit(bf16, tmp_path / "in", **{name: state[name].to(dtype) for name in names})
    report = write_folder(open_source(folder), tmp_path / "out", "bf16")

    assert report.cast == {str(dtype).removeprefix("torch."): 2}
    assert_same_bits(weights(tmp_path / "out"), state)


def test_a_stale_quantization_config_is_not_written_again(bf16: Path, tmp_path: Path):
    folder = edit(bf16, tmp_path / "stale")
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})

    assert detect(folder) == "bf16"
    table = json.loads((convert(folder, tmp_path / "out", "bf16") / "config.json").read_text())
    assert "quantization_config" not in table


def test_what_another_wrapper_left_in_config_json_is_not_written_again(bf16: Path, tmp_path: Path):
    folder = edit(bf16, tmp_path / "wrapped")
    edit_config(folder, architectures=["FSDPGptOssForCausalLM"], dtype="float32")
    loaded_by_transformers(convert(folder, tmp_path / "out", "bf16"))
    table = json.loads((tmp_path / "out" / "config.json").read_text())

    assert (table["architectures"], table["dtype"]) == (["GptOssForCausalLM"], "bfloat16")


def test_no_more_than_a_piece_is_read_or_written_at_a_time(mxfp4, tmp_path, monkeypatch):
    """Whatever the size of the model; an expert's matrix, or a row, is the least there is."""
    from ossature.checkpoint.safetensors import Reader, Writer
    from ossature.convert import transfer

    monkeypatch.setattr(transfer, "PIECE_BYTES", 8192)
    sizes: list[int] = []
    read, write = Reader.read, Writer.write

    def reading(self, *arguments):
        tensor = read(self, *arguments)
        sizes.append(tensor.nbytes)
        return tensor

    def writing(self, name, tensor, start=0):
        sizes.append(tensor.nbytes)
        write(self, name, tensor, start)

    monkeypatch.setattr(Reader, "read", reading)
    monkeypatch.setattr(Writer, "write", writing)
    once = convert(mxfp4, tmp_path / "bf16", "bf16")
    convert(once, tmp_path / "back", "openai")

    assert max(sizes) == 8192  # a gate_up matrix of one expert: 64 x 64 in bfloat16
    assert len(sizes) > 300
    assert_same_bits(native(open_source(tmp_path / "back")), native(open_source(once)))


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_scale_that_stands_for_no_number_is_refused(place: str, mxfp4: Path, tmp_path: Path):
    """Not so by the published decoders: to them it is 2 ** 128, and the weights infinite."""
    name = "model.layers.1.mlp.experts.down_proj_scales"
    scales = weights(mxfp4)[name].clone()
    scales.view(-1)[0 if place == "first" else -1] = 255
    source = open_source(edit(mxfp4, tmp_path / "damaged", **{name: scales}))

    for read in (source.read, source.packed):
        with pytest.raises(ValueError, match=rf"model\.safetensors: {name} has a scale of 255"):
            read("blocks.1.moe.experts.down_weight")
    scales[scales == 255] = 254
    source = open_source(edit(mxfp4, tmp_path / "large", **{name: scales}))
    assert source.read("blocks.1.moe.experts.down_weight").isinf().any()

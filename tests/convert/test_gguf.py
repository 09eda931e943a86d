"""GGUF files: against the package gguf's own reader and tables, by hand, and run by llama.cpp."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from ossature import cli
from ossature.checkpoint.gguf import from_groups, read_header, to_groups
from ossature.config import LoraConfig
from ossature.convert import transfer
from ossature.convert.base import BASE, base_of
from ossature.convert.folder import open_source
from ossature.convert.gguf import GgufSource, layout, metadata, read_metadata
from ossature.convert.gguf_tokenizer import PROBE
from ossature.convert.gguf_write import write_gguf
from ossature.convert.model import load_model
from ossature.convert.names import UnknownTensor, rows, shapes
from ossature.data import vocabulary
from ossature.data.tokenizer import Tokenizer, load
from ossature.model.config import GPT_OSS_20B, GPT_OSS_120B, ModelConfig
from tests.convert.folders import convert, native, theirs, weights
from tests.convert.test_adapters import ours_adapted, put_on
from tests.golden import ROOT

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model with a tokenizer in every format; the embedding has five rows to spare."""
    root = tmp_path_factory.mktemp("gguf")
    tokenizer = Tokenizer(vocabulary.train([PROBE, "so it is and so it was"] * 9, 300), "toy")
    ids = {"eos_token_id": tokenizer.special["<|return|>"], "pad_token_id": None}
    theirs(root / "bf16", vocab_size=tokenizer.vocab_size + 5, **ids)
    tokenizer.save(root / "bf16")
    (root / "bf16" / "chat_template.jinja").write_text(TEMPLATE)
    convert(root / "bf16", root / "mxfp4", "mxfp4")
    convert(root / "mxfp4", root / "openai", "openai")
    convert(root / "bf16", root / "native", "native")
    return {name: root / name for name in ("bf16", "mxfp4", "openai", "native")}


@pytest.fixture(scope="module")
def file(folders: dict[str, Path]) -> Path:
    return written(folders["mxfp4"], folders["mxfp4"].with_suffix(".gguf"))


def written(source: Path, target: Path) -> Path:
    write_gguf(open_source(source), target)
    return target


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def mistake(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("format", ["bf16", "mxfp4", "openai", "native"])
def test_every_format_becomes_a_file_with_the_same_bits(format, folders, tmp_path: Path, capsys):
    target = tmp_path / "model.gguf"
    assert run("convert", folders[format], target, "--to", "gguf") == 0
    out = capsys.readouterr().out
    assert run("verify", folders[format], target) == 0
    assert capsys.readouterr().out == "71 tensors, all equal to the bit\n"
    assert "tensors rounded" not in out and "chat template" not in out
    assert "llama.cpp rounds the YaRN ramp to whole dimensions" in out
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    kinds = {name: place.type for name, place in read_header(target)[1].items()}
    packed = 39 if format in ("mxfp4", "openai") else 30
    assert kinds["blk.3.ffn_up_exps.weight"] == kinds["blk.0.ffn_down_exps.weight"] == packed


@pytest.mark.parametrize("format", ["bf16", "mxfp4"])
def test_the_packages_own_reader_finds_hugging_faces_numbers(format, folders, tmp_path: Path):
    """Names by the package's table; gate and up are the even and odd columns, turned."""
    reader = gguf.GGUFReader(written(folders[format], tmp_path / "x.gguf"))
    found = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    once = (
        folders["bf16"] if format == "bf16" else convert(folders["mxfp4"], tmp_path / "b", "bf16")
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, 4)
    expected: dict[str, Tensor] = {}
    for name, tensor in weights(once).items():
        if name.endswith(("gate_up_proj", "gate_up_proj_bias")):
            base = name.removesuffix("_bias").removesuffix("gate_up_proj")
            bias = ".bias" if name.endswith("bias") else ".weight"
            for turn, part in enumerate(("gate_proj", "up_proj")):
                expected[names.get_name(base + part) + bias] = tensor[..., turn::2]
        elif name.endswith(("down_proj", "down_proj_bias")):
            bias = ".bias" if name.endswith("bias") else ".weight"
            expected[names.get_name(name.removesuffix("_bias")) + bias] = tensor
        elif name.endswith("sinks"):
            expected[names.get_name(name) + ".weight"] = tensor
        else:
            end = name.rpartition(".")[2]
            expected[names.get_name(name.removesuffix(f".{end}")) + f".{end}"] = tensor
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        turned = tensor.mT if "_exps.weight" in name else tensor
        assert np.array_equal(found[name], turned.float().numpy()), name


def test_the_packages_own_reader_finds_config_tokenizer_and_template(folders, file: Path):
    reader = gguf.GGUFReader(file)
    fields = {key: reader.fields[key].contents() for key in reader.fields if "GGUF" not in key}
    keys = gguf.Keys

    def of(key: str) -> object:
        return fields[key.format(arch="gpt-oss")]

    assert (
        of(keys.General.ARCHITECTURE) == "gpt-oss" == gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT_OSS]
    )
    assert of(keys.General.FILE_TYPE) == gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    assert of(keys.LLM.BLOCK_COUNT) == 4
    assert of(keys.LLM.EXPERT_FEED_FORWARD_LENGTH) == 32
    assert of(keys.LLM.EXPERT_COUNT) == 8 and of(keys.LLM.EXPERT_USED_COUNT) == 3
    assert of(keys.LLM.EMBEDDING_LENGTH) == 64 and of(keys.LLM.CONTEXT_LENGTH) == 131_072
    assert of(keys.Attention.HEAD_COUNT) == 6 and of(keys.Attention.HEAD_COUNT_KV) == 2
    assert of(keys.Attention.KEY_LENGTH) == 16 == of(keys.Attention.VALUE_LENGTH)
    assert of(keys.Attention.SLIDING_WINDOW) == 7
    assert of(keys.Attention.LAYERNORM_RMS_EPS) == pytest.approx(1e-5)
    assert of(keys.Rope.FREQ_BASE) == 150_000 and of(keys.Rope.SCALING_FACTOR) == 32
    assert of(keys.Rope.SCALING_TYPE) == gguf.RopeScalingType.YARN.value
    assert of(keys.Rope.SCALING_ORIG_CTX_LEN) == 4096
    assert of(keys.Rope.SCALING_YARN_BETA_FAST) == 32 and of(keys.Rope.SCALING_YARN_BETA_SLOW) == 1

    tokenizer, table = (
        load(folders["mxfp4"]),
        json.loads((folders["mxfp4"] / "tokenizer.json").read_text()),
    )
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    size = tokenizer.vocab_size
    assert len(tokens) == len(kinds) == size + 5
    assert {text: n for text, n in table["model"]["vocab"].items()} == {
        text: n for n, text in enumerate(tokens[: len(table["model"]["vocab"])])
    }
    control = {tokens[n]: n for n in range(size + 5) if kinds[n] == gguf.TokenType.CONTROL}
    assert control == tokenizer.special
    assert tokens[size:] == [f"[PAD{n}]" for n in range(size, size + 5)]
    assert set(kinds[size:]) == {gguf.TokenType.UNUSED}
    merges = [m if isinstance(m, str) else " ".join(m) for m in table["model"]["merges"]]
    assert fields["tokenizer.ggml.merges"] == merges and len(merges) > 5
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-4o")
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.special["<|return|>"]
    assert fields["tokenizer.ggml.padding_token_id"] == tokenizer.special["<|endoftext|>"]
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.special["<|startoftext|>"]
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == TEMPLATE


def test_groups_by_hand():
    """Neighbours in a byte become numbers 16 apart, after the scale."""
    blocks = torch.arange(16, dtype=torch.uint8)[None] * 17 % 251  # bytes of two nibbles
    codes = [nibble for byte in blocks[0].tolist() for nibble in (byte & 15, byte >> 4)]
    packed = to_groups(blocks[None], torch.tensor([[120]], dtype=torch.uint8))

    assert packed[0].tolist() == [120] + [codes[j] | codes[j + 16] << 4 for j in range(16)]
    value = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType.MXFP4)[0]
    numbers = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    expected = [(-1) ** (c >> 3) * numbers[c & 7] * 2.0 ** (120 - 127) for c in codes]
    assert value.tolist() == expected


def test_groups_come_back_from_any_bytes():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 5, 7, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 256, (3, 5, 7), generator=generator, dtype=torch.uint8)
    back = from_groups(to_groups(blocks, scales))
    assert torch.equal(back[0], blocks) and torch.equal(back[1], scales)


@pytest.mark.parametrize(
    "config",
    [
        GPT_OSS_20B,
        GPT_OSS_120B,
        replace(GPT_OSS_20B, rope_truncate=True, rms_norm_eps=1.5e-6, rope_factor=7.3),
    ],
)
def test_the_config_comes_back_from_numbers_of_32_bits(config: ModelConfig):
    fields = {"general.architecture": "gpt-oss", "tokenizer.ggml.eos_token_id": 200_002}
    fields["tokenizer.ggml.padding_token_id"] = 199_999
    for key, value in metadata(config).items():
        fields[key] = float(np.float32(value)) if isinstance(value, float) else value
    assert read_metadata(fields, config.vocab_size, 459) == config


def test_the_published_model_has_so_many_tensors():
    """459 as in the published MXFP4 folder, where gate and up are one and experts two."""
    assert sum(len(stored.names) for stored in layout(GPT_OSS_20B).values()) == 459
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, 24)
    known = {name for _, name in names.mapping.values()}
    found = {n.rpartition(".")[0] for stored in layout(GPT_OSS_20B).values() for n in stored.names}
    assert found <= known
    assert layout(GPT_OSS_20B).keys() == rows(GPT_OSS_20B).keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"swiglu_limit": 6.0}, "swiglu_limit (6.0)"),
        ({"swiglu_alpha": 1.5}, "swiglu_alpha (1.5)"),
        ({"layer_types": ("full_attention",) * 24}, "layer_types (other than alternating)"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(changes: dict, words: str):
    with pytest.raises(ValueError, match="has no place in a GGUF file") as error:
        metadata(replace(GPT_OSS_20B, **changes))
    assert words in str(error.value)


@pytest.mark.parametrize("format", ["bf16", "mxfp4"])
def test_a_part_of_a_weight_is_that_part(format, folders, tmp_path: Path):
    source = GgufSource(written(folders[format], tmp_path / "x.gguf"))
    generator = random.Random(0)
    for name, shape in shapes(source.config).items():
        whole = source.read(name)
        for _ in range(4):
            cut = [sorted((generator.randint(0, n), generator.randint(0, n))) for n in shape]
            box = tuple(slice(*pair) for pair in cut)
            assert torch.equal(source.part(name, box), whole[box]), (name, box)


def test_one_bit_is_found(folders, file: Path, tmp_path: Path, capsys):
    for n, name in enumerate(
        ("blk.2.ffn_up_exps.weight", "blk.0.attn_sinks.weight", "output.weight")
    ):
        other = Path(shutil.copy(file, tmp_path / f"{n}.gguf"))
        place = read_header(other)[1][name]
        with other.open("r+b") as edited:
            edited.seek(place.offset + place.num_bytes - 2)
            byte = edited.read(1)[0]
            edited.seek(-1, os.SEEK_CUR)
            edited.write(bytes([byte ^ 1]))
        assert run("verify", folders["mxfp4"], other) == 1
        assert ": 1 numbers differ" in capsys.readouterr().out


def test_numbers_beyond_bfloat16_are_rounded_and_counted(folders, tmp_path: Path, capsys):
    source = load_model(folders["bf16"], dtype=torch.float32)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.001)
    from ossature.convert.model import save_model

    save_model(source, tmp_path / "wide", "native")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders["bf16"] / name, tmp_path / "wide" / name)
    assert run("convert", tmp_path / "wide", tmp_path / "x.gguf", "--to", "gguf") == 0
    assert "26 tensors rounded from float32 to bfloat16" in capsys.readouterr().out
    back, wide = (open_source(tmp_path / name) for name in ("x.gguf", "wide"))
    for name in wide.names():
        exact = torch.equal(back.read(name).float(), wide.read(name))
        assert exact == (not layout(wide.config)[name].matrix), name


def test_no_more_than_a_piece_is_held_at_a_time(folders, tmp_path: Path, monkeypatch):
    from ossature.checkpoint.safetensors import Reader
    from ossature.convert import gguf_write

    monkeypatch.setattr(transfer, "PIECE_BYTES", 8192)
    sizes: list[int] = []
    read, write = Reader.box, gguf_write.write_at

    def reading(self, *arguments):
        tensor = read(self, *arguments)
        sizes.append(tensor.nbytes)
        return tensor

    def writing(handle, data, offset):
        sizes.append(len(data))
        write(handle, data, offset)

    monkeypatch.setattr(Reader, "box", reading)
    monkeypatch.setattr(gguf_write, "write_at", writing)
    written(folders["bf16"], tmp_path / "x.gguf")
    assert max(sizes) == 8192 and len(sizes) > 150  # an expert's gate_up: 64 x 64 in bfloat16
    assert run("verify", folders["bf16"], tmp_path / "x.gguf") == 0


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.01, 0.2, 0.5, 0.9, 0.999999])
def test_a_file_cut_short_is_a_sentence(share: float, folders, file: Path, tmp_path: Path, capsys):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    error = mistake(capsys, "verify", folders["mxfp4"], cut)
    assert str(cut) in error and ("cut short" in error or "not a GGUF file" in error)


def test_every_damage_of_a_header_is_a_sentence_or_harmless(file: Path, tmp_path: Path):
    """A hundred bytes changed, one at a time, most of them lengths, types and counts."""
    whole = file.read_bytes()
    start = min(place.offset for place in read_header(file)[1].values())
    generator = random.Random(0)
    spots = [*range(4, 24), *(generator.randrange(24, 700) for _ in range(60))]
    spots += [generator.randrange(start - 4000, start) for _ in range(50)]
    refused = 0
    for spot in spots:
        data = bytearray(whole)
        data[spot] = generator.choice([0, 1, 127, 255, data[spot] ^ 1])
        damaged = tmp_path / "damaged.gguf"
        damaged.write_bytes(data)
        try:
            GgufSource(damaged).close()
        except (ValueError, UnknownTensor) as error:
            assert str(damaged) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 50


def edited(file: Path, target: Path, drop: str = "", add: str = "", q8: str = "", **fields) -> Path:
    """A copy written by the package, with fields or tensors changed."""
    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(target, "gpt-oss")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in fields:
            continue
        writer.add_key_value(key, field.contents(), field.types[0])
    for key, value in fields.items():
        if value is not None:
            kind = (
                gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
            )
            writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        if tensor.name == drop:
            continue
        data, kind = tensor.data, tensor.tensor_type
        if tensor.name == q8:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(gguf.quants.dequantize(data, tensor.tensor_type), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    if add:
        writer.add_tensor(add, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drop": "blk.2.attn_sinks.weight"}, "lacks blk.2.attn_sinks.weight"),
        ({"drop": "token_embd.weight"}, "lacks token_embd.weight"),
        ({"add": "blk.1.attn_k_norm.weight"}, "no row in the table of names for blk.1.attn_k_norm"),
        ({"q8": "output.weight"}, "output.weight has GGML's type 8; only F32, F16, BF16, MXFP4"),
        ({"gpt-oss.expert_count": 7}, "ffn_gate_inp.weight has shape (8, 64)"),
        ({"gpt-oss.block_count": 2**31}, "gpt-oss.block_count (2147483648) must be at most 79"),
        ({"gpt-oss.expert_count": None}, "gpt-oss.expert_count (None) must be a number"),
        ({"gpt-oss.rope.scaling.type": "linear"}, "gpt-oss.rope.scaling.type (linear)"),
        ({"gpt-oss.attention.value_length": 17}, "gpt-oss.attention.value_length (17) must be 16"),
        ({"tokenizer.ggml.eos_token_id": 999_999}, "eos_token_id (999999) must be a token of the"),
        ({"gpt-oss.leading_dense_block_count": 1}, "unknown key gpt-oss.leading_dense_block_count"),
    ],
)
def test_what_is_not_this_model_is_named(changes, words, file: Path, tmp_path: Path, capsys):
    other = edited(file, tmp_path / "other.gguf", **changes)
    error = mistake(capsys, "info", other)
    assert str(other) in error and words in error


def test_a_file_that_the_package_wrote_is_read(folders, file: Path, tmp_path: Path):
    """With what its converter writes and we do not, and without what we add."""
    other = edited(
        file, tmp_path / "theirs.gguf",
        **{"ossature.rope_truncate": None, "gpt-oss.rope.dimension_count": 16,
           "gpt-oss.vocab_size": None, "general.author": "somebody"},
    )  # fmt: skip
    assert run("verify", folders["mxfp4"], other) == 0


def test_what_a_destination_may_not_be(folders, file: Path, tmp_path: Path, capsys):
    words = ("convert", folders["mxfp4"])
    assert "must end in .gguf" in mistake(capsys, *words, tmp_path / "x.bin", "--to", "gguf")
    assert "is in the way" in mistake(capsys, *words, file, "--to", "gguf")
    shard = (tmp_path / "x.gguf", "--to", "gguf", "--max-shard-size", "5GB")
    assert "--to gguf has no files of a given size" in mistake(capsys, *words, *shard)
    scales = (tmp_path / "x.gguf", "--to", "gguf", "--source", folders["mxfp4"])
    assert "has no scales to keep" in mistake(capsys, *words, *scales)
    assert "takes a folder" in mistake(capsys, "verify", file, "--round-trip")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_llama_cpp_has_not_is_refused(folders, tmp_path: Path, capsys):
    def refused(name: str, change) -> str:
        folder = tmp_path / name
        shutil.copytree(folders["bf16"], folder)
        table = json.loads((folder / "tokenizer.json").read_text())
        change(table)
        (folder / "tokenizer.json").write_text(json.dumps(table))
        return mistake(capsys, "convert", folder, tmp_path / "x.gguf", "--to", "gguf")

    def plain_gpt2(table):
        table["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False,
                                  "trim_offsets": True, "use_regex": True}  # fmt: skip

    def lower(table):
        table["normalizer"] = {"type": "Lowercase"}

    assert "cuts text in other ways than o200k" in refused("cut", plain_gpt2)
    assert "has a normalizer" in refused("lower", lower)
    folder = tmp_path / "none"
    shutil.copytree(folders["bf16"], folder)
    (folder / "tokenizer.json").unlink()
    error = mistake(capsys, "convert", folder, tmp_path / "x.gguf", "--to", "gguf")
    assert f"{folder}: has no tokenizer.json" in error
    theirs(tmp_path / "few", vocab_size=200)
    capsys.readouterr()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders["bf16"] / name, tmp_path / "few" / name)
    error = mistake(capsys, "convert", tmp_path / "few", tmp_path / "x.gguf", "--to", "gguf")
    assert "the model 200 rows of embedding" in error
    assert not (tmp_path / "x.gguf").exists()


def test_a_missing_template_is_told_and_one_in_the_config_is_taken(folders, tmp_path, capsys):
    folder = tmp_path / "folder"
    shutil.copytree(folders["bf16"], folder)
    (folder / "chat_template.jinja").unlink()
    assert run("convert", folder, tmp_path / "none.gguf", "--to", "gguf") == 0
    assert "has no chat template" in capsys.readouterr().out
    table = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**table, "chat_template": "{{ 1 }}"}))
    assert run("convert", folder, tmp_path / "one.gguf", "--to", "gguf") == 0
    assert "has no chat template" not in capsys.readouterr().out
    assert read_header(tmp_path / "one.gguf")[0]["tokenizer.chat_template"] == "{{ 1 }}"
    assert "tokenizer.chat_template" not in read_header(tmp_path / "none.gguf")[0]


def test_without_the_package_it_is_asked_for(folders, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    error = mistake(capsys, "convert", folders["mxfp4"], tmp_path / "x.gguf", "--to", "gguf")
    assert "pip install 'ossature[gguf]'" in error
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(folders, tmp_path: Path, capsys, monkeypatch):
    pwrite, writes = os.pwrite, 0

    def full(handle: int, data: memoryview, offset: int) -> int:
        nonlocal writes
        writes += 1
        if writes > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    error = mistake(capsys, "convert", folders["mxfp4"], tmp_path / "x.gguf", "--to", "gguf")
    assert error == f"error: {tmp_path / 'x.gguf'}: No space left on device\n"
    assert not list(tmp_path.iterdir())


SLOW = """
import sys, time
from ossature import cli
from ossature.convert import gguf_write
write = gguf_write.write_at
def slow(*arguments):
    write(*arguments)
    print("written", file=sys.stderr, flush=True)
    time.sleep(0.5)
gguf_write.write_at = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def test_an_interrupt_leaves_nothing_under_the_final_name(folders, tmp_path: Path):
    words = ["convert", folders["mxfp4"], tmp_path / "x.gguf", "--to", "gguf"]
    command = [sys.executable, "-c", SLOW, *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process:
        while "written" not in process.stderr.readline():
            assert process.poll() is None
        assert [path.name for path in tmp_path.iterdir()] == [f"x.gguf.partial-{process.pid}"]
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
    assert process.returncode == 143
    assert not list(tmp_path.iterdir())


def test_a_file_is_sampled_from_with_a_tokenizer_at_hand(folders, file: Path, capsys):
    words = ("--prompt", "so it", "--max-new-tokens", 4, "--temperature", 0, "--device", "cpu")
    assert run("sample", folders["mxfp4"], *words) == 0
    expected = capsys.readouterr().out
    assert run("sample", file, "--tokenizer", folders["mxfp4"], *words) == 0
    assert capsys.readouterr().out == expected
    assert "say which one with --tokenizer" in mistake(capsys, "sample", file, *words)


def test_a_folder_again_has_the_same_experts(folders, file: Path, tmp_path: Path, capsys):
    assert run("convert", file, tmp_path / "back", "--to", "mxfp4") == 0
    assert "its tokenizer is not carried along" in capsys.readouterr().out
    assert run("verify", tmp_path / "back", folders["mxfp4"], "--bytes") == 0
    assert native(open_source(file)).keys() == native(open_source(tmp_path / "back")).keys()


def test_a_file_is_a_base_that_adapters_know(folders, file: Path, tmp_path: Path, capsys):
    adapter = ours_adapted(file, LoraConfig(rank=2, targets=("q_proj",)))
    put_on(load_model(file), adapter, tmp_path)
    made = tmp_path / "native"
    (made / BASE).write_text(base_of(adapter.lora, file, seed=0).text())
    assert run("merge", file, made, tmp_path / "a", "--to", "mxfp4") == 0
    assert "warning" not in capsys.readouterr().out
    assert run("merge", folders["mxfp4"], made, tmp_path / "b", "--to", "mxfp4") == 0
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)

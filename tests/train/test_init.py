"""Starting from a checkpoint in any format: its weights, its tokenizer, and no other model's."""

import json
from pathlib import Path

import pytest
import torch

from ossature.checkpoint import store
from ossature.convert.folder import open_source
from ossature.convert.model import load_model, save_model
from ossature.data.tokenizer import load as load_tokenizer
from ossature.model.transformer import Transformer
from ossature.train.loop import train
from ossature.train.setup import small_files
from tests.ranks import run_ranks
from tests.small_runs import SIZES, TINY, records, small_run, text_corpus

# With a rate of zero what is saved is what was loaded.
STILL = {"steps": 1, "optim__min_lr": 0.0, "optim__lr": 0.0}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    model = Transformer(TINY)
    model.init_weights(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return {name: p.detach() for name, p in model.named_parameters()}


def write(folder: Path, weights: dict[str, torch.Tensor], format: str) -> Path:
    model = Transformer(TINY)
    model.load_state_dict(weights)
    save_model(model.bfloat16(), folder, format=format)  # type: ignore[arg-type]
    return folder


def saved(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: store.read_weight(checkpoint, name) for name in store.list_weights(checkpoint)}


@pytest.mark.parametrize("format", ["bf16", "openai", "native", "mxfp4"])
def test_a_run_starts_from_the_weights_of_a_checkpoint(tmp_path, weights, format):
    source = write(tmp_path / "start", weights, format)
    checkpoint = train(small_run(tmp_path / "run", init=source, **STILL))
    assert checkpoint
    opened = open_source(source)
    for name, value in saved(checkpoint).items():
        assert torch.equal(value, opened.read(name).float()), name
        if format in ("bf16", "native"):
            assert torch.equal(value, weights[name]), name


def _train(rank: int, world: int, config) -> None:
    train(config)


def test_every_rank_takes_its_part(tmp_path, weights):
    source = write(tmp_path / "start", weights, "bf16")
    run_ranks(3, _train, small_run(tmp_path / "run", init=source, global_batch_tokens=96, **STILL))
    checkpoint = store.newest(tmp_path / "run")
    assert checkpoint
    for name, value in saved(checkpoint).items():
        assert torch.equal(value, weights[name]), name


def test_a_run_starts_from_another_run_at_step_1_and_resumes_itself(tmp_path):
    first = train(small_run(tmp_path / "first", steps=2))
    (first / "tokenizer_config.json").write_text("{}")  # type: ignore[operator]
    config = small_run(tmp_path / "second", steps=3, init=tmp_path / "first", checkpoint__keep=1)
    train(config)
    assert [r["step"] for r in records(tmp_path / "second")] == [1, 2, 3]
    again = train(small_run(tmp_path / "second", steps=4, init=tmp_path / "first"))
    assert [r["step"] for r in records(tmp_path / "second")] == [1, 2, 3, 4]
    assert (again / "tokenizer_config.json").read_text() == "{}"  # type: ignore[operator]


def test_the_exported_model_is_the_trained_one(tmp_path):
    """Native logits of the newest checkpoint equal those of the folder that is exported."""
    train(small_run(tmp_path / "run", steps=3, router__bias_update_rate=0.1))
    native = load_model(tmp_path / "run")
    save_model(native, tmp_path / "out", format="native")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = native(tokens)
        assert torch.equal(load_model(tmp_path / "out")(tokens), expected)


def test_a_checkpoint_of_another_model_is_refused_by_field(tmp_path, weights):
    source = write(tmp_path / "start", weights, "bf16")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "sliding_window": 8}))
    with pytest.raises(ValueError, match=r"start: is not of this model: sliding_window \(8, model"):
        train(small_run(tmp_path / "run", init=source, **STILL))
    assert not (tmp_path / "run").exists()


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises((ValueError, OSError), match="nowhere"):
        train(small_run(tmp_path / "run", init=tmp_path / "nowhere", **STILL))


def test_a_checkpoint_says_which_tokens_end_a_text(tmp_path: Path):
    from transformers import AutoTokenizer, GenerationConfig, GptOssConfig

    tokenizer = load_tokenizer(text_corpus(tmp_path))
    carried = tmp_path / "origin"
    carried.mkdir()
    (carried / ".metadata").touch()
    (carried / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": 7}')
    files = small_files(SIZES["tiny_text"], carried, tokenizer)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    theirs, special = AutoTokenizer.from_pretrained(tmp_path), tokenizer.special

    assert GptOssConfig.from_pretrained(tmp_path).eos_token_id == theirs.eos_token_id
    assert GptOssConfig.from_pretrained(tmp_path).pad_token_id == theirs.pad_token_id
    generation = GenerationConfig.from_pretrained(tmp_path)
    ends = [special[f"<|{word}|>"] for word in ("return", "endoftext", "call")]
    assert generation.eos_token_id == ends and ends[0] == theirs.eos_token_id
    assert generation.bos_token_id == theirs.bos_token_id == special["<|startoftext|>"]
    assert generation.pad_token_id == special["<|endoftext|>"] and generation.temperature == 0.5

"""The guide's snippets, with a local folder: in, a layout, out again."""

from pathlib import Path

import pytest
import torch

import ossature
from ossature.config import ParallelConfig
from ossature.convert.folder import open_source
from ossature.convert.model import load_model
from tests.convert.folders import loaded_by_transformers, theirs
from tests.ranks import run_ranks
from tests.tiny import random_tokens

TOKENS = random_tokens(2, 24, 96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bridge") / "hf"
    theirs(path)
    return path


@torch.no_grad()
def test_a_checkpoint_goes_in_and_comes_out(folder, tmp_path):
    bridge = ossature.AutoBridge.from_hf_pretrained(folder, trust_remote_code=True)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 1
    provider.pipeline_model_parallel_size = 1
    provider.expert_model_parallel_size = 1
    provider.sequence_parallel = True
    provider.dtype = torch.float32
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    provider.finalize()
    torch.testing.assert_close(model(TOKENS), load_model(folder)(TOKENS))
    bridge.import_ckpt(folder, megatron_path=tmp_path / "native")
    bridge.export_ckpt(megatron_path=tmp_path / "native", hf_path=tmp_path / "out")
    assert open_source(tmp_path / "native").format == "native"
    logits = loaded_by_transformers(tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(logits, loaded_by_transformers(folder)(TOKENS).logits)


@torch.no_grad()
def _on_ranks(rank: int, world: int, folder: Path) -> torch.Tensor:
    provider = ossature.AutoBridge.from_hf_pretrained(folder).to_provider()
    provider.tensor_model_parallel_size, provider.dtype = 2, torch.float32
    assert provider.tp == 2 == provider.tensor_model_parallel_size
    model = provider.provide_distributed_model()
    return model(TOKENS)


def test_ranks_have_the_model_together(folder, monkeypatch):
    found = run_ranks(2, _on_ranks, folder)
    with torch.no_grad():
        expected = load_model(folder)(TOKENS)
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_axes_are_set_by_either_name(folder):
    provider = ossature.AutoBridge.from_hf_pretrained(folder).to_provider()
    provider.context_parallel_size, provider.ep = 2, 4
    assert provider.parallel == ParallelConfig(cp=2, ep=4)
    assert provider.expert_model_parallel_size == 4


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tp": 3}, "parallel"),
        ({"tp": 2, "sequence_parallel": False}, "sequence_parallel must be True"),
        ({"ep": 2}, r"ep \(2\)"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(folder, change, words):
    provider = ossature.AutoBridge.from_hf_pretrained(folder).to_provider()
    for name, value in change.items():
        setattr(provider, name, value)
    with pytest.raises(ValueError, match=words):
        provider.finalize()


def test_what_it_has_not_is_named(folder, tmp_path):
    bridge = ossature.AutoBridge.from_hf_pretrained(folder)
    with pytest.raises(AttributeError, match="no tensor_parallel"):
        bridge.to_provider().tensor_parallel = 2
    with pytest.raises(ValueError, match="wrap_with_ddp must be False"):
        bridge.to_provider().provide_distributed_model(wrap_with_ddp=True)
    with pytest.raises(ValueError, match="load_weights must be True"):
        bridge.to_provider(load_weights=False)
    with pytest.raises(ValueError, match=r"give native_path \(or megatron_path\) and hf_path"):
        bridge.export_ckpt(hf_path=tmp_path / "x")
    with pytest.raises(ValueError, match="no such folder, and not to be had"):
        ossature.AutoBridge.from_hf_pretrained("nobody/nothing-of-this-name")

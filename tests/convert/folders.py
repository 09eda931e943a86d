"""Folders with weights for tests: written by transformers, or spoilt by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssForCausalLM

from ossature.convert.folder import open_source, write_folder
from ossature.convert.source import Source
from tests.tiny import hugging_face_model, random_tokens


def theirs(folder: Path, shape: str = "oblong", seed: int = 0, **changes: Any) -> GptOssForCausalLM:
    """A random model of transformers', saved by transformers in bfloat16, and given in float32."""
    hugging_face_model(shape, seed, torch.bfloat16, **changes).save_pretrained(folder)
    return hugging_face_model(shape, seed, **changes)


def loaded_by_transformers(folder: Path) -> GptOssForCausalLM:
    """As a user would, but in float32 and eager, to be compared; every weight must be there."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def convert(source: Path, target: Path, to: str, **options: Any) -> Path:
    write_folder(open_source(source), target, to, **options)  # type: ignore[arg-type]
    return target


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def native(source: Source) -> dict[str, Tensor]:
    return {name: source.read(name) for name in source.names()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        ours, their = (t.contiguous().view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(ours, their), name


def edit(folder: Path, target: Path, **tensors: Tensor | None) -> Path:
    """A copy of a one-file folder with tensors replaced, added, or (None) left out."""
    shutil.copytree(folder, target)
    state = {**load_file(target / "model.safetensors"), **tensors}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def edit_config(folder: Path, **keys: Any) -> None:
    """Set keys of config.json; None takes a key out."""
    path = folder / "config.json"
    table = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({k: v for k, v in table.items() if v is not None}))


@torch.no_grad()
def logits(model: torch.nn.Module, vocab_size: int) -> torch.Tensor:
    out = model(random_tokens(2, 11, vocab_size))
    return out if isinstance(out, torch.Tensor) else out.logits

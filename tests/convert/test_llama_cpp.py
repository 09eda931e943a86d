"""GGUF files run by llama.cpp itself, where its Python binding is at hand; skipped where not.

LLAMA_PYTHON names an interpreter that has the package llama-cpp-python, if this one has not.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ossature.convert import gguf_write
from ossature.convert.folder import open_source
from ossature.convert.model import load_model, save_model
from ossature.data import vocabulary
from ossature.data.tokenizer import Tokenizer, load
from ossature.model.config import ModelConfig
from ossature.model.transformer import Transformer
from ossature.sample.generate import generate
from tests.convert.folders import edit_config, theirs
from tests.small_runs import TINY

PYTHON = os.environ.get("LLAMA_PYTHON", "")
if not PYTHON and importlib.util.find_spec("llama_cpp"):
    PYTHON = sys.executable
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="llama-cpp-python is not there: LLAMA_PYTHON names it"),
]
TEXT = "what it is, that is what it was: 12 and 345 and so on and on, as it is written here.\n"
CHILD = """
import json, sys
import llama_cpp, numpy
path, given = sys.argv[1], json.loads(sys.argv[2])
model = llama_cpp.Llama(path, n_ctx=256, n_threads=1, logits_all=True, verbose=False,
                        flash_attn=False, type_k=0, type_v=0)
model.eval(given["tokens"])
numpy.save(path + ".npy", numpy.array(model.scores[: len(given["tokens"])]))
said = []
for _ in range(given["new"]):
    said.append(int(numpy.argmax(model.scores[model.n_tokens - 1])))
    model.eval([said[-1]])
texts = [model.tokenize(t.encode(), add_bos=False, special=False) for t in given["texts"]]
marks = model.tokenize(given["marks"].encode(), add_bos=False, special=True)
print(json.dumps({"said": said, "texts": texts, "marks": marks}))
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer(vocabulary.train([TEXT] * 9, 300), "toy").save(folder)
    return folder


def llama(path: Path, tokens: list[int], new: int = 0, texts: tuple[str, ...] = (), marks=""):
    """What llama.cpp makes of a file: logits of the tokens, and what follows them."""
    given = json.dumps({"tokens": tokens, "new": new, "texts": texts, "marks": marks})
    command = [PYTHON, "-c", CHILD, str(path), given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.from_numpy(np.load(f"{path}.npy")), json.loads(done.stdout.splitlines()[-1])


def with_tokenizer(folder: Path, tokenizer: Path) -> Path:
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("shape", ["oblong", "square"])
def test_its_logits_are_ours_where_nothing_is_rounded(shape, tokenizer, tmp_path, monkeypatch):
    """Matrices are written in float32 here, for it rounds what it multiplies bfloat16 with; and the
    YaRN ramp is rounded, as it does always.  Weights are large: biases, sinks, limits count.
    """
    size = load(tokenizer).vocab_size + 3
    theirs(tmp_path / "model", shape, vocab_size=size, eos_token_id=None, pad_token_id=None)
    edit_config(with_tokenizer(tmp_path / "model", tokenizer), rope_parameters={
        "rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "truncate": True, "original_max_position_embeddings": 4096,
    })  # fmt: skip
    plain = gguf_write.tensors
    monkeypatch.setattr(
        gguf_write, "tensors", lambda s: {n: p._replace(type=0) for n, p in plain(s).items()}
    )
    gguf_write.write_gguf(open_source(tmp_path / "model"), tmp_path / "x.gguf")
    tokens = torch.randint(0, size, (1, 40), generator=torch.Generator().manual_seed(1))
    expected = load_model(tmp_path / "model", dtype=torch.float32)(tokens)[0]
    found, _ = llama(tmp_path / "x.gguf", tokens[0].tolist())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def learnt(tokenizer: Path) -> tuple[Transformer, list[int]]:
    """A small model that knows a text by heart."""
    words = load(tokenizer)
    ids = words.encode(TEXT)
    config: ModelConfig = replace(TINY, vocab_size=words.vocab_size, rope_original_context=4096)
    model = Transformer(config)
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    row = torch.tensor([ids])
    for _ in range(80):
        optimizer.zero_grad()
        model(row, targets=torch.cat([row[:, 1:], row[:, :1]], dim=1)).div(len(ids)).backward()
        optimizer.step()
    return model.eval(), ids


def test_its_greedy_tokens_are_ours(tokenizer, tmp_path):
    """Of the very files that `convert --to gguf` writes, experts in bfloat16 and in MXFP4."""
    model, ids = learnt(tokenizer)
    for format in ("bf16", "mxfp4"):
        folder = tmp_path / format
        save_model(model, folder, format)  # type: ignore[arg-type]
        with_tokenizer(folder, tokenizer)
        path = tmp_path / f"{format}.gguf"
        gguf_write.write_gguf(open_source(folder), path)
        ours = load_model(folder, dtype=torch.float32)
        expected = generate(ours, torch.tensor([ids[:5]]), max_new_tokens=len(ids) - 6)[0, 5:]
        logits, found = llama(path, ids[:5], new=len(ids) - 6)
        assert found["said"] == expected.tolist()
        assert len(set(found["said"])) > 10
        with torch.no_grad():
            size = (logits - ours(torch.tensor([ids[:5]]))[0]).norm() / logits.norm()
        assert size < 0.05


def test_its_tokens_are_ours(tokenizer, tmp_path):
    words = load(tokenizer)
    theirs(tmp_path / "model", vocab_size=words.vocab_size, eos_token_id=None, pad_token_id=None)
    with_tokenizer(tmp_path / "model", tokenizer)
    gguf_write.write_gguf(open_source(tmp_path / "model"), tmp_path / "x.gguf")
    texts = (TEXT, "It'S 1234567 naïve\r\n\n  你好 👍🏽  x", "a<|return|>b  \t\n ")
    marks = "<|start|>user<|message|>it is<|end|><|start|>assistant<|channel|>final<|return|>"
    _, found = llama(tmp_path / "x.gguf", [1], texts=texts, marks=marks)
    assert found["texts"] == [words.encode(text) for text in texts]
    assert found["marks"] == words.encode(marks, special=True)

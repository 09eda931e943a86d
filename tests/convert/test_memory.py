"""What converting a checkpoint of several ranks takes of memory: pieces, and no whole tensor."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ossature.checkpoint.store import save_weights
from ossature.convert.config import hugging_face_config
from ossature.convert.names import shapes
from ossature.model.config import ModelConfig
from tests.golden import ROOT
from tests.ranks import run_ranks

CONFIG = ModelConfig(
    vocab_size=60_000, hidden_size=512, intermediate_size=384, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=2, head_dim=32, num_local_experts=16,
    num_experts_per_tok=2,
)  # fmt: skip
LARGEST = 60_000 * 512 * 4
"""Bytes of the embedding, and of the head; the experts' matrices of a layer have 38 MB more."""

CHILD = """
import re, sys
from ossature.convert import command, folder, transfer
transfer.PIECE_BYTES = 2**20
def resident(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = resident("VmRSS")
command.convert(sys.argv[1:])
print("peak", resident("VmHWM") - before)
"""


def _write(rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for name, shape in shapes(CONFIG).items():
        dim = 1 if len(shape) == 3 else 0
        part = [size // world if n == dim else size for n, size in enumerate(shape)]
        numbers = torch.randn(part, generator=generator).bfloat16().float()
        tensors[name] = DTensor.from_local(numbers, mesh, [Shard(dim)])
    save_weights(folder, tensors)
    if rank == 0:
        table = hugging_face_config(CONFIG, dtype="float32")
        (folder / "config.json").write_text(json.dumps(table))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_no_whole_tensor_of_a_sharded_checkpoint_is_held(tmp_path: Path):
    run_ranks(2, _write, tmp_path / "sharded")
    for to in ("bf16", "mxfp4"):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, tmp_path / "sharded", tmp_path / to, "--to", to],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = re.search(r"peak (\d+)", done.stdout)
        assert found
        # Half of it is code that is loaded late; with one tensor in memory it was LARGEST more.
        assert int(found[1]) < 0.8 * LARGEST, f"{to}: {int(found[1]) / 2**20:.0f} MiB"

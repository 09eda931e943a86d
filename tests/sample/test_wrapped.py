"""Sampling from a model as training holds it: sharded over ranks, or compiled.

In child processes: the hook that checks shapes goes with neither.
"""

import subprocess
import sys
from pathlib import Path

from tests.golden import ROOT

MODEL = """
import sys, torch
from ossature.model.config import ModelConfig
from ossature.model.transformer import Transformer
from ossature.sample.generate import generate

def build():
    torch.manual_seed(5)
    model = Transformer(
        ModelConfig(
            vocab_size=96, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=2, head_dim=16, num_local_experts=8,
            num_experts_per_tok=3, sliding_window=7,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model

prompts = [[5, 6, 7], list(range(10, 30))]
"""

SHARDED = """
import os
from datetime import timedelta
import torch.distributed as dist, torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

def rank(number, store):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=number, world_size=2,
        timeout=timedelta(seconds=60),
    )
    model, expected = build(), generate(build(), prompts, 12)
    mesh = init_device_mesh("cpu", (2,))
    for module in [*model.blocks.values(), model]:
        fully_shard(module, mesh=mesh)
    model.train()
    assert torch.equal(generate(model, prompts, 12), expected)
    assert model.training
    drawn = generate(model, prompts, 12, temperature=1.0, seed=7)
    assert torch.equal(drawn, generate(build(), prompts, 12, temperature=1.0, seed=7))
    # Training goes on: gradients arrive after sampling.
    model(torch.arange(4)[None]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort a process that ends by itself

if __name__ == "__main__":
    mp.spawn(rank, args=(sys.argv[1],), nprocs=2)
"""

COMPILED = """
import torch._dynamo.utils
torch.set_num_threads(1)
model, expected = build(), generate(build(), prompts, 12)
for block in model.blocks.values():
    block.compile(backend="aot_eager")
assert torch.equal(generate(model, prompts, 12), expected)
frames = sum(torch._dynamo.utils.counters["frames"].values())
assert frames == 0, f"{frames} frames were compiled for lengths that never come again"
"""


def run(program: str, folder: Path, timeout: int) -> None:
    script = folder / "child.py"
    script.write_text(MODEL + program)
    done = subprocess.run(
        [sys.executable, script, folder / "store"],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_sharded_model_says_the_same_and_no_rank_waits_for_ever(tmp_path: Path):
    run(SHARDED, tmp_path, timeout=120)


def test_a_compiled_model_says_the_same_and_compiles_nothing_for_it(tmp_path: Path):
    run(COMPILED, tmp_path, timeout=120)

"""torch.compile on every block: the same losses, in a process without checks of shapes."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks_give_the_same_losses(tmp_path, recompute):
    losses = {}
    for compiled in ("false", "true"):
        run = tmp_path / compiled
        words = [
            sys.executable, "-m", "ossature", "train", "--run", str(run), "--data.mock", "true",
            "--data.seq_len", "64", "--micro_batch_tokens", "64", "--global_batch_tokens", "128",
            "--steps", "3", "--optim.warmup_steps", "1", "--precision", "fp32",
            "--log.tensorboard", "false", "--compile", compiled, "--recompute", recompute,
        ]  # fmt: skip
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=400,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses[compiled] = [json.loads(line)["loss"] for line in lines]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-5)

"""Peak memory of LoRA training on a base in MXFP4 and in BF16; its step time beside full training.

    python benchmarks/lora_memory.py FOLDER [--layers 2] [--experts 20] [--rank 32] [--steps 3]
    python benchmarks/lora_memory.py FOLDER --time --layers 1 --experts 6

Fabricates layers of gpt-oss-20b with fewer experts (1.07 billion parameters, 93 % of them in
experts, by default) in MXFP4, converts them to BF16, and trains the recipe's adapters on both, in
the loop's own steps of 512 tokens, each case in a fresh process.  Memory is the peak resident size
above that of a process that has only imported, from the first step on; that of loading stands
beside it.  --time adds full training in BF16, which takes 18 bytes a parameter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

TOKENS = 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new folder, removed at the end")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=20)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one warm-up")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--time", action="store_true", help="train the whole model too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(**json.loads(options.case))))
        return 0
    make(options.folder, options.layers, options.experts)
    try:
        compare(options)
    finally:
        shutil.rmtree(options.folder)
    return 0


def compare(options: argparse.Namespace) -> None:
    from ossature.model.flops import expert_weights, parameters

    config = shape(options.layers, options.experts)
    total, share = parameters(config), expert_weights(config) / parameters(config)
    print(
        f"{total:,} parameters, {share:.1%} in experts; LoRA rank {options.rank}, {TOKENS} tokens"
    )
    kinds = [("mxfp4", options.rank), ("bf16", options.rank), *([("bf16", 0)] * options.time)]
    found = []
    for base, rank in kinds:
        name = f"LoRA on {base}" if rank else f"full, {base}"
        case = {"folder": str(options.folder), "base": base, "rank": rank, "steps": options.steps}
        case |= {"recompute": options.recompute}
        command = [sys.executable, __file__, str(options.folder), "--case", json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        result = json.loads(done.stdout.splitlines()[-1])
        found.append(result)
        print(
            f"{name:16} peak {result['peak_bytes'] / 2**20:7.0f} MiB (loading "
            f"{result['loading_bytes'] / 2**20:.0f}, model and optimizer at rest "
            f"{result['rest_bytes'] / 2**20:.0f}), {result['seconds']:.2f} s a step, "
            f"loss {result['loss']:.4f}",
            flush=True,
        )
    ratio = found[0]["peak_bytes"] / found[1]["peak_bytes"]
    print(f"LoRA on mxfp4 takes {ratio:.1%} of the memory of LoRA on bf16")
    if options.time:
        for name, result in zip(("mxfp4", "bf16"), found, strict=False):
            share = result["seconds"] / found[2]["seconds"]
            print(f"a step of LoRA on {name} takes {share:.1%} of the time of a full one")


def shape(layers: int, experts: int):
    from ossature.model.config import GPT_OSS_20B

    return dataclasses.replace(
        GPT_OSS_20B,
        num_hidden_layers=layers,
        layer_types=(),
        num_local_experts=experts,
        vocab_size=4096,
        eos_token_id=None,
        pad_token_id=None,
    )


def make(folder: Path, layers: int, experts: int) -> None:
    """The same random model in FOLDER/mxfp4 and FOLDER/bf16."""
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from make_checkpoint import write_random

    from ossature.checkpoint.safetensors import Writer
    from ossature.convert.destination import new_folder
    from ossature.convert.folder import MAX_SHARD_BYTES, open_source, write_folder
    from ossature.convert.hugging_face import write_configs
    from ossature.convert.layout import specs

    config = shape(layers, experts)
    tensors, generator = specs(config, "mxfp4"), torch.Generator().manual_seed(0)
    with new_folder(folder / "mxfp4") as partial:
        writer = Writer(partial, tensors, MAX_SHARD_BYTES)
        for name, spec in tensors.items():
            write_random(writer, name, spec, generator)
        writer.finish()
        writer.close()
        write_configs(partial, config, "mxfp4")
    write_folder(open_source(folder / "mxfp4"), folder / "bf16", "bf16")


def measure(folder: str, base: str, rank: int, steps: int, recompute: str) -> dict:
    """One case, in this process."""
    import torch

    from ossature.config import CheckpointConfig, DataConfig, LoraConfig, OptimConfig, TrainConfig
    from ossature.parallel.launch import launched
    from ossature.train.loop import one_step
    from ossature.train.setup import build
    from ossature.train.step import count

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    imported = resident("VmRSS")
    packed = base == "mxfp4"
    config = TrainConfig(
        run=Path(folder) / "run",
        model=f"{folder}/{base}/config.json",
        init=Path(folder) / base,
        steps=steps + 1,
        global_batch_tokens=TOKENS,
        micro_batch_tokens=TOKENS,
        recompute=recompute,
        optim=OptimConfig(warmup_steps=0, lr=1e-4, min_lr=0.0),
        lora=LoraConfig(rank=rank, base="mxfp4" if packed else "plain"),
        data=DataConfig(mock=True, seq_len=TOKENS),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    with launched() as ranks:
        parts = build(config, ranks)
        loading = resident("VmHWM")
        rest = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        times = []
        for _ in range(steps + 1):
            began = time.monotonic()
            batches = list(parts.loader.micro_batches(parts.progress.step))
            record = one_step(parts, batches, count(batches, False, parts.mesh).tokens)
            times.append(time.monotonic() - began)
        peak = resident("VmHWM")
    return {
        "peak_bytes": peak - imported,
        "loading_bytes": loading - imported,
        "rest_bytes": rest - imported,
        "seconds": statistics.median(times[1:]),
        "loss": record["loss"],
    }


def resident(field: str) -> int:
    """Bytes of this process, now (VmRSS) or at their highest (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


if __name__ == "__main__":
    sys.exit(main())

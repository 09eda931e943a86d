"""Tokens per second and peak memory of one training step: ossature beside transformers.

    python benchmarks/train_step.py [--shapes 2x1024 1x4096 1x8192] [--steps 3] [--dtype bfloat16]

Both train the same weights on the same tokens, forward, backward and fused AdamW, each case in a
fresh process.  transformers runs with every pair of experts and attention implementation that it
accepts; the ratio is taken against its fastest.  Memory is the peak resident size above that of a
process that has only imported.  A case may not take more memory than the machine has free.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time

EXPERTS = ("eager", "grouped_mm", "batched_mm")
ATTENTION = ("eager", "sdpa", "flex_attention")
SHAPE = {
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 16,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["2x1024", "1x4096", "1x8192"])
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one warm-up")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one case")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(json.loads(options.case))))
        return

    rate = child({"name": "matmul", "dtype": options.dtype}, options.timeout)["gflops"]
    print(f"machine: {os.cpu_count()} cores, {options.dtype} matmul {rate:.0f} GFLOP/s\n")
    for shape in options.shapes:
        batch, seq = map(int, shape.split("x"))
        case = {"batch": batch, "seq": seq, "dtype": options.dtype, "steps": options.steps}
        ours = child({"name": "ossature", **case}, options.timeout)
        report(shape, "ossature", ours, rate)
        theirs = []
        for experts, attention in itertools.product(EXPERTS, ATTENTION):
            peer = {"name": "transformers", "experts": experts, "attention": attention, **case}
            result = child(peer, options.timeout)
            report(shape, f"transformers {experts}/{attention}", result, rate)
            if "error" not in result:
                theirs.append(result)
        if "error" in ours or not theirs:
            print(f"{shape}: no ratio, one side did not run\n")
            continue
        best = max(theirs, key=lambda result: result["tokens_per_second"])
        lean = min(theirs, key=lambda result: result["peak_bytes"])
        print(
            f"{shape}: {ours['tokens_per_second'] / best['tokens_per_second']:.2f} x its tokens/s, "
            f"{ours['peak_bytes'] / best['peak_bytes']:.0%} of the memory of its fastest, "
            f"{ours['peak_bytes'] / lean['peak_bytes']:.0%} of its leanest\n"
        )


def report(shape: str, name: str, result: dict, rate: float) -> None:
    if "error" in result:
        print(f"{shape:>8}  {name:36} failed: {result['error']}", flush=True)
        return
    share = result["gflops"] / rate
    print(
        f"{shape:>8}  {name:36} {result['tokens_per_second']:8.0f} tokens/s "
        f"{result['peak_bytes'] / 2**30:7.2f} GiB  {result['gflops']:5.0f} GFLOP/s ({share:.0%})  "
        f"loss {result['loss']:.4f}",
        flush=True,
    )


def child(case: dict, timeout: int) -> dict:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"no result in {timeout} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": lines[-1][:150]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: dict) -> dict:
    """One case, in this process."""
    import torch

    dtype = getattr(torch, case["dtype"])
    if case["name"] == "matmul":
        return {"gflops": matmul_rate(dtype)}
    import transformers  # both sides import both, so that their baselines are the same

    import ossature
    from ossature.model.flops import flops_per_token
    from ossature.model.transformer import Transformer

    torch.manual_seed(0)
    config = ossature.ModelConfig(**SHAPE)
    ours = Transformer(config)
    tokens = torch.randint(0, config.vocab_size, (case["batch"], case["seq"]))
    limit_memory()
    if case["name"] == "ossature":
        model = ours.to(dtype)

        def loss_of() -> torch.Tensor:
            return ossature.language_model_loss(model, tokens)
    else:
        model = transformers.GptOssForCausalLM._from_config(
            transformers.GptOssConfig(**SHAPE, router_aux_loss_coef=0.0),
            attn_implementation=case["attention"],
            experts_implementation=case["experts"],
        )
        model.load_state_dict(ossature.convert.to_hugging_face(ours.state_dict()))
        model.to(dtype)

        def loss_of() -> torch.Tensor:
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    del ours
    reset_peak()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    seconds = []
    first = None
    for _ in range(1 + case["steps"]):
        start = time.perf_counter()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        first = loss.item() if first is None else first
    rate = tokens.numel() / min(seconds[1:])
    return {
        "tokens_per_second": rate,
        "peak_bytes": peak_bytes() - imported_bytes(),
        "gflops": rate * flops_per_token(config, case["seq"]) / 1e9,
        "loss": first,
    }


def matmul_rate(dtype) -> float:
    """Best GFLOP/s of a square product of 2,048."""
    import torch

    a = torch.randn(2048, 2048).to(dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best / 1e9


def limit_memory() -> None:
    """A case that wants more memory than is free gets an error, and the machine stays alive."""
    import psutil

    free = psutil.virtual_memory().available
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + int(0.9 * free), resource.RLIM_INFINITY))


def reset_peak() -> None:
    """Forget the peak of building the model (Linux)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_bytes() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def imported_bytes() -> int:
    """Resident size of a process that has imported what this one imports."""
    code = (
        "import torch, transformers, ossature, psutil; ossature.Transformer; "
        "transformers.GptOssForCausalLM; print(psutil.Process().memory_info().rss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


if __name__ == "__main__":
    main()

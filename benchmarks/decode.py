"""Tokens per second of generation: ossature beside transformers; many requests; memory; a GPU.

    python benchmarks/decode.py [--batches 1 8] [--prompt 512] [--new 128] [--dtype bfloat16]
    python benchmarks/decode.py --many            64 requests of mixed lengths, at once and in turn
    python benchmarks/decode.py --packed FOLDER   memory of experts in MXFP4 beside BF16
    python benchmarks/decode.py --device cuda     the shape of gpt-oss-20b with random weights

Both go on with the same random prompts on the same weights, greedily, each case in a fresh
process.  Tokens are those added; the time is that of the whole call, prompt included; the rate of
decoding alone comes from the time that one token takes.  transformers runs with every pair of
experts and attention implementation that it accepts; the ratio is taken against its fastest.
Memory is the peak resident size above that of a process that has only imported.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

EXPERTS = ("eager", "grouped_mm", "batched_mm")
ATTENTION = ("eager", "sdpa")
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
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens added to each")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeat", type=int, default=3, help="timed calls; the best counts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--many", action="store_true")
    parser.add_argument("--requests", type=int, default=64, help="with --many")
    parser.add_argument("--packed", type=Path, help="a new folder, removed at the end")
    parser.add_argument("--layers", type=int, default=2, help="with --packed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one case")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case = json.loads(options.case)
        print(json.dumps(KINDS[case.pop("kind")](**case)))
        return
    if options.packed:
        compare_memory(options)
    elif options.many:
        compare_many(options)
    elif options.device != "cpu":
        on_device(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    for dtype, batch in itertools.product(options.dtype, options.batches):
        same = {"batch": batch, "prompt": options.prompt, "new": options.new, "dtype": dtype}
        same |= {"repeat": options.repeat, "threads": options.threads}
        label = f"{dtype} batch {batch}"
        ours = child({"kind": "ossature", **same}, options.timeout)
        report(label, "ossature", ours)
        theirs = []
        for experts, attention in itertools.product(EXPERTS, ATTENTION):
            peer = {"kind": "transformers", "experts": experts, "attention": attention, **same}
            result = child(peer, options.timeout)
            report(label, f"transformers {experts}/{attention}", result)
            if "error" not in result:
                theirs.append(result)
        if "error" in ours or not theirs:
            print(f"{label}: no ratio, one side did not run\n")
            continue
        best = max(theirs, key=lambda result: result["rate"])
        decode = max(theirs, key=lambda result: result["decode_rate"])
        pairs = [
            one == other
            for rows in zip(ours["tokens"], best["tokens"], strict=True)
            for one, other in zip(*rows, strict=True)
        ]
        print(
            f"{label}: {ours['rate'] / best['rate']:.2f} x its tokens/s, decoding alone "
            f"{ours['decode_rate'] / decode['decode_rate']:.2f} x; "
            f"{statistics.mean(pairs):.1%} of the tokens are the same\n",
            flush=True,
        )


def compare_many(options: argparse.Namespace) -> None:
    for dtype in options.dtype:
        same = {"kind": "many", "requests": options.requests, "dtype": dtype}
        same |= {"prompt": options.prompt, "new": options.new, "threads": options.threads}
        found = {}
        for places in (1, 8, 32):
            found[places] = result = child({**same, "places": places}, options.timeout)
            if "error" in result:
                sys.exit(f"{places} at a time: {result['error']}")
            print(
                f"{dtype} {options.requests} requests, {places:2} at a time: "
                f"{result['rate']:7.1f} tokens/s, {result['seconds']:.1f} s",
                flush=True,
            )
        for places in (8, 32):
            one, many = found[1], found[places]
            equal = sum(a == b for a, b in zip(one["texts"], many["texts"], strict=True))
            print(
                f"{dtype} {places} at a time: {many['rate'] / one['rate']:.2f} x the tokens/s of "
                f"one after another; {equal} of {len(one['texts'])} texts are the same"
            )


def compare_memory(options: argparse.Namespace) -> None:
    """Layers of gpt-oss-20b with fewer experts, in both formats."""
    sys.path.insert(0, str(Path(__file__).parent))
    from lora_memory import make, shape

    from ossature.model.flops import expert_weights, parameters

    config = shape(options.layers, 20)
    share = expert_weights(config) / parameters(config)
    print(f"{parameters(config):,} parameters, {share:.1%} in experts; prompt 64, 32 new tokens")
    make(options.packed, options.layers, 20)
    try:
        found = {}
        for base in ("bf16", "mxfp4"):
            case = {"kind": "packed", "folder": str(options.packed / base), "base": base}
            found[base] = result = child({**case, "threads": options.threads}, options.timeout)
            if "error" in result:
                sys.exit(f"{base}: {result['error']}")
            print(
                f"{base:6} peak {result['peak_bytes'] / 2**20:6.0f} MiB, "
                f"{result['decode_rate']:.1f} tokens/s",
                flush=True,
            )
        ratio = found["mxfp4"]["peak_bytes"] / found["bf16"]["peak_bytes"]
        same = found["mxfp4"]["tokens"] == found["bf16"]["tokens"]
        print(f"mxfp4 takes {ratio:.1%} of the memory of bf16; the same text: {same}")
    finally:
        shutil.rmtree(options.packed)


def on_device(options: argparse.Namespace) -> None:
    for batch in options.batches:
        case = {"kind": "device", "device": options.device, "batch": batch}
        case |= {"prompt": options.prompt, "new": options.new, "repeat": options.repeat}
        report(f"20B batch {batch}", "bfloat16", child(case, options.timeout))


def report(label: str, name: str, result: dict) -> None:
    if "error" in result:
        print(f"{label:>16}  {name:32} failed: {result['error']}", flush=True)
        return
    print(
        f"{label:>16}  {name:32} {result['rate']:8.1f} tokens/s, decoding alone "
        f"{result['decode_rate']:8.1f}",
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


def rates(call, batch: int, new: int, repeat: int) -> dict:
    """`call(new)` adds so many tokens to every prompt; its last tokens, and tokens per second."""
    call(2)
    first = min(timed(lambda: call(1))[0] for _ in range(repeat))
    results = [timed(lambda: call(new)) for _ in range(repeat)]
    whole, tokens = min(results, key=lambda result: result[0])
    return {
        "rate": batch * new / whole,
        "decode_rate": batch * (new - 1) / (whole - first),
        "tokens": tokens,
    }


def timed(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def build(dtype: str):
    import torch

    from ossature.model.config import ModelConfig
    from ossature.model.transformer import Transformer

    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE)).requires_grad_(False)
    return model.to(getattr(torch, dtype)).eval()


def ours(batch: int, prompt: int, new: int, dtype: str, repeat: int, threads: int) -> dict:
    import torch

    from ossature.model.prepacked import can_prepack, prepack
    from ossature.sample.generate import generate

    torch.set_num_threads(threads)
    model = build(dtype)
    if can_prepack(model):
        prepack(model)
    tokens = torch.randint(0, SHAPE["vocab_size"], (batch, prompt))
    return rates(
        lambda count: generate(model, tokens, count)[:, prompt:].tolist(), batch, new, repeat
    )


def theirs(
    batch: int, prompt: int, new: int, dtype: str, repeat: int, threads: int, experts: str,
    attention: str,
) -> dict:  # fmt: skip
    import torch
    import transformers

    import ossature

    torch.set_num_threads(threads)
    ours = build(dtype)
    tokens = torch.randint(0, SHAPE["vocab_size"], (batch, prompt))
    model = transformers.GptOssForCausalLM._from_config(
        transformers.GptOssConfig(**SHAPE),
        attn_implementation=attention,
        experts_implementation=experts,
    )
    model.load_state_dict(ossature.convert.to_hugging_face(ours.state_dict()))
    model.to(getattr(torch, dtype)).eval()
    del ours
    mask = torch.ones_like(tokens)

    def call(count: int) -> list[list[int]]:
        rows = model.generate(
            tokens, attention_mask=mask, max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return rows[:, prompt:].tolist()

    return rates(call, batch, new, repeat)


def many(requests: int, places: int, prompt: int, new: int, dtype: str, threads: int) -> dict:
    """Lengths are drawn evenly, up to the largest."""
    import torch

    from ossature.model.prepacked import can_prepack, prepack
    from ossature.sample.engine import Engine
    from ossature.sample.options import SamplingOptions
    from ossature.sample.request import Request

    torch.set_num_threads(threads)
    model, draw = build(dtype), random.Random(0)
    if can_prepack(model):
        prepack(model)
    wanted = [
        Request(
            [
                draw.randrange(SHAPE["vocab_size"])
                for _ in range(draw.randint(prompt // 32, prompt))
            ],
            SamplingOptions(temperature=0.0, max_new_tokens=draw.randint(new // 16, new)),
        )
        for _ in range(requests)
    ]
    engine = Engine(model, max_batch=places, max_tokens=places * (prompt + new))
    engine.generate(wanted[:2])
    seconds, texts = timed(lambda: engine.generate(wanted))
    texts = [text.tokens for (text,) in texts]
    return {"rate": sum(map(len, texts)) / seconds, "seconds": seconds, "texts": texts}


def packed(folder: str, base: str, threads: int) -> dict:
    import torch

    from ossature.convert.model import load_model
    from ossature.sample.generate import generate

    torch.set_num_threads(threads)
    imported = resident("VmRSS")
    experts = "mxfp4" if base == "mxfp4" else "plain"
    model = load_model(folder, dtype=torch.bfloat16, experts=experts).eval()
    tokens = torch.arange(64)[None]
    found = rates(lambda count: generate(model, tokens, count).tolist(), 1, 32, 1)
    return found | {"peak_bytes": resident("VmHWM") - imported}


def resident(field: str) -> int:
    """Bytes of this process, now (VmRSS) or at their highest (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def device(device: str, batch: int, prompt: int, new: int, repeat: int) -> dict:
    import torch

    from ossature.model.config import GPT_OSS_20B
    from ossature.model.transformer import Transformer
    from ossature.sample.generate import generate

    torch.manual_seed(0)
    config = GPT_OSS_20B
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16).requires_grad_(False)
    model.to_empty(device=device).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(0, config.vocab_size, (batch, prompt), device=device)
    return rates(
        lambda count: generate(model, tokens, count)[:, prompt:].tolist(),
        batch, new, repeat,
    )  # fmt: skip


KINDS = {
    "ossature": ours, "transformers": theirs, "many": many, "packed": packed, "device": device,
}  # fmt: skip


if __name__ == "__main__":
    main()

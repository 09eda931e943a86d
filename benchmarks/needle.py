"""Memory of the needle task at 4,096, 32,768 and 131,072 positions, against a bound.

    python benchmarks/needle.py [--lengths 4096 32768 131072] [--dtype fp32]

A small model with random weights, on a CPU; each length in a process of its own.  What is measured
is the peak of resident memory above the process with its model open, while one needle is looked
for.  The bound is a sum over what one layer of one forward pass holds at a time, per token:

    hidden      the residual, its norm, sums          4 x hidden x bytes
    attention   q, k, v, output, and copies           3 x (heads + 2 kv_heads) x head_dim x bytes
    band        who sees whom in a sliding layer      2 x window x (bytes + 2)
    experts     inputs, gates and outputs of k        2 x k x (hidden + 3 x inner) x bytes
    ids         tokens, targets, documents, ...       16 x 8

plus 64 MiB for logits of the answer and buffers of the allocator.  Nothing grows with the square of
the length, nor with length x vocabulary.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from random import Random

MIB = 2**20
EXTRA = 64 * MIB


def bound(shape, length: int, item: int) -> int:
    """Bytes above the open model."""
    heads = shape.num_attention_heads + 2 * shape.num_key_value_heads
    token = 4 * shape.hidden_size * item
    token += 3 * heads * shape.head_dim * item
    token += 2 * shape.sliding_window * (item + 2)
    token += (
        2 * shape.num_experts_per_tok * (shape.hidden_size + 3 * shape.intermediate_size) * item
    )
    return length * (token + 16 * 8) + EXTRA


def measure(length: int, dtype: str) -> None:
    import psutil
    import torch

    from ossature.data.tokenizer import Tokenizer
    from ossature.data.vocabulary import train
    from ossature.eval.needle import COLOURS, QUIET, THINGS, haystack
    from ossature.eval.subject import Subject
    from ossature.model.config import ModelConfig
    from ossature.model.transformer import Transformer

    torch.set_num_threads(1)
    words = " ".join([*QUIET, *COLOURS, *THINGS, "The number of the What is 0123456789"])
    tokenizer = Tokenizer(train([words] * 3, 512), "words")
    shape = ModelConfig(
        vocab_size=8192, hidden_size=96, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_local_experts=8,
        num_experts_per_tok=4, sliding_window=128, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = Transformer(shape).to(kind).eval()
    subject = Subject(model, tokenizer, torch.device("cpu"))
    # What a first call brings along is not of the length.
    subject.scores([haystack(tokenizer, 256, 0.5, Random(1))])
    row = haystack(tokenizer, length, 0.5, Random(0))
    before, began = psutil.Process().memory_info().rss, time.monotonic()
    (score,) = subject.scores([row])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {
        "length": len(row.context) + len(row.continuation),
        "above": max(0, peak - before),
        "bound": bound(shape, length, kind.itemsize),
        "seconds": time.monotonic() - began,
        "logprob": score.logprob,
    }
    print(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32_768, 131_072])
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.dtype)
        return 0
    print(f"{'positions':>10} {'MiB above the model':>20} {'bound':>8} {'seconds':>8}")
    kept = True
    for length in options.lengths:
        words = [
            sys.executable,
            str(Path(__file__)),
            "--one",
            str(length),
            "--dtype",
            options.dtype,
        ]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["length"] == length
        print(
            f"{length:>10,} {found['above'] / MIB:>20,.0f} {found['bound'] / MIB:>8,.0f} "
            f"{found['seconds']:>8.1f}",
            flush=True,
        )
        kept = kept and found["above"] <= found["bound"]
    print("within the bound" if kept else "NOT within the bound")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""What the parallel code costs one rank: its tokens per second over those of the plain model.

    python benchmarks/one_rank.py [--shape 2x1024] [--rounds 5] [--precision bf16] [--tiny]

Both train the same shape on the same tokens, with the same AdamW and global-norm clipping.  The one
goes through what `ossature train` runs: a mesh of one rank, FSDP around every block, the step of
`ossature.train.step`.  The other is the model with fp32 masters, cast to the precision of the run
before each forward, and torch's own clipping: what a loop of one's own does.  Each is a process
of its own; they take turns, step by step, and each ratio is of two neighbouring steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

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
TINY = {**SHAPE, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "head_dim": 16}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2x1024", help="rows x tokens of a step")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--side", choices=["parallel", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    sides = {
        side: subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--side", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for side in ("parallel", "plain")
    }
    ratios, rates, losses = [], [], []
    try:
        for n in range(options.rounds + 2):  # two to warm up
            order = list(sides) if n % 2 else list(sides)[::-1]
            found = {side: ask(sides[side]) for side in order}
            losses.append(abs(found["parallel"]["loss"] - found["plain"]["loss"]))
            if n > 1:
                rates.append({side: answer["rate"] for side, answer in found.items()})
                ratios.append(found["parallel"]["rate"] / found["plain"]["rate"])
                print(f"round {n - 1}: {ratios[-1]:.3f}", flush=True)
    finally:
        for process in sides.values():
            process.kill()
            process.wait()
    for side in sides:
        rate = statistics.median(rate[side] for rate in rates)
        print(f"{side:>9}: {rate:.0f} tokens/s (median)")
    print(f"losses differ by at most {max(losses):.1e}")
    print(f"one rank / plain: {statistics.median(ratios):.3f} (median of {len(ratios)})")


def ask(process: subprocess.Popen) -> dict[str, float]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a side ended before its time")
    return json.loads(line)


def serve(options: argparse.Namespace) -> None:
    """One step for each line that comes in."""
    rows, seq = map(int, options.shape.split("x"))
    with ExitStack() as stack:
        step = (parallel if options.side == "parallel" else plain)(options, rows, seq, stack)
        for _ in sys.stdin:
            start = time.perf_counter()
            loss = step()
            print(json.dumps({"rate": rows * seq / (time.perf_counter() - start), "loss": loss}))
            sys.stdout.flush()


def settings(options: argparse.Namespace, rows: int, seq: int):
    from ossature.config import DataConfig, LogConfig, TrainConfig
    from ossature.model.config import SIZES, ModelConfig

    SIZES["bench"] = ModelConfig(**(TINY if options.tiny else SHAPE))
    return TrainConfig(
        run=Path("unused"),
        model="bench",
        global_batch_tokens=rows * seq,
        micro_batch_tokens=rows * seq,
        precision=options.precision,
        data=DataConfig(mock=True, seq_len=seq),
        log=LogConfig(tensorboard=False),
    )


def parallel(options: argparse.Namespace, rows: int, seq: int, stack: ExitStack):
    """The step of `ossature train`, on a mesh of one rank."""
    from ossature.parallel.gradients import global_norm, scale_and_clip
    from ossature.parallel.launch import launched
    from ossature.train import setup
    from ossature.train import step as steps

    config = settings(options, rows, seq)
    parts = setup.build(config, stack.enter_context(launched(config.timeout_seconds)))
    batches = list(parts.loader.micro_batches(0))

    def step() -> float:
        counted = steps.count(batches, False, parts.mesh).tokens
        sums = steps.accumulate(
            parts.model, batches, counted, parts.mesh, config.router, log_router=False,
            axes=config.parallel,
        )  # fmt: skip
        norm = global_norm(parts.weights.values(), parts.mesh)
        loss = sums.loss.item()
        scale_and_clip(parts.weights.values(), norm, config.optim.clip, 1.0)
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def plain(options: argparse.Namespace, rows: int, seq: int, _stack: ExitStack):
    """The same model by hand: masters, a copy to compute with, AdamW."""
    import torch

    from ossature.model.transformer import Transformer
    from ossature.parallel.fsdp import COMPUTE_DTYPE
    from ossature.train import optim, setup
    from ossature.train.step import targets

    config = settings(options, rows, seq)
    shape = setup.model_config(config.model)
    with torch.device("meta"):
        model = Transformer(shape)
    model.to_empty(device="cpu")
    model.init_weights(config.seed)
    dtype = COMPUTE_DTYPE[config.precision]
    masters = {name: torch.nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    model.to(dtype)
    optimizer = optim.build(masters.items(), config.optim, config.seed)
    (batch,) = setup.train_loader(config, shape.vocab_size, 0, 1).micro_batches(0)
    goal = targets(batch)
    counted = int((goal >= 0).sum())

    def step() -> float:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
        loss = model(batch.tokens, position=batch.position, document=batch.document, targets=goal)
        loss = loss / counted
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            masters[name].grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters.values(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


if __name__ == "__main__":
    main()

"""`ossature serve` under load, by OpenAI's own client: what is answered, lost, and kept in memory.

    python benchmarks/serve.py [MODEL] [--requests 200] [--tokens 32] [--json FILE]

MODEL is any checkpoint; without one a small model with random weights is made in a temporary
folder.  A server is started for each case.

    at once    all requests at the same time, half of them streamed, half chats and half completions
    again      the same on the same server: memory that grows now would grow for ever
    overload   the same with a queue of 8: the rest gets status 429 and is sent again by the client
    gone       every second client goes away after its first token; the places must come back
    TERM       the server gets SIGTERM while they run; whoever was let in must get the whole answer

lost: let in, and not answered in full.  refused: told to come back (429), or that the server ends
(503, or nobody listens).  MiB: resident memory of the server at the end, and its peak.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import openai
import psutil

QUESTION = [{"role": "user", "content": "what is the answer to question {n}?"}]


def make(folder: Path) -> None:
    """A small model with random weights, and a tokenizer."""
    import torch

    import ossature
    from ossature.data import vocabulary
    from ossature.data.tokenizer import Tokenizer
    from ossature.model.config import ModelConfig

    tokenizer = Tokenizer(vocabulary.train(["what is the answer to a question?"] * 9, 400), "small")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=96, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=32, rope_original_context=1024,
        max_position_embeddings=8192, initializer_range=0.1, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ossature.Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    ossature.save_model(model, folder)
    tokenizer.save(folder)


class Server(NamedTuple):
    process: subprocess.Popen
    url: str
    memory: psutil.Process


@contextmanager
def served(model: Path, *words: str) -> Iterator[Server]:
    """A server of its own, ended at the end."""
    command = [
        sys.executable, "-m", "ossature", "serve", str(model), "--port", "0", "--name", "model",
        "--dtype", "fp32", "--context", "1024", "--max-batch", "16", *words,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise OSError(process.communicate()[1])
        yield Server(process, found[0], psutil.Process(process.pid))
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


async def ask(client: openai.AsyncOpenAI, n: int, tokens: int, leave: bool = False) -> str:
    """One request: answered, refused, gone (went away itself) or lost."""
    messages = [{**message, "content": message["content"].format(n=n)} for message in QUESTION]
    try:
        if n % 4 < 2:
            asked = client.chat.completions.create(
                model="model", messages=messages, max_tokens=tokens, stream=n % 2 == 0 or leave,
                seed=n, stream_options={"include_usage": True} if n % 2 == 0 or leave else None,
            )  # fmt: skip
        else:
            asked = client.completions.create(
                model="model", prompt=f"what is {n}?", max_tokens=tokens, seed=n,
                stream=n % 2 == 0 or leave,
                stream_options={"include_usage": True} if n % 2 == 0 or leave else None,
            )  # fmt: skip
        found = await asked
        if isinstance(found, openai.AsyncStream):
            ends, usage = [], None
            async for chunk in found:
                if leave:
                    await found.close()
                    return "gone"
                ends += [c.finish_reason for c in chunk.choices if c.finish_reason]
                usage = chunk.usage
        else:
            ends, usage = [c.finish_reason for c in found.choices], found.usage
    except openai.APIStatusError as error:
        return "refused" if error.status_code in (429, 503) else "lost"
    except openai.APIConnectionError as error:
        # Nobody listens any more; anything else on the way is a loss.
        return "refused" if "ConnectError" in repr(error.__cause__) else "lost"
    except openai.APIError:
        return "lost"
    whole = ends in (["length"], ["stop"]) and usage is not None and usage.completion_tokens > 0
    whole = whole and (ends == ["stop"] or usage.completion_tokens == tokens)
    return "answered" if whole else "lost"


async def load(server: Server, requests: int, tokens: int, retries: int = 0, **case) -> dict:
    """All requests at once; what became of them, and the server's memory."""
    peak = server.memory.memory_info().rss
    start = time.monotonic()

    async def watch() -> None:
        nonlocal peak
        while True:
            if server.process.poll() is None:
                peak = max(peak, server.memory.memory_info().rss)
            await asyncio.sleep(0.05)

    limits = {"max_retries": retries, "timeout": 600}
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", **limits) as client:
        watching = asyncio.create_task(watch())
        asked = [
            asyncio.create_task(ask(client, n, tokens, leave=bool(case.get("leave") and n % 2)))
            for n in range(requests)
        ]
        if case.get("term"):
            while sum(task.done() for task in asked) < requests // 10:
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
        outcomes = Counter(await asyncio.gather(*asked))
        watching.cancel()
    ended = server.process.poll() is not None or bool(case.get("term"))
    return {
        "requests": requests, **{k: outcomes[k] for k in ("answered", "refused", "gone", "lost")},
        "seconds": time.monotonic() - start,
        "rss_mib": 0 if ended else server.memory.memory_info().rss / 2**20,
        "peak_mib": peak / 2**20,
    }  # fmt: skip


def cases(model: Path, requests: int, tokens: int) -> Iterator[tuple[str, dict]]:
    size = (requests, tokens)
    with served(model, "--max-queue", str(requests)) as server:
        asyncio.run(load(server, 4, tokens))  # first of everything
        yield "at once", asyncio.run(load(server, *size))
        yield "again", asyncio.run(load(server, *size))
    with served(model, "--max-queue", "8") as server:
        yield "overload", asyncio.run(load(server, *size, retries=100))
    with served(model, "--max-queue", str(requests)) as server:
        found = asyncio.run(load(server, *size, leave=True))
        asyncio.run(load(server, 1, tokens))
        yield "gone", found
    with served(model, "--max-queue", str(requests)) as server:
        found = asyncio.run(load(server, *size, term=True))
        found["status"] = server.process.wait(120)
        assert server.process.stderr is not None
        said = re.search(r"answered (\d+) requests, left (\d+)", server.process.stderr.read())
        found["server_says"] = said[0] if said else ""
        yield "TERM", found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = options.model
        if model is None:
            model = Path(temporary) / "model"
            make(model)
        found = {}
        print("case      requests  answered  refused  gone  lost  seconds  MiB  peak")
        for name, row in cases(model, options.requests, options.tokens):
            found[name] = row
            print(
                f"{name:<9} {row['requests']:>8} {row['answered']:>9} {row['refused']:>8}"
                f" {row['gone']:>5} {row['lost']:>5} {row['seconds']:>8.1f} {row['rss_mib']:>4.0f}"
                f" {row['peak_mib']:>5.0f}",
                flush=True,
            )
        print(
            f"TERM: exit status {found['TERM']['status']}; server: {found['TERM']['server_says']}"
        )
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if any(row["lost"] for row in found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Speed and memory of `data chat` and of the shuffle of `data build`.

    python benchmarks/data_chat.py [--mebibytes 2048] [--workers 2] [--tokenizer o200k_harmony]
                                   [--folder FOLDER]

Fabricates a JSONL file of conversations and one of texts, each of --mebibytes, from the words of
the standard library's sources with log-normal lengths; then, each in a new process: `data chat` to
rows of 4096 tokens, `data build --shuffle 1`, and the shuffle alone, of the tokens that were built.
Prints throughput, how far rows are filled, and the peak of resident memory of all processes
together, also above processes that have only imported; the goal is at most 1 GiB.  Everything it
writes lies in a folder that it deletes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

SEQ_LEN = 4096
COMMAND = "import sys; from ossature.cli import main; sys.exit(main(sys.argv[1:]))"
RSS = "import psutil; print(psutil.Process().memory_info().rss)"
PARENT = "import ossature.cli, ossature.data.chat_folder, ossature.data.assemble; " + RSS
WORKER = "import ossature.data.chat_parts, ossature.data.parts; " + RSS
SHUFFLE = """
import sys, time
from pathlib import Path
import numpy as np
from ossature.data.indexed import IndexedTokens, Writer
from ossature.data.shuffle import shuffled
folder = Path(sys.argv[1])
file, step = IndexedTokens(folder / "train_text_document"), 2**13
def parts():
    for first in range(0, file.num_documents, step):
        last = min(first + step, file.num_documents)
        borders = np.array([file.document_start(n) for n in range(first, last + 1)])
        tokens = file.tokens(borders[0], borders[-1]).astype(np.int32)
        yield tokens, np.diff(borders).astype(np.int32)
        file.release()
writer = Writer(folder / "again")
for stretch in shuffled(parts(), file.num_tokens, 1, folder / "buckets"):
    writer.add(*stretch)
writer.close()
assert (writer.num_documents, writer.num_tokens) == (file.num_documents, file.num_tokens)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=2048, help="of each fabricated file")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokenizer", default="", help="default: a BPE of 8192 tokens, trained")
    parser.add_argument("--folder", help="where to write (about 8 times the size)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        words = vocabulary_of_words()
        tokenizer = options.tokenizer or str(train_tokenizer(folder, words))
        for kind in ("chat", "text"):
            size, records = fabricate(folder / f"{kind}.jsonl", kind, words, options.mebibytes)
            print(f"{kind}: {size / 2**20:,.0f} MiB, {records:,} records", flush=True)
        common = ["--tokenizer", tokenizer, "--workers", str(options.workers)]
        chat = ["data", "chat", str(folder / "chat.jsonl"), "--seq-len", str(SEQ_LEN), "--too-long"]
        build = ["data", "build", str(folder / "text.jsonl")]
        chat = measure("data chat", [COMMAND, *chat, "split", *common], folder, options.workers)
        build = measure("data build --shuffle", [COMMAND, *build, "--shuffle", "1", *common],
                        folder, options.workers)  # fmt: skip
        describe("data chat", chat, folder / "chat.jsonl")
        describe("data build --shuffle", build, folder / "text.jsonl")
        alone = measure("the shuffle alone", [SHUFFLE, str(build.output)], folder, 1)
        describe("the shuffle alone", alone._replace(output=build.output), folder / "text.jsonl")


class Measured(NamedTuple):
    seconds: float
    peak: int
    above: int
    """Bytes of the peak above processes that have only imported."""
    output: Path


def vocabulary_of_words() -> list[str]:
    """Words of the standard library, as often as they occur: texts with natural frequencies."""
    from ossature.data.sources import standard_library

    words: list[str] = []
    for source in standard_library():
        words += Path(source.path).read_text("utf-8").split()
        if len(words) > 500_000:
            break
    return words


def train_tokenizer(folder: Path, words: list[str]) -> Path:
    from ossature.data import vocabulary
    from ossature.data.tokenizer import Tokenizer

    text = " ".join(words)
    Tokenizer(vocabulary.train([text], 8192), "trained").save(folder / "tokenizer")
    return folder / "tokenizer"


def fabricate(path: Path, kind: str, words: list[str], mebibytes: int) -> tuple[int, int]:
    """Write records until the file is large enough; its size and their number."""
    generator = np.random.default_rng(0)
    size = records = 0
    with path.open("w", encoding="utf-8") as file:
        while size < mebibytes * 2**20:
            if kind == "text":
                record = {"text": draw(generator, words, 6.0)}
            else:
                turns = int(generator.integers(1, 4))
                record = {"messages": [m for _ in range(turns) for m in turn(generator, words)]}
            line = json.dumps(record, ensure_ascii=False) + "\n"
            size += file.write(line)
            records += 1
    return path.stat().st_size, records


def turn(generator: np.random.Generator, words: list[str]) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": draw(generator, words, 3.5)},
        {
            "role": "assistant",
            "thinking": draw(generator, words, 4.0),
            "content": draw(generator, words, 4.5),
        },
    ]


def draw(generator: np.random.Generator, words: list[str], mean: float) -> str:
    """A stretch of words whose length is log-normal."""
    count = 1 + int(generator.lognormal(mean, 0.8))
    start = int(generator.integers(len(words)))
    return " ".join(words[start : start + count])


def measure(name: str, command: list[str], folder: Path, workers: int) -> Measured:
    """Run a program in a new process."""
    output = folder / name.replace(" ", "-")
    words = [*command, "--output", str(output)] if command[0] == COMMAND else command
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", *words], stdout=subprocess.DEVNULL)
    peak = Peak(process.pid)
    status = process.wait()
    seconds = time.perf_counter() - began
    most = peak.stop()
    if status:
        raise SystemExit(f"{name}: exit status {status}")
    only_imported = resident(PARENT) + (workers * resident(WORKER) if workers > 1 else 0)
    return Measured(seconds, most, most - only_imported, output)


def describe(name: str, found: Measured, source: Path) -> None:
    manifest = json.loads((found.output / "manifest.json").read_text("utf-8"))
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    print(
        f"{name}: {found.seconds:.1f} s, {source.stat().st_size / 2**20 / found.seconds:.1f} MiB/s "
        f"of JSONL, {tokens / found.seconds:,.0f} tokens/s; peak {found.peak / 2**20:,.0f} MiB, "
        f"{found.above / 2**20:,.0f} above the imports (goal: 1024)",
        flush=True,
    )
    if "rows" in manifest:
        filling = manifest["splits"]["train"]["filling"]
        print(f"{name}: {tokens:,} tokens, rows of {SEQ_LEN} filled to {filling:.2%} (goal: 98 %)")


class Peak:
    """Largest sum of the resident memory of a process and its children, looked at often."""

    def __init__(self, pid: int) -> None:
        self.process, self.bytes, self.ended = psutil.Process(pid), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.ended.wait(0.05):
            try:
                family = [self.process, *self.process.children(recursive=True)]
                self.bytes = max(self.bytes, sum(p.memory_info().rss for p in family))
            except psutil.NoSuchProcess:
                continue

    def stop(self) -> int:
        self.ended.set()
        self.thread.join()
        return self.bytes


def resident(program: str) -> int:
    """Bytes of a process that runs a program and prints them."""
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return int(result.stdout)


if __name__ == "__main__":
    main()

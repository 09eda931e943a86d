"""Speed of `data build` and of the loader's start.

    python benchmarks/data.py [--workers 2] [--megabytes 24] [--tokenizer o200k_harmony]
                              [--folder FOLDER]

Build: end to end (a new process: start, reading, encoding, hashing, writing) against the bare
`encode_batch` of `tokenizers` on the same text with as many threads, the best of two each; the goal
is 80 %.  The text is the standard library's sources, as often as it takes.

Loader: a corpus of 10 billion tokens in 10 million documents of unequal length (a sparse .bin, a
real .idx), opened in a new process: time and memory above the imports, to the first shuffled batch;
the goals are 1 second and 200 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

NUM_DOCUMENTS = 10_000_000
NUM_TOKENS = 10_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--megabytes", type=int, default=24, help="of text to encode")
    parser.add_argument("--tokenizer", default="", help="default: a BPE of 8192 tokens, trained")
    parser.add_argument("--folder", help="where to write (0.2 GB, and 40 GB sparse)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        benchmark_build(Path(folder), options)
        benchmark_loader(Path(folder))


def benchmark_build(folder: Path, options: argparse.Namespace) -> None:
    from ossature.data import vocabulary
    from ossature.data.sources import standard_library
    from ossature.data.tokenizer import Tokenizer, load

    texts = [Path(source.path).read_text("utf-8") for source in standard_library()]
    texts = [text for text in texts if text]
    if options.tokenizer:
        load(options.tokenizer).save(folder / "tokenizer")
    else:
        Tokenizer(vocabulary.train(texts, 8192), "trained").save(folder / "tokenizer")
    copies = -(-options.megabytes * 10**6 // sum(map(len, texts)))
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for text in texts * copies:
            file.write(json.dumps({"text": text}) + "\n")
    size = (folder / "text.jsonl").stat().st_size

    built = min(build_seconds(folder, n, options.workers) for n in range(2))
    bare, tokens = min(bare_encode_batch(folder, options.workers) for _ in range(2))
    manifest = json.loads((folder / "out-0/manifest.json").read_text("utf-8"))
    written = sum(split["tokens"] for split in manifest["splits"].values())
    assert written == tokens + len(texts) * copies, "one end per document, and all of its tokens"
    print(f"text: {size / 1e6:.1f} MB in {len(texts) * copies:,} documents, {written:,} tokens")
    print(f"bare encode_batch, {options.workers} threads:  {tokens / bare:12,.0f} tokens/s")
    print(f"data build, {options.workers} workers:         {written / built:12,.0f} tokens/s")
    print(f"data build / bare: {written / built / (tokens / bare):.0%} (goal: 80 %)")


BUILD = "import sys; from ossature.data.build import build; sys.exit(build(sys.argv[1:]))"


def build_seconds(folder: Path, run: int, workers: int) -> float:
    words = [folder / "text.jsonl", "--output", folder / f"out-{run}", "--workers", workers]
    words += ["--tokenizer", folder / "tokenizer"]
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", BUILD, *map(str, words)], check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - began


# Text in memory, tokenizer loaded, nothing done with the ids: the bare rate.
BARE = """
import json, sys, time, tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1] + "/tokenizer/tokenizer.json")
texts = [json.loads(line)["text"] for line in open(sys.argv[1] + "/text.jsonl", encoding="utf-8")]
began, tokens = time.perf_counter(), 0
for start in range(0, len(texts), 256):
    batch = tokenizer.encode_batch(texts[start:start + 256], add_special_tokens=False)
    tokens += sum(len(encoding) for encoding in batch)
print(time.perf_counter() - began, tokens)
"""


def bare_encode_batch(folder: Path, threads: int) -> tuple[float, int]:
    threads_of = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    result = subprocess.run(
        [sys.executable, "-c", BARE, str(folder)],
        check=True, capture_output=True, text=True, env=os.environ | threads_of,
    )  # fmt: skip
    seconds, tokens = result.stdout.split()
    return float(seconds), int(tokens)


LOADER = """
import sys, time, psutil, torch, numpy
from pathlib import Path
from ossature.config import DataConfig
from ossature.data.loader import Loader
process = psutil.Process()
before, began = process.memory_info().rss, time.perf_counter()
data = DataConfig(path=Path(sys.argv[1]), split="9999,8,2", seq_len=4096)
loader = Loader(data, seed=1, global_batch_rows=64, micro_batch_rows=8, vocab_size=201088)
opened = time.perf_counter()
batch = next(loader.micro_batches(0))
first = time.perf_counter()
assert batch.tokens.shape == (8, 4096)
above = process.memory_info().rss - before
for batch in loader.micro_batches(1): pass
done = time.perf_counter()
print(f"loader over {loader.rows[0].corpus.num_tokens:,} tokens in "
      f"{loader.rows[0].corpus.num_documents:,} documents: {loader.num_rows:,} rows an epoch")
print(f"open: {opened - began:.3f} s, first shuffled batch after {first - began:.3f} s (goal: 1 s)")
print(f"memory above imports: {above / 2**20:.1f} MiB (goal: 200 MiB)")
print(f"then {64 * 4096 / (done - first):,.0f} tokens/s")
"""


def benchmark_loader(folder: Path) -> None:
    prefix = folder / "large"
    write_large(prefix)
    sys.stdout.flush()
    subprocess.run([sys.executable, "-c", LOADER, str(prefix)], check=True)


def write_large(prefix: Path) -> None:
    """An index of real lengths over tokens that are all zero and take no room on the disk."""
    from ossature.data.indexed import HEADER, MAGIC, index_path, tokens_path

    generator = np.random.default_rng(0)
    mean = NUM_TOKENS // NUM_DOCUMENTS
    lengths = generator.integers(1, 2 * mean, NUM_DOCUMENTS, dtype=np.int32)
    lengths[-1] += max(0, NUM_TOKENS - lengths.sum(dtype=np.int64))
    ends = np.cumsum(lengths, dtype=np.int64) * 4
    with index_path(prefix).open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 4, NUM_DOCUMENTS, NUM_DOCUMENTS + 1))
        lengths.tofile(file)
        np.concatenate([[0], ends[:-1]]).tofile(file)
        np.arange(NUM_DOCUMENTS + 1, dtype=np.int64).tofile(file)
    with tokens_path(prefix).open("wb") as file:
        file.truncate(int(ends[-1]))


if __name__ == "__main__":
    main()

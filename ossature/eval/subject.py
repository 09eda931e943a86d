"""The model that is evaluated, as its tasks see it: scores of rows, and texts after prompts.

Both remember what they have answered (`Answers`), ask nothing twice, and give every rank the same
answers, so that tasks need not know of ranks.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from ossature.config import ParallelConfig
from ossature.convert.base import identity, read_base
from ossature.convert.model import load_adapter
from ossature.convert.open import open_model
from ossature.data.tokenizer import Tokenizer
from ossature.eval.answers import Answers, key_of
from ossature.eval.likelihood import Place, Row, Score, score
from ossature.eval.options import EvalOptions
from ossature.model.transformer import Transformer
from ossature.parallel.fsdp import inference
from ossature.parallel.launch import Ranks
from ossature.parallel.mesh import sizes
from ossature.sample.engine import Engine
from ossature.sample.generate import evaluating
from ossature.sample.request import Completion, Request


@dataclass
class Subject:
    """All ranks make the same calls."""

    model: Transformer
    tokenizer: Tokenizer
    device: torch.device
    place: Place = field(default_factory=Place)
    answers: Answers = field(default_factory=Answers)
    batch_tokens: int = 8192
    """Of rows that are scored at a time, padding included."""
    batch: int = 8
    """Texts that are sampled at a time."""
    progress: bool = False
    """Show how far it is, on the terminal."""

    def scores(self, rows: Sequence[Row], what: str = "") -> list[Score]:
        """How probable each continuation is after its context."""
        keys = [key_of("score", list(row.context), list(row.continuation)) for row in rows]
        first = {key: n for n, key in reversed(list(enumerate(keys)))}
        asked = [n for key, n in sorted(first.items(), key=lambda x: x[1]) if not self._has(key)]
        with (
            evaluating(self.model),
            inference(self.model),
            self._bar(what, len(rows), len(first) - len(asked)) as bar,
        ):
            some = [rows[n] for n in asked]
            for found in score(
                self.model, some, self.place, self.device, batch_tokens=self.batch_tokens
            ):
                self.answers.keep({keys[asked[n]]: list(answer) for n, answer in found.items()})
                bar.update(len(found))
        return [Score(*self.answers[key]) for key in keys]

    def texts(self, requests: Sequence[Request], what: str = "") -> list[list[Completion]]:
        """The texts of each request, as many as it wants."""
        keys = [key_of("text", list(r.prompt), asdict(r.options)) for r in requests]
        first = {key: n for n, key in reversed(list(enumerate(keys)))}
        asked = [n for key, n in sorted(first.items(), key=lambda x: x[1]) if not self._has(key)]
        with (
            evaluating(self.model),
            inference(self.model),
            self._bar(what, len(requests), len(first) - len(asked)) as bar,
        ):
            if asked:
                self._sample([requests[n] for n in asked], [keys[n] for n in asked], bar)
        return [
            [Completion(tokens=tokens, text=text, finished=end) for tokens, text, end in found]
            for found in map(self.answers.__getitem__, keys)
        ]

    def _sample(self, requests: list[Request], keys: list[str], bar: tqdm) -> None:
        rooms = [r.options.samples * (len(r.prompt) + r.options.max_new_tokens) for r in requests]
        engine = Engine(
            self.model,
            max_batch=max(self.batch, *(r.options.samples for r in requests)),
            max_tokens=max(max(rooms), min(sum(rooms), 65_536)),
            tokenizer=self.tokenizer,
            device=self.device,
        )
        key_by_number = {engine.submit(r): key for r, key in zip(requests, keys, strict=True)}
        texts = {
            number: [Completion() for _ in range(r.options.samples)]
            for number, r in zip(key_by_number, requests, strict=True)
        }
        while engine.busy:
            for event in engine.step():
                text = texts[event.request][event.sample]
                if event.token is not None:
                    text.tokens.append(event.token)
                text.text += event.text
                text.finished = event.finished
                if event.finished and all(t.finished for t in texts[event.request]):
                    done = [[t.tokens, t.text, t.finished] for t in texts.pop(event.request)]
                    self.answers.keep({key_by_number[event.request]: done})
                    bar.update()

    def _has(self, key: str) -> bool:
        return key in self.answers

    def _bar(self, what: str, count: int, known: int) -> tqdm:
        return tqdm(total=count, initial=known, desc=what, disable=not self.progress, leave=False)


def open_subject(
    folder: Path, options: EvalOptions, tokenizer: Tokenizer, dtype: torch.dtype, ranks: Ranks
) -> Subject:
    """The model of a folder, on all ranks."""
    if options.adapter is not None and ranks.world > 1:
        raise ValueError(f"adapter ({options.adapter}) needs one process, not {ranks.world}")
    model = open_model(folder, options.parallel, dtype, ranks, options.device or None)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{model.config.vocab_size}; is this the model's tokenizer?"
        )
    if options.adapter is not None:
        base = read_base(load_adapter(model, options.adapter).folder)
        if base is not None and base.identity != identity(folder):
            print(
                f"warning: {options.adapter}: the adapter was trained on "
                f"{base.folder or 'random weights'}, and the weights in {folder} are others",
                file=sys.stderr,
            )
    adapter = "" if options.adapter is None else weights_fingerprint(options.adapter)
    owner = {
        "weights": weights_fingerprint(folder), "adapter": adapter, "dtype": options.dtype,
        "tokenizer": tokenizer.sha256(), "parallel": asdict(options.parallel),
    }  # fmt: skip
    return Subject(
        model,
        tokenizer,
        device=next(model.parameters()).device,
        place=place_of(options.parallel, ranks),
        answers=Answers(options.cache, owner),
        batch_tokens=options.batch_tokens,
        batch=options.batch,
        progress=ranks.first and sys.stderr.isatty(),
    )


def weights_fingerprint(folder: Path) -> str:
    """Changes with a checkpoint's files: with their names, sizes and times, not their bytes."""
    digest = hashlib.sha256()
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        status = path.stat()
        name = path.relative_to(folder.parent if folder.is_file() else folder)
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns} ".encode())
    return digest.hexdigest()[:16]


def place_of(parallel: ParallelConfig, ranks: Ranks) -> Place:
    """Of a rank, by its axes; the last one is innermost, as in `ossature.parallel.mesh`."""
    if ranks.world == 1:
        return Place()
    axes = sizes(parallel, ranks.world)
    data = axes["dp_replicate"] * axes["dp_shard"]
    return Place(
        rank=ranks.rank // (axes["cp"] * axes["tp"]) % data,
        world=data,
        speaks=ranks.rank % axes["tp"] == 0,
        multiple=axes["tp"] * (2 * axes["cp"] if axes["cp"] > 1 else 1),
    )

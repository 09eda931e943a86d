"""`ossature sample FOLDER --prompt TEXT ...`: what a model goes on to write."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from ossature.config import ParallelConfig, parse
from ossature.sample.options import Constraint, SamplingOptions


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Continue prompts with a model, all at once, and print the text as it comes."""

    folder: tyro.conf.Positional[Path]
    """Checkpoint in any format, or the folder of a run (its newest checkpoint)."""
    prompt: tuple[str, ...] = ()
    """One or more texts; may be given several times.  They may differ in length."""
    max_new_tokens: int = 64
    """Tokens added to each prompt, unless it stops before."""
    temperature: float = 0.8
    """0 always takes the most probable token."""
    top_k: int = 0
    """Draw among so many of the most probable tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the most probable tokens that reach this probability together."""
    min_p: float = 0.0
    """Draw among tokens at least this times as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Logits of tokens that were seen are divided by it, or multiplied if negative; 1: none."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens of the continuation; 0: none."""
    frequency_penalty: float = 0.0
    """The same once for each time a token is there; 0: none."""
    seed: int = 0
    """Of the draws: the same command prints the same text."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; they are not printed."""
    regex: str = ""
    """A regular expression that the whole of each continuation matches."""
    json_schema: str = ""
    """A file with the JSON schema of each continuation."""
    batch: int = 8
    """Prompts that are continued at a time; each of the others takes the place of one that ends."""
    tokenizer: str = ""
    """Tokenizer of a folder that holds none: a tokenizer.json, a folder or a Hugging Face id."""
    device: str = ""
    """Such as "cpu" or "cuda:0"; empty takes a GPU if there is one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of weights and computation."""
    experts: Literal["plain", "mxfp4"] = "plain"
    """"mxfp4" keeps the experts of a folder that has them so packed: a quarter of the memory."""
    adapter: tuple[str, ...] = ()
    """NAME=FOLDER: adapters that are put on the model; each prompt is continued with each."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is divided over the ranks that torchrun starts."""


def main(argv: list[str]) -> int:
    options = parse(SampleOptions, argv, prog="ossature sample")
    if not options.prompt:
        raise ValueError('sample: no prompt; give --prompt "TEXT"')
    if "" in options.prompt:
        raise ValueError("sample: an empty --prompt; give at least one character")
    if options.batch < 1:
        raise ValueError(f"batch ({options.batch}) must be 1 or more")
    if options.regex and options.json_schema:
        raise ValueError("sample: --regex and --json-schema exclude each other")
    sampling = _sampling(options, ())
    folders = adapter_folders(options.adapter)

    import torch

    from ossature.convert.folder import resolve
    from ossature.convert.model import with_adapter
    from ossature.convert.open import open_model
    from ossature.data.tokenizer import load as load_tokenizer
    from ossature.model.prepacked import can_prepack, prepack
    from ossature.parallel.launch import first_prints, launched
    from ossature.sample.engine import Engine
    from ossature.sample.request import Request

    folder = resolve(options.folder)
    if not options.tokenizer and not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder}: no tokenizer.json beside the weights; say which one with --tokenizer"
        )
    tokenizer = load_tokenizer(options.tokenizer or str(folder))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    with launched() as ranks, first_prints(ranks):
        if folders and ranks.world > 1:
            raise ValueError(f"adapter: {ranks.world} ranks cannot put adapters on; use one")
        device = options.device or None
        model = open_model(folder, options.parallel, dtype, ranks, device, options.experts)
        adapters = {name: with_adapter(model, path) for name, path in folders.items()}
        if ranks.world == 1 and not adapters and can_prepack(model):
            prepack(model)
        prompts = [tokenizer.encode(text) for text in options.prompt]
        texts = [(row, name) for row in range(len(prompts)) for name in adapters or [""]]
        batch = min(options.batch, len(texts))
        longest = max(map(len, prompts)) + options.max_new_tokens
        engine = Engine(
            model, max_batch=batch, max_tokens=batch * longest, tokenizer=tokenizer,
            adapters=adapters,
        )  # fmt: skip
        ends = tuple(sorted(stop_ids(tokenizer.special, model.config.eos_token_id)))
        sampling = _sampling(options, ends)
        numbers = [
            engine.submit(Request(prompts[row], replace(sampling, seed=options.seed + row), name))
            for row, name in texts
        ]
        several, failed = len(adapters) > 1, False
        printer = Printer([several * f"[{name}] " + options.prompt[row] for row, name in texts])
        while engine.busy:
            for event in engine.step():
                row = numbers.index(event.request)
                printer.take(row, event.text, bool(event.finished))
                if event.finished == "failed" and ranks.first:
                    print(f"error: prompt {texts[row][0] + 1}: {event.problem}", file=sys.stderr)
                failed |= event.finished == "failed"
    return 1 if failed else 0


def adapter_folders(words: tuple[str, ...]) -> dict[str, Path]:
    """Folders by name, of words NAME=FOLDER."""
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"adapter ({word}) must be NAME=FOLDER")
        if name in found:
            raise ValueError(f"adapter: {name} is given twice")
        found[name] = Path(folder)
    return found


def _sampling(options: SampleOptions, ends: tuple[int, ...]) -> SamplingOptions:
    constraint = None
    if options.regex:
        constraint = Constraint("regex", options.regex)
    elif options.json_schema:
        constraint = Constraint("json_schema", Path(options.json_schema).read_text("utf-8"))
    same = (
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty",
    )  # fmt: skip
    return SamplingOptions(
        **{name: getattr(options, name) for name in same},
        max_new_tokens=options.max_new_tokens, stop=options.stop, stop_ids=ends,
        constraint=constraint,
    )  # fmt: skip


def stop_ids(special: Mapping[str, int], eos: int | None) -> set[int]:
    """Tokens that end a text: the config's, and those of harmony's three that the tokenizer has.

    Published generation configs older than 2025-08-08 lack `<|call|>`, and a tool call would
    never end; so they are not asked.
    """
    ends = ("<|return|>", "<|endoftext|>", "<|call|>")
    return {special[name] for name in ends if name in special} | (
        {eos} if eos is not None else set()
    )


class Printer:
    """Prints several growing texts one below the other, each after its prompt.

    The first unfinished row is shown live; the others grow unseen until it is their turn.
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        from ossature.data.picture import visible

        self.prompts = prompts
        self.texts = [""] * len(prompts)
        self.ended = [False] * len(prompts)
        self.live = 0
        self._show = visible if sys.stdout.isatty() else str
        self._print(prompts[0])

    def take(self, row: int, text: str, ended: bool) -> None:
        """More of the text of a row."""
        self.texts[row] += text
        self.ended[row] |= ended
        if row == self.live:
            self._print(text)
        while self.live < len(self.prompts) and self.ended[self.live]:
            print()
            self.live += 1
            if self.live < len(self.prompts):
                self._print(f"\n{self.prompts[self.live]}{self.texts[self.live]}")
            sys.stdout.flush()

    def _print(self, text: str) -> None:
        """Nothing in it drives a terminal; into a file it goes as it is."""
        print(self._show(text), end="", flush=True)

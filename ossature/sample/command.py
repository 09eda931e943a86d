"""`ossature sample FOLDER --prompt TEXT ...`: what a model goes on to write."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from ossature.config import ParallelConfig, parse
from ossature.sample.text import Continuation


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
    seed: int = 0
    """Of the draws: the same command prints the same text."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; they are not printed."""
    tokenizer: str = ""
    """Tokenizer of a folder that holds none: a tokenizer.json, a folder or a Hugging Face id."""
    device: str = ""
    """Such as "cpu" or "cuda:0"; empty takes a GPU if there is one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of weights and computation."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is divided over the ranks that torchrun starts."""


def main(argv: list[str]) -> int:
    options = parse(SampleOptions, argv, prog="ossature sample")
    if not options.prompt:
        raise ValueError('sample: no prompt; give --prompt "TEXT"')
    if "" in options.prompt:
        raise ValueError("sample: an empty --prompt; give at least one character")

    import torch

    from ossature.convert.folder import resolve
    from ossature.convert.open import open_model
    from ossature.data.tokenizer import load as load_tokenizer
    from ossature.parallel.launch import first_prints, launched
    from ossature.sample.generate import generate
    from ossature.sample.sampling import check_sampling

    check_sampling(options.temperature, options.top_k, options.top_p)
    folder = resolve(options.folder)
    if not options.tokenizer and not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder}: no tokenizer.json beside the weights; say which one with --tokenizer"
        )
    tokenizer = load_tokenizer(options.tokenizer or str(folder))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    with launched() as ranks, first_prints(ranks):
        model = open_model(folder, options.parallel, dtype, ranks, options.device or None)
        ends = stop_ids(tokenizer.special, model.config.eos_token_id)
        printer = Printer(options.prompt, tokenizer.decode, ends, options.stop)
        generate(
            model,
            [tokenizer.encode(text) for text in options.prompt],
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            stop_ids=ends,
            seed=options.seed,
            top_k=options.top_k,
            top_p=options.top_p,
            watch=printer.watch,
        )
        printer.finish()
    return 0


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

    def __init__(
        self,
        prompts: Sequence[str],
        decode: Callable[[list[int]], str],
        stop_ids: Collection[int] = (),
        stops: Sequence[str] = (),
    ) -> None:
        self.prompts, self.stop_ids = prompts, stop_ids
        self.rows = [Continuation(decode, stops) for _ in prompts]
        self.running = [True] * len(prompts)
        self.live = -1
        self.next()

    def watch(self, tokens: list[int | None]) -> list[int]:
        """Take in one step of `generate`; returns the rows that a stop string ends."""
        for number, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if token is None or token in self.stop_ids:
                self.running[number] = False
            elif text := row.feed(token):
                self.show(number, text)
        while self.live < len(self.rows) and not self.grows(self.live):
            self.next()
        return [number for number, row in enumerate(self.rows) if row.stopped]

    def grows(self, number: int) -> bool:
        return self.running[number] and not self.rows[number].stopped

    def show(self, number: int, text: str) -> None:
        if number == self.live:
            print(text, end="", flush=True)

    def next(self) -> None:
        """End the live row and go to the one below, with all the text it has."""
        if self.live >= 0:
            print(self.rows[self.live].finish(), flush=True)
        self.live += 1
        if self.live < len(self.rows):
            gap = "\n" if self.live else ""
            row = self.rows[self.live]
            print(f"{gap}{self.prompts[self.live]}{row.text}", end="", flush=True)

    def finish(self) -> None:
        while self.live < len(self.rows):
            self.next()
        sys.stdout.flush()

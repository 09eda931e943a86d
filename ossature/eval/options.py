"""What an evaluation may be asked.  No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from ossature.config import ParallelConfig

Grade = Literal["exact", "numeric", "regex", "choice", "likelihood"]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What is asked, and how."""

    limit: int = 0
    """Items of each task, at most; 0: all of a file, 40 to 200 of a generated task."""
    seed: int = 0
    """Of generated tasks and of draws."""
    samples: int = 1
    """Texts for each question of a file: for pass@k and the majority's vote."""
    temperature: float = 0.0
    """Of texts; 0 always takes the most probable token."""
    max_new_tokens: int = 256
    """Of a text."""
    chat: bool = False
    """Ask in harmony, as a message of the user; only the channel final is graded."""
    effort: Literal["low", "medium", "high"] = "low"
    """Reasoning effort that the system message asks for."""
    grade: Grade = "exact"
    """How answers to the questions of a file are graded, unless a question says so itself."""
    fewshot: int = -1
    """Examples before each question of lm-eval's tasks; -1 leaves it to the task."""
    include_path: str = ""
    """Folder with more tasks for lm-eval, as YAML files."""

    def __post_init__(self) -> None:
        least = {"limit": 0, "samples": 1, "temperature": 0, "max_new_tokens": 1, "fewshot": -1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} ({getattr(self, name)}) must be {bound} or more")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples ({self.samples}) need a temperature above 0: they would all be the same"
            )


@dataclass(frozen=True, kw_only=True)
class EvalOptions(TaskOptions):
    """Ask a model questions and count what it gets right, with intervals of 95 %.

    Tasks that come with the package, made from a seed in the model's own tokens: `arithmetic`;
    `copying`, of random tokens; `needle` or `needle:4096,131072`, a number in a text of so many
    tokens; `harmony`, the share of answers that are well formed; `bits_per_byte:PATH`, of a data
    folder's validation split, or of text.  A task that ends in .jsonl is a file of questions and
    answers.  Any other is one of lm-eval (needs ossature[eval]).

    `ossature eval --compare A.json B.json` compares two files of results.
    """

    folder: tyro.conf.Positional[Path]
    """Checkpoint in any format, or the folder of a run (its newest checkpoint)."""
    tasks: tuple[str, ...] = ()
    """One or more."""
    output: Path | None = None
    """A JSON file for the results, every item's included."""
    cache: Path | None = None
    """A file for answers as they come: the same command goes on from there if it was killed."""
    plot: Path | None = None
    """An SVG of the needle task: share found by depth and length."""
    adapter: Path | None = None
    """Put this adapter on the model: PEFT's folder or a run that trained one.  One process."""
    batch_tokens: int = 8192
    """Of rows that are scored at a time, padding included; a longer row is scored alone."""
    batch: int = 8
    """Texts that are sampled at a time."""
    tokenizer: str = ""
    """Tokenizer of a folder that holds none: a tokenizer.json, a folder or a Hugging Face id."""
    device: str = ""
    """Such as "cpu" or "cuda:0"; empty takes a GPU if there is one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of weights and computation."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is divided over the ranks that torchrun starts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compare the results of two models on the same questions: B - A, item by item."""

    compare: tuple[Path, ...]
    """Two files of `ossature eval --output`."""

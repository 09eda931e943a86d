"""What the engine is asked for, and what it answers: requests, events, whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ossature.sample.options import Finish, SamplingOptions


@dataclass(frozen=True)
class Request:
    prompt: Sequence[int]
    """Tokens."""
    options: SamplingOptions = field(default_factory=SamplingOptions)
    adapter: str = ""
    """Name of one of the engine's adapters; empty: the model as it is."""


class Event(NamedTuple):
    """One more token of a text; or its end, if it was cancelled or has failed."""

    request: int
    """As `submit` has numbered it."""
    sample: int
    """Which of the request's texts."""
    token: int | None
    """None if the text was cancelled or has failed."""
    logprob: float
    """Log-probability of the token, by the model's own logits."""
    top: tuple[tuple[int, float], ...]
    """As many of the most probable tokens as were asked for, with their log-probabilities."""
    text: str
    """What has become certain of the text with this token, if the engine has a tokenizer."""
    finished: Finish
    problem: str = ""
    """Why it has failed."""


@dataclass
class Completion:
    """A whole text."""

    tokens: list[int] = field(default_factory=list)
    """The stop id that ended it included."""
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finished: Finish = ""

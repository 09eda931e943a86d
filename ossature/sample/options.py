"""What a request may ask of the draws, and where its text ends.  No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Applied in this order: bias, penalties, constraint, temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the most probable token."""
    top_k: int = 0
    """Draw among so many of the most probable tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the most probable tokens that reach this probability together."""
    min_p: float = 0.0
    """Draw among tokens at least this times as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Logits of tokens of the prompt and the text are divided by it, or multiplied if negative."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens of the text, once each."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens of the text, once for each time they are there."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, and what is added to the logit of each."""
    seed: int | None = None
    """Of the draws: the same text whatever else is computed at the time.  None: torch's next."""
    max_new_tokens: int = 256
    """Tokens added to the prompt, unless the text ends before."""
    stop_ids: tuple[int, ...] = ()
    """The text ends with the first of these tokens."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    logprobs: int = 0
    """So many of the most probable tokens are told at each place, besides the chosen one."""
    samples: int = 1
    """Texts for the same prompt, which is read once."""
    constraint: Constraint | None = None
    """What the text has to be."""

    def __post_init__(self) -> None:
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "0 or more; 0 is greedy"),
            "top_k": (self.top_k >= 0, "0 or more; 0 keeps every token"),
            "top_p": (0 <= self.top_p <= 1, "between 0 and 1; 1 keeps every token"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1; 0 keeps every token"),
            "repetition_penalty": (
                0.01 <= self.repetition_penalty <= 100,
                "between 0.01 and 100; 1 is none",
            ),
            "presence_penalty": (
                abs(self.presence_penalty) <= 100,
                "between -100 and 100; 0 is none",
            ),
            "frequency_penalty": (
                abs(self.frequency_penalty) <= 100,
                "between -100 and 100; 0 is none",
            ),
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "logprobs": (self.logprobs >= 0, "0 or more"),
            "samples": (self.samples >= 1, "1 or more"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} ({getattr(self, name)}) must be {rule}")
        for token, bias in self.logit_bias:
            if not abs(bias) <= 100:
                raise ValueError(
                    f"logit_bias: {bias} of token {token} must be between -100 and 100; 0 is none"
                )
        if "" in self.stop:
            raise ValueError("stop: an empty string would end every text")


@dataclass(frozen=True)
class Constraint:
    """A regular expression that the whole text matches, or a JSON schema that it satisfies."""

    kind: Literal["regex", "json_schema"]
    text: str


Finish = Literal["", "stop", "length", "cancelled", "failed"]
"""Why a text has ended: a stop id, a stop string or the constraint's end; max_new_tokens; the
caller; a problem that its last event names.  Empty while it goes on."""

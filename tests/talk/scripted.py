"""A model that says what a test wants, run by the real engine; and a tokenizer for it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from ossature.data import vocabulary
from ossature.data.tokenizer import Tokenizer
from ossature.model.cache import Cache, Prompt
from tests.small_runs import TINY

THINK = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>{}<|return|>"
CALL = " to=functions.{}<|channel|>commentary json<|message|>{}<|call|>"


def answer(text: str, thought: str = "hm") -> str:
    return THINK.format(thought) + FINAL.format(text)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(vocabulary.train(["what is the answer to a question? 1 2 3"] * 9, 400), "toy")


class Scripted(nn.Module):
    """Gives its whole probability to the next token of `says(prompt)`, again and again from the
    start once that is through; remembers the tokens of each row of the engine's cache itself.

    Args:
        says: what follows a prompt; special tokens spelled out in both.
        each: called before every forward pass; may wait, or raise.
    """

    def __init__(self, says: Callable[[str], str], each: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.says, self.each = says, each
        self.weight = nn.Parameter(torch.zeros(1))
        self.vocab = tokenizer().vocab_size
        self.config = replace(TINY, vocab_size=self.vocab)
        self.rows: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}
        self.passes = 0
        self.watched: set[Cache] = set()
        self.eval()

    def forward(self, tokens: torch.Tensor, cache) -> torch.Tensor:
        self.each()
        self.passes += 1
        if isinstance(cache, Prompt):
            seen = self.rows.get(cache.row, []) if cache.first else []
            self.rows[cache.row] = seen + tokens[0].tolist()
            self.prompts[cache.row] = len(self.rows[cache.row])
            self._watch(cache.cache)
            return self._logits([cache.row])
        for row, token, length in zip(
            cache.rows, tokens[:, 0].tolist(), cache.lengths, strict=False
        ):
            assert len(self.rows[row]) == length - 1
            self.rows[row] = [*self.rows[row], token]
        logits = self._logits(cache.rows)
        return torch.cat([logits, logits[:1].expand(cache.fill, -1, -1)])

    def _watch(self, cache: Cache) -> None:
        """Copy what the engine copies for several samples of a prompt."""
        if cache in self.watched:
            return
        self.watched.add(cache)
        copy = cache.copy

        def both(row: int, to: int) -> None:
            self.rows[to], self.prompts[to] = self.rows[row], self.prompts[row]
            copy(row, to)

        cache.copy = both  # type: ignore[method-assign]

    def _logits(self, rows: list[int]) -> torch.Tensor:
        logits = torch.full((len(rows), 1, self.vocab), -50.0)
        for n, row in enumerate(rows):
            start = self.prompts[row]
            script = self._script(tuple(self.rows[row][:start]))
            logits[n, 0, script[(len(self.rows[row]) - start) % len(script)]] = 0.0
        return logits

    def _script(self, prompt: tuple[int, ...]) -> list[int]:
        return tokenizer().encode(self.says(tokenizer().decode(prompt)), special=True)


def last_question(prompt: str) -> str:
    """What the user said last."""
    return prompt.rpartition("<|start|>user<|message|>")[2].partition("<|end|>")[0]

"""Texts that have to match a regular expression or a JSON schema, by way of llguidance.

After every token the library says which tokens may come next: those whose bytes keep the text on
a way to a match.
"""

from __future__ import annotations

import json
from collections.abc import Collection

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from ossature.data.tokenizer import Tokenizer
from ossature.sample.options import Constraint


class Grammars:
    """Makes matchers for one tokenizer.

    Args:
        vocab_size: of the model, which may have more ids than the tokenizer.

    Raises:
        ValueError: llguidance is not installed, or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        try:
            import llguidance
        except ImportError:
            raise ValueError("constraint: needs `pip install ossature[constrain]`") from None
        self._matcher = llguidance.LLMatcher
        self.vocab_size, self.end = vocab_size, tokenizer.end_of_document
        try:
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer.to_json(), n_vocab=vocab_size, eos_token=self.end
            )
        except ValueError as error:
            line = str(error).splitlines()[0]
            raise ValueError(f"constraint: llguidance cannot read this tokenizer: {line}") from None

    def start(self, constraint: Constraint, stop_ids: Collection[int]) -> Matcher:
        """A matcher for a new text.

        Raises:
            ValueError: the expression or the schema is wrong.
        """
        grammar = (
            self._matcher.grammar_from_regex(constraint.text)
            if constraint.kind == "regex"
            else self._matcher.grammar_from_json_schema(_json(constraint.text))
        )
        matcher = self._matcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            line = matcher.get_error().strip().splitlines()[0]
            raise ValueError(f"constraint: not a {constraint.kind} that can be followed: {line}")
        return Matcher(matcher, self.vocab_size, self.end, stop_ids)


class Matcher:
    """Follows one text.  Where it may end, the stop ids are allowed too."""

    def __init__(self, inner, vocab_size: int, end: int, stop_ids: Collection[int]) -> None:
        self._inner, self._end, self._stop_ids = inner, end, list(stop_ids)
        self._size = vocab_size

    @property
    def ended(self) -> bool:
        """Whether nothing can come any more."""
        return self._inner.is_stopped() and not self._inner.is_error()

    def allowed(self) -> Bool[Tensor, " vocab"]:
        """Which tokens may come next.

        Raises:
            ValueError: none may, or the grammar is too large to be followed.
        """
        bits = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)
        if self._inner.is_error():
            line = self._inner.get_error().strip().splitlines()[0]
            raise ValueError(f"constraint: {line}")
        allowed = np.unpackbits(bits, bitorder="little")[: self._size].astype(bool)
        allowed[self._end] = False
        allowed[self._stop_ids] = self._inner.is_accepting()
        if not allowed.any():
            raise ValueError("constraint: no token of the vocabulary goes on with this text")
        return torch.from_numpy(allowed)

    def accept(self, token: int) -> None:
        """The text goes on with this token, which was allowed and is no stop id."""
        self._inner.consume_token(token)


def _json(text: str) -> str:
    """The library puts a schema into a larger text unread, so that more could come with it."""
    try:
        return json.dumps(json.loads(text))
    except ValueError as error:
        raise ValueError(f"constraint: not a JSON schema: {error}") from None
    except RecursionError:
        raise ValueError("constraint: the JSON schema is nested too deeply") from None

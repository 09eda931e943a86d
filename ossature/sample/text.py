"""Tokens of one row -> text as it becomes certain, until a stop string.

A token may end in the middle of a character, and a text in the middle of a stop string; such an
end is held back until the next token decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are no whole character
LONG, UNREAD = 16, 4  # tokens; a character has four bytes at most, and a token one at least


class Continuation:
    """The text of one row, growing token by token.

    Args:
        decode: text of tokens; of a byte-level tokenizer, so that texts of parts add up.
        stops: strings that end the text; they are not part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._until = decode, Until(stops)
        self._tokens: list[int] = []  # since the last end of a whole character
        self._shown = 0  # characters of their text that were passed on

    @property
    def text(self) -> str:
        """What is certain so far."""
        return self._until.text

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._until.stopped

    def feed(self, token: int) -> str:
        """The text that has become certain with this token."""
        self._tokens.append(token)
        decoded = self._decode(self._tokens)
        # At most the last of them may still become a character.
        whole = decoded.removesuffix(UNFINISHED)
        fresh = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        if whole == decoded:
            self._tokens, self._shown = [], 0
        elif len(self._tokens) > LONG:  # bytes that are no text: they are not read again and again
            self._tokens = self._tokens[-UNREAD:]
            self._shown = len(self._decode(self._tokens)) - 1
        return self._until.feed(fresh)

    def finish(self) -> str:
        """The text that was held back, when no more tokens come."""
        rest = self._decode(self._tokens)[self._shown :] if self._tokens else ""
        self._tokens, self._shown = [], 0
        return self._until.feed(rest) + self._until.finish()


class Until:
    """A text in pieces, until the first of some strings."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""  # the end of the text, while it may begin a stop string
        self._parts: list[str] = []
        self.stopped = False
        """Whether a stop string was met."""

    @property
    def text(self) -> str:
        """What is certain so far."""
        return "".join(self._parts)

    def feed(self, piece: str) -> str:
        """The text that has become certain with this piece."""
        if self.stopped:
            return ""
        text = self._held + piece
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            text, self._held = text[: min(ends)], ""
        else:
            held = max((_overlap(text, stop) for stop in self._stops), default=0)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self._parts.append(text)
        return text

    def finish(self) -> str:
        """The text that was held back, when no more comes."""
        held, self._held = self._held, ""
        self._parts.append(held)
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0

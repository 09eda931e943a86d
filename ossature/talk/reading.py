"""What a model writes in harmony, token by token -> pieces of text, each with its channel.

The parser of `ossature.data.harmony` knows whole messages; here the text of the message that is
being written becomes known as it comes, at a cost per token that does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ossature.data.harmony import Message, Parser
from ossature.data.tokenizer import Tokenizer
from ossature.sample.text import Continuation


class Piece(NamedTuple):
    """More of a message."""

    channel: str
    recipient: str
    """functions.NAME for a call of a tool; empty for text that is for the reader."""
    text: str
    begins: bool = False
    """Whether a message begins here; its text comes later."""
    ends: bool = False


class Reader:
    """Reads one answer: the messages that follow the header `<|start|>assistant` of a prompt.

    Args:
        header: tokens that the prompt has after that header already.
    """

    def __init__(self, tokenizer: Tokenizer, header: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._end_of_document = tokenizer.end_of_document
        self.parser = Parser(tokenizer)
        self._text = Continuation(self._decode)
        for token in header:
            self.push(token)

    @property
    def messages(self) -> list[Message]:
        """Those that are whole."""
        return self.parser.messages

    def push(self, token: int) -> Piece | None:
        """What is known with one more token; None if that is nothing to be shown."""
        if token == self._end_of_document:  # no harmony: some models stop with it all the same
            return None
        before = self.parser.state
        is_text = self.parser.push(token)
        if is_text:
            return self._piece(self._text.feed(token))
        if before == "header" and self.parser.state == "body":
            self._text = Continuation(self._decode)
            return self._piece("", begins=True)
        if before == "body" and self.parser.state == "between":
            return self._piece(self._text.finish(), ends=True)
        return None

    def close(self) -> Piece | None:
        """No more tokens come: the end of a message that has none."""
        unfinished = self.parser.state == "body"
        self.parser.close()
        return self._piece(self._text.finish(), ends=True) if unfinished else None

    def _piece(self, text: str, begins: bool = False, ends: bool = False) -> Piece:
        return Piece(self.parser.channel, self.parser.recipient, text, begins, ends)

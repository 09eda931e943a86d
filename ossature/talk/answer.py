"""A conversation -> the assistant's next messages, in pieces as they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ossature.data.harmony import CHANNELS, Conversation, Message, Rendering, prompt
from ossature.data.tokenizer import Tokenizer
from ossature.sample.engine import Engine
from ossature.sample.options import SamplingOptions
from ossature.sample.request import Request
from ossature.talk.reading import Piece, Reader


class Answer:
    """One answer of a model that nobody else uses at the time.

    Args:
        context: tokens that the conversation and the answer may have together.

    Raises:
        ValueError: the conversation leaves no room for an answer.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        conversation: Conversation,
        rendering: Rendering,
        sampling: SamplingOptions,
        context: int,
    ) -> None:
        tokens = prompt(conversation, rendering, tokenizer)
        if len(tokens) >= context:
            raise ValueError(
                f"the conversation has {len(tokens)} tokens, which leaves no room for an answer in "
                f"a context of {context}"
            )
        most = min(sampling.max_new_tokens, context - len(tokens))
        self._request = Request(tokens, replace(sampling, max_new_tokens=most))
        self._engine, self._reader = engine, Reader(tokenizer)
        self.ended = ""
        """Why: return, call, length, stopped (by the user), or role (the model wrote for another
        role than its own)."""

    def pieces(self, stopped: Callable[[], bool]) -> Iterator[Piece]:
        """The answer as it comes, until it ends or `stopped()`."""
        number = self._engine.submit(self._request)
        try:
            yield from self._pieces(number, stopped)
        finally:  # nobody hears the rest, and the next answer does not get it
            if self._engine.busy:
                self._engine.cancel(number)

    def _pieces(self, number: int, stopped: Callable[[], bool]) -> Iterator[Piece]:
        parser = self._reader.parser
        while self._engine.busy:
            if not self.ended and stopped():
                self.ended = "stopped"
                self._engine.cancel(number)
            for event in self._engine.step():
                if event.request != number or self.ended or event.token is None:
                    continue
                piece = self._reader.push(event.token)
                if piece is not None and piece.begins and parser.role != "assistant":
                    self.ended = "role"
                    self._engine.cancel(number)
                    continue
                if event.finished:
                    calls = parser.messages and parser.messages[-1].recipient
                    self.ended = "call" if calls else "return"
                    if event.finished == "length":
                        self.ended = "length"
                if piece is not None:
                    yield piece
        if self.ended != "role":
            piece = self._reader.close()
            if piece is not None:
                yield piece

    @property
    def problem(self) -> str:
        """The first thing that was not harmony; empty if all was."""
        return self._reader.parser.problem

    @property
    def messages(self) -> list[Message]:
        """What the assistant said; what it wrote without a channel counts as its answer."""
        said = [message for message in self._reader.messages if message.role == "assistant"]
        return [
            replace(
                message,
                channel=message.channel if message.channel in CHANNELS else "final",
                content_type=message.content_type or "json",
            )
            for message in said
        ]

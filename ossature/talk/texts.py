"""One request of a client -> its texts as they come from the engine's thread.

A chat's texts are read in harmony.  A message that has to match a schema is written in two steps:
the model writes freely up to the message's beginning, and goes on from there under the constraint,
so that it may think before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ossature.data.harmony import CHANNEL
from ossature.data.tokenizer import Tokenizer
from ossature.sample.options import Constraint, SamplingOptions
from ossature.sample.request import Event, Request
from ossature.sample.text import Until
from ossature.talk.reading import Piece, Reader
from ossature.talk.worker import EngineFailed, Worker

TO_FUNCTION = " to=functions."
"""In the head of a call, before the name of the function."""
NEXT_SEED = 0x9E3779B97F4A7C15
"""Between the texts of a request, as the engine has it between samples."""


class TextFailed(Exception):
    """A text cannot go on: no token follows its schema, or the model gives no numbers."""

    @property
    def status(self) -> int:
        """A schema is the client's, and would fail again."""
        return 400 if str(self).startswith("constraint:") else 500


@dataclass(frozen=True)
class Asked:
    """What is asked of the engine.

    Args:
        prompts: tokens of each; texts are numbered through all of them.
        sampling: of each text; `samples` is how many for each prompt.
    """

    prompts: Sequence[Sequence[int]]
    sampling: SamplingOptions
    adapter: str
    """Of the engine's; empty: the model as it is."""
    chat: bool
    """Whether the texts are harmony, after `<|start|>assistant`."""
    heads: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """By name, the beginning of each call of which the answer has to be one; empty: of none."""
    stop: tuple[str, ...] = ()
    """End the answer of a chat before the first of these, wherever tokens begin."""
    constraint: Callable[[str, str], Constraint | None] | None = None
    """What the body of a message has to match, by its channel and recipient."""


class Said(NamedTuple):
    """More of a text."""

    number: int
    """Which text."""
    text: str
    event: Event | None
    """The token behind it; none for text that was held back."""
    piece: Piece | None
    """Of a chat: its message.  None if the token shows nothing."""
    finished: str = ""
    """stop, length or call at the end of the text."""


@dataclass
class _Text:
    index: int
    prompt: Sequence[int]
    reader: Reader | None
    until: Until
    tokens: list[int] = field(default_factory=list)
    finished: str = ""
    constrained: bool = False
    choosing: bool = False
    """Whether it says which function it calls."""
    choice: str = ""
    ticket: int = -1


class Texts:
    """The texts of one request; `close` whatever happens.

    Raises:
        ValueError: the request can never be run.
        EngineFailed
    """

    def __init__(self, worker: Worker, tokenizer: Tokenizer, asked: Asked) -> None:
        self._worker, self._tokenizer, self._asked = worker, tokenizer, asked
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()
        samples = asked.sampling.samples
        self._texts = [
            self._text(n, asked.prompts[n // samples]) for n in range(len(asked.prompts) * samples)
        ]
        self._of: dict[tuple[int, int], _Text] = {}
        self.count = len(self._texts)
        self.generated = 0
        """Tokens so far, of all texts."""
        self.reasoning = 0
        """Tokens of the channel analysis among them."""
        # A prompt is then read once.
        together = asked.constraint is None and not asked.stop and not asked.heads
        try:
            for first in range(0, len(self._texts), samples):
                texts = self._texts[first : first + samples]
                if together:
                    self._submit(texts, texts[0].prompt, asked.sampling)
                    continue
                for sample, text in enumerate(texts):
                    sampling = replace(asked.sampling, samples=1)
                    if sampling.seed is not None:
                        sampling = replace(sampling, seed=sampling.seed + sample * NEXT_SEED)
                    if text.choosing:
                        sampling = self._choosing(sampling)
                    else:
                        sampling = replace(sampling, constraint=self._constraint(text))
                        text.constrained = sampling.constraint is not None
                    self._submit([text], text.prompt, sampling)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Nobody wants more; ends what has not ended."""
        for ticket in {ticket for ticket, _ in self._of}:
            self._worker.cancel(ticket)
        self._of = {}

    async def __aiter__(self) -> AsyncIterator[Said]:
        """What is said, until all texts have ended.

        Raises:
            EngineFailed, TextFailed
        """
        if len(self._asked.heads) == 1:
            for text in self._texts:
                yield self._begun(text)
        while any(not text.finished for text in self._texts):
            ticket, event = await self._queue.get()
            if event is None:
                raise EngineFailed(self._worker.failure)
            text = self._of.get((ticket, event.sample))
            if text is None or text.finished:
                continue  # of a part that was cancelled, or after a stop string
            if event.finished == "failed":
                raise TextFailed(event.problem)
            for said in self._take(text, event):
                yield said

    def _text(self, index: int, prompt: Sequence[int]) -> _Text:
        reader = Reader(self._tokenizer) if self._asked.chat else None
        text = _Text(index, prompt, reader, Until(self._asked.stop))
        text.choosing = len(self._asked.heads) > 1
        if len(self._asked.heads) == 1:
            self._call(text, *self._asked.heads)
        return text

    def _call(self, text: _Text, name: str) -> None:
        """Let the text be a call of a function."""
        head = self._asked.heads[name]
        text.reader, text.prompt = Reader(self._tokenizer, head), [*text.prompt, *head]

    def _begun(self, text: _Text) -> Said:
        assert text.reader is not None
        parser = text.reader.parser
        return Said(text.index, "", None, Piece(parser.channel, parser.recipient, "", begins=True))

    def _choosing(self, sampling: SamplingOptions) -> SamplingOptions:
        """To write which function is called, and nothing else."""
        heads = self._asked.heads
        names = Constraint("regex", f"{TO_FUNCTION.replace('.', '[.]')}({'|'.join(heads)})")
        return replace(
            sampling, constraint=names, stop_ids=(self._tokenizer.special[CHANNEL],),
            max_new_tokens=max(map(len, heads.values())),
        )  # fmt: skip

    def _chosen(self, text: _Text) -> list[Said]:
        """Go on with the call of the function that the text has chosen."""
        del self._of[text.ticket, 0]
        said, names = text.choice[len(TO_FUNCTION) :], list(self._asked.heads)
        # In unusual tokens a name may not have come to its end.
        name = said if said in names else next(n for n in names if n.startswith(said))
        self._call(text, name)
        text.choosing, text.constrained = False, True
        sampling = replace(self._asked.sampling, samples=1, constraint=self._constraint(text))
        self._submit([text], text.prompt, self._seeded(text, sampling))
        return [self._begun(text)]

    def _seeded(self, text: _Text, sampling: SamplingOptions) -> SamplingOptions:
        """For the second part of a text."""
        if sampling.seed is None:
            return sampling
        sample = text.index % self._asked.sampling.samples
        return replace(sampling, seed=sampling.seed + sample * NEXT_SEED + 1)

    def _submit(
        self, texts: Sequence[_Text], prompt: Sequence[int], sampling: SamplingOptions
    ) -> None:
        def sink(number: int, event: Event | None) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended, and its loop
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

        ticket = self._worker.submit(Request(prompt, sampling, self._asked.adapter), sink)
        for sample, text in enumerate(texts):
            self._of[ticket, sample], text.ticket = text, ticket

    def _constraint(self, text: _Text) -> Constraint | None:
        """Of the message whose body comes next."""
        if self._asked.constraint is None or text.reader is None:
            return None
        parser = text.reader.parser
        if parser.state != "body":
            return None
        return self._asked.constraint(parser.channel, parser.recipient)

    def _take(self, text: _Text, event: Event) -> list[Said]:
        assert event.token is not None, "only what nobody waits for is cancelled"
        self.generated += 1
        if text.choosing:
            text.choice += event.text
            return self._chosen(text) if event.finished else []
        text.tokens.append(event.token)
        if text.reader is None:
            text.finished = event.finished
            return [Said(text.index, event.text, event, None, text.finished)]
        piece = text.reader.push(event.token)
        parser = text.reader.parser
        if piece is not None and piece.channel == "analysis":
            self.reasoning += not (piece.begins or piece.ends)
        if piece is not None and piece.begins:
            if parser.role != "assistant":  # the model goes on to write what others say
                self._stop(text)
                return [Said(text.index, "", event, None, "stop")]
            if not event.finished and not text.constrained:
                self._go_on(text)
        said = [self._said(text, piece, event)]
        if event.finished and not text.finished:
            rest = text.reader.close()
            if rest is not None:
                said.append(self._said(text, rest, None))
            held = text.until.finish()
            if held:
                said.append(Said(text.index, held, None, Piece("final", "", held)))
            calls = bool(text.reader.messages and text.reader.messages[-1].recipient)
            text.finished = "call" if calls and event.finished == "stop" else event.finished
            said[-1] = said[-1]._replace(finished=text.finished)
        return said

    def _said(self, text: _Text, piece: Piece | None, event: Event | None) -> Said:
        """A piece, cut at stop strings if it is of the answer."""
        if piece is None or piece.recipient or piece.channel == "analysis":
            return Said(text.index, piece.text if piece else "", event, piece)
        shown = text.until.feed(piece.text)
        if text.until.stopped:
            self._stop(text)
        return Said(text.index, shown, event, piece._replace(text=shown), text.finished)

    def _stop(self, text: _Text) -> None:
        text.finished = "stop"
        if (text.ticket, 1) not in self._of:  # others share the request, which goes on
            self._worker.cancel(text.ticket)

    def _go_on(self, text: _Text) -> None:
        """Write the message that begins under its constraint, if it has one."""
        constraint = self._constraint(text)
        left = self._asked.sampling.max_new_tokens - len(text.tokens)
        if constraint is None or not left:
            return
        self._worker.cancel(text.ticket)
        del self._of[text.ticket, 0]
        sampling = replace(
            self._asked.sampling, samples=1, constraint=constraint, max_new_tokens=left
        )
        text.constrained = True
        self._submit([text], [*text.prompt, *text.tokens], self._seeded(text, sampling))

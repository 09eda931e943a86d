"""What the endpoints share: the model that is served, its limits, and how requests reach it."""

from __future__ import annotations

import asyncio
import datetime
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ossature.data.conversations import conversation
from ossature.data.harmony import CHANNEL, MESSAGE, Conversation, Rendering, prompt
from ossature.data.tokenizer import Tokenizer
from ossature.sample.constraint import Grammars
from ossature.sample.options import Constraint, SamplingOptions
from ossature.talk.bodies import CommonBody, ResponseFormat, SampledBody, TextFormat
from ossature.talk.metrics import Metrics
from ossature.talk.refused import Refused, reading
from ossature.talk.texts import TO_FUNCTION, Asked, Said, Texts
from ossature.talk.worker import Worker

RETRY_SECONDS = 2
SPACING = {"whitespace_pattern": " ?"}
"""Between parts of JSON that follows a schema; llguidance reads this key of it.  Left free, a weak
model writes spaces on and on."""


@dataclass
class Service:
    worker: Worker
    tokenizer: Tokenizer
    name: str
    """Of the model, in requests and answers."""
    stop_ids: tuple[int, ...]
    context: int
    """Tokens of a prompt and one text after it together."""
    max_queue: int
    """Texts that may wait for a place among those that the engine writes at a time."""
    date: str = ""
    """As the model is told it; empty: the day it is."""
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    _grammars: Grammars | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def names(self) -> list[str]:
        """The model's, and those of its adapters."""
        return [self.name, *filter(None, self.worker.engine.models)]

    def adapter(self, name: str) -> str:
        """The engine's adapter behind the name of a model; empty: the model as it is."""
        if name not in self.names:
            known = ", ".join(self.names)
            raise Refused(
                404, f"model: there is no {name!r}, only {known}", "model", "model_not_found"
            )
        return "" if name == self.name else name

    def check_load(self, prompts: int, n: int) -> None:
        """Refuse what would wait behind too many others."""
        most, texts = self.worker.engine.max_batch, prompts * n
        if n > most:
            raise Refused(400, f"n ({n}) must be at most {most}", "n")
        if texts > most + self.max_queue:
            raise Refused(
                400, f"{texts} texts in one request: at most {most + self.max_queue}", "prompt"
            )
        if self.worker.load + texts > most + self.max_queue:
            raise Refused(
                429, f"the queue is full: {self.max_queue} texts wait", code="queue_full",
                retry_seconds=RETRY_SECONDS,
            )  # fmt: skip

    def sampling(
        self, body: CommonBody, prompt_tokens: int, max_tokens: int | None, logprobs: int = 0
    ) -> SamplingOptions:
        """The options of each text.  `max_tokens` is cut to what the context has room for."""
        room = self.context - prompt_tokens
        if room < 1:
            raise Refused(
                400,
                f"the prompt has {prompt_tokens} tokens, which leaves no room for an answer in a "
                f"context of {self.context}",
                code="context_length_exceeded",
            )
        given = {
            "temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k,
            "min_p": body.min_p, "repetition_penalty": body.repetition_penalty,
        }  # fmt: skip
        if isinstance(body, SampledBody):
            if body.stream_options is not None and not body.stream:
                raise Refused(400, "stream_options: only with stream", "stream_options")
            given |= {
                "presence_penalty": body.presence_penalty,
                "frequency_penalty": body.frequency_penalty,
            }
        values: dict[str, Any] = {
            name: float(value) if name != "top_k" else max(0, int(value))  # -1: all, as vLLM says
            for name, value in given.items()
            if value is not None
        }
        if isinstance(body, SampledBody):
            values |= {"seed": body.seed, "samples": body.n or 1, "logit_bias": _biases(body)}
        with reading():
            return SamplingOptions(
                **values, max_new_tokens=min(room, max_tokens or room), stop_ids=self.stop_ids,
                logprobs=logprobs,
            )  # fmt: skip

    async def chat_prompt(self, record: dict[str, Any]) -> tuple[Conversation, list[int]]:
        """A record of the shape `messages` and its tokens, which the answer follows."""
        with reading():
            chat = conversation(record, "messages", frozenset(), answered=False)
            if not any(message.role in ("user", "tool") for message in chat.messages):
                raise ValueError("messages: there is none of a user to answer")
            date = self.date or datetime.date.today().isoformat()
            return chat, await asyncio.to_thread(prompt, chat, Rendering(date), self.tokenizer)

    async def check(self, constraint: Constraint) -> None:
        """Refuse a schema that cannot be followed before anything is written."""
        with reading():
            await asyncio.to_thread(self._start, constraint)

    def _start(self, constraint: Constraint) -> None:
        with self._lock:
            if self._grammars is None:
                vocabulary = self.worker.engine.config.vocab_size
                self._grammars = Grammars(self.tokenizer, vocabulary)
        self._grammars.start(constraint, self.stop_ids)

    @asynccontextmanager
    async def texts(self, asked: Asked) -> AsyncIterator[Counted]:
        """The texts of a request, which end when the context is left.

        Nothing is waited for between the look at the queue and the place in it.
        """
        self.check_load(len(asked.prompts), asked.sampling.samples)
        with reading():
            texts = Texts(self.worker, self.tokenizer, asked)
        counted = Counted(texts, self.metrics, sum(map(len, asked.prompts)))
        try:
            yield counted
        finally:
            texts.close()
            counted.done()


class Counted:
    """Texts, counted for /metrics."""

    def __init__(self, texts: Texts, metrics: Metrics, prompt_tokens: int) -> None:
        self.texts, self._metrics, self._start = texts, metrics, time.monotonic()
        self.prompt_tokens = prompt_tokens
        self._seen = 0
        metrics.prompt_tokens.inc(prompt_tokens)

    async def __aiter__(self) -> AsyncIterator[Said]:
        async for said in self.texts:
            if not self._seen and self.texts.generated:
                self._metrics.first_token.observe(time.monotonic() - self._start)
            self._metrics.generated_tokens.inc(self.texts.generated - self._seen)
            self._seen = self.texts.generated
            yield said

    def done(self) -> None:
        self._metrics.whole.observe(time.monotonic() - self._start)

    def usage(self) -> dict[str, Any]:
        """As chats and completions have it."""
        generated = self.texts.generated
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
            "completion_tokens_details": {"reasoning_tokens": self.texts.reasoning},
        }


def _biases(body: SampledBody) -> tuple[tuple[int, float], ...]:
    """Tokens, which JSON has as texts, and what is added to the logit of each."""
    wrong = next(
        (token for token in body.logit_bias or {} if not re.fullmatch(r"\d{1,9}", token)), None
    )
    if wrong is not None:
        raise Refused(400, f"logit_bias: {wrong!r} is no token's number", "logit_bias")
    return tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items())


def stops(body: SampledBody) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def format_constraint(form: ResponseFormat | TextFormat | None, param: str) -> Constraint | None:
    """What a response format asks of an answer."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return _schema({"type": "object"})
    inner = form.json_schema if isinstance(form, ResponseFormat) else form
    if inner is None or inner.schema_ is None:
        raise Refused(400, f"{param}: json_schema without a schema", param)
    return _schema(inner.schema_)


def _schema(schema: dict[str, Any]) -> Constraint:
    return Constraint("json_schema", json.dumps({"x-guidance": SPACING} | schema))


def merged_instructions(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several messages of instructions at the beginning as one, as harmony has one."""
    first = 0
    while first < len(messages) and messages[first].get("role") in ("system", "developer"):
        first += 1
    texts = [_plain(message.get("content")) for message in messages[:first]]
    if first < 2 or None in texts:  # of something else the reader of records speaks
        return list(messages)
    return [{"role": "developer", "content": "\n\n".join(map(str, texts))}, *messages[first:]]


def _plain(content: Any) -> str | None:
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else None


class Tools(NamedTuple):
    """What a request says of tools."""

    functions: list[dict[str, Any]]
    """Those that the model is told of."""
    forced: tuple[str, ...]
    """Of these it has to call one; empty if it may do as it likes."""

    def heads(self, tokenizer: Tokenizer) -> dict[str, list[int]]:
        """The head of a call of each that is forced, after `<|start|>assistant`."""
        special = tokenizer.special
        kind = [special[CHANNEL], *tokenizer.encode("commentary json"), special[MESSAGE]]
        return {name: [*tokenizer.encode(f"{TO_FUNCTION}{name}"), *kind] for name in self.forced}


def read_tools(functions: list[dict[str, Any]], choice: str, named: str) -> Tools:
    """Tools and `tool_choice`: auto, none, required, or the name of one."""
    names = [function["name"] for function in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Refused(400, f"tools: there are two of the name {twice!r}", "tools")
    if choice == "required" and not names:
        raise Refused(400, "tool_choice: 'required', but there are no tools", "tool_choice")
    if named and named not in names:
        known = f"only {', '.join(names)}" if names else "there are no tools"
        raise Refused(400, f"tool_choice: there is no tool {named!r}: {known}", "tool_choice")
    forced = (named,) if named else tuple(names) if choice == "required" else ()
    return Tools([] if choice == "none" else functions, forced)


async def constraints(
    service: Service, tools: Tools, answer: Constraint | None
) -> Callable[[str, str], Constraint | None] | None:
    """What messages have to match: the answer its format; calls of strict tools, and forced ones,
    the tool's parameters."""
    strict = {
        f"functions.{function['name']}": _schema(function.get("parameters") or {"type": "object"})
        for function in tools.functions
        if function.get("strict") or function["name"] in tools.forced
    }
    if answer is None and not strict:
        return None
    for constraint in [*([answer] if answer else []), *strict.values()]:
        await service.check(constraint)

    def find(channel: str, recipient: str) -> Constraint | None:
        if recipient:
            return strict.get(recipient)
        # All that is shown as the answer; but what is said before a call is left free.
        free = ("analysis", "commentary") if tools.functions else ("analysis",)
        return None if channel in free else answer

    return find

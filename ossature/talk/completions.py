"""`POST /v1/completions`: texts and tokens that the model goes on with, no chat."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

from ossature.talk.bodies import CompletionBody
from ossature.talk.refused import Refused
from ossature.talk.service import Counted, Service, stops
from ossature.talk.texts import Asked, Said

MAX_TOKENS = 16
"""If a request does not say; OpenAI's."""


async def asked(service: Service, body: CompletionBody) -> Asked:
    """What a body asks of the engine."""
    adapter = service.adapter(body.model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise Refused(400, "best_of: only as many as n", "best_of")
    prompts = await asyncio.to_thread(_prompts, service, body.prompt)
    if not prompts or not all(prompts):
        raise Refused(400, "prompt: it is empty", "prompt")
    most = body.max_tokens or MAX_TOKENS
    sampling = service.sampling(body, max(map(len, prompts)), most, body.logprobs or 0)
    return Asked(prompts, replace(sampling, stop=stops(body)), adapter, chat=False)


def _prompts(
    service: Service, prompt: str | list[str] | list[int] | list[list[int]]
) -> list[list[int]]:
    """Tokens of one prompt or of several, each a text or tokens."""
    encode = service.tokenizer.encode
    if isinstance(prompt, str):
        return [encode(prompt)]
    tokens = [part for part in prompt if isinstance(part, int)]
    if tokens:
        return [tokens]
    return [encode(part) if isinstance(part, str) else part for part in prompt]  # type: ignore[misc]


def _head(body: CompletionBody) -> dict[str, Any]:
    return {
        "id": f"cmpl-{uuid4().hex}", "object": "text_completion", "created": int(time.time()),
        "model": body.model,
    }  # fmt: skip


class _Logprobs:
    """Of one text: lists with an entry for each token."""

    def __init__(self, service: Service) -> None:
        self._service, self._length = service, 0

    def of(self, said: Said) -> dict[str, list[Any]]:
        decode, event = self._service.tokenizer.decode, said.event
        if event is None or event.token is None or event.token in self._service.stop_ids:
            return {}
        found = {
            "tokens": [decode([event.token])],
            "token_logprobs": [event.logprob],
            "top_logprobs": [{decode([token]): value for token, value in event.top}],
            "text_offset": [self._length],
        }
        self._length += len(found["tokens"][0])
        return found


async def whole(service: Service, body: CompletionBody, counted: Counted) -> dict[str, Any]:
    """All texts at once."""
    choices: list[dict[str, Any]] = [
        {"index": n, "text": "", "logprobs": None, "finish_reason": None}
        for n in range(counted.texts.count)
    ]
    logprobs = [_Logprobs(service) for _ in choices]
    async for said in counted:
        choice = choices[said.number]
        choice["text"] += said.text
        if body.logprobs is not None:
            for key, values in logprobs[said.number].of(said).items():
                choice["logprobs"] = choice["logprobs"] or {}
                choice["logprobs"].setdefault(key, []).extend(values)
        if said.finished:
            choice["finish_reason"] = said.finished
    return _head(body) | {"choices": choices, "usage": counted.usage()}


async def stream(service: Service, body: CompletionBody, counted: Counted) -> AsyncIterator[str]:
    """The texts in events."""
    head = _head(body)
    logprobs = [_Logprobs(service) for _ in range(counted.texts.count)]
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)

    def chunk(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        end = {"usage": usage} if with_usage else {}
        return f"data: {json.dumps(head | {'choices': choices} | end)}\n\n"

    async for said in counted:
        found = logprobs[said.number].of(said) if body.logprobs is not None else {}
        if said.text or found or said.finished:
            choice = {
                "index": said.number, "text": said.text, "logprobs": found or None,
                "finish_reason": said.finished or None,
            }  # fmt: skip
            yield chunk([choice])
    if with_usage:
        yield chunk([], counted.usage())
    yield "data: [DONE]\n\n"

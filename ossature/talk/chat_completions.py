"""`POST /v1/chat/completions`, as OpenAI's API has it; thinking in `reasoning`, as in vLLM."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from ossature.data.tokenizer import Tokenizer
from ossature.talk.bodies import ChatBody, NamedTool
from ossature.talk.refused import Refused
from ossature.talk.service import (
    Counted,
    Service,
    constraints,
    format_constraint,
    merged_instructions,
    read_tools,
    stops,
)
from ossature.talk.texts import Asked, Said

REASONS = {"stop": "stop", "length": "length", "call": "tool_calls"}


async def asked(service: Service, body: ChatBody) -> Asked:
    """What a body asks of the engine."""
    adapter = service.adapter(body.model)
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else ""
    choice = body.tool_choice if isinstance(body.tool_choice, str) else "auto"
    functions = [t.function.model_dump(exclude_none=True) for t in body.tools or []]
    tools = read_tools(functions, choice, named)
    if body.top_logprobs and not body.logprobs:
        raise Refused(400, "top_logprobs: only with logprobs", "top_logprobs")
    if body.max_tokens and body.max_completion_tokens:
        raise Refused(400, "max_tokens and max_completion_tokens exclude each other", "max_tokens")
    record: dict[str, Any] = {"messages": [*map(_entry, merged_instructions(body.messages))]}
    record["tools"] = [
        {key: value for key, value in tool.items() if key != "strict"} for tool in tools.functions
    ]
    record["chat_template_kwargs"] = body.chat_template_kwargs or {}
    if body.reasoning_effort is not None:
        record["reasoning_effort"] = body.reasoning_effort
    _, tokens = await service.chat_prompt(record)
    heads = tools.heads(service.tokenizer)
    longest = max(map(len, heads.values()), default=0)
    most = body.max_tokens or body.max_completion_tokens
    sampling = service.sampling(body, len(tokens) + longest, most, body.top_logprobs or 0)
    answer = format_constraint(body.response_format, "response_format")
    find = await constraints(service, tools, answer)
    return Asked([tokens], sampling, adapter, True, heads, stops(body), find)


def _entry(message: dict[str, Any]) -> dict[str, Any]:
    """A message of a request as one of a record: what stands before a call is a preamble."""
    entry = {key: value for key, value in message.items() if key != "refusal"}
    if entry.get("tool_calls") and entry.get("content") and not entry.get("channel"):
        entry["channel"] = "commentary"
    return entry


class _Deltas:
    """Pieces -> what they add to the message of a choice."""

    def __init__(self, body: ChatBody, tokenizer: Tokenizer) -> None:
        self._body, self._tokenizer = body, tokenizer
        self._calls: dict[int, int] = {}  # of each choice, begun so far

    def of(self, said: Said) -> dict[str, Any]:
        """May be nothing at all."""
        piece = said.piece
        if piece is None:
            return {}
        if piece.recipient:
            return self._call(said.number, piece.recipient, said.text, piece.begins)
        if not said.text:
            return {}
        if piece.channel == "analysis":
            hidden = self._body.include_reasoning is False
            return {} if hidden else {"reasoning": said.text}
        return {"content": said.text}

    def _call(self, index: int, recipient: str, text: str, begins: bool) -> dict[str, Any]:
        if begins:
            number = self._calls[index] = self._calls.get(index, -1) + 1
            function = {"name": recipient.removeprefix("functions."), "arguments": ""}
            call = {"id": f"call_{uuid4().hex}", "type": "function", "function": function}
            return {"tool_calls": [{"index": number, **call}]}
        if not text:
            return {}
        call = {"index": self._calls[index], "function": {"arguments": text}}
        return {"tool_calls": [call]}

    def logprobs(self, said: Said) -> list[dict[str, Any]]:
        """Of a token of the answer's text, if they are asked for."""
        event, piece = said.event, said.piece
        shown = piece is not None and piece.channel == "final" and not piece.recipient
        if not self._body.logprobs or event is None or event.token is None or not shown:
            return []
        if piece.begins or piece.ends:  # type: ignore[union-attr]
            return []
        top = [self._token(token, value) for token, value in event.top]
        return [{**self._token(event.token, event.logprob), "top_logprobs": top}]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        whole = "\ufffd" not in text  # else a part of a character, whose bytes the text hides
        return {
            "token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None
        }  # fmt: skip


def _head(body: ChatBody, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid4().hex}", "object": kind, "created": int(time.time()),
        "model": body.model,
    }  # fmt: skip


async def whole(service: Service, body: ChatBody, counted: Counted) -> dict[str, Any]:
    """The answer in one piece."""
    deltas = _Deltas(body, service.tokenizer)
    choices: list[dict[str, Any]] = [
        {
            "index": n,
            "message": {"role": "assistant", "content": None, "refusal": None, "reasoning": None},
            "logprobs": {"content": [], "refusal": None} if body.logprobs else None,
            "finish_reason": None,
        }
        for n in range(body.n or 1)
    ]
    async for said in counted:
        choice = choices[said.number]
        _add(choice["message"], deltas.of(said))
        if body.logprobs:
            choice["logprobs"]["content"] += deltas.logprobs(said)
        if said.finished:
            choice["finish_reason"] = REASONS[said.finished]
    return _head(body, "chat.completion") | {"choices": choices, "usage": counted.usage()}


def _add(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for key in ("content", "reasoning"):
        if key in delta:
            message[key] = (message[key] or "") + delta[key]
    for call in delta.get("tool_calls", []):
        calls = message.setdefault("tool_calls", [])
        if "id" in call:
            calls.append({key: value for key, value in call.items() if key != "index"})
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


async def stream(service: Service, body: ChatBody, counted: Counted) -> AsyncIterator[str]:
    """The answer in events."""
    deltas = _Deltas(body, service.tokenizer)
    head = _head(body, "chat.completion.chunk")
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)

    def chunk(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        end = {"usage": usage} if with_usage else {}
        return f"data: {json.dumps(head | {'choices': choices} | end)}\n\n"

    def choice(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | more

    for n in range(body.n or 1):
        yield chunk([choice(n, {"role": "assistant", "content": ""})])
    async for said in counted:
        delta, probs = deltas.of(said), deltas.logprobs(said)
        if delta or probs:
            logprobs = {"content": probs, "refusal": None} if probs else None
            yield chunk([choice(said.number, delta, logprobs=logprobs)])
        if said.finished:
            yield chunk([choice(said.number, {}, finish_reason=REASONS[said.finished])])
    if with_usage:
        yield chunk([], counted.usage())
    yield "data: [DONE]\n\n"

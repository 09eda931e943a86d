"""`POST /v1/responses`: the subset that OpenAI's client and gpt-oss's evaluations use.

Nothing is kept between requests: the client sends the whole conversation.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

from ossature.talk.bodies import FlatNamedTool, ResponsesBody
from ossature.talk.refused import Refused
from ossature.talk.service import (
    Counted,
    Service,
    constraints,
    format_constraint,
    merged_instructions,
    read_tools,
)
from ossature.talk.texts import Asked, Said

Event = dict[str, Any]


async def asked(service: Service, body: ResponsesBody) -> Asked:
    """What a body asks of the engine."""
    adapter = service.adapter(body.model)
    named = body.tool_choice.name if isinstance(body.tool_choice, FlatNamedTool) else ""
    choice = body.tool_choice if isinstance(body.tool_choice, str) else "auto"
    functions = [t.model_dump(exclude_none=True, exclude={"type"}) for t in body.tools or []]
    tools = read_tools(functions, choice, named)
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages = list(_entries(items))
    if body.instructions:
        messages.insert(0, {"role": "developer", "content": body.instructions})
    record: dict[str, Any] = {"messages": merged_instructions(messages)}
    record["tools"] = [
        {key: value for key, value in tool.items() if key != "strict"} for tool in tools.functions
    ]
    if body.reasoning is not None and body.reasoning.effort is not None:
        record["reasoning_effort"] = body.reasoning.effort
    _, tokens = await service.chat_prompt(record)
    heads = tools.heads(service.tokenizer)
    longest = max(map(len, heads.values()), default=0)
    sampling = service.sampling(body, len(tokens) + longest, body.max_output_tokens)
    answer = format_constraint(body.text.format if body.text else None, "text.format")
    find = await constraints(service, tools, answer)
    return Asked([tokens], sampling, adapter, True, heads, (), find)


def _entries(items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Items of an input -> messages of a record."""
    for n, item in enumerate(items, 1):
        kind, place = item.get("type", "message"), f"input: item {n}"
        if kind == "message":
            yield {"role": item.get("role"), "content": _text(item.get("content"), place)}
        elif kind == "reasoning":
            if item.get("content"):  # a summary alone says nothing to this model
                text = _text(item["content"], place)
                yield {"role": "assistant", "channel": "analysis", "content": text}
        elif kind == "function_call":
            function = {key: item.get(key) for key in ("name", "arguments")}
            call = {"id": item.get("call_id"), "function": function}
            yield {"role": "assistant", "tool_calls": [call]}
        elif kind == "function_call_output":
            text = _text(item.get("output"), place)
            yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": text}
        else:
            raise Refused(400, f"{place}: type {kind!r} is not supported", "input")


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    kinds = ("input_text", "output_text", "text", "reasoning_text")
    if isinstance(content, list) and all(
        isinstance(p, dict) and p.get("type") in kinds and isinstance(p.get("text"), str)
        for p in content
    ):
        return "".join(part["text"] for part in content)
    raise Refused(400, f"{place}: content must be text", "input")


class _Item:
    """A message of the model as an item of the output: thinking, a call, or an answer."""

    def __init__(self, place: int, channel: str, recipient: str) -> None:
        self.place, self.text = place, ""
        self.kind = "call" if recipient else "reasoning" if channel == "analysis" else "message"
        self.name = recipient.removeprefix("functions.")
        prefix = {"call": "fc", "reasoning": "rs", "message": "msg"}[self.kind]
        self.id, self.call_id = f"{prefix}_{uuid4().hex}", f"call_{uuid4().hex}"

    def part(self) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def value(self, status: str) -> dict[str, Any]:
        if self.kind == "call":
            return {
                "type": "function_call", "id": self.id, "call_id": self.call_id, "name": self.name,
                "arguments": self.text, "status": status,
            }  # fmt: skip
        parts = [self.part()] if self.text or status == "completed" else []
        if self.kind == "reasoning":
            return {
                "type": "reasoning", "id": self.id, "summary": [], "content": parts,
                "status": status,
            }  # fmt: skip
        return {
            "type": "message", "id": self.id, "role": "assistant", "content": parts,
            "status": status,
        }  # fmt: skip

    def begin(self) -> Iterator[Event]:
        yield {"type": "response.output_item.added", "item": self.value("in_progress")}
        if self.kind != "call":
            yield self._event("response.content_part.added", part=self.part())

    def more(self, text: str) -> Iterator[Event]:
        self.text += text
        if text:
            extra = {"logprobs": []} if self.kind == "message" else {}
            yield self._event(f"{self._stem()}.delta", delta=text, **extra)

    def end(self, status: str) -> Iterator[Event]:
        if self.kind == "call":
            more = {"arguments": self.text, "name": self.name}
            yield self._event(f"{self._stem()}.done", **more)
        else:
            extra = {"logprobs": []} if self.kind == "message" else {}
            yield self._event(f"{self._stem()}.done", text=self.text, **extra)
            yield self._event("response.content_part.done", part=self.part())
        yield {"type": "response.output_item.done", "item": self.value(status)}

    def _stem(self) -> str:
        kind = {"call": "function_call_arguments", "reasoning": "reasoning_text"}
        return f"response.{kind.get(self.kind, 'output_text')}"

    def _event(self, kind: str, **more: Any) -> Event:
        place = {} if self.kind == "call" else {"content_index": 0}
        return {"type": kind, "item_id": self.id} | place | more


async def events(service: Service, body: ResponsesBody, counted: Counted) -> AsyncIterator[Event]:
    """Everything that happens; the last event has the whole response."""
    response = _head(body)
    yield {"type": "response.created", "response": dict(response)}
    yield {"type": "response.in_progress", "response": dict(response)}
    items: list[_Item] = []
    open_item: _Item | None = None
    finished = ""
    async for said in counted:
        finished = said.finished or finished
        for event in _steps(said, items):
            yield event | {"output_index": len(items) - 1}
        open_item = items[-1] if items else None
    done: list[dict[str, Any]] = []
    status = "incomplete" if finished == "length" else "completed"
    for item in items:
        last = item is open_item
        done.append(item.value(status if last else "completed"))
    usage = counted.usage()
    response |= {
        "status": status, "output": done, "completed_at": int(time.time()),
        "incomplete_details": {"reason": "max_output_tokens"} if finished == "length" else None,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        },
    }  # fmt: skip
    yield {"type": f"response.{status}", "response": response}


def _steps(said: Said, items: list[_Item]) -> Iterator[Event]:
    piece = said.piece
    if piece is None:
        return
    if piece.begins:
        items.append(_Item(len(items), piece.channel, piece.recipient))
        yield from items[-1].begin()
    if items:
        yield from items[-1].more(said.text)
        if piece.ends:
            yield from items[-1].end("incomplete" if said.finished == "length" else "completed")


def _head(body: ResponsesBody) -> dict[str, Any]:
    given = body.model_dump(by_alias=True, exclude_none=True)
    return {
        "id": f"resp_{uuid4().hex}", "object": "response", "created_at": int(time.time()),
        "status": "in_progress", "model": body.model, "output": [], "error": None,
        "incomplete_details": None, "usage": None, "parallel_tool_calls": False, "store": False,
        "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {}, "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None} | given.get("reasoning", {}),
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "text": given.get("text") or {"format": {"type": "text"}},
        "tools": [{"strict": None, "parameters": None} | t for t in given.get("tools", [])],
        "tool_choice": given.get("tool_choice", "auto"), "truncation": "disabled",
    }  # fmt: skip


async def whole(service: Service, body: ResponsesBody, counted: Counted) -> dict[str, Any]:
    """The response in one piece."""
    last: Event = {}
    async for event in events(service, body, counted):
        last = event
    return last["response"]


async def stream(service: Service, body: ResponsesBody, counted: Counted) -> AsyncIterator[str]:
    """The response in events."""
    number = 0
    async for event in events(service, body, counted):
        data = json.dumps(event | {"sequence_number": number})
        number += 1
        yield f"event: {event['type']}\ndata: {data}\n\n"

"""The HTTP side: who may ask, how much, and what becomes of those who go away or come too late."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable, Coroutine, MutableMapping
from types import ModuleType
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ossature.talk import chat_completions, completions, responses
from ossature.talk.bodies import ChatBody, CompletionBody, ResponsesBody, read
from ossature.talk.refused import Refused
from ossature.talk.service import RETRY_SECONDS, Service
from ossature.talk.texts import TextFailed
from ossature.talk.worker import EngineFailed

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/models",
    "/health",
    "/metrics",
)
GONE = 499
"""In the figures, the status of requests whose clients went away, as nginx has it."""
BODY_SECONDS = 60
"""A client that takes longer to send its request is refused."""


def application(service: Service, api_key: str, max_body_bytes: int) -> Gate:
    """The server of a model, as an ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    service.metrics.watch(service.worker)

    async def body(request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # pages of other sites may send the rest without asking
            raise Refused(415, "Content-Type: must be application/json")
        found = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    found += part
                    if len(found) > max_body_bytes:
                        raise Refused(413, f"the body has more than {max_body_bytes} bytes")
        except TimeoutError:
            raise Refused(408, f"the body took longer than {BODY_SECONDS} seconds") from None
        return bytes(found)

    async def answer(request: Request, kind: type, endpoint: ModuleType) -> Response:
        asked_for = read(kind, await body(request))
        asked = await endpoint.asked(service, asked_for)
        if asked_for.stream:
            stack = contextlib.AsyncExitStack()
            # Entered here: what is wrong with the request is told by the status.
            counted = await stack.enter_async_context(service.texts(asked))
            return Events(endpoint.stream(service, asked_for, counted), stack, service)

        async def whole() -> dict[str, Any]:
            async with service.texts(asked) as counted:
                return await endpoint.whole(service, asked_for, counted)

        found = await _unless_gone(request.scope, request.receive, whole(), service)
        return JSONResponse(found)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, ChatBody, chat_completions)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer(request, CompletionBody, completions)

    @app.post("/v1/responses")
    async def respond(request: Request) -> Response:
        return await answer(request, ResponsesBody, responses)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.adapter(name)
        return _model(service, name)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health(request: Request) -> JSONResponse:
        gate: Gate = request.scope["gate"]
        if service.worker.failure:
            return JSONResponse({"status": "failed", "error": service.worker.failure}, 503)
        if gate.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.scope['path']}: {error.detail}"
        return JSONResponse(Refused(error.status_code, text).body(), error.status_code)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        service.metrics.gone.inc()  # in the middle of its body
        request.scope["gone"] = True
        return Response(status_code=GONE)

    @app.exception_handler(EngineFailed)
    async def failed(request: Request, error: EngineFailed) -> JSONResponse:
        return JSONResponse(Refused(500, f"the engine has failed: {error}").body(), 500)

    @app.exception_handler(TextFailed)
    async def stuck(request: Request, error: TextFailed) -> JSONResponse:
        return JSONResponse(Refused(error.status, str(error)).body(), error.status)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(Refused(500, "the server has made a mistake").body(), 500)

    return Gate(app, service, api_key)


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": service.created, "owned_by": "ossature",
        "max_model_len": service.context, "parent": None if name == service.name else service.name,
    }  # fmt: skip


class Gate:
    """Lets requests in: not without the key, and none once the server is to end.

    Args:
        api_key: empty lets everybody in.
    """

    def __init__(self, app: ASGIApp, service: Service, api_key: str) -> None:
        self._app, self._service = app, service
        self._key = hashlib.sha256(api_key.encode()).digest() if api_key else b""
        self.draining = False
        self.inside = 0
        """Requests that were let in and are not through."""
        self.answered = 0
        """Requests that were let in and went through to the end of their answer."""
        self.left = 0
        """Requests that were let in and cut off."""
        self.gone = 0
        """Requests that were let in, and whose clients went away."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["gate"], scope["gone"] = self, False
        refused = self._refused(scope)
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        if refused is not None:
            response = JSONResponse(refused.body(), refused.status, refused.headers)
            await response(scope, receive, sending)
        elif scope["path"] == "/health":
            await self._app(scope, receive, sending)
        else:
            self.inside += 1
            try:
                await self._app(scope, receive, sending)
                self.gone += scope["gone"]
                self.answered += not scope["gone"]
            except asyncio.CancelledError:
                self.left += 1
                raise
            finally:
                self.inside -= 1
                self._count(scope, status)
            return
        self._count(scope, status)

    def _count(self, scope: Scope, status: int) -> None:
        path = scope["path"] if scope["path"] in PATHS else "other"  # not one series a typo
        status = GONE if scope["gone"] else status
        self._service.metrics.requests.labels(path, status).inc()

    def _refused(self, scope: Scope) -> Refused | None:
        if scope["path"] == "/health":
            return None
        if self.draining:
            return Refused(503, "the server is about to end", retry_seconds=RETRY_SECONDS)
        if self._key:
            headers = dict(scope["headers"])
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            given = hashlib.sha256(key).digest()
            if not hmac.compare_digest(given, self._key) or scheme.lower() != b"bearer":
                return Refused(401, "Authorization: the API key is missing or wrong")
        return None


class Events(Response):
    """An answer in server-sent events; what is behind it ends with the client."""

    def __init__(
        self, events: AsyncIterator[str], stack: contextlib.AsyncExitStack, service: Service
    ) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self._events, self._stack, self._service = events, stack, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await _unless_gone(scope, receive, self._send(send), self._service)

    async def _send(self, send: Send) -> None:
        headers = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **headers})
        try:
            async for event in self._events:
                await _more(send, event)
        except (EngineFailed, TextFailed) as error:
            refused = (
                Refused(error.status, str(error)) if isinstance(error, TextFailed)
                else Refused(500, f"the engine has failed: {error}")
            )  # fmt: skip
            await _more(send, f"data: {json.dumps(refused.body())}\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _more(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def _unless_gone(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Coroutine[Any, Any, Message]] | Receive,
    work: Coroutine[Any, Any, Any],
    service: Service,
) -> Any:
    """The result of some work, which is stopped when the client goes away; `scope` then says so."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        service.metrics.gone.inc()
        scope["gone"] = True
        return None
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)

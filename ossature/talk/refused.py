"""What a client is told when a request is not answered, in the shape of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error",
    405: "invalid_request_error", 408: "invalid_request_error", 413: "invalid_request_error",
    415: "invalid_request_error", 429: "overloaded_error", 500: "server_error",
    503: "service_unavailable",
}  # fmt: skip


class Refused(Exception):
    """A request that is answered with a status and a sentence.

    Args:
        param: the field it is about.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        retry_seconds: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {"Retry-After": str(retry_seconds)} if retry_seconds else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        error = {
            "message": self.message, "type": TYPES[self.status], "param": self.param,
            "code": self.code,
        }  # fmt: skip
        return {"error": error}


@contextmanager
def reading() -> Iterator[None]:
    """While a request is read: what is wrong with it is the client's mistake."""
    try:
        yield
    except ValueError as error:
        raise Refused(400, " ".join(str(error).split())) from None

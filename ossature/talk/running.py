"""A server from its start to its end.

SIGTERM or Ctrl-C: requests that were let in are answered to their end while others get status 503,
then the process ends.  A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from types import FrameType

import uvicorn

from ossature.talk.server import Gate, application
from ossature.talk.service import Service


def run(
    service: Service, host: str, port: int, api_key: str, max_body_bytes: int, drain_seconds: int
) -> int:
    """Serve until a signal comes; 0 if every request that was let in was answered, else 1."""
    gate = application(service, api_key, max_body_bytes)
    listener = listen(host, port)
    config = uvicorn.Config(
        gate, log_level="warning", access_log=False, lifespan="off", ws="none",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5, server_header=False,
    )  # fmt: skip
    server = Server(config, gate, drain_seconds)
    if service.worker.engine.lockstep:  # the other ranks wait for one that does not come again
        service.worker.on_failure = server.give_up
    service.worker.start()
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {service.name} at http://{shown}:{listener.getsockname()[1]}/v1", flush=True)
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
        service.worker.end()
    told = f"answered {gate.answered} requests, left {gate.left}"
    told += f"; {gate.gone} clients went away" if gate.gone else ""
    print(told, file=sys.stderr, flush=True)
    return 1 if gate.left or service.worker.failure else 0


class Server(uvicorn.Server):
    """uvicorn's, which listens until all is answered that was let in."""

    def __init__(self, config: uvicorn.Config, gate: Gate, drain_seconds: int) -> None:
        super().__init__(config)
        self._gate, self._drain_seconds = gate, drain_seconds
        self._deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gate.draining:
            self.give_up()
        self._gate.draining = True

    def give_up(self) -> None:
        """End without waiting; may be called by any thread."""
        # Of each request that is cut off uvicorn would tell where: the last line counts them.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.force_exit = self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._gate.draining and not self.should_exit:
            now = asyncio.get_running_loop().time()
            self._deadline = self._deadline or now + self._drain_seconds
            self.should_exit = not self._gate.inside or now > self._deadline
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        OSError: it is taken, or none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name != "nt":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OSError(f"{host}:{port}: cannot listen there: {error.strerror or error}") from None
    return listener

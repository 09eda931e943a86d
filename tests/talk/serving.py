"""A server in this process, on a free port, with a scripted model and OpenAI's own client."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import openai
import uvicorn

from ossature.sample.command import stop_ids
from ossature.sample.engine import Engine
from ossature.talk.running import Server, listen
from ossature.talk.server import Gate, application
from ossature.talk.service import Service
from ossature.talk.worker import Worker
from tests.talk.scripted import Scripted, tokenizer

KEY = "the key"


@dataclass
class Serving:
    client: openai.OpenAI
    """Which does not try again."""
    url: str
    gate: Gate
    service: Service
    server: Server

    def http(self, **more) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, **more)

    def idle(self) -> None:
        """Wait until the engine has nothing to do."""
        until(lambda: self.service.worker.load == 0)


@contextmanager
def released(go: threading.Event) -> Iterator[None]:
    """Whatever happens, nobody waits for `go` afterwards."""
    try:
        yield
    finally:
        go.set()


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def scripted_service(
    model: Scripted, max_batch: int = 4, max_queue: int = 8, context: int = 1500, adapters=None
) -> Service:
    engine = Engine(
        model, max_batch=max_batch, max_tokens=max_batch * context, tokenizer=tokenizer(),
        adapters=adapters,
    )  # fmt: skip
    ends = tuple(sorted(stop_ids(tokenizer().special, None)))
    return Service(
        Worker(engine), tokenizer(), "toy", ends, context, max_queue, date="2025-06-28"
    )  # fmt: skip


@contextmanager
def serving(
    says: Callable[[str], str], each: Callable[[], None] = lambda: None, key: str = KEY, **sizes
) -> Iterator[Serving]:
    with serving_model(Scripted(says, each), key, **sizes) as there:
        yield there


@contextmanager
def serving_model(
    model: Scripted, key: str = KEY, max_body_bytes: int = 40_000, **sizes
) -> Iterator[Serving]:
    service = scripted_service(model, **sizes)
    gate = application(service, key, max_body_bytes)
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(gate, log_level="warning", lifespan="off", ws="none")
    server = Server(config, gate, drain_seconds=20)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    service.worker.start()
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=20)
    try:
        until(lambda: server.started)
        yield Serving(client, url, gate, service, server)
    finally:
        client.close()
        server.give_up()  # a test that has failed does not wait for answers
        thread.join()
        listener.close()
        service.worker.end()

"""Figures of a server for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ossature.talk.worker import Worker

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Those of one server: two in a process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ossature_requests", "Answered, by path and status.", ["path", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.gone = Counter(
            "ossature_clients_gone", "Went away before their answer was there.",
            registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "ossature_prompt_tokens", "Tokens of prompts.", registry=self.registry
        )
        self.generated_tokens = Counter(
            "ossature_generated_tokens", "Tokens of texts.", registry=self.registry
        )
        self.first_token = Histogram(
            "ossature_first_token_seconds", "From a request to its first token.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.whole = Histogram(
            "ossature_request_seconds", "From a request to its end.", buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip

    def watch(self, worker: Worker) -> None:
        """Read from the engine whenever somebody asks."""
        engine = worker.engine
        for name, text, value in (
            ("ossature_texts_running", "Texts that grow.", lambda: engine.running),
            ("ossature_requests_waiting", "Requests not begun.", lambda: engine.waiting),
            ("ossature_texts_in_flight", "Texts asked for and not ended.", lambda: worker.load),
            ("ossature_cache_tokens_used", "Of the cache.", lambda: engine.used_tokens),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)

    def page(self) -> bytes:
        return generate_latest(self.registry)

"""`ossature serve FOLDER`: a model behind OpenAI's API, for any client of it."""

from __future__ import annotations

import datetime
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from ossature.config import ParallelConfig, parse

if TYPE_CHECKING:
    from ossature.parallel.launch import Ranks

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Answer requests to /v1/chat/completions, /v1/completions and /v1/responses.

    Under torchrun the model is divided over the ranks, and the first one answers.
    """

    folder: tyro.conf.Positional[Path]
    """Checkpoint in any format, or the folder of a run (its newest checkpoint)."""
    name: str = ""
    """Of the model in requests; empty: the folder's."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every one of this machine."""
    port: int = 8000
    """0 takes a free one."""
    api_key: str = ""
    """What clients have to send; empty: that of the variable OSSATURE_API_KEY, or everybody may."""
    context: int = 8192
    """Tokens of a prompt and its answer together."""
    max_batch: int = 16
    """Texts that are written at a time."""
    max_tokens: int = 0
    """Tokens of all these texts and their prompts that memory is kept for; 0: four contexts."""
    max_queue: int = 256
    """Texts that may wait beside them; more are refused with status 429."""
    max_body_bytes: int = 4 * 1024 * 1024
    """Of a request."""
    drain_seconds: int = 600
    """After SIGTERM, running requests have so long to end."""
    date: str = ""
    """Today's date as the model is told it, YYYY-MM-DD; empty: the day it is."""
    tokenizer: str = ""
    """Tokenizer of a folder that holds none: a tokenizer.json, a folder or a Hugging Face id."""
    device: str = ""
    """Such as "cpu" or "cuda:0"; empty takes a GPU if there is one."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights and computation."""
    experts: Literal["plain", "mxfp4"] = "plain"
    """"mxfp4" keeps the experts of a folder that has them so packed: a quarter of the memory."""
    adapter: tuple[str, ...] = ()
    """NAME=FOLDER: adapters of this model, each served as a model of that name."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is divided over the ranks that torchrun starts."""

    def __post_init__(self) -> None:
        for name in ("context", "max_batch", "max_body_bytes", "drain_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be 1 or more")
        if self.max_queue < 0 or self.max_tokens < 0:
            raise ValueError("max_queue and max_tokens must be 0 or more")
        if 0 < self.max_tokens < self.context:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must be at least context ({self.context})"
            )
        if not 0 <= self.port < 65536:
            raise ValueError(f"port ({self.port}) must be between 0 and 65535")
        if self.date:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError:
                raise ValueError(f"date ({self.date}) must be a day, as YYYY-MM-DD") from None


def main(argv: list[str]) -> int:
    options = parse(ServeOptions, argv, prog="ossature serve")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"serve: needs `pip install ossature[serve]` ({error.name})") from None
    from ossature.parallel.launch import launched

    with launched() as ranks:
        return serve(options, ranks)


def serve(options: ServeOptions, ranks: Ranks) -> int:
    """Serve until the process is told to end; the status it ends with."""
    from ossature.convert.model import with_adapter
    from ossature.sample.command import adapter_folders, stop_ids
    from ossature.sample.engine import Engine
    from ossature.talk.opening import find_tokenizer, open_to_talk

    folders = adapter_folders(options.adapter)
    name = options.name or options.folder.resolve().name
    if name in folders:
        raise ValueError(f"adapter: {name} is the name of the model itself; see --name")
    tokenizer = find_tokenizer(options.folder, options.tokenizer)
    model = open_to_talk(
        options.folder, options.parallel, options.dtype, ranks, options.device, options.experts,
        bool(folders),
    )  # fmt: skip
    engine = Engine(
        model,
        max_batch=options.max_batch,
        max_tokens=options.max_tokens or 4 * options.context,
        tokenizer=tokenizer,
        lockstep=ranks.world > 1,
        adapters={name: with_adapter(model, folder) for name, folder in folders.items()},
    )
    if not ranks.first:
        for number in (signal.SIGTERM, signal.SIGINT):  # the first one tells when to end
            signal.signal(number, signal.SIG_IGN)
        engine.follow()
        return 0
    from ossature.talk.running import run
    from ossature.talk.service import Service
    from ossature.talk.worker import Worker

    key = options.api_key or os.environ.get("OSSATURE_API_KEY", "")
    if options.host not in LOOPBACK and not key:
        print(
            f"warning: everybody who reaches {options.host} may use this server; set --api-key",
            file=sys.stderr,
        )
    service = Service(
        Worker(engine),
        tokenizer,
        name,
        tuple(sorted(stop_ids(tokenizer.special, model.config.eos_token_id))),
        options.context,
        options.max_queue,
        options.date,
    )
    return run(
        service, options.host, options.port, key, options.max_body_bytes, options.drain_seconds
    )

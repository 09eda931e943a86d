"""A model divided over ranks, served: the first rank answers, and all end together."""

import os
import signal
import socket
import threading
from pathlib import Path

import openai
import pytest
import torch

import ossature
from ossature.config import ParallelConfig
from tests.ranks import run_ranks
from tests.talk.scripted import tokenizer
from tests.tiny import hugging_face_model, ours

PROMPTS = ["what is", "the answer to a", "1 2 3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "model"
    size = tokenizer().vocab_size + tokenizer().vocab_size % 2
    theirs = hugging_face_model(vocab_size=size, seed=2, eos_token_id=None, pad_token_id=None)
    ossature.save_model(ours(theirs), path)
    tokenizer().save(path)
    return path


def ask(port: int) -> list[str]:
    """Texts of a server that is about to listen; then it is told to end."""
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=40, timeout=30
    )
    with client:
        texts = [
            client.completions.create(model="toy", prompt=p, max_tokens=12, temperature=0)
            for p in PROMPTS
        ]
    os.kill(os.getpid(), signal.SIGTERM)
    return [found.choices[0].text for found in texts]


def serving_rank(rank: int, world: int, folder: Path, port: int, axes: dict) -> tuple:
    from ossature.parallel.launch import Ranks
    from ossature.talk.serve import ServeOptions, serve

    options = ServeOptions(
        folder=folder, name="toy", port=port, dtype="fp32", context=64, max_batch=4,
        parallel=ParallelConfig(**axes),
    )  # fmt: skip
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.extend(ask(port)))
    if rank == 0:
        thread.start()
    status = serve(options, Ranks(rank, rank, world, torch.device("cpu")))
    if rank == 0:
        thread.join()
    return status, texts


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"tp": 2}, {"ep": 2}, {"pp": 2}])
def test_two_ranks_serve_what_one_does(folder, axes):
    ((status, one),) = run_ranks(1, serving_rank, folder, free_port(), {})
    (first, two), (second, _) = run_ranks(2, serving_rank, folder, free_port(), axes)

    assert status == first == second == 0
    assert one == two and len(one) == 3 and all(one)

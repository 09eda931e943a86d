"""The engine on models that are divided over ranks: the texts of one process, and nobody waits.

Requests reach the first rank alone, some of them late, some are cancelled, and they end at
different times; the other ranks follow.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ossature
from ossature.cli import main
from ossature.config import ParallelConfig
from ossature.convert.model import load_model
from ossature.convert.open import open_model
from ossature.parallel.launch import launched
from ossature.sample.engine import Engine
from ossature.sample.options import SamplingOptions
from ossature.sample.request import Request
from tests.golden import ROOT
from tests.ranks import run_ranks
from tests.sample.test_command import byte_tokenizer
from tests.tiny import hugging_face_model, ours, random_tokens

SIZES = {"max_batch": 3, "max_tokens": 120, "prefill_chunk": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "model"
    theirs = hugging_face_model(vocab_size=259, seed=3, eos_token_id=None, pad_token_id=None)
    ossature.save_model(ours(theirs), path)
    byte_tokenizer().save(path)
    return path


def requests() -> list[Request]:
    """Greedy but for two, of lengths that keep ranks busy for different times."""
    made = []
    for n, (size, new) in enumerate([(3, 20), (25, 4), (1, 9), (40, 15), (7, 1), (12, 30), (5, 5)]):
        options = SamplingOptions(temperature=n % 4 // 3 * 0.9, max_new_tokens=new, seed=n)
        made.append(Request(random_tokens(1, size, 250, seed=n)[0].tolist(), options))
    return made


def drive(engine: Engine) -> list[list[int]]:
    """Three requests at the start, the others one every second step, one of them cancelled."""
    waiting, said, steps = requests(), {}, 0
    numbers = [engine.submit(waiting.pop(0)) for _ in range(3)]
    while engine.busy or waiting:
        if waiting and steps % 2:
            numbers.append(engine.submit(waiting.pop(0)))
        if steps == 9:
            engine.cancel(numbers[0])
        for event in engine.step():
            if event.token is not None:
                said.setdefault(event.request, []).append(event.token)
        steps += 1
    return [said.get(number, []) for number in numbers]


def _serve(rank: int, world: int, folder: Path, layouts: list[dict]) -> list:
    found = []
    for axes in layouts:
        with launched() as ranks:
            model = open_model(folder, ParallelConfig(**axes), torch.float32, ranks)
            engine = Engine(model, lockstep=True, **SIZES)
            if rank == 0:
                found.append(drive(engine))
                assert engine.step() == []  # while nothing is to do
                engine.close()
                engine.step()
            else:
                engine.follow()
                assert not engine.busy and engine.used_tokens == 0
            # Ranks that are not led would each draw another text.
            with pytest.raises(ValueError, match="seed: give one"):
                Engine(model).submit(Request([3], SamplingOptions()))
    return found


def alone(folder: Path) -> list[list[int]]:
    return drive(Engine(load_model(folder, dtype=torch.float32).eval(), **SIZES))


def test_two_ranks_serve_what_one_serves_in_every_layout(folder: Path):
    layouts = [{"tp": 2}, {"tp": 2, "async_tp": True}, {"ep": 2}, {"pp": 2}, {}]

    served, _ = run_ranks(2, _serve, folder, layouts)

    assert served == [alone(folder)] * len(layouts)
    # The cancelled one had said some, and the others said all.
    assert [len(text) for text in served[0]][1:] == [4, 9, 15, 1, 30, 5]


def _checkpoint(rank: int, world: int, run: Path) -> None:
    from ossature.train.loop import train
    from tests.small_runs import small_run

    train(small_run(run, steps=2))


@pytest.mark.slow
def test_four_ranks_serve_the_checkpoint_that_four_ranks_wrote(tmp_path: Path):
    run_ranks(4, _checkpoint, tmp_path / "run")

    (served, *_) = run_ranks(4, _generate, tmp_path / "run", [{}, {"tp": 2, "pp": 2}, {"ep": 4}])

    model = load_model(tmp_path / "run", dtype=torch.float32).eval()
    assert served == [_texts(Engine(model, **SIZES))] * 3


def _texts(engine: Engine) -> list[list[int]]:
    options = SamplingOptions(temperature=0.0, max_new_tokens=15)
    prompts = [random_tokens(1, size, 96, seed=size)[0].tolist() for size in (3, 30, 9, 1)]
    found = engine.generate(Request(prompt, options) for prompt in prompts)
    return [text.tokens for (text,) in found]


def _generate(rank: int, world: int, folder: Path, layouts: list[dict]) -> list:
    found = []
    for axes in layouts:
        with launched() as ranks:
            model = open_model(folder, ParallelConfig(**axes), torch.float32, ranks)
            found.append(_texts(Engine(model, **SIZES)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["-m torch.distributed.run --standalone --nproc-per-node 2"])
def test_the_command_under_torchrun_prints_what_one_process_prints(
    folder: Path, launcher: str, capsys: pytest.CaptureFixture[str]
):
    words = ["sample", str(folder), "--prompt", "one", "two two", "--max-new-tokens", "12"]
    words += ["--temperature", "0", "--batch", "1"]
    assert main(words) == 0
    expected = capsys.readouterr().out
    for axes in ("--parallel.tp", "--parallel.pp"):
        done = subprocess.run(
            [sys.executable, *launcher.split(), "-m", "ossature", *words, axes, "2"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == expected

"""Every key of a run file does something: a table of keys against what each one changes."""

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ossature.checkpoint import store
from ossature.config import TrainConfig, flatten, parse
from ossature.train import loop
from ossature.train.loop import train
from tests.small_runs import change, records, small_run, text_corpus


@dataclass
class Outcome:
    """What a run leaves behind."""

    folder: Path
    weights: dict[str, torch.Tensor]
    lines: list[dict[str, Any]]
    printed: list[str]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpora")
    return {
        "one": text_corpus(folder, "one"),
        "two": text_corpus(folder, "two", "class for in range print x y ( ) :"),
    }


@pytest.fixture(scope="module")
def baselines() -> dict[str, Outcome]:
    """Runs that several keys are compared with, made once."""
    return {}


@pytest.fixture
def outcome(tmp_path, corpora, capsys) -> Callable[..., Outcome]:
    """Runs a small run on text, with changes, and tells what came of it."""

    def run(**changes: Any) -> Outcome:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        base = {
            "model": "tiny_text", "steps": 4, "data__mock": False, "data__path": corpora["one"],
            "router__bias_anneal_steps": 0, "data__seq_len": 32,
        }  # fmt: skip
        both = {**base, **changes}
        if both.get("data__blend") or both.get("data__train_blend") or both["data__mock"]:
            both["data__path"] = None
        if both["data__path"] == "prefix":  # without a manifest the split is given with the run
            both["data__path"] = corpora["one"] / "train_text_document"
        config = change(small_run(folder), **both)
        capsys.readouterr()
        checkpoint = train(config)
        names = store.list_weights(checkpoint)
        return Outcome(
            folder=folder,
            weights={name: store.read_weight(checkpoint, name) for name in names},
            lines=records(folder) if folder.exists() else [],
            printed=capsys.readouterr().out.splitlines(),
        )

    return run


def same(one: Outcome, other: Outcome) -> bool:
    if {n: w.shape for n, w in one.weights.items()} != {
        n: w.shape for n, w in other.weights.items()
    }:
        return False
    return all(torch.equal(w, other.weights[n]) for n, w in one.weights.items())


# Keys that lead to other weights, each with a base in which it matters.
NEAR = {"optim__schedule": "linear"}
ADAPTERS = {"lora__rank": 4}
WEIGHTS: dict[str, tuple[dict[str, Any], Any]] = {
    "model": ({}, "tiny_wide"),
    "num_layers": ({}, 1),
    "seed": ({}, 5),
    "global_batch_tokens": ({}, 256),
    "precision": ({}, "bf16"),
    "data.blend": ({}, "both"),
    "data.train_blend": ({}, "both"),
    "data.split": ({"data__path": "prefix", "data__split": "8,1,1"}, "4,3,3"),
    "data.path": ({}, "two"),
    "data.mock": ({}, True),
    "data.separate_documents": ({}, False),
    "data.seq_len": ({"micro_batch_tokens": 64}, 64),
    "optim.name": ({}, "muon"),
    "optim.states": ({}, "8bit"),
    "optim.weights": ({"precision": "bf16"}, "bf16"),
    "optim.lr": ({}, 5e-3),
    "optim.min_lr": ({}, 5e-3),
    "optim.warmup_steps": ({}, 3),
    "optim.decay_steps": (NEAR, 9),
    "optim.schedule": ({}, "wsd"),
    "optim.weight_decay": ({}, 0.5),
    "optim.beta1": ({}, 0.5),
    "optim.beta2": ({}, 0.5),
    "optim.eps": ({}, 1e-3),
    "optim.clip": ({"optim__eps": 1e-2}, 0.01),
    "lora.rank": ({}, 4),
    "lora.alpha": (ADAPTERS, 4.0),
    "lora.dropout": (ADAPTERS, 0.5),
    "lora.dora": (ADAPTERS, True),
    "lora.rank_stabilised": (ADAPTERS, True),
    "lora.targets": (ADAPTERS, ("q_proj", "down")),
    "lora.base": (ADAPTERS, "mxfp4"),
    "router.aux_loss": ({}, 0.1),
    "router.z_loss": ({}, 0.1),
    "router.bias_update_rate": ({}, 0.5),
    "router.bias_anneal_steps": ({"router__bias_update_rate": 0.5}, 4),
    "steps": ({}, 5),
}


@pytest.mark.parametrize("key", WEIGHTS)
def test_a_key_of_the_mathematics_leads_to_other_weights(key, outcome, corpora, baselines):
    base, value = WEIGHTS[key]
    if value == "tiny_wide":
        from dataclasses import replace

        from ossature.model.config import SIZES

        SIZES["tiny_wide"] = replace(SIZES["tiny_text"], hidden_size=96)
    if key == "data.path":
        value = corpora["two"]
    if key in ("data.blend", "data.train_blend"):
        value = ("1", str(corpora["one"]), "2", str(corpora["two"]))
    one = baselines.get(str(base)) or outcome(**base)
    baselines[str(base)] = one
    other = outcome(**{**base, key.replace(".", "__"): value})
    assert not same(one, other)


def test_and_nothing_else_does(outcome):
    assert same(outcome(), outcome())


def test_run_is_the_folder(outcome):
    made = outcome()
    assert (made.folder / "checkpoints").is_dir() and (made.folder / "run.json").is_file()


def test_data_is_cut_into_micro_batches(outcome, monkeypatch):
    rows = []
    plain = loop.accumulate

    def accumulate(model, batches, *args, **options):
        rows.append([len(batch.tokens) for batch in batches])
        return plain(model, batches, *args, **options)

    monkeypatch.setattr(loop, "accumulate", accumulate)
    outcome(steps=1)
    outcome(steps=1, micro_batch_tokens=64)
    assert rows == [[1, 1, 1, 1], [2, 2]]


def test_eval_keys(outcome):
    losses = [
        [line.get("validation_loss") for line in outcome(**changes).lines]
        for changes in (
            {},
            {"eval__every_steps": 2, "eval__tokens": 64},
            {"eval__every_steps": 2, "eval__tokens": 320},
            {"eval__every_steps": 3, "eval__tokens": 64},
        )
    ]
    assert [[loss is not None for loss in run] for run in losses] == [
        [False] * 4, [False, True, False, True], [False, True, False, True],
        [False, False, True, True],
    ]  # fmt: skip
    assert losses[1][3] != losses[2][3]


def test_task_keys(outcome, tmp_path, capsys):
    """Tasks are asked when they are due, of the model as it is then, and change nothing."""
    from ossature.train.report import curves

    (tmp_path / "q.jsonl").write_text('{"question": "def", "answer": "x"}\n' * 9)
    base = {
        "eval__tasks": ("arithmetic", str(tmp_path / "q.jsonl")), "eval__tasks_every_steps": 3,
        "eval__task_items": 5,
    }  # fmt: skip
    plain, asked = outcome(), outcome(**base)
    found = [line.get("eval") for line in asked.lines]
    assert [value is not None for value in found] == [False, False, True, True]
    assert found[2]["arithmetic/nats_per_token"] != found[3]["arithmetic/nats_per_token"]
    assert any("step 3: arithmetic/nats_per_token " in line for line in asked.printed)
    assert same(plain, asked)
    drawn = {curve["key"]: [n for n, *_ in curve["points"]] for curve in curves(asked.lines)}
    assert drawn["eval/arithmetic/accuracy"] == [3, 4]
    assert "eval/arithmetic/accuracy, add 1 digit" not in drawn
    fewer = outcome(**{**base, "eval__task_items": 2})
    assert "arithmetic/accuracy, add 3 digits" in found[2]
    assert "arithmetic/accuracy, add 3 digits" not in fewer.lines[2]["eval"]


def test_tasks_are_checked_before_a_run_begins(tmp_path):
    both = {"eval__tasks": ("needle:3",), "eval__tasks_every_steps": 2}
    with pytest.raises(ValueError, match="needle:3: give lengths"):
        train(small_run(tmp_path / "r", **both))
    both["eval__tasks"] = ("arithmetic",)
    with pytest.raises(ValueError, match=r"eval.tasks needs a corpus with a tokenizer"):
        train(small_run(tmp_path / "r", **both))
    with pytest.raises(ValueError, match=r"eval.tasks \(none\) and eval.tasks_every_steps \(2\)"):
        small_run(tmp_path / "r", eval__tasks_every_steps=2)
    assert not (tmp_path / "r").exists()


def test_sample_keys(outcome):
    from ossature.train.metrics import read_records

    base = {"sample__every_steps": 2, "sample__max_new_tokens": 5, "sample__prompts": ("def ", "x")}
    hot = outcome(**base)
    said = read_records(hot.folder / "samples.jsonl")
    assert [(entry["step"], entry["prompt"]) for entry in said] == [
        (2, "def "), (2, "x"), (4, "def "), (4, "x"),
    ]  # fmt: skip
    assert any("step 2: 'def ' -> " in line for line in hot.printed)
    long = outcome(**{**base, "sample__max_new_tokens": 40})
    cold = outcome(**{**base, "sample__temperature": 0.0})
    texts = [
        "".join(entry["text"] for entry in read_records(run.folder / "samples.jsonl"))
        for run in (hot, long, cold)
    ]
    assert len(texts[1]) > len(texts[0])
    assert texts[2] != texts[0]
    assert same(hot, cold)


def test_checkpoint_keys(outcome):
    steps = [
        [store.step_of(folder) for folder in store.checkpoints(outcome(**changes).folder)]
        for changes in (
            {},
            {"checkpoint__every_steps": 1},
            {"checkpoint__every_steps": 1, "checkpoint__keep": 2},
            {"checkpoint__every_steps": 3, "checkpoint__asynchronous": True},
        )
    ]
    assert steps == [[4], [1, 2, 3, 4], [3, 4], [3, 4]]


def test_log_keys(outcome):
    quiet = outcome(log__every_steps=2)
    assert sum("grad norm" in line for line in quiet.printed) == 2
    assert ["router" in line for line in quiet.lines] == [False, True, False, True]
    assert not (quiet.folder / "tensorboard").exists()
    board = outcome(log__tensorboard=True)
    assert list((board.folder / "tensorboard").glob("events*"))
    assert sum("grad norm" in line for line in board.printed) == 4


def test_wandb_is_asked_for_by_name_and_missed_by_name(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"wandb is not installed: pip install 'ossature\[wandb\]"):
        train(small_run(tmp_path / "r", log__wandb_project="p"))
    assert not (tmp_path / "r").exists()


def test_wandb_gets_project_entity_and_name(tmp_path, monkeypatch):
    import sys
    from types import SimpleNamespace

    asked = []
    fake = SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **k: asked.append(k) or fake)
    )
    keys = {"log__wandb_project": "p", "log__wandb_entity": "e", "log__wandb_name": "n"}
    train(small_run(tmp_path / "r", steps=1, **keys))
    train(small_run(tmp_path / "s", steps=1, log__wandb_project="p"))
    assert [(a["project"], a["entity"], a["name"]) for a in asked] == [
        ("p", "e", "n"), ("p", None, "s"),
    ]  # fmt: skip


def test_process_wide_switches_hold_during_the_run_and_are_set_back(tmp_path, monkeypatch):
    seen = []
    plain = loop.accumulate

    def accumulate(model, *args, **options):
        seen.append((gc.isenabled(), torch.are_deterministic_algorithms_enabled()))
        return plain(model, *args, **options)

    monkeypatch.setattr(loop, "accumulate", accumulate)
    train(small_run(tmp_path / "a", steps=1))
    train(small_run(tmp_path / "b", steps=1, gc_every_steps=0))
    train(small_run(tmp_path / "c", steps=1, deterministic=True))
    assert seen == [(False, False), (True, False), (False, True)]
    assert gc.isenabled() and not torch.are_deterministic_algorithms_enabled()


ELSEWHERE = {
    "data.validation_blend": "tests/data/test_loader.py",
    "data.test_blend": "tests/data/test_loader.py",
    "init": "tests/train/test_init.py",
    "optim.in_backward": "tests/train/test_adamw.py",
    "lora.quantize_base": "tests/train/test_lora.py",
    "lora.start": "tests/train/test_lora.py",
    "recompute": "tests/parallel/test_recompute.py",
    "float8": "tests/parallel/test_float8.py",
    "float8_emulate": "tests/parallel/test_float8.py",
    "offload_activations": "tests/parallel/test_recompute.py",
    "compile": "tests/train/test_compile.py",
    "max_skipped_steps": "tests/train/test_loop.py",
    "resume": "tests/train/test_loop.py",
    "timeout_seconds": "tests/parallel/test_nodes.py",
}
HERE = (
    "run", "micro_batch_tokens", "eval.every_steps", "eval.tokens", "eval.tasks",
    "eval.tasks_every_steps", "eval.task_items", "sample.every_steps",
    "sample.prompts", "sample.max_new_tokens", "sample.temperature", "checkpoint.every_steps",
    "checkpoint.keep", "checkpoint.asynchronous", "log.every_steps", "log.tensorboard",
    "log.wandb_project", "log.wandb_entity", "log.wandb_name", "gc_every_steps", "deterministic",
)  # fmt: skip


GROUPS = {"parallel.": "tests/parallel/*.py"}
"""Groups whose keys have tests of their own, found there by name."""


def test_no_key_is_without_a_test():
    config = parse(TrainConfig, ["--run", "r", "--data.mock", "true"])
    keys = {key for key, _ in flatten(config)}
    grouped = {key for key in keys if key.startswith(tuple(GROUPS))}
    assert keys - grouped == {*WEIGHTS, *ELSEWHERE, *HERE}
    root = Path(__file__).parents[2]
    for key, file in ELSEWHERE.items():
        text = (root / file).read_text()
        assert key in text or key.removeprefix("data.") in text, key
    for group, files in GROUPS.items():
        tests = "\n".join(path.read_text() for path in root.glob(files))
        for key in grouped:
            if key.startswith(group):
                assert re.search(rf"\b{key.removeprefix(group)}\b", tests), key

"""Texts, files of answers and training on several ranks: as on one, and nobody waits for ever."""

import json

import pytest
import torch

from ossature.config import ParallelConfig
from ossature.convert.open import open_model
from ossature.data.tokenizer import load
from ossature.eval import tasks
from ossature.eval.answers import Answers
from ossature.eval.options import TaskOptions
from ossature.eval.subject import Subject, place_of
from ossature.parallel.launch import launched
from ossature.train.loop import train
from tests.ranks import run_ranks
from tests.small_runs import records, small_run, text_corpus

NAMES = ["arithmetic", "harmony"]


def ask(rank, world, folder, layouts, cache, names):
    """Values of every metric in each layout; answers are kept in a file, and asked for again."""
    found = []
    for n, axes in enumerate(layouts):
        parallel = ParallelConfig(**axes)
        with launched() as ranks:
            model = open_model(folder, parallel, torch.float32, ranks)
            place, device = place_of(parallel, ranks), torch.device("cpu")
            values = []
            for _ in range(2):
                answers = Answers(cache / f"{world}-{n}", {})
                # A row a batch: data ranks have batches of different lengths.
                subject = Subject(model, load(folder), device, place, answers, batch_tokens=1)
                options = TaskOptions(limit=5, max_new_tokens=5)
                made = tasks.run(subject, names, options)
                numbers = {
                    f"{task}/{key}": list(metric.values)
                    for task, outcome in made.items()
                    for key, metric in outcome.metrics.items()
                }
                values.append(numbers | {"texts": made["harmony"].details})
                answers.close()
            assert values[0] == values[1]
            found.append(values[0])
    return found


def test_ranks_answer_as_one_does(folder, tmp_path):
    ((one,),) = run_ranks(1, ask, folder, [{}], tmp_path, NAMES)
    layouts = [{"tp": 2}, {"pp": 2}, {"dp_shard": 2, "ep": 2}, {"dp_shard": 2, "etp": 2}]
    for found in run_ranks(2, ask, folder, layouts, tmp_path, NAMES):
        for values in found:
            assert values["texts"] == one["texts"]
            for key, expected in one.items():
                if key != "texts":
                    assert values[key] == pytest.approx(expected, abs=1e-4)
    assert len((tmp_path / "2-0").read_text().splitlines()) == 1 + 5 + 5


def run_training(rank, world, config):
    train(config)
    return records(config.run)[-1]["eval"] if rank == 0 else None


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [{"dp_shard": 2}, {"tp": 2}, {"pp": 2}, {"cp": 2}, {"dp_shard": 2, "ep": 2}]
)
def test_a_run_on_ranks_is_asked_as_on_one(tmp_path, axes):
    corpus = text_corpus(tmp_path)
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"question": "def", "answer": "x"}) + "\n")
    base = {
        "model": "tiny_text", "steps": 2, "data__mock": False, "data__path": corpus,
        "eval__tasks": ("arithmetic", str(questions)), "eval__tasks_every_steps": 1,
        "eval__task_items": 5,
    }  # fmt: skip
    one = run_ranks(1, run_training, small_run(tmp_path / "one", **base))[0]
    axes = {f"parallel__{axis}": size for axis, size in axes.items()}
    two = run_ranks(2, run_training, small_run(tmp_path / "two", **base, **axes))[0]
    assert two == pytest.approx(one, abs=1e-3)

"""Scores of rows against whole logits, and on several ranks against one."""

from pathlib import Path

import pytest
import torch

from ossature.config import ParallelConfig
from ossature.convert.open import open_model
from ossature.eval import likelihood
from ossature.eval.likelihood import Place, Row, batches, score
from ossature.eval.subject import place_of
from ossature.parallel.launch import launched
from tests.ranks import run_ranks
from tests.tiny import hugging_face_model, ours


def some_rows(count: int = 9, vocab: int = 96) -> list[Row]:
    """Contexts of 1 to 30 tokens, continuations of 1 to 9."""
    draw = torch.Generator().manual_seed(0)
    sizes = [torch.randint(1, most, (count,), generator=draw).tolist() for most in (31, 10)]
    return [
        Row(*(torch.randint(2, vocab, (size,), generator=draw).tolist() for size in pair))
        for pair in zip(*sizes, strict=True)
    ]


def all_scores(model, rows, place=Place(), **options):  # noqa: B008
    found = {}
    for part in score(model, rows, place, torch.device("cpu"), **options):
        found |= part
    return [found[n] for n in range(len(rows))]


@pytest.fixture(scope="module")
def model():
    return ours(hugging_face_model()).eval()


@torch.no_grad()
def by_whole_logits(model, rows):
    found = []
    for row in rows:
        tokens = torch.tensor([[*row.context, *row.continuation]])
        logits = model(tokens[:, :-1])[0, len(row.context) - 1 :].double().log_softmax(-1)
        goal = torch.tensor(row.continuation)
        missed = int((logits.argmax(-1) != goal).sum())
        found.append((float(logits.gather(1, goal[:, None]).sum()), missed))
    return found


def test_scores_are_those_of_whole_logits_one_row_at_a_time(model, monkeypatch):
    rows = some_rows()
    with torch.no_grad():  # one row that greedy decoding would give
        tokens = torch.tensor([rows[0].context])
        best = [int(model(tokens)[0, -1].argmax())]
    rows.append(Row(rows[0].context, best))
    expected = by_whole_logits(model, rows)
    for logits in (likelihood.LOGITS, 500):  # all places at a time, and a few
        monkeypatch.setattr(likelihood, "LOGITS", logits)
        found = all_scores(model, rows, batch_tokens=64)
        for ours_, (logprob, missed) in zip(found, expected, strict=True):
            assert ours_.logprob == pytest.approx(logprob, abs=2e-5)
            assert ours_.missed == missed
    assert found[-1].missed == 0 and any(score.missed for score in found)
    assert "forward" not in model.lm_head.__dict__  # the head is as it was


def test_a_model_whose_logits_are_no_numbers_gets_nothing_right():
    broken = ours(hugging_face_model()).eval()
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    rows = some_rows(3)
    for row, found in zip(rows, all_scores(broken, rows), strict=True):
        assert found.missed == len(row.continuation)


def test_batches_go_by_length_and_hold_every_row_once():
    rows = [Row([2], [3] * size) for size in (1, 9, 2, 9, 3, 30)]
    made = batches(rows, 18)
    assert made == [[5], [1, 3], [4, 2, 0]]  # 30 alone; 9 + 9; 3 x 3


def test_memory_does_not_hold_the_logits_of_a_long_row(model, monkeypatch):
    """Of 719 places, logits are found some at a time, and only of those that are asked for."""
    seen = []
    logits_of = model.lm_head.logits

    def watched(x):
        seen.append(x.shape[1])
        return logits_of(x)

    monkeypatch.setattr(model.lm_head, "logits", watched)
    monkeypatch.setattr(likelihood, "LOGITS", 96 * 50)
    all_scores(model, [Row([5] * 600, [7] * 120)])
    assert seen == [1, 50, 50, 19]


def on_ranks(rank: int, world: int, folder: Path, layouts: list[dict], rows) -> list:
    found = []
    for axes in layouts:
        parallel = ParallelConfig(**axes)
        with launched() as ranks:
            model = open_model(folder, parallel, torch.float32, ranks)
            place = place_of(parallel, ranks)
            found.append(all_scores(model, rows, place, batch_tokens=64))
    return found


LAYOUTS = {
    1: [{}],
    2: [{"tp": 2}, {"ep": 2}, {"pp": 2}, {"cp": 2}, {"dp_shard": 2}],
    4: [{"dp_shard": 4}, {"tp": 2, "pp": 2}, {"cp": 2, "tp": 2}, {"dp_shard": 2, "tp": 2, "ep": 2}],
}  # fmt: skip


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_in_any_layout_find_the_scores_of_one(tmp_path, world):
    hugging_face_model().save_pretrained(tmp_path)
    rows = some_rows()
    ((one,),) = run_ranks(1, on_ranks, tmp_path, LAYOUTS[1], rows)
    for found in run_ranks(world, on_ranks, tmp_path, LAYOUTS[world], rows):
        for axes, scores in zip(LAYOUTS[world], found, strict=True):
            for ours_, expected in zip(scores, one, strict=True):
                assert ours_.logprob == pytest.approx(expected.logprob, abs=1e-4), axes
                assert ours_.missed == expected.missed, axes

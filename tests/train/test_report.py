"""The page of a run: whole without a network, and true to the records."""

import json
import math
import re
from pathlib import Path

import pytest

from ossature.train import report
from ossature.train.loop import train
from tests.small_runs import records, small_run


def page_data(page: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1].replace("<\\/", "</"))


def test_the_page_shows_the_run_and_asks_nobody_for_anything(tmp_path, capsys):
    train(small_run(tmp_path / "r", eval__every_steps=3, eval__tokens=64))
    (tmp_path / "r" / "samples.jsonl").write_text(
        json.dumps({"step": 3, "prompt": "def ", "text": "</script><b>@DATA@"}) + "\n"
    )
    assert report.main([str(tmp_path / "r")]) == 0
    page = (tmp_path / "r" / "report.html").read_text()
    for outside in ("http://", "https://", "src=", "@import", "<link"):
        rest = page.replace("http://www.w3.org/2000/svg", "")
        assert outside not in rest, outside
    data = page_data(page)
    lines = records(tmp_path / "r")
    loss = next(c for c in data["curves"] if c["key"] == "loss")
    assert [p[0] for p in loss["points"]] == [1, 2, 3, 4, 5, 6]
    for point, line in zip(loss["points"], lines, strict=True):
        assert point[1:] == pytest.approx([line["loss"]] * 3, rel=1e-4)
    assert data["validation"] == [[n, lines[n - 1]["validation_loss"]] for n in (3, 6)]
    expected = lines[-1]["router"]["load"]
    for layer in range(2):
        for expert, digit in enumerate(data["router"]["load"][layer][-1]):
            assert int(digit, 36) / 10 == pytest.approx(expected[layer][expert], abs=0.051)
    assert "&lt;/script&gt;&lt;b&gt;@DATA@" in page  # a sample is text and nothing else
    assert "optim.warmup_steps" in page and "6 of 6" in page
    assert "wrote" in capsys.readouterr().out


def test_a_long_run_is_thinned_without_losing_its_extremes():
    points = [(step, 1.0) for step in range(1, 10_001)]
    points[4321] = (4322, 50.0)
    thinned = report.thin(points)
    assert len(thinned) <= report.POINTS
    assert thinned[-1][0] == 10_000
    assert max(point[3] for point in thinned) == 50.0
    assert math.fsum(p[1] for p in thinned) / len(thinned) == pytest.approx(1.0049, abs=1e-3)


def test_skipped_steps_are_marked():
    lines = [{"step": n, "skipped_steps": skips} for n, skips in enumerate([0, 1, 1, 3, 3], 1)]
    assert report.skipped(lines) == [2, 4]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "not a run: it has no metrics.jsonl"), ("", "no step is finished yet")],
)
def test_a_folder_without_a_run_is_refused(tmp_path: Path, content, sentence):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        report.report(tmp_path)

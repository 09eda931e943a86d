"""Files of results: written whole, compared item by item, refused when they asked other things."""

import json
import math

import pytest

from ossature.eval.results import Metric, Outcome, compare, read, table, to_json, write


def written(path, values, fingerprint="f", task="sums", metric="accuracy"):
    outcome = Outcome(fingerprint, {metric: Metric(values)})
    write(path, to_json("model", {}, {task: outcome}))
    return path


def test_a_comparison_by_hand(tmp_path):
    a = written(tmp_path / "a.json", [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    b = written(tmp_path / "b.json", [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    head, line = (row.split() for row in compare(a, b))
    found = dict(zip(head[:5] + head[6:], line[:5] + line[8:], strict=True))
    assert found == {
        "task": "sums", "metric": "accuracy", "A": "0.2857", "B": "0.8571", "B-A": "+0.5714",
        "higher": "5", "lower": "1", "same": "1", "p": "0.219",  # 2 x (1 + 6) / 2 ** 6
    }  # fmt: skip


def test_files_that_asked_other_things_are_refused_by_name(tmp_path):
    a = written(tmp_path / "a.json", [0.0, 1.0])
    other = written(tmp_path / "b.json", [0.0, 1.0], fingerprint="g")
    with pytest.raises(ValueError, match=r"b.json: task sums asked other questions than in .*a.js"):
        list(compare(a, other))
    other = written(tmp_path / "c.json", [0.0, 1.0], task="words")
    with pytest.raises(ValueError, match=r"c.json: lacks task sums, which .*a.json has"):
        list(compare(a, other))
    more = json.loads(a.read_text())
    more["tasks"]["words"] = more["tasks"]["sums"]
    (tmp_path / "d.json").write_text(json.dumps(more))
    with pytest.raises(ValueError, match=r"a.json: lacks task words, which .*d.json has"):
        list(compare(a, tmp_path / "d.json"))
    other = written(tmp_path / "e.json", [0.0, 1.0], metric="nats")
    with pytest.raises(ValueError, match=r"e.json: task sums: only one of the files has"):
        list(compare(a, other))
    other = written(tmp_path / "f.json", [0.0])
    with pytest.raises(ValueError, match=r"f.json: task sums, metric accuracy: 1 items, .* has 2"):
        list(compare(a, other))


def test_a_metric_that_is_no_mean_of_its_items_differs_by_its_value(tmp_path):
    """A perplexity, and one that its items have no part of."""
    for name, values, value in (("a", [2.0, 8.0], 4.0), ("b", [2.0, 2.0], 2.0)):
        metrics = {
            "perplexity": Metric(values, None, (value, 1.0, 9.0)),
            "f1": Metric([], None, (value, 1.0, 9.0), 2),
        }
        made = to_json("m", {}, {"t": Outcome("f", metrics)})
        assert made["tasks"]["t"]["metrics"]["f1"]["count"] == 2
        write(tmp_path / name, made)
    _, first, second = (row.split() for row in compare(tmp_path / "a", tmp_path / "b"))
    assert first == ["t", "perplexity", "4.0000", "2.0000", "-2.0000", "-", "0", "1", "1", "1"]
    assert second == ["t", "f1", "4.0000", "2.0000", "-2.0000", *"-----"]


def test_settings_that_differ_are_said(tmp_path):
    for name, chat in (("a", True), ("b", False)):
        outcome = Outcome("f", {"accuracy": Metric([1.0])})
        write(tmp_path / name, to_json("m", {"chat": chat, "seed": 0}, {"t": outcome}))
    first, *_ = compare(tmp_path / "a", tmp_path / "b")
    assert first == "chat: True in A, False in B"


def test_what_is_no_number_is_null_in_the_file(tmp_path):
    path = written(tmp_path / "a.json", [1.0, math.nan])
    assert "NaN" not in path.read_text() and "null" in path.read_text()
    assert math.isnan(read(path)["tasks"]["sums"]["items"]["accuracy"]["values"][1])
    assert [line.split()[4] for line in compare(path, path)] == ["B-A", "+nan"]


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"format": 1}', '{"format": 1, "tasks": {"a": 3}}', "[" * 100_000,
        '{"format": 1, "tasks": {"a": {"fingerprint": "", "metrics": {"m": {"value": "1", "low": 0,'
        ' "high": 1}}, "items": {"m": {"values": []}}}}}',
        '{"format": 1, "tasks": {"a": {"fingerprint": "", "metrics": {"m": {"value": 1, "low": 0,'
        ' "high": 1}}, "items": {"m": {"values": [1, "x"]}}}}}',
        '{"format": 1, "tasks": {"a": {"fingerprint": "", "metrics": {"m": {"value": 1, "low": 0,'
        ' "high": 1}}, "items": {"m": {"values": [1], "weights": [1, 2]}}}}}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_results_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x.json: (not|damaged)"):
        read(tmp_path / "x.json")


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = written(tmp_path / "a.json", [1.0])
    before = path.read_text()
    with pytest.raises(TypeError):
        write(path, {"x": object()})
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_table_has_a_line_a_metric(tmp_path):
    found = read(written(tmp_path / "a.json", [1.0, 0.0, 1.0, 1.0]))
    _, line = table(found)
    assert line.split() == ["sums", "accuracy", "0.7500", "0.3006", "-", "0.9544", "4"]

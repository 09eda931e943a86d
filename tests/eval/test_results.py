"""Files of results: written whole, compared item by item, refused when they asked other things."""

import json

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


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "tasks": {"a": 3}}']
)
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

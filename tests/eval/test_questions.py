"""Files of questions: votes, and files that are not as they must be."""

import json

import pytest

from ossature.eval import questions as module
from ossature.eval.options import TaskOptions
from ossature.eval.questions import questions, read_questions


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting"),
        ('{"question": "a"}', "line 2: answer must be a text that is not empty"),
        ('{"question": "a", "answer": "b", "x": 1}', "line 2: key 'x' has no meaning"),
        ('{"question": "a", "answer": "b", "grade": "good"}', "line 2: grade 'good' must"),
        (
            '{"question": "a", "answer": "b", "grade": "numeric"}',
            "line 2: answer 'b' has no number",
        ),
        ('{"question": "a", "answer": "(", "grade": "regex"}', "line 2: answer '[(]' is no expr"),
        ('{"question": "a", "answer": "b", "grade": "choice"}', "line 2: grade choice needs 2 to"),
        (
            '{"question": "a", "answer": "C", "grade": "choice", "choices": ["x", "y"]}',
            "line 2: answer 'C' is none of the choices",
        ),
        ("[]", "line 2: must be an object"),
        ('{"question": "a", "answer": " "}', "line 2: answer must be a text that is not empty"),
        ('{"question": "a\\ud800", "answer": "b"}', "line 2: has half of a surrogate pair"),
        ('{"question": "a", "answer": "b", "kind": "\\ud800"}', "line 2: has half of a surr"),
        ("[" * 100_000, "line 2: JSON that is nested too deeply"),
        (
            '{"question": "a", "answer": "x{99999999999999999999}", "grade": "regex"}',
            "line 2: answer .* is no expression: repeat count too big",
        ),
        (
            json.dumps({"question": "a", "answer": "(" * 5000, "grade": "regex"}),
            "line 2: answer .* is no expression: maximum recursion",
        ),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, message):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "q", "answer": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"q.jsonl: {message}"):
        read_questions(file, TaskOptions())


def test_votes_and_pass_at_k_of_texts_written_by_hand(tmp_path, subject, monkeypatch):
    rows = [
        {"question": "1 + 1", "answer": "2", "grade": "numeric", "kind": "sum"},
        {"question": "sky", "answer": "blue", "kind": "word"},
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [["2", "3", "is 2", "2.0"], ["red", "blue", "red", ""]]
    monkeypatch.setattr(module, "_texts", lambda *_: said)
    found = questions(subject, TaskOptions(samples=4, temperature=1.0), file)
    values = {key: list(metric.values) for key, metric in found.metrics.items()}
    assert values == {
        "accuracy": [0.75, 0.25],
        "majority": [1.0, 0.0],
        "pass@2": [1.0, 0.5],
        "pass@4": [1.0, 1.0],
        "accuracy, sum": [0.75],
        "accuracy, word": [0.25],
    }
    assert found.details[1]["said"] == said[1] and found.details[1]["right"] == [
        False, True, False, False,
    ]  # fmt: skip


def test_the_most_probable_choice_is_the_models_own(tmp_path, subject):
    """A question whose answers the model scores itself: by hand from its logits."""
    import torch

    choices = ["the door", "lamp", "birds sit in"]
    context = subject.tokenizer.encode("Question: what\nAnswer:")
    means = []
    for choice in choices:
        more = subject.tokenizer.encode(f" {choice}")
        tokens = torch.tensor([[*context, *more]])
        with torch.no_grad():
            logits = subject.model(tokens)[0, len(context) - 1 : -1].log_softmax(-1)
        means.append(float(logits.gather(1, torch.tensor(more)[:, None]).mean()))
    best = choices[means.index(max(means))]
    file = tmp_path / "q.jsonl"
    record = {"question": "what", "choices": choices, "grade": "likelihood"}
    lines = [json.dumps({**record, "answer": answer}) for answer in choices]
    file.write_text("\n".join(lines))
    found = questions(subject, TaskOptions(), file)
    assert list(found.metrics["accuracy"].values) == [float(c == best) for c in choices]


def test_lines_end_where_json_lines_end(tmp_path):
    """An answer may hold other separators; a byte order mark is no part of the first line."""
    file = tmp_path / "q.jsonl"
    lines = '{"question": "a\u2028b", "answer": "c\x85"}\r\n{"question": "2", "answer": "4"}\n'
    file.write_bytes(lines.encode("utf-8-sig"))
    assert [(q.question, q.answer) for q in read_questions(file, TaskOptions())] == [
        ("a\u2028b", "c\x85"),
        ("2", "4"),
    ]


def test_a_file_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(ValueError, match=r"q\.jsonl: not UTF-8"):
        read_questions(file, TaskOptions())


@pytest.mark.parametrize("grade", ["exact", "likelihood"])
def test_a_question_longer_than_the_models_positions_is_named(tmp_path, subject, grade):
    file = tmp_path / "q.jsonl"
    record = {"question": "the door " * 2100, "answer": "A", "choices": ["x", "y"], "grade": grade}
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"q.jsonl: 'the door .*'...: \d+ tokens are more than"):
        questions(subject, TaskOptions(max_new_tokens=1), file)

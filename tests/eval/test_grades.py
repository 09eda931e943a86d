"""Grades, numbers and votes made by hand."""

import time

import pytest

from ossature.eval import grades as module
from ossature.eval.grades import Question, check, number, reduced, right, vote


@pytest.mark.parametrize(
    ("grade", "answer", "text", "is_right"),
    [
        ("exact", "42", " 42\n", True),
        ("exact", "42", "42.", False),
        ("numeric", "42", "so it is 42.0, I think", True),
        ("numeric", "1,234", "First 7, then 1234.", True),
        ("numeric", "42", "42 or 43", False),
        ("numeric", "42", "forty-two", False),
        ("numeric", "-0.5", "x = -.50", True),
        ("numeric", "1/2", "2", False),
        ("numeric", "1/2", "so 0.5", True),
        ("numeric", "5", "\u22125", False),
        ("numeric", "-5", "that is \u2212$5", True),
        ("numeric", "123", "1,2,3", False),
        ("numeric", "100000", "1,00,000", True),
        ("numeric", "-4", "3-4", False),
        ("numeric", "3", "3 of 1e1000000", False),
        ("numeric", "1", "1/0", False),
        ("numeric", "1" + "0" * 31 + "1", "1" + "0" * 31 + "2", False),
        ("regex", r"^(?i:paris)\b", "Paris, of course", True),
        ("regex", r"^(?i:paris)\b", "It is Paris", False),
        ("choice", "B", "The answer is B.", True),
        ("choice", "blue", "B", True),
        ("choice", "blue", "blue", True),
        ("choice", "B", "A or B? A", False),
        ("choice", "B", "Because", False),
    ],
)
def test_grades(grade, answer, text, is_right):
    question = Question("?", answer, grade, ("red", "blue"))
    assert right(reduced(text, question), question) == is_right


def test_the_last_number_counts():
    assert [number(t) for t in ("a 1 b 2.50", "1e3", "none", "-7%")] == [2.5, 1000, None, -7]
    assert number("9" * 1001) is None and number("9" * 999) == int("9" * 999)


def test_an_expression_that_finds_no_end_is_stopped_and_the_text_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(module, "REGEX_SECONDS", 0.2)
    began = time.monotonic()
    question = Question("?", r"(.*)(.*)(.*)(.*)(.*)(.*)[^a]\1\2\3", "regex")
    assert not right("a" * 200, question)
    assert time.monotonic() - began < 5
    assert "not decided in 0.2 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (("x", "y", "x "), "choices: 'x' is there twice"),
        (("B", "A"), "choices: 'B' is the letter of another choice"),
    ],
)
def test_choices_that_cannot_be_told_apart_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        check(Question("?", "A", "choice", choices))
    check(Question("?", "A", "choice", ("A", "B")))


def test_the_majority_wins_and_those_who_say_nothing_abstain():
    assert vote(["1", "2", "2", "", "", ""]) == "2"
    assert vote(["3", "1", "1", "3"]) == "3"
    assert vote(["", ""]) == ""

"""A file of questions and answers -> how many a model answers, in one try and in several.

A line is a JSON object with `question` and `answer`; and, where needed, `choices` (a list of
texts), `grade` (how this one is graded) and `kind` (a word; each kind gets its own line).
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, get_args

from ossature.eval.answers import key_of
from ossature.eval.chat import ask, read, stops
from ossature.eval.options import Grade, TaskOptions
from ossature.eval.puzzles import split
from ossature.eval.results import Metric, Outcome
from ossature.eval.statistics import pass_at
from ossature.eval.subject import Subject
from ossature.sample.engine import Request
from ossature.sample.options import SamplingOptions

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Question:
    question: str
    answer: str
    grade: Grade
    choices: tuple[str, ...] = ()
    kind: str = ""

    @property
    def text(self) -> str:
        """The question, with its choices by letter."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices)]  # noqa: B905
        return "\n".join([self.question, *lines])


LETTERS = string.ascii_uppercase
KEYS = ("question", "answer", "grade", "choices", "kind", "id")


def read_questions(path: Path, options: TaskOptions) -> list[Question]:
    """The questions of a file, at most `limit`.

    Raises:
        ValueError: a line that is no question; names file, line and key.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    found = []
    # Not splitlines: JSON may hold other separators of lines as they are.
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_question(json.loads(line), options.grade))
        except ValueError as error:
            raise ValueError(f"{path}: line {n}: {error}") from None
    if not found:
        raise ValueError(f"{path}: has no question")
    return found[: options.limit or None]


def _question(record: Any, grade: Grade) -> Question:
    if not isinstance(record, dict):
        raise ValueError("must be an object")
    unknown = [key for key in record if key not in KEYS]
    if unknown:
        raise ValueError(f"key {unknown[0]!r} has no meaning here")
    for key in ("question", "answer"):
        if not isinstance(record.get(key), str) or not record[key]:
            raise ValueError(f"{key} must be a text that is not empty")
    choices = record.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("choices must be a list of texts")
    grade = record.get("grade", grade)
    if grade not in get_args(Grade):
        raise ValueError(f"grade {grade!r} must be {', '.join(get_args(Grade))}")
    kind = record.get("kind", "")
    if not isinstance(kind, str):
        raise ValueError("kind must be a text")
    made = Question(record["question"], record["answer"], grade, tuple(choices), kind)
    _check(made)
    return made


def _check(question: Question) -> None:
    if question.grade in ("choice", "likelihood"):
        if not 2 <= len(question.choices) <= len(LETTERS):
            raise ValueError(f"grade {question.grade} needs 2 to {len(LETTERS)} choices")
        right_choice(question)
    elif question.grade == "numeric" and number(question.answer) is None:
        raise ValueError(f"answer {question.answer!r} has no number")
    elif question.grade == "regex":
        try:
            re.compile(question.answer)
        except re.error as error:
            raise ValueError(f"answer {question.answer!r} is no expression: {error}") from None


def right_choice(question: Question) -> str:
    """The letter of the right choice; the answer is that letter or the choice's text."""
    if question.answer in question.choices:
        return LETTERS[question.choices.index(question.answer)]
    if question.answer in LETTERS[: len(question.choices)]:
        return question.answer
    raise ValueError(f"answer {question.answer!r} is none of the choices")


def number(text: str) -> Decimal | None:
    """The last number of a text; commas between its figures are left out."""
    found = NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def chosen(text: str, choices: Sequence[str]) -> str:
    """The letter that a text chooses: it is the choice, or its last letter that stands alone."""
    if text.strip() in choices:
        return LETTERS[list(choices).index(text.strip())]
    letters = re.findall(rf"\b[A-{LETTERS[len(choices) - 1]}]\b", text)
    return letters[-1] if letters else ""


def reduced(text: str, question: Question) -> str:
    """What of a text is graded; texts that agree in it are one vote.  Empty: it says nothing."""
    if question.grade == "numeric":
        found = number(text)
        return "" if found is None else str(found.normalize())
    if question.grade == "choice":
        return chosen(text, question.choices)
    return text.strip()


def right(said: str, question: Question) -> bool:
    """Whether what a text was reduced to is the answer."""
    if question.grade == "numeric":
        return said == reduced(question.answer, question)
    if question.grade == "choice":
        return said == right_choice(question)
    if question.grade == "regex":
        return re.search(question.answer, said) is not None
    return said == question.answer.strip()


def vote(said: Sequence[str]) -> str:
    """What most texts say; of equally many, what was said first.  Those without answer abstain."""
    counts = Counter(text for text in said if text)
    return counts.most_common(1)[0][0] if counts else ""


def questions(subject: Subject, options: TaskOptions, path: Path) -> Outcome:
    asked = read_questions(path, options)
    written = [q for q in asked if q.grade != "likelihood"]
    texts = iter(_texts(subject, options, written, path.name))
    by_likelihood = iter(_most_probable(subject, options, asked, path.name))
    correct: list[list[bool]] = []
    votes, details = [], []
    for question in asked:
        if question.grade == "likelihood":
            letter = next(by_likelihood)
            said, graded = [letter], [letter]
            correct.append([letter == right_choice(question)] * options.samples)
            votes.append(correct[-1][0])
        else:
            said = next(texts)
            graded = [reduced(text, question) for text in said]
            correct.append([right(text, question) for text in graded])
            votes.append(right(vote(graded), question))
        details.append({"question": question.question, "answer": question.answer, "said": said,
                        "graded": graded, "right": correct[-1]})  # fmt: skip
    return Outcome(
        key_of([[q.question, q.answer, q.grade, list(q.choices)] for q in asked]),
        _metrics(correct, votes, [q.kind for q in asked]),
        details,
    )


def _metrics(correct: list[list[bool]], votes: list[bool], kinds: list[str]) -> dict[str, Metric]:
    count = len(correct[0])
    shares = [sum(row) / count for row in correct]
    metrics = {"accuracy": Metric(shares)}
    if count > 1:
        metrics["majority"] = Metric([float(vote) for vote in votes])
        for k in dict.fromkeys([*(2**n for n in range(1, 12) if 2**n < count), count]):
            metrics[f"pass@{k}"] = Metric([pass_at(k, count, sum(row)) for row in correct])
    for kind in dict.fromkeys(kind for kind in kinds if kind):
        values = [share for share, other in zip(shares, kinds, strict=True) if other == kind]
        metrics[f"accuracy, {kind}"] = Metric(values)
    return metrics


def _texts(
    subject: Subject, options: TaskOptions, asked: list[Question], name: str
) -> list[list[str]]:
    """What the model says: of a chat, the channel final; else its next line."""
    tokenizer = subject.tokenizer
    requests = []
    for n, question in enumerate(asked):
        sampling = SamplingOptions(
            temperature=options.temperature,
            seed=options.seed + n,
            samples=options.samples,
            max_new_tokens=options.max_new_tokens,
            stop_ids=stops(tokenizer) if options.chat else (tokenizer.end_of_document,),
            stop=() if options.chat else ("\n",),
        )
        if options.chat:
            tokens = ask(question.text, options, tokenizer)
        else:
            tokens = tokenizer.encode(_plain(question))
        requests.append(Request(tokens, sampling))
    found = subject.texts(requests, name)
    if options.chat:
        return [[read(t.tokens, tokenizer).final for t in texts] for texts in found]
    return [[t.text for t in texts] for texts in found]


def _most_probable(
    subject: Subject, options: TaskOptions, asked: list[Question], name: str
) -> list[str]:
    """The letter of the choice that is most probable as an answer, a token of it on average."""
    several = [q for q in asked if q.grade == "likelihood"]
    if several and options.chat:
        raise ValueError(f"{name}: grade likelihood asks for no text; leave out --chat")
    rows = [split(subject.tokenizer, _bare(q), f" {c}") for q in several for c in q.choices]
    scores = iter(subject.scores(rows, name))
    letters = []
    for question in several:
        means = []
        for choice in question.choices:
            row = split(subject.tokenizer, _bare(question), f" {choice}")
            means.append(next(scores).logprob / len(row.continuation))
        letters.append(LETTERS[means.index(max(means))])
    return letters


def _plain(question: Question) -> str:
    return f"Question: {question.text}\nAnswer:"


def _bare(question: Question) -> str:
    return f"Question: {question.question}\nAnswer:"

"""A file of questions and answers -> how many a model answers, in one try and in several.

A line is a JSON object with `question` and `answer`; and, where needed, `choices` (a list of
texts), `grade` (how this one is graded) and `kind` (a word; each kind gets its own line).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

from ossature.eval.answers import key_of
from ossature.eval.chat import ask, read, stops
from ossature.eval.grades import LETTERS, Question, check, reduced, right, right_choice, vote
from ossature.eval.options import Grade, TaskOptions
from ossature.eval.puzzles import split
from ossature.eval.results import Metric, Outcome
from ossature.eval.statistics import pass_at
from ossature.eval.subject import Subject
from ossature.sample.options import SamplingOptions
from ossature.sample.request import Request

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
        except RecursionError:
            raise ValueError(f"{path}: line {n}: JSON that is nested too deeply") from None
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
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise ValueError(f"{key} must be a text that is not empty")
    choices = record.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError("choices must be a list of texts")
    grade = record.get("grade", grade)
    if grade not in get_args(Grade):
        raise ValueError(f"grade {grade!r} must be {', '.join(get_args(Grade))}")
    kind = record.get("kind", "")
    if not isinstance(kind, str):
        raise ValueError("kind must be a text")
    made = Question(record["question"], record["answer"], grade, tuple(choices), kind)
    try:
        "".join([made.text, made.answer, kind]).encode()
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair: no Unicode text") from None
    check(made)
    return made


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
        _check_length(subject, question, len(tokens), name)
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
    owners = [q for q in several for _ in q.choices]
    for question, row in zip(owners, rows, strict=True):
        _check_length(subject, question, len(row.context) + len(row.continuation) - 1, name)
    found = zip(rows, subject.scores(rows, name), strict=True)
    means = iter([score.logprob / len(row.continuation) for row, score in found])
    letters = []
    for question in several:
        mine = [next(means) for _ in question.choices]
        # Of a model whose logits are no numbers, none is.
        letters.append("" if any(map(math.isnan, mine)) else LETTERS[mine.index(max(mine))])
    return letters


def _check_length(subject: Subject, question: Question, size: int, name: str) -> None:
    most = subject.model.config.max_position_embeddings
    if size > most:
        raise ValueError(
            f"{name}: {question.question[:40]!r}...: {size} tokens are more than the model's "
            f"max_position_embeddings ({most})"
        )


def _plain(question: Question) -> str:
    return f"Question: {question.text}\nAnswer:"


def _bare(question: Question) -> str:
    return f"Question: {question.question}\nAnswer:"

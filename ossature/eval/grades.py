"""Whether a text answers a question: to the letter, by its number, by an expression, by a choice.

Numbers are compared as fractions, exactly, and never as text.  Expressions are searched for by the
package regex, which stops after a time: a text of a model may well be one on which an expression
goes back and forth for ever.
"""

from __future__ import annotations

import string
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import regex

from ossature.eval.options import Grade

LETTERS = string.ascii_uppercase
REGEX_SECONDS = 2.0
MOST_FIGURES = 1000
"""A number of more, or an exponent beyond, is none."""
# A minus after a letter, a figure or a bracket is no sign: 10-2.
SIGN = r"(?:(?<![\w.)\]])(?P<sign>[-+\u2212])[$€£]?)?"
WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+)"
NUMBER = regex.compile(
    rf"{SIGN}(?:(?P<over>\d+)/(?P<under>\d+)|(?P<plain>(?:{WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?))"
)


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


def check(question: Question) -> None:
    """Raises ValueError, in a sentence, for a question that its grade cannot decide."""
    if question.grade in ("choice", "likelihood"):
        choices = [choice.strip() for choice in question.choices]
        if not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f"grade {question.grade} needs 2 to {len(LETTERS)} choices")
        for n, choice in enumerate(choices):
            if choice in choices[:n]:
                raise ValueError(f"choices: {choice!r} is there twice")
            if choice in LETTERS[: len(choices)] and choice != LETTERS[n]:
                raise ValueError(f"choices: {choice!r} is the letter of another choice")
        right_choice(question)
    elif question.grade == "numeric" and number(question.answer) is None:
        raise ValueError(f"answer {question.answer!r} has no number")
    elif question.grade == "regex":
        try:
            regex.compile(question.answer)
        except (regex.error, RecursionError) as error:
            raise ValueError(f"answer {question.answer!r} is no expression: {error}") from None


def right_choice(question: Question) -> str:
    """The letter of the right choice; the answer is that letter or the choice's text."""
    if question.answer in question.choices:
        return LETTERS[question.choices.index(question.answer)]
    if question.answer in LETTERS[: len(question.choices)]:
        return question.answer
    raise ValueError(f"answer {question.answer!r} is none of the choices")


def number(text: str) -> Fraction | None:
    """The last number of a text: 1,234.5, -7, 1e3 or 3/4."""
    every = list(NUMBER.finditer(text))
    if not every:
        return None
    last = every[-1]
    if len(last[0]) > MOST_FIGURES:
        return None
    figures, _, power = (last["plain"] or "").lower().partition("e")
    if abs(int(power or 0)) > MOST_FIGURES or (last["under"] and not int(last["under"])):
        return None
    if last["under"]:
        value = Fraction(int(last["over"]), int(last["under"]))
    else:
        value = Fraction(figures.replace(",", "")) * Fraction(10) ** int(power or 0)
    return -value if last["sign"] in ("-", "\u2212") else value


def chosen(text: str, choices: Sequence[str]) -> str:
    """The letter that a text chooses: it is the choice, or its last letter that stands alone."""
    plain = [choice.strip() for choice in choices]
    if text.strip() in plain:
        return LETTERS[plain.index(text.strip())]
    letters = regex.findall(rf"\b[A-{LETTERS[len(choices) - 1]}]\b", text)
    return letters[-1] if letters else ""


def reduced(text: str, question: Question) -> str:
    """What of a text is graded; texts that agree in it are one vote.  Empty: it says nothing."""
    if question.grade == "numeric":
        found = number(text)
        return "" if found is None else str(found)
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
        try:
            return regex.search(question.answer, said, timeout=REGEX_SECONDS) is not None
        except TimeoutError:
            print(
                f"answer {question.answer!r}: not decided in {REGEX_SECONDS:g} s whether it is in "
                "a text: counted as wrong",
                file=sys.stderr,
            )
            return False
    return said == question.answer.strip()


def vote(said: Sequence[str]) -> str:
    """What most texts say; of equally many, what was said first.  Those without answer abstain."""
    counts = Counter(text for text in said if text)
    return counts.most_common(1)[0][0] if counts else ""

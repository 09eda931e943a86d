"""Questions in harmony: prompts, and what of an answer counts; and the task that asks how many
answers are harmony at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from ossature.data.harmony import CALL, RETURN, Conversation, Message, Parser, Rendering, prompt
from ossature.data.tokenizer import Tokenizer
from ossature.eval.answers import key_of
from ossature.eval.options import TaskOptions
from ossature.eval.puzzles import KINDS, sum_of
from ossature.eval.results import Metric, Outcome
from ossature.eval.subject import Subject
from ossature.sample.options import SamplingOptions
from ossature.sample.request import Request

RENDERING = Rendering("2025-06-28")
"""A day that does not change: the same questions on any day."""
ORDER = ("analysis", "commentary", "final")
ITEMS = 100
WORDS = ["stone", "river", "window", "garden", "letter", "winter", "paper", "summer"]


class Reading(NamedTuple):
    """What a text of the model is, read as harmony."""

    final: str
    """Text of the last message of the channel final; empty if there is none."""
    problem: str
    """The first thing that was not harmony, in words."""
    ended: bool
    """Whether the model stopped by itself."""
    ordered: bool
    """Whether there is one answer, last, and no analysis after it or a call."""


def read(tokens: Sequence[int], tokenizer: Tokenizer) -> Reading:
    """The tokens that follow <|start|>assistant."""
    parser = Parser(tokenizer)
    for token in tokens:
        parser.push(token)
        if parser.ended:
            break
    parser.close()
    channels = [message.channel for message in parser.messages]
    known = all(channel in ORDER for channel in channels)
    ranks = [ORDER.index(channel) for channel in channels] if known else []
    final = [message.text for message in parser.messages if message.channel == "final"]
    last = parser.ended == CALL or channels[-1:] == ["final"]
    ordered = bool(ranks) and ranks == sorted(ranks) and len(final) <= 1 and last
    return Reading(final[-1] if final else "", parser.problem, bool(parser.ended), ordered)


def ask(question: str, options: TaskOptions, tokenizer: Tokenizer) -> list[int]:
    """Tokens after which the model answers."""
    chat = Conversation((Message("user", question),), reasoning_effort=options.effort)
    return prompt(chat, RENDERING, tokenizer)


def stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tokenizer.special[RETURN], tokenizer.special[CALL]


def harmony(subject: Subject, options: TaskOptions) -> Outcome:
    """Draw an answer, at temperature 1, to each of some questions, and see whether it is harmony.

    valid: every message has a header, a channel and its end, and the text ends by itself.
    ordered: analysis, commentary, final, in this order, with the answer or a call at the end.
    """
    draw = Random(f"harmony {options.seed}")
    questions = [_question(draw) for _ in range(options.limit or ITEMS)]
    requests = [
        Request(
            ask(question, options, subject.tokenizer),
            SamplingOptions(
                temperature=1.0, seed=options.seed + n, stop_ids=stops(subject.tokenizer),
                max_new_tokens=options.max_new_tokens,
            ),
        )
        for n, question in enumerate(questions)
    ]  # fmt: skip
    said = [text.tokens for (text,) in subject.texts(requests, "harmony")]
    found = [read(tokens, subject.tokenizer) for tokens in said]
    metrics = {
        "valid": Metric([float(not r.problem and r.ended) for r in found]),
        "ordered": Metric([float(not r.problem and r.ended and r.ordered) for r in found]),
        "ended": Metric([float(r.ended) for r in found]),
        "answered": Metric([float(bool(r.final)) for r in found]),
    }
    details = [
        {"question": q, "text": subject.tokenizer.decode(t), "problem": r.problem}
        for q, t, r in zip(questions, said, found, strict=True)
    ]
    return Outcome(key_of(questions), metrics, details)


def _question(draw: Random) -> str:
    words = draw.sample(WORDS, 3)
    sums, _ = sum_of(draw.choice(KINDS), draw)
    return draw.choice(
        (
            f"What is {sums.removesuffix(' =')}?",
            f"Put these words in order: {', '.join(words)}.",
            f"Say one sentence about a {words[0]}.",
            f"Which is longer, {words[0]} or {words[1]}?",
        )
    )

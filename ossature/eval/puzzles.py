"""Tasks made from a seed: sums in figures, and random tokens that come again.

An answer is right if every token of it, the one that ends it included, is the most probable one:
then greedy decoding gives this answer, and one forward pass shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from ossature.data.tokenizer import Tokenizer
from ossature.eval.answers import key_of
from ossature.eval.likelihood import Row, Score
from ossature.eval.options import TaskOptions
from ossature.eval.results import Metric, Outcome
from ossature.eval.subject import Subject

ITEMS = 200
SHOWN = 4
"""Examples before each sum."""
KINDS = ("add 1 digit", "add 2 digits", "add 3 digits", "subtract 2 digits", "multiply 1 digit")
DISTANCES = (16, 64, 256, 1024)
"""Tokens from one copy to the next."""


def arithmetic(subject: Subject, options: TaskOptions) -> Outcome:
    """Sums of five kinds, each after four examples of its kind."""
    draw = Random(f"arithmetic {options.seed}")
    kinds, rows = [], []
    for n in range(options.limit or ITEMS):
        kinds.append(KINDS[n % len(KINDS)])
        *shown, (question, answer) = (sum_of(kinds[-1], draw) for _ in range(SHOWN + 1))
        examples = "".join(f"{q}{a}" for q, a in shown)
        rows.append(split(subject.tokenizer, examples + question, answer))
    return outcome(subject.scores(rows, "arithmetic"), rows, kinds)


def sum_of(kind: str, draw: Random) -> tuple[str, str]:
    """A question and its answer, such as "17 + 25 =" and " 42" with a line feed."""
    verb, digits, _ = kind.split()
    low, high = 10 ** (int(digits) - 1), 10 ** int(digits) - 1
    a, b = draw.randint(low, high), draw.randint(low, high)
    sign, value = {
        "add": ("+", a + b), "subtract": ("-", a - b), "multiply": ("*", a * b),
    }[verb]  # fmt: skip
    return f"{a} {sign} {b} =", f" {value}\n"


def copying(subject: Subject, options: TaskOptions) -> Outcome:
    """Random tokens, twice: how many of the second copy are found (arXiv 2209.11895).

    All but the first of them are asked: only what comes before says where one is.
    """
    draw = Random(f"copying {options.seed}")
    special = set(subject.tokenizer.special.values())
    size = min(subject.model.config.vocab_size, subject.tokenizer.vocab_size)
    plain = [n for n in range(size) if n not in special]
    longest = subject.model.config.max_position_embeddings
    distances = [d for d in DISTANCES if 2 * d <= longest]
    if not distances:
        raise ValueError(
            f"copying: the model's max_position_embeddings ({longest}) must be at least "
            f"{2 * DISTANCES[0]}"
        )
    kinds, rows = [], []
    for n in range(options.limit or 40):
        distance = distances[n % len(distances)]
        tokens = [draw.choice(plain) for _ in range(distance)]
        kinds.append(f"{distance} tokens away")
        rows.append(Row([*tokens, tokens[0]], tokens[1:]))
    return outcome(subject.scores(rows, "copying"), rows, kinds, whole=False)


def split(tokenizer: Tokenizer, context: str, continuation: str) -> Row:
    """Tokens of both as they are of the whole text."""
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    return Row(whole[: len(before)], whole[len(before) :])


def outcome(
    scores: Sequence[Score], rows: Sequence[Row], kinds: Sequence[str], whole: bool = True
) -> Outcome:
    """Accuracy and nats a token, of all rows and of each kind.

    Args:
        whole: a row counts if all of its tokens are right; else its share of right tokens does.
    """
    sizes = [len(row.continuation) for row in rows]
    if whole:
        right = [float(score.missed == 0) for score in scores]
    else:
        right = [1 - score.missed / size for score, size in zip(scores, sizes, strict=True)]
    nats = [-score.logprob / size for score, size in zip(scores, sizes, strict=True)]
    metrics = {"accuracy": Metric(right), "nats_per_token": Metric(nats, sizes)}
    for kind in dict.fromkeys(kinds):
        values = [value for value, other in zip(right, kinds, strict=True) if other == kind]
        metrics[f"accuracy, {kind}"] = Metric(values)
    asked = key_of([[list(row.context), list(row.continuation)] for row in rows])
    return Outcome(asked, metrics)

"""A number in a long text: is it found, however long the text is and wherever the number stands?

As in RULER (arXiv 2404.06654, section 3.1), single needle: a text of sentences that say nothing,
one sentence that says the number of a thing, and the question for that number at the end.  Other
sentences say the numbers of other things, so that the last number of the text is no answer.  All
of it is made from a seed, in the tokens of the model, to the token: a text of 131,072 tokens has
131,072 with its question and answer.

A row is one forward pass.  It holds a few tensors of length x hidden at a time, and logits of the
answer alone: benchmarks/needle.py states how much that is, and measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from random import Random

from ossature.data.tokenizer import Tokenizer
from ossature.eval.likelihood import Row
from ossature.eval.options import TaskOptions
from ossature.eval.puzzles import outcome, split
from ossature.eval.results import Outcome
from ossature.eval.subject import Subject

LENGTHS = (1024, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
EACH = 4
"""Needles at each length and depth, unless `limit` leaves fewer."""
OTHERS = 3
"""Numbers of other things in the text."""
COLOURS = ["red", "blue", "green", "grey", "black", "white", "brown", "golden"]
THINGS = ["door", "lamp", "boat", "clock", "coat", "drum", "flag", "horn", "kite", "mask"]
QUIET = (
    "The {a} {b} stands beside the {c} {d}.", "Nobody has moved the {a} {b} for a long time.",
    "Somebody left a {a} {b} under the {c} {d}.", "Later the {a} {b} was put away again.",
)  # fmt: skip


def needle(subject: Subject, options: TaskOptions, argument: str) -> Outcome:
    """All lengths with all depths."""
    most = subject.model.config.max_position_embeddings
    lengths = lengths_of(argument) or [n for n in LENGTHS if n <= most]
    for length in lengths:
        if length > most:
            raise ValueError(
                f"needle: {length} tokens are more than max_position_embeddings ({most})"
            )
    cells = list(product(lengths, DEPTHS))
    each = EACH if not options.limit else -(-options.limit // len(cells))
    rows, kinds = [], []
    asked = [(cell, n) for n in range(each) for cell in cells]  # a limit leaves out the last ones
    for (length, depth), n in asked[: options.limit or None]:
        draw = Random(f"needle {options.seed} {length} {depth} {n}")
        rows.append(haystack(subject.tokenizer, length, depth, draw))
        kinds.append(f"{length} tokens, depth {depth:.0%}")
    return outcome(subject.scores(rows, "needle"), rows, kinds)


def lengths_of(argument: str) -> list[int]:
    """Of "4096,131072".

    Raises:
        ValueError: not a list of whole numbers from 128 up.
    """
    try:
        lengths = [int(word) for word in argument.split(",")] if argument else []
        if any(length < 128 for length in lengths):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"needle:{argument}: give lengths in tokens, from 128 up, such as needle:4096,131072"
        ) from None
    return lengths


def haystack(tokenizer: Tokenizer, length: int, depth: float, draw: Random) -> Row:
    """A text of `length` tokens, the answer included, with its needle at a depth.

    Args:
        depth: share of the other sentences that stand before the needle.
    """
    names = draw.sample([f"{a} {b}" for a, b in product(COLOURS, THINGS)], OTHERS + 1)
    numbers = draw.sample(range(10_000, 100_000), OTHERS + 1)
    told = [tokenizer.encode(f" The number of the {a} is {n}.")
            for a, n in zip(names, numbers, strict=True)]  # fmt: skip
    question = f" What is the number of the {names[0]}? The number of the {names[0]} is"
    end = split(tokenizer, question, f" {numbers[0]}.")
    left = length - sum(map(len, told)) - len(end.context) - len(end.continuation)
    if left < 0:
        raise ValueError(
            f"needle: {length} tokens are too few for this tokenizer: question, answer and needles "
            f"take {length - left}"
        )
    # Few different sentences, each encoded once: a long text takes no time to make.
    pool = [tokenizer.encode(" " + _quiet(draw)) for _ in range(64)]
    hay: list[list[int]] = []
    while left:
        hay.append(draw.choice(pool)[-left:])  # the one that fills the text up lacks its beginning
        left -= len(hay[-1])
    hay.reverse()
    places = sorted(draw.randrange(len(hay) + 1) for _ in range(OTHERS))
    for place, other in zip(reversed(places), told[1:], strict=True):
        hay.insert(place, other)
    hay.insert(round(depth * len(hay)), told[0])
    return Row([token for sentence in hay for token in sentence] + list(end.context),
               end.continuation)  # fmt: skip


def _quiet(draw: Random) -> str:
    words = (*draw.sample(COLOURS, 2), *draw.sample(THINGS, 2))
    return draw.choice(QUIET).format(a=words[0], b=words[2], c=words[1], d=words[3])


def plot(found: Outcome, path: Path) -> None:
    """Write the share that was found by depth and length, as an SVG."""
    cells = {
        tuple(name.removeprefix("accuracy, ").split(" tokens, depth ")): metric.summary()["value"]
        for name, metric in found.metrics.items()
        if " tokens, depth " in name
    }
    lengths, depths = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    path.write_text(_svg(cells, lengths, depths), encoding="utf-8")


def _svg(cells: dict[tuple[str, ...], float], lengths: Sequence[str], depths: Sequence[str]) -> str:
    wide, high, left, top = 84, 34, 62, 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" '
        f'width="{left + wide * len(lengths) + 8}" height="{top + high * len(depths) + 8}">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="6" y="20">depth</text>',
    ]
    for x, length in enumerate(lengths):
        middle = left + wide * x + wide / 2
        parts.append(f'<text x="{middle}" y="20" text-anchor="middle">{int(length):,}</text>')
    for y, depth in enumerate(depths):
        line = top + high * y
        parts.append(f'<text x="6" y="{line + 22}">{depth}</text>')
        for x, length in enumerate(lengths):
            share = cells.get((length, depth))
            if share is None:  # a limit left it out
                continue
            # From red over yellow to green.
            parts.append(
                f'<rect x="{left + wide * x}" y="{line}" width="{wide - 2}" height="{high - 2}" '
                f'fill="hsl({120 * share:.0f} 60% 75%)"/>'
                f'<text x="{left + wide * x + wide / 2}" y="{line + 21}" text-anchor="middle">'
                f"{share:.0%}</text>"
            )
    return "\n".join([*parts, "</svg>\n"])

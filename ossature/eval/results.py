"""What an evaluation has found: its file, its table, and two files compared.  No torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ossature.eval.statistics import bootstrap, mean, sign_test

FORMAT = 1


@dataclass(frozen=True)
class Metric:
    """A value for each item of a task, and what they come to."""

    values: Sequence[float]
    weights: Sequence[int | float] | None = None
    """Of the values in their mean; None: all the same."""
    whole: tuple[float, float, float] | None = None
    """Value, low and high where they are no mean of the values."""
    items: int = 0
    """How many there are, where none has a value of its own (f1, say)."""

    def summary(self) -> dict[str, Any]:
        value, low, high = self.whole or mean(self.values, self.weights)
        return {"value": value, "low": low, "high": high, "count": len(self.values) or self.items}


@dataclass(frozen=True)
class Outcome:
    """What one task has found."""

    fingerprint: str
    """Hash of the questions: files are only compared if they asked the same."""
    metrics: Mapping[str, Metric]
    details: list[dict[str, Any]] = field(default_factory=list)
    """What was asked and said, an entry an item, where a person may want to read it."""


def to_json(model: str, settings: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> dict:
    tasks = {}
    for name, outcome in outcomes.items():
        tasks[name] = {
            "fingerprint": outcome.fingerprint,
            "metrics": {key: metric.summary() for key, metric in outcome.metrics.items()},
            "items": {
                key: {"values": list(metric.values)}
                | ({} if metric.weights is None else {"weights": list(metric.weights)})
                for key, metric in outcome.metrics.items()
            },
            "details": outcome.details,
        }
    return {"format": FORMAT, "model": model, "settings": dict(settings), "tasks": tasks}


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Write a file of results, whole or not at all."""
    beside = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        text = json.dumps(finite(results), ensure_ascii=False, allow_nan=False)
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> dict[str, Any]:
    """A file of results; null is read as a number that is none.

    Raises:
        ValueError: it is none; names the file and the key that is missing.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or "tasks" not in found:
        raise ValueError(f"{path}: not a file of `ossature eval --output`")
    try:
        for task in found["tasks"].values():
            _ = task["fingerprint"]
            for metric, summary in task["metrics"].items():
                summary |= {key: _number(summary[key]) for key in ("value", "low", "high")}
                items = task["items"][metric]
                items |= {key: list(map(_number, items[key])) for key in items}
                if len(items.get("weights", items["values"])) != len(items["values"]):
                    raise ValueError(f"as many weights as values of {metric}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: damaged: {error!r}") from None
    return found


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def table(results: Mapping[str, Any]) -> Iterator[str]:
    """A line for every metric, with its 95 % interval."""
    rows: list[tuple[str, ...]] = [("task", "metric", "value", "95 % interval", "items")]
    for name, task in results["tasks"].items():
        for metric, found in task["metrics"].items():
            interval = _interval(found["low"], found["high"], ".4f")
            rows.append((name, metric, f"{found['value']:.4f}", interval, str(found["count"])))
    return _aligned(rows)


def compare(a: Path, b: Path) -> Iterator[str]:
    """Differences b - a, item by item, with a sign test: a line for every metric.

    Raises:
        ValueError: the files are not of the same tasks and questions; names the first difference.
    """
    one, other = read(a), read(b)
    for first, second, names in ((a, b, (one, other)), (b, a, (other, one))):
        missing = [name for name in names[0]["tasks"] if name not in names[1]["tasks"]]
        if missing:
            raise ValueError(f"{second}: lacks task {missing[0]}, which {first} has")
    for key in dict.fromkeys([*one.get("settings", {}), *other.get("settings", {})]):
        values = [side.get("settings", {}).get(key) for side in (one, other)]
        if values[0] != values[1]:
            yield f"{key}: {values[0]!r} in A, {values[1]!r} in B"
    rows: list[tuple[str, ...]] = [
        ("task", "metric", "A", "B", "B-A", "interval", "higher", "lower", "same", "p")
    ]
    for name, task in one["tasks"].items():
        twin = other["tasks"][name]
        if task["fingerprint"] != twin["fingerprint"]:
            raise ValueError(f"{b}: task {name} asked other questions than in {a}")
        if task["items"].keys() != twin["items"].keys():
            odd = sorted(task["items"].keys() ^ twin["items"].keys())[0]
            raise ValueError(f"{b}: task {name}: only one of the files has the metric {odd}")
        for metric, items in task["items"].items():
            before, after = items["values"], twin["items"][metric]["values"]
            if len(before) != len(after):
                raise ValueError(
                    f"{b}: task {name}, metric {metric}: {len(after)} items, {a} has {len(before)}"
                )
            rows.append((name, metric, *_paired(before, after, task, twin, metric, items)))
    yield from _aligned(rows)


def _paired(before, after, task, twin, metric, items) -> tuple[str, ...]:
    a, b = (side["metrics"][metric]["value"] for side in (task, twin))
    numbers = f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}"
    if not before:
        return *numbers, *("-",) * 5
    differences = [late - early for early, late in zip(before, after, strict=True)]
    higher, lower = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    found = bootstrap(differences, items.get("weights"))
    # A perplexity is no mean over items: of its difference they give no interval.
    is_mean = math.isclose(found.value, b - a, rel_tol=1e-6, abs_tol=1e-9)
    return (
        *numbers,
        _interval(found.low, found.high, "+.4f") if is_mean else "-",
        *map(str, (higher, lower, len(differences) - higher - lower)),
        f"{sign_test(higher, lower):.3g}",
    )


def _interval(low: float, high: float, form: str) -> str:
    return "-" if math.isnan(low) or math.isnan(high) else f"{low:{form}} - {high:{form}}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Texts to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if n < 2 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()

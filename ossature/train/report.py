"""`ossature report RUN`: a run's curves, expert load and samples as one page without a network.

Reads metrics.jsonl, samples.jsonl and run.json, and fills `report.html`, which draws.  No torch.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from ossature.config import parse
from ossature.train.metrics import Record, read_records

POINTS = 600
"""Points of a curve; more steps are taken together, with their least and greatest value."""
COLUMNS = 120
"""Columns of the map of expert load over time."""
SAMPLES = 60
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"

CURVES = (
    ("loss", "Loss", "cross-entropy per counted token, nats"),
    ("lr", "Learning rate", ""),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("tokens_per_second", "Throughput", "tokens per second"),
    ("mfu", "MFU", "share of the device's peak"),
    ("memory_bytes", "Memory", "GiB on the first rank"),
    ("router_loss", "Router losses", "coefficients included"),
    ("loss_scale", "Loss scale", "fp16"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    run: Positional[Path]
    """Folder of a training run."""
    output: Path | None = None
    """The page; default: report.html in the run's folder."""


def main(argv: list[str]) -> int:
    options = parse(Options, argv, prog="ossature report")
    path = options.output or options.run / "report.html"
    page = report(options.run)
    path.write_text(page, encoding="utf-8")
    print(f"wrote {path} ({len(page.encode()) / 1024:,.0f} KiB)")
    return 0


def report(run: Path) -> str:
    """The page of a run.

    Raises:
        ValueError: the folder is not one of a run, or its run has not finished a step.
    """
    if not (run / "metrics.jsonl").is_file():
        raise ValueError(f"{run}: not a run: it has no metrics.jsonl")
    records = read_records(run / "metrics.jsonl")
    if not records:
        raise ValueError(f"{run}: no step is finished yet")
    config = json.loads((run / "run.json").read_text(encoding="utf-8"))
    data = {
        "curves": curves(records),
        "validation": [
            [r["step"], r["validation_loss"]] for r in records if r.get("validation_loss")
        ],
        "router": router(records),
        "skipped": skipped(records),
        "steps": config["steps"],
    }
    said = read_records(run / "samples.jsonl")
    template = files("ossature.train").joinpath("report.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(run.resolve().name),
        "FACTS": facts(records, config),
        "SAMPLES": samples(said[-SAMPLES:]),
        "CONFIG": settings(config),
        # A text of the run may hold "</script>".
        "DATA": json.dumps(data, separators=(",", ":")).replace("</", "<\\/"),
    }
    # In one pass: a sample may hold what looks like a place to fill.
    return re.sub(r"@([A-Z]+)@", lambda match: parts[match[1]], template)


def curves(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every curve that has a value: its points as [step, mean, least, greatest]."""
    made = []
    for key, title, unit in CURVES:
        scale = 2**-30 if key == "memory_bytes" else 1.0
        points = [(r["step"], r[key] * scale) for r in records if r.get(key) is not None]
        if points:
            made.append({"key": key, "title": title, "unit": unit, "points": thin(points)})
    asked = [(r["step"], r["eval"]) for r in records if "eval" in r]
    # Kinds of a task's questions, which have a comma in their name, would be too many.
    for name in dict.fromkeys(name for _, values in asked for name in values if ", " not in name):
        points = [(n, values[name]) for n, values in asked if values.get(name) is not None]
        if points:
            task = {
                "key": f"eval/{name}",
                "title": name.replace("/", ": "),
                "unit": "all questions",
            }
            made.append({**task, "points": thin(points)})
    return made


def thin(points: list[tuple[int, float]]) -> list[tuple[int, float, float, float]]:
    """At most POINTS points: the last step of each group, its mean, least and greatest value."""
    size = -(-len(points) // POINTS)
    groups = [points[n : n + size] for n in range(0, len(points), size)]
    thinned = []
    for group in groups:
        values = [value for _, value in group]
        mean = sum(values) / len(values)
        thinned.append((group[-1][0], _short(mean), _short(min(values)), _short(max(values))))
    return thinned


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def router(records: Sequence[Record]) -> dict[str, Any] | None:
    """Load of every expert over time, one character a number: tenths of the mean load, up to 35."""
    logged = [r for r in records if "router" in r]
    if not logged:
        return None
    size = -(-len(logged) // COLUMNS)
    groups = [logged[n : n + size] for n in range(0, len(logged), size)]
    layers, experts = len(logged[0]["router"]["load"]), len(logged[0]["router"]["load"][0])
    return {
        "steps": [group[-1]["step"] for group in groups],
        "experts": experts,
        # One text a layer and time: a character an expert.
        "load": [
            ["".join(_mean_load(group, layer, expert) for expert in range(experts))
             for group in groups]
            for layer in range(layers)
        ],
        "entropy": [
            [_short(sum(r["router"]["entropy"][layer] for r in group) / len(group))
             for group in groups]
            for layer in range(layers)
        ],
    }  # fmt: skip


def _mean_load(group: list[Record], layer: int, expert: int) -> str:
    mean = sum(r["router"]["load"][layer][expert] for r in group) / len(group)
    return DIGITS[min(35, round(10 * mean))]


def skipped(records: Sequence[Record]) -> list[int]:
    """Steps that were skipped for a loss or gradient that was not finite."""
    before = [0, *(r["skipped_steps"] for r in records)]
    return [r["step"] for r, n in zip(records, before, strict=False) if r["skipped_steps"] > n]


def facts(records: Sequence[Record], config: dict[str, Any]) -> str:
    """The numbers a person looks for first."""
    last = records[-1]
    losses = [r["loss"] for r in records[-10:] if r["loss"] is not None]
    seconds = sum(r["seconds"] for r in records)
    tiles = [
        ("step", f"{last['step']:,} of {config['steps']:,}"),
        ("loss, last 10 steps", f"{sum(losses) / len(losses):.4f}" if losses else "not finite"),
    ]
    validation = [r["validation_loss"] for r in records if r.get("validation_loss")]
    if validation:
        tiles.append(("validation loss", f"{validation[-1]:.4f}"))
    rate = sum(r["tokens_per_second"] * r["seconds"] for r in records) / seconds
    tiles += [
        ("tokens", f"{last['tokens']:,}"),
        ("tokens per second", f"{rate:,.0f}"),
        ("time in steps", _clock(seconds)),
        ("steps skipped", f"{last['skipped_steps']:,}"),
        ("model", str(config["model"])),
    ]
    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in tiles
    )


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def samples(said: Sequence[Record]) -> str:
    """Newest first, grouped by step."""
    if not said:
        return "<p class=none>No samples: sample.every_steps is 0, or none was due yet.</p>"
    blocks = []
    for step in sorted({entry["step"] for entry in said}, reverse=True):
        texts = "".join(
            f"<pre><b>{html.escape(entry['prompt'])}</b>{html.escape(entry['text'])}</pre>"
            for entry in said
            if entry["step"] == step
        )
        blocks.append(f"<h3>step {step:,}</h3>{texts}")
    newest, *older = blocks
    if not older:
        return newest
    return f"{newest}<details><summary>earlier samples</summary>{''.join(older)}</details>"


def settings(config: dict[str, Any]) -> str:
    return "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(json.dumps(value))}</td></tr>"
        for key, value in config.items()
    )

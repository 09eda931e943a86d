"""Memory of frozen experts with adapters, by formula: `ossature.kernels.frozen_experts`."""

from __future__ import annotations

from ossature.parallel.sizes import BRIEF, KEPT, Bytes, Ledger, Sizes


def kept_by_experts(s: Sizes) -> Bytes:
    """Rows as adapters need them, their order and weights, both pre-activations, the inner rows."""
    kept = s.routed * (8 + s.item + s.low("gate_up", "down")) + 2 * s.inner
    kept += s.row if "gate_up" in s.config.lora.targets else 0
    kept += s.inner if "down" in s.config.lora.targets else 0
    if s.config.lora.dora:
        kept += 2 * s.inner if "gate_up" in s.config.lora.targets else 0
        kept += s.row if "down" in s.config.lora.targets else 0
    return kept


def unpacked(s: Sizes) -> Bytes:
    """Of packed matrices, what exists as numbers at a time: one expert's on CPU, else a layer's."""
    if s.config.lora.base != "mxfp4":
        return 0.0
    axes, shape = s.config.parallel, s.shape
    number = 2 * shape.hidden_size * shape.intermediate_size // axes.etp
    return number * s.item * (shape.num_local_experts // axes.ep if s.cuda else 1)


def experts(m: Ledger, s: Sizes) -> None:
    """Rows -> what their experts found, BRIEF."""
    later = kept_by_experts(s) - 2 * s.inner
    m.take(BRIEF, s.row)
    m.take(KEPT, 2 * s.inner)
    m.pass_by(BRIEF, unpacked(s), 2 * s.inner if s.cuda else 0)
    m.pass_by(BRIEF, 4 * s.inner)  # gate, up, what comes of them
    m.take(KEPT, later)
    m.pass_by(BRIEF, s.inner, s.row, unpacked(s) / 2, s.row if s.cuda else 0)


def experts_backward(m: Ledger, s: Sizes) -> None:
    """Beside the gradients of what came out and of the rows."""
    m.pass_by(BRIEF, s.inner, unpacked(s) / 2, s.inner if s.cuda else 0)
    m.pass_by(BRIEF, 9 * s.inner)  # halves, gradients of halves, put together
    m.pass_by(BRIEF, 2 * s.inner, unpacked(s), s.row if s.cuda else 0)

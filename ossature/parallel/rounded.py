"""Memory of experts whose products are in 8 bits, by formula: `ossature.parallel.float8`.

Attention's projections keep what plain ones keep: torchao saves inputs as they were, and rounds
them again in the backward pass.
"""

from __future__ import annotations

from ossature.parallel.sizes import BRIEF, KEPT, Bytes, Ledger, Sizes


def filled(s: Sizes) -> float:
    """Rows of a grouped product, filled up for each expert, over those there are."""
    if not s.cuda:
        return 1.0
    multiple = 32 if s.config.float8 == "mxfp8" else 16
    experts = s.shape.num_local_experts // s.config.parallel.ep
    return 1 + experts * (multiple - 1) / s.routed


def kept_by_experts(s: Sizes) -> Bytes:
    """Both inputs of products; gate and up; of each row its order, weight, expert and bias of
    `down`; on CUDA its places among those that are filled up, for both products."""
    numbers = s.routed * (8 + s.item + 8 + (16 if s.cuda else 0))
    return filled(s) * (s.row + s.inner) + 2 * s.inner + s.row + numbers


def matrices(s: Sizes) -> Bytes:
    """The larger matrix of a rank's experts, rounded; one expert's at a time where emulated."""
    axes, shape = s.config.parallel, s.shape
    experts = shape.num_local_experts // axes.ep if s.cuda else 1
    return 2 * shape.intermediate_size // axes.etp * shape.hidden_size * experts


def experts(m: Ledger, s: Sizes) -> None:
    """Rows -> what their experts found, BRIEF."""
    more = filled(s)
    m.take(KEPT, kept_by_experts(s))
    m.take(BRIEF, s.row)  # before they were filled up
    m.pass_by(BRIEF, (2 + more) * s.inner, more * s.row / s.item, matrices(s))
    m.pass_by(BRIEF, (1 + more) * s.row, more * s.inner / s.item)
    m.give(BRIEF, s.row)
    m.take(BRIEF, s.row)


def experts_backward(m: Ledger, s: Sizes) -> None:
    """Gradients of what was found, and of their inputs, are there; matrices' are counted too."""
    more = filled(s)
    rounded = 2 * more * 2 * s.inner / s.item + matrices(s)
    m.pass_by(BRIEF, (2 + 2 * more) * s.inner, more * s.row, rounded)

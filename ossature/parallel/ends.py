"""Memory of a model's two ends by formula: the embedding, and the head with its loss."""

from __future__ import annotations

from ossature.kernels.cross_entropy import _WIDE_LOGITS, default_chunk_tokens
from ossature.parallel.activations import norm, norm_backward
from ossature.parallel.sizes import BRIEF, GRADIENTS, KEPT, LOSS, Bytes, Ledger, Sizes


def head(m: Ledger, s: Sizes, vocab: int, whole_vocab: int) -> None:
    """The last norm and the loss: its gradients are found at once, and kept.

    Args:
        vocab: rows of this rank.
    """
    norm(m, s)
    tp, hidden = s.config.parallel.tp, s.shape.hidden_size
    if tp > 1:
        m.take(KEPT, s.whole_x)
        m.pass_by(BRIEF, s.whole_x)
        m.give(KEPT, s.x)
    m.take(LOSS, s.whole_x)
    learns = not s.config.lora.rank
    if learns:
        m.take(LOSS, vocab * hidden * 4)
    gathers = tp > 1 and not s.config.parallel.loss_parallel
    size = -(-whole_vocab // tp)
    chunk = min(default_chunk_tokens(s.device, whole_vocab if gathers else size), s.attended)
    m.take(LOSS, chunk * vocab * s.item)
    cast = 2 if s.item == 2 else 1
    if tp == 1:
        rows = min(chunk, max(1, _WIDE_LOGITS[s.device] // vocab))
        m.pass_by(LOSS, rows * vocab * 4 * cast)
    elif gathers:
        rows = min(chunk, max(1, _WIDE_LOGITS[s.device] // whole_vocab))
        m.take(LOSS, 2 * chunk * size * tp * s.item)
        m.pass_by(LOSS, rows * whole_vocab * 4 * cast)
        m.give(LOSS, 2 * chunk * size * tp * s.item)
    else:
        m.pass_by(LOSS, chunk * vocab * 4 * (cast - 1))
    if learns:
        m.pass_by(LOSS, 4096 * hidden * 4)
    if s.item == 2 and learns:
        m.take(LOSS, vocab * hidden * s.item)
        m.give(LOSS, vocab * hidden * 4)
    m.give(LOSS, chunk * vocab * s.item)


def head_backward(m: Ledger, s: Sizes, weight: Bytes) -> None:
    """The loss -> the gradient of the last block's output, BRIEF.

    Args:
        weight: bytes of the head's gradient.
    """
    tp = s.config.parallel.tp
    m.take(BRIEF, s.whole_x)
    m.take(GRADIENTS, weight)
    m.give(LOSS, s.whole_x + (0 if s.config.lora.rank else weight))
    m.give(KEPT, s.whole_x)
    if tp > 1:
        m.pass_by(BRIEF, s.whole_x + s.x)
        m.give(BRIEF, s.whole_x - s.x)
    norm_backward(m, s)
    m.give(KEPT, s.x)

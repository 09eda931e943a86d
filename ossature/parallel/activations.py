"""Memory of activations by formula: what every part of a block takes, keeps and gives back.

The functions go through a block as its code does, forward and backward, and tell a `Ledger` of
every tensor whose size grows with the tokens.  A tensor is written down where it is made and
crossed out where its last holder lets go of it: autograd's nodes hold what they save until they
have run, Python's frames hold arguments and locals until they return.  There is nothing to adjust.

Kernels differ by device, and so do the bytes: `cpu` is what tests measure, `cuda` what plans are
made for.  Experts are taken to be chosen evenly.  `ossature.parallel.memory` puts blocks together.
"""

from __future__ import annotations

from dataclasses import dataclass

from ossature.config import TrainConfig
from ossature.kernels.cross_entropy import _WIDE_LOGITS, default_chunk_tokens
from ossature.model.config import ModelConfig

KEPT, BRIEF, LOSS = "activations", "temporary", "loss"
GRADIENTS = "gradients, whole"
"""Of the weights as they are gathered, before they are reduced."""


class Ledger:
    """Bytes held, by what they are for; and how they were when there were most of them."""

    def __init__(self) -> None:
        self.held: dict[str, float] = {}
        self.total = 0.0
        self.peak = 0.0
        self.at_peak: dict[str, float] = {}

    def take(self, what: str, size: float) -> None:
        self.held[what] = self.held.get(what, 0.0) + size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.held)

    def give(self, what: str, size: float) -> None:
        self.held[what] = self.held.get(what, 0.0) - size
        self.total -= size

    def pass_by(self, what: str, *sizes: float) -> None:
        """Taken together and given back at once."""
        self.take(what, sum(sizes))
        self.give(what, sum(sizes))

    def move(self, what: str, to: str, size: float) -> None:
        self.held[what] -= size
        self.held[to] = self.held.get(to, 0.0) + size


@dataclass(frozen=True)
class Sizes:
    """Numbers of one micro-batch on one rank, and of its part of the model."""

    config: TrainConfig
    shape: ModelConfig
    device: str
    """"cpu" or "cuda": whose kernels."""
    sums: bool = True
    """Whether the routers' statistics are taken, as on every step that is logged."""

    @property
    def item(self) -> int:
        """Bytes of a number in the precision of the computation."""
        return 4 if self.config.precision == "fp32" else 2

    @property
    def cuda(self) -> bool:
        return self.device != "cpu"

    @property
    def rows(self) -> int:
        return self.config.micro_batch_tokens // self.config.data.seq_len

    @property
    def attended(self) -> int:
        """Tokens whose queries a rank has: attention sees the whole of what tp divides."""
        return self.config.micro_batch_tokens // self.config.parallel.cp

    @property
    def tokens(self) -> int:
        """Tokens that a rank has between blocks."""
        return self.attended // self.config.parallel.tp

    @property
    def routed(self) -> int:
        """Rows of a rank's experts."""
        return self.tokens * self.config.parallel.etp * self.shape.num_experts_per_tok

    @property
    def x(self) -> float:
        """What goes from block to block."""
        return self.tokens * self.shape.hidden_size * self.item

    @property
    def whole_x(self) -> float:
        """The same where tp does not divide it."""
        return self.x * self.config.parallel.tp

    @property
    def heads(self) -> int:
        return self.shape.num_attention_heads // self.config.parallel.tp

    @property
    def q(self) -> float:
        return self.attended * self.heads * self.shape.head_dim * self.item

    @property
    def k(self) -> float:
        kv_heads = self.shape.num_key_value_heads // self.config.parallel.tp
        return self.attended * kv_heads * self.shape.head_dim * self.item

    @property
    def lse(self) -> float:
        return self.attended * self.heads * 4

    @property
    def row(self) -> float:
        """One row for each choice, `hidden` wide."""
        return self.routed * self.shape.hidden_size * self.item

    @property
    def inner(self) -> float:
        """One row for each choice, as wide as a rank's part of an expert."""
        return self.routed * self.shape.intermediate_size // self.config.parallel.etp * self.item

    @property
    def widened(self) -> float:
        """fp32 numbers of a norm that exist at a time."""
        numbers = self.tokens * self.shape.hidden_size
        return 4 * (numbers if self.cuda else min(numbers, 2**17))

    def slides(self, layer: int) -> bool:
        """Whether a layer is computed as one with a window."""
        window = self.shape.window(layer)
        return window is not None and window < self.config.data.seq_len


@dataclass(frozen=True)
class Gradients:
    """Bytes of the gradients of a block's weights, in the precision of the computation."""

    o_proj: float
    qkv: float
    router: float
    experts: float
    norms: float


def norm(m: Ledger, s: Sizes) -> None:
    """x -> the normed x, which goes on being held as KEPT; its scale too."""
    m.take(KEPT, s.x + s.tokens * 4)
    m.pass_by(BRIEF, s.widened * (2 if s.item == 4 else 3))


def norm_backward(m: Ledger, s: Sizes) -> None:
    """Gradient of the normed x, BRIEF -> that of x beside it; what the norm kept is let go of."""
    m.take(BRIEF, s.x)
    m.pass_by(BRIEF, s.widened * (3 if s.item == 4 else 4))
    m.give(BRIEF, s.x)
    m.give(KEPT, s.tokens * 4)


def attention(m: Ledger, s: Sizes, layer: int) -> None:
    """x + attention(norm(x)); what comes out is KEPT, as is all that the backward pass needs."""
    tp = s.config.parallel.tp
    norm(m, s)
    if tp > 1:
        m.take(KEPT, s.whole_x)
        m.pass_by(BRIEF, s.whole_x)
        m.give(KEPT, s.x)
    for size in (s.q, s.k):
        m.take(BRIEF, size)
        m.pass_by(BRIEF, 2 * size)
        m.take(KEPT, size)
        m.give(BRIEF, size)
        if s.item == 2:  # cos and sin, cast
            m.take(KEPT, s.attended * s.shape.head_dim * s.item)
    m.take(KEPT, s.k)
    core(m, s, layer)
    m.take(BRIEF, s.whole_x)
    if tp > 1:
        m.pass_by(BRIEF, s.whole_x + s.x)
        m.give(BRIEF, s.whole_x - s.x)
    m.take(KEPT, s.x)
    m.give(BRIEF, s.x)


def halo(s: Sizes) -> float:
    """Tokens before a rank's chunks, as a share of its own."""
    return 2 * s.rows * (s.shape.sliding_window - 1) / s.attended


def core(m: Ledger, s: Sizes, layer: int) -> None:
    """Queries, keys and values -> what the heads found: KEPT, with its logsumexp."""
    cp, slides = s.config.parallel.cp, s.slides(layer)
    q, k, lse = s.q, s.k, s.lse
    if cp > 1 and slides:
        more = 1 + halo(s)
        m.take(BRIEF, 2 * k)
        m.pass_by(BRIEF, 2 * k * more)  # own and received
        q, k, lse = q * more, k * more, lse * more
        m.take(KEPT, 2 * k)
        m.give(BRIEF, 2 * s.k)
    elif cp > 1:
        m.take(BRIEF, 2 * k)
        m.pass_by(BRIEF, 4 * k * cp)
        m.give(BRIEF, 2 * k)
        m.take(KEPT, 2 * k * cp)
        k *= cp
    if s.cuda:
        m.take(KEPT, q + lse)  # flex_attention's
        m.take(KEPT, lse)  # the share that the sink leaves
        m.pass_by(BRIEF, 2 * q if s.item == 2 else 0, lse)
        m.take(KEPT, q)
    elif slides:
        if cp > 1:
            m.take(KEPT, q)  # with the halo's
            m.give(KEPT, 0)
        m.take(KEPT, lse)
        m.take(BRIEF, 4 * k)
        m.pass_by(BRIEF, k)
        m.take(BRIEF, q)
        m.pass_by(BRIEF, 2 * lse)
        m.give(BRIEF, 4 * k)
        m.take(KEPT, q)
        m.give(BRIEF, q)
        if cp > 1:
            m.take(KEPT, s.q)
    elif cp > 1:
        m.take(KEPT, q + lse)
        m.pass_by(BRIEF, q, q / 2 if s.item == 2 else 0)
    else:
        m.take(KEPT, q + lse)
        m.pass_by(BRIEF, q, 2 * lse)
    if cp > 1:  # the rotated ones have been copied
        m.give(KEPT, 2 * s.k + (s.q if slides and not s.cuda else 0))


def kept_by_core(s: Sizes, layer: int) -> float:
    """What `core` adds to KEPT."""
    m = Ledger()
    core(m, s, layer)
    return m.held[KEPT]


def attention_backward(m: Ledger, s: Sizes, layer: int, g: Gradients) -> None:
    """Gradient of what `attention` returned, BRIEF -> that of x, in its place."""
    tp, cp, slides = s.config.parallel.tp, s.config.parallel.cp, s.slides(layer)
    if tp > 1:
        m.take(BRIEF, s.whole_x)
        m.pass_by(BRIEF, s.whole_x)
    m.take(GRADIENTS, g.o_proj)
    m.take(BRIEF, s.q)  # of the heads
    if tp > 1:
        m.give(BRIEF, s.whole_x)
    q, k = s.q, s.k
    if cp > 1:
        k *= 1 + halo(s) if slides else cp
        q *= 1 + halo(s) if slides and not s.cuda else 1
    grown = q + 2 * k - s.q - 2 * s.k
    wide = 4 / s.item
    m.take(BRIEF, q + 2 * k)
    if s.cuda:
        m.pass_by(BRIEF, 2 * s.q * wide)
    elif slides:
        m.pass_by(BRIEF, 4 * k + q, q + 2 * k)
    elif cp > 1:
        m.pass_by(BRIEF, (q + 2 * k) * (wide if s.item == 2 else 0), q + k)
    else:
        m.pass_by(BRIEF, q + 2 * k, q * (wide if s.item == 2 else 0))
    m.give(BRIEF, s.q)
    m.give(KEPT, kept_by_core(s, layer) + s.q + 2 * s.k)
    if cp > 1:
        m.pass_by(BRIEF, 2 * k)
        m.give(BRIEF, grown)
    m.pass_by(BRIEF, 2 * s.q)
    if s.item == 2:
        m.give(KEPT, 2 * s.attended * s.shape.head_dim * s.item)
    m.take(BRIEF, s.whole_x)
    m.take(GRADIENTS, g.qkv)
    m.pass_by(BRIEF, 2 * s.whole_x)
    m.give(BRIEF, s.q + 2 * s.k)
    if tp > 1:
        m.pass_by(BRIEF, s.whole_x + s.x)
        m.give(BRIEF, s.whole_x - s.x)
    m.give(KEPT, s.whole_x)
    norm_backward(m, s)
    m.take(GRADIENTS, g.norms / 2)
    m.pass_by(BRIEF, s.x)  # the sum with what went around
    m.give(BRIEF, s.x)
    m.give(KEPT, s.x)


def statistics(s: Sizes) -> float:
    """What the sums over the tokens keep of a router's scores, until the loss is found."""
    per_token = 3 * s.shape.num_local_experts * 4 + 8
    return s.tokens * per_token if s.sums else 0.0


def statistics_kept(s: Sizes) -> float:
    """Of that, what a router loss needs for its backward pass."""
    router = s.config.router
    return statistics(s) if router.aux_loss or router.z_loss else 0.0


def choice(s: Sizes) -> float:
    """What the weights of the chosen experts keep: their numbers, and the softmax."""
    return s.tokens * s.shape.num_experts_per_tok * (8 + 4)


def wide_input(s: Sizes) -> float:
    """The router's own copy of its input and of its weight, in fp32."""
    if s.item == 4:
        return 0.0
    return 4 * s.shape.hidden_size * (s.tokens + s.shape.num_local_experts)


def moe(m: Ledger, s: Sizes) -> None:
    """x + moe(norm(x)); what comes out is KEPT."""
    k, experts = s.shape.num_experts_per_tok, s.shape.num_local_experts
    norm(m, s)
    m.take(KEPT, wide_input(s))
    m.take(BRIEF, s.tokens * experts * 4)
    m.take(KEPT, choice(s))
    if s.sums:
        m.take(BRIEF, s.tokens * experts * 8)
        m.pass_by(BRIEF, s.tokens * k * experts * 8)
        m.take(KEPT, statistics(s))
        m.give(BRIEF, s.tokens * experts * 8)
    m.give(BRIEF, s.tokens * experts * 4)
    exchanged_experts(m, s)
    if s.item == 2:
        m.give(KEPT, s.x)
    m.take(KEPT, s.x)
    m.give(BRIEF, s.x)


def exchanged_experts(m: Ledger, s: Sizes) -> None:
    """The normed x -> the weighted sum of each token's experts, BRIEF."""
    axes, k = s.config.parallel, s.shape.num_experts_per_tok
    gathered = s.x * axes.etp
    if axes.etp > 1:
        m.take(BRIEF, gathered)
    if axes.ep > 1:
        m.take(KEPT, s.routed * 8)
        m.take(BRIEF, s.row)  # received
        m.pass_by(BRIEF, s.row)  # sent
    experts(m, s)
    if axes.ep > 1:
        m.take(BRIEF, s.row)
        m.pass_by(BRIEF, s.row)
        m.give(BRIEF, s.row)  # what the experts found; what was received is held until the end
        m.give(BRIEF, s.row)
        m.take(BRIEF, s.row)
        m.pass_by(BRIEF, s.row + gathered)
        m.give(BRIEF, s.row)
        m.give(BRIEF, s.row)
        m.take(BRIEF, gathered)
    else:
        m.pass_by(BRIEF, s.row + gathered + 2 * 8 * s.tokens * k)
        m.give(BRIEF, s.row)
        m.take(BRIEF, gathered)
    if axes.etp > 1:
        m.take(BRIEF, s.x)
        m.give(BRIEF, 2 * gathered)


def kept_by_experts(s: Sizes) -> float:
    """Rows, their order and weights, gate and up; and of the exchange the order."""
    exchange = s.routed * 8 if s.config.parallel.ep > 1 else 0
    return s.row + s.routed * (8 + s.item) + 2 * s.inner + exchange


def experts(m: Ledger, s: Sizes) -> None:
    """Rows -> what their experts found, BRIEF."""
    m.take(KEPT, s.row + s.routed * (8 + s.item))
    m.pass_by(BRIEF, s.routed * 8 * 2)
    if s.cuda:
        m.take(BRIEF, 2 * s.inner)  # gate and up in turn
        m.pass_by(BRIEF, 2 * s.inner)  # the bias of each row; the sum
        m.take(KEPT, 2 * s.inner)
        m.give(BRIEF, 2 * s.inner)
        m.take(BRIEF, s.inner)
        m.pass_by(BRIEF, s.inner)
        m.take(BRIEF, s.row)
        m.pass_by(BRIEF, 2 * s.row)
        m.give(BRIEF, s.inner)
    else:
        m.take(KEPT, 2 * s.inner)
        m.take(BRIEF, s.row)
        m.pass_by(BRIEF, 3 * one_expert(s))


def one_expert(s: Sizes) -> float:
    """Inner rows of one expert: on CPU they are computed one after the other."""
    mine = s.shape.num_local_experts // s.config.parallel.ep
    return s.inner / mine


def moe_backward(m: Ledger, s: Sizes, g: Gradients) -> None:
    """Gradient of what `moe` returned, BRIEF -> that of x, in its place."""
    axes, k = s.config.parallel, s.shape.num_experts_per_tok
    gathered = s.x * axes.etp
    if axes.etp > 1:
        m.take(BRIEF, gathered)
    m.take(BRIEF, s.row)
    if axes.ep > 1:
        m.pass_by(BRIEF, s.row)  # sent, received
        m.pass_by(BRIEF, s.row)  # the inner order
    if axes.etp > 1:
        m.give(BRIEF, gathered)
    m.take(BRIEF, s.row)
    m.take(GRADIENTS, g.experts)
    if s.cuda:
        m.pass_by(BRIEF, 8 * s.inner)
    else:
        # Nine inner rows at once; and rows that are filled up, of the last expert.
        hidden_rows = one_expert(s) * s.shape.hidden_size / s.shape.intermediate_size
        m.pass_by(BRIEF, 11 * one_expert(s), hidden_rows * axes.etp)
    m.give(BRIEF, s.row)
    m.give(KEPT, kept_by_experts(s))
    if axes.ep > 1:
        m.pass_by(BRIEF, 2 * s.row)
    m.pass_by(BRIEF, s.row + 2 * 8 * s.routed)
    m.take(BRIEF, gathered)
    m.give(BRIEF, s.row)
    if axes.etp > 1:
        m.take(BRIEF, s.x)
        m.give(BRIEF, gathered)
    scores = s.tokens * s.shape.num_local_experts * 4
    wide = s.tokens * s.shape.hidden_size * 4
    m.pass_by(BRIEF, 2 * scores + s.tokens * k * 8)
    m.pass_by(BRIEF, wide + scores + (s.x if s.item == 2 else 0))
    m.take(GRADIENTS, g.router)
    m.give(KEPT, wide_input(s) + choice(s) + (s.x if s.item == 4 else 0))
    norm_backward(m, s)
    m.take(GRADIENTS, g.norms / 2)
    m.pass_by(BRIEF, s.x)
    m.give(BRIEF, s.x)
    m.give(KEPT, s.x)


def block(m: Ledger, s: Sizes, layer: int) -> None:
    attention(m, s, layer)
    moe(m, s)


def kept_by_block(s: Sizes, layer: int) -> float:
    """What a block adds to KEPT: what it returns is among it."""
    m = Ledger()
    block(m, s, layer)
    return m.held[KEPT]


def outputs_kept(s: Sizes, layer: int) -> tuple[float, float]:
    """Under selective recomputation: outputs of operators that are kept; and of those, what a
    block that is not recomputed keeps too."""
    scores = s.tokens * s.shape.num_local_experts * 4
    chosen = s.tokens * s.shape.num_experts_per_tok
    attended = 1 + halo(s) if s.config.parallel.cp > 1 and s.slides(layer) else 1
    both = s.k + (s.q + s.lse) * attended + 2 * s.inner + chosen * 8
    alone = s.q + s.k + s.whole_x + s.row + chosen * 4 + scores
    return both + alone, both


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
    m.pass_by(LOSS, 4096 * hidden * 4)
    if s.item == 2:
        m.take(LOSS, vocab * hidden * s.item)
        m.give(LOSS, vocab * hidden * 4)
    m.give(LOSS, chunk * vocab * s.item)


def head_backward(m: Ledger, s: Sizes, weight: float) -> None:
    """The loss -> the gradient of the last block's output, BRIEF.

    Args:
        weight: bytes of the head's gradient.
    """
    tp = s.config.parallel.tp
    m.take(BRIEF, s.whole_x)
    m.take(GRADIENTS, weight)
    m.give(LOSS, s.whole_x + weight)
    m.give(KEPT, s.whole_x)
    if tp > 1:
        m.pass_by(BRIEF, s.whole_x + s.x)
        m.give(BRIEF, s.whole_x - s.x)
    norm_backward(m, s)
    m.give(KEPT, s.x)

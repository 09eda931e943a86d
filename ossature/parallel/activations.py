"""Memory of activations by formula: what every part of a block takes, keeps and gives back.

The functions go through a block as its code does, forward and backward, and tell a `Ledger` of
every tensor whose size grows with the tokens.  A tensor is written down where it is made and
crossed out where its last holder lets go of it: autograd's nodes hold what they save until they
have run, Python's frames hold arguments and locals until they return.  There is nothing to adjust.

Kernels differ by device, and so do the bytes: `cpu` is what tests measure, `cuda` what plans are
made for.  Experts are taken to be chosen evenly.  `ossature.parallel.memory` puts blocks together.
"""

from __future__ import annotations

from ossature.parallel import adapted, rounded
from ossature.parallel.sizes import BRIEF, GRADIENTS, KEPT, Bytes, Gradients, Ledger, Sizes


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
        m.take(KEPT, s.taken_x)
        m.pass_by(BRIEF, s.taken_x)
        m.give(KEPT, s.x)
    for size in (s.q, s.k):
        m.take(BRIEF, size)
        m.pass_by(BRIEF, 2 * size)
        m.take(KEPT, size)
        m.give(BRIEF, size)
        if s.item == 2:  # cos and sin, cast
            m.take(KEPT, s.attended * s.shape.head_dim * s.item)
    m.take(KEPT, s.k)
    m.take(KEPT, adapters(s))
    if not s.learns("q_proj", "k_proj", "v_proj"):
        m.give(KEPT, s.taken_x)
    core(m, s, layer)
    m.take(BRIEF, s.whole_x)
    if tp > 1:
        m.pass_by(BRIEF, s.whole_x + s.x)
        m.give(BRIEF, s.whole_x - s.x)
    m.take(KEPT, s.x)
    m.give(BRIEF, s.x)


def adapters(s: Sizes) -> Bytes:
    """What adapters of attention's matrices keep: narrowed inputs; with DoRA, outputs too."""
    kept = s.attended * s.low("q_proj", "k_proj", "v_proj", "o_proj")
    if s.config.lora.rank and s.config.lora.dora:
        outputs = {"q_proj": s.q, "k_proj": s.k, "v_proj": s.k, "o_proj": s.whole_x}
        kept += sum(size for name, size in outputs.items() if name in s.config.lora.targets)
    return kept


def halo(s: Sizes) -> Bytes:
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


def kept_by_core(s: Sizes, layer: int) -> Bytes:
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
    m.give(KEPT, adapters(s) + (s.taken_x if s.learns("q_proj", "k_proj", "v_proj") else 0))
    norm_backward(m, s)
    m.take(GRADIENTS, g.norms / 2)
    m.pass_by(BRIEF, s.x)  # the sum with what went around
    m.give(BRIEF, s.x)
    m.give(KEPT, s.x)


def statistics(s: Sizes) -> Bytes:
    """What the sums over the tokens keep of a router's scores, until the loss is found."""
    per_token = 3 * s.shape.num_local_experts * 4 + 8
    return s.tokens * per_token if s.sums else 0.0


def statistics_kept(s: Sizes) -> Bytes:
    """Of that, what a router loss needs for its backward pass."""
    router = s.config.router
    return statistics(s) if router.aux_loss or router.z_loss else 0.0


def choice(s: Sizes) -> Bytes:
    """What the weights of the chosen experts keep: their numbers, and the softmax."""
    return s.tokens * s.shape.num_experts_per_tok * (8 + 4)


def wide_input(s: Sizes) -> Bytes:
    """The router's own copy of its input and of its weight, in fp32."""
    if s.item == 4:
        return 0.0
    tokens = s.tokens if s.learns("router") else 0
    return 4 * s.shape.hidden_size * (tokens + s.shape.num_local_experts)


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
    if not keeps_normed(s):
        m.give(KEPT, s.x)
    m.take(KEPT, s.x)
    m.give(BRIEF, s.x)


def keeps_normed(s: Sizes) -> bool:
    """Whether the router keeps its input as it is, and not in a wider copy or not at all."""
    return s.item == 4 and s.learns("router")


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


def kept_by_experts(s: Sizes) -> Bytes:
    """Rows, their order and weights, gate and up; and of the exchange the order."""
    exchange = s.routed * 8 if s.config.parallel.ep > 1 else 0
    if s.adapted_experts:
        return adapted.kept_by_experts(s) + exchange
    if s.config.float8:
        return rounded.kept_by_experts(s) + exchange
    return s.row + s.routed * (8 + s.item) + 2 * s.inner + exchange


def experts(m: Ledger, s: Sizes) -> None:
    """Rows -> what their experts found, BRIEF."""
    if s.adapted_experts:
        adapted.experts(m, s)
        return
    if s.config.float8:
        rounded.experts(m, s)
        return
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


def one_expert(s: Sizes) -> Bytes:
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
    if s.adapted_experts:
        adapted.experts_backward(m, s)
    elif s.config.float8:
        rounded.experts_backward(m, s)
    elif s.cuda:
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
    m.give(KEPT, wide_input(s) + choice(s) + (s.x if keeps_normed(s) else 0))
    norm_backward(m, s)
    m.take(GRADIENTS, g.norms / 2)
    m.pass_by(BRIEF, s.x)
    m.give(BRIEF, s.x)
    m.give(KEPT, s.x)


def block(m: Ledger, s: Sizes, layer: int) -> None:
    attention(m, s, layer)
    moe(m, s)


def kept_by_block(s: Sizes, layer: int) -> Bytes:
    """What a block adds to KEPT: what it returns is among it."""
    m = Ledger()
    block(m, s, layer)
    return m.held[KEPT]


def outputs_kept(s: Sizes, layer: int) -> tuple[Bytes, Bytes]:
    """Under selective recomputation: outputs of operators that are kept; and of those, what a
    block that is not recomputed keeps too."""
    scores = s.tokens * s.shape.num_local_experts * 4
    chosen = s.tokens * s.shape.num_experts_per_tok
    attended = 1 + halo(s) if s.config.parallel.cp > 1 and s.slides(layer) else 1
    both = s.k + (s.q + s.lse) * attended + 2 * s.inner + chosen * 8
    alone = s.q + s.k + s.whole_x + s.row + chosen * 4 + scores
    return both + alone, both

"""Rows divided over ranks: attention against the eager form on whole rows, gradients included."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ossature.kernels.chunk_attention import chunk_attention
from ossature.model.attention import attend, attention_mask
from ossature.parallel import context, exchange
from ossature.parallel.exchange import Split
from tests.parallel.parity import Layout, largest, worst
from tests.ranks import run_ranks

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
NOWHERE = dist.ProcessGroup(0, 2)
"""For layouts that do not communicate."""


def documents(seq: int) -> torch.Tensor:
    """Two rows: documents that end inside, at and far behind the ends of chunks; and padding."""
    place = torch.arange(seq)
    first = (place >= 3).long() + (place >= seq // 4) + (place >= seq - 5)
    second = (place >= seq // 2 + 1).long()
    second[-2:] = -1
    return torch.stack([first, second])


def drawn(seq: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """q, k, v, sinks and the gradient of the output, of whole rows."""
    g = torch.Generator().manual_seed(1)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, dout = (torch.randn(2, seq, h, HEAD_DIM, generator=g, dtype=dtype) for h in heads)
    return q, k, v, torch.randn(HEADS, generator=g, dtype=dtype) * 2, dout


def whole_rows(seq: int, window: int | None) -> list[torch.Tensor]:
    """Output and gradients of q, k, v, sinks, by the eager form."""
    *inputs, dout = drawn(seq)
    inputs = [x.requires_grad_() for x in inputs]
    q, k, v, sinks = inputs
    out = attend(q, k, v, sinks=sinks, mask=attention_mask(documents(seq), window))
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def shortened(split: Split, reach: int) -> exchange.Halo:
    """Without the oldest token of each halo: the filler stands in its place."""
    whole = exchange.halo(split, reach)
    tokens = whole.arranged.unflatten(0, (2, -1)).clone()
    tokens[:, 0] = 2 * split.length + sum(whole.received_tokens)
    return whole._replace(arranged=tokens.flatten())


def _split_attention(rank: int, world: int, cases: list, fault: str = "") -> list[list]:
    found = []
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    if fault == "a halo one token short":
        context.halo = shortened
    if fault == "no sinks":
        context.chunk_attention = lambda q, k, v, sinks, pieces: chunk_attention(
            q, k, v, sinks * 0 - 100, pieces
        )
    for seq, window in cases:
        layout = context.Context(mesh).layout(documents(seq))
        *inputs, dout = (x if x.dim() == 1 else layout.split.cut(x) for x in drawn(seq))
        inputs = [x.requires_grad_() for x in inputs]
        q, k, v, sinks = inputs
        out = layout.attend(q, k, v, sinks=sinks, window=window)
        results = [out.detach(), *torch.autograd.grad(out, inputs, dout)]
        dist.all_reduce(results[-1])
        found.append([x.numpy() for x in results])
    return found


def errors(world: int, cases: list, fault: str = "") -> dict[str, float]:
    """The largest relative error of each quantity, over ranks and cases."""
    worst = dict.fromkeys(("out", "dq", "dk", "dv", "dsinks"), 0.0)
    for rank, found in enumerate(run_ranks(world, _split_attention, cases, fault)):
        for (seq, window), results in zip(cases, found, strict=True):
            split = Split(rank, world, seq)
            for name, result, true in zip(worst, results, whole_rows(seq, window), strict=True):
                true = true if name == "dsinks" else split.cut(true)
                error = (torch.from_numpy(result) - true).norm() / true.norm()
                worst[name] = max(worst[name], error.item())
    return worst


# Windows shorter than a chunk, as long, longer (from several ranks), and longer than the row.
CASES = [(48, None), (48, 5), (48, 12), (48, 13), (48, 31), (48, 60), (48, 1), (16, 7)]


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_finds_its_part_of_the_eager_form(world):
    cases = CASES if world == 2 else [*CASES, (8, 7), (80, 11)]
    assert max(errors(world, cases).values()) < 1e-13


def test_three_ranks_find_their_parts_too():
    assert max(errors(3, [(48, None), (48, 7), (12, 7)]).values()) < 1e-13


def test_the_comparison_sees_sinks_that_were_dropped():
    assert errors(2, [(48, None)], "no sinks")["dsinks"] > 0.99


def test_the_comparison_sees_a_halo_one_token_short():
    assert errors(2, [(48, 5)], "a halo one token short")["dk"] > 1e-3


def test_chunks_of_the_head_and_the_tail_balance_the_work():
    """Visible pairs of query and key differ by at most the length of two chunks squared."""
    for ranks in (2, 4, 8):
        work = [(Split(rank, ranks, 64 * ranks).places + 1).sum().item() for rank in range(ranks)]
        assert max(work) == min(work)


def test_the_ranks_places_are_the_whole_row_once():
    places = torch.cat([Split(rank, 3, 24).places for rank in range(3)])
    assert places.sort().values.tolist() == list(range(24))


def test_a_halo_receives_only_the_tokens_before_each_chunk():
    """4 ranks, chunks of 8 tokens, a window of 6: 5 tokens a chunk, none for the first."""
    received = [sum(exchange.halo(Split(rank, 4, 64), 5).received_tokens) for rank in range(4)]
    assert received == [5, 10, 10, 10]


def test_the_parts_of_a_long_row_take_memory_in_proportion_to_it():
    """No table of 131,072 tokens grows with the square of the row, on any of 8 ranks."""
    document = torch.zeros(1, 131_072, dtype=torch.int64)
    for rank in (0, 7):
        layout = context.SplitLayout(document, Split(rank, 8, 131_072), NOWHERE)
        assert layout.pieces.numel() == 8
        band = layout.band(128, torch.float32)
        assert band.numel() <= (2 * 8_192 + 2 * 128 + 128) * 256


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 5, 13])
def test_the_mask_for_flex_attention_shows_what_the_eager_mask_shows(window):
    """Through FlexAttention's eager form, which is all that a CPU has, on the keys of a row."""
    from ossature.kernels.flex import flex_attend

    seq = 48
    q, k, v, sinks, _ = drawn(seq, torch.float32)
    true = attend(q, k, v, sinks=sinks, mask=attention_mask(documents(seq), window))
    for rank in range(2):
        split = Split(rank, 2, seq)
        layout = context.SplitLayout(documents(seq), split, NOWHERE)
        keys = torch.arange(seq) if window is None else exchange.halo(split, window - 1).places
        mine = [x[:, keys.clamp(min=0)] for x in (k, v)]
        out = flex_attend(split.cut(q), *mine, sinks=sinks, block_mask=layout.block_mask(window))
        torch.testing.assert_close(out, split.cut(true), atol=2e-6, rtol=1e-5)


def assert_equal(world: int, *axes: dict, **changes) -> None:
    """Loss, router loss, norm, counts and gradients of a model; weights after two steps."""
    for errors in worst(world, [Layout(given, changes=changes) for given in axes]):
        assert largest(errors) < (2e-5, "")


def test_a_model_on_split_rows_finds_the_numbers_of_one_process():
    """Packed documents, ragged masks; at cp 4 chunks of 4 tokens and a window of 7."""
    assert_equal(2, {"cp": 2})
    assert_equal(4, {"cp": 4}, {"cp": 2, "dp_shard": 2})


@pytest.mark.slow
def test_split_rows_go_with_every_other_axis():
    axes = [{"dp_replicate": 2, "dp_shard": 1}, {"tp": 2}, {"ep": 2}, {"tp": 2, "ep": 2, "etp": 2}]
    assert_equal(4, *({"cp": 2, **given} for given in axes), {"cp": 4, "ep": 4})
    assert_equal(8, {"cp": 2, "dp_replicate": 2, "ep": 2}, {"cp": 4, "tp": 2})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_split_rows_go_with_recomputation(mode):
    assert_equal(2, {"cp": 2}, recompute=mode)


def _plant(fault: str, patch: pytest.MonkeyPatch) -> None:
    if fault == "no sinks":
        plain = context.window_attention
        patch.setattr(
            context, "window_attention", lambda q, k, v, s, mask: plain(q, k, v, s * 0 - 100, mask)
        )
    if fault == "a halo one token short":
        patch.setattr(context, "halo", shortened)


@pytest.mark.parametrize("fault", ["no sinks", "a halo one token short"])
def test_the_comparison_of_models_sees_the_fault(fault):
    (errors,) = worst(2, [Layout({"cp": 2}, fault=fault)], _plant)
    assert errors["gradients blocks.0.attention.sinks.weight"] > 1e-3
    assert errors["loss"] > 1e-5

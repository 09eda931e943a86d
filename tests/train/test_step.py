"""One step: what is summed over micro-batches, what is added to the loss, what balances experts."""

from pathlib import Path

import pytest
import torch

from ossature.config import RouterConfig
from ossature.data.loader import Batch
from ossature.model.moe import RouterLog
from ossature.model.transformer import Transformer
from ossature.parallel import mesh as meshes
from ossature.parallel import plan, weights
from ossature.parallel.fsdp import inference
from ossature.parallel.launch import launched
from ossature.train import step as steps
from ossature.train.loss import language_model_loss, shift
from tests.small_runs import TINY, part, ragged_batch, small_run


@pytest.fixture
def sharded():
    """A model on a mesh of one rank, and the mesh."""
    with launched() as ranks:
        config = small_run(Path("unused"))
        mesh = meshes.build(meshes.sizes(config.parallel, ranks.world), "cpu")
        with torch.device("meta"):
            model = Transformer(TINY)
        plan.parallelize(model, mesh, config)
        model.to_empty(device="cpu")
        weights.initialise(model, seed=5)
        yield model, mesh


def accumulate(sharded, batches, router=None, **options):
    model, mesh = sharded
    model.zero_grad()
    counted = steps.count(batches, False, mesh).tokens
    sums = steps.accumulate(model, batches, counted, mesh, router or RouterConfig(), **options)
    return sums, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_loss_and_gradients_do_not_depend_on_the_split_into_micro_batches(sharded):
    """With loss masks of density 0.1 to 0.9: a mean of means would differ by tens of percent."""
    batch = ragged_batch(8)
    whole, expected = accumulate(sharded, [batch])
    for rows in (1, 2, 4):
        parts = [part(batch, n, n + rows) for n in range(0, 8, rows)]
        sums, gradients = accumulate(sharded, parts)
        torch.testing.assert_close(sums.loss, whole.loss, rtol=1e-5, atol=0)
        assert torch.equal(sums.counts, whole.counts)
        torch.testing.assert_close(sums.entropy, whole.entropy)
        for name, gradient in gradients.items():
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < 1e-5, name
    means = [accumulate(sharded, [part(batch, n, n + 1)])[0].loss.item() for n in range(8)]
    assert sum(means) / 8 != pytest.approx(whole.loss.item(), rel=1e-3)


def test_a_mask_names_the_tokens_that_are_learnt_and_not_the_places_that_predict_them():
    tokens = torch.tensor([[11, 12, 13, 14, 15, 16]])
    mask = torch.tensor([[True, False, True, True, False, True]])

    assert shift(tokens, mask).tolist() == [[-100, 13, 14, -100, 16, -100]]


def test_the_loss_is_the_public_loss_and_nothing_is_added_by_default(sharded):
    batch = ragged_batch(4)
    sums, _ = accumulate(sharded, [batch])
    alone = Transformer(TINY)
    alone.init_weights(5)
    tokens, position, document, mask = batch
    loss = language_model_loss(alone, tokens, mask, position=position, document=document)
    assert sums.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert sums.router_loss == 0


def test_router_losses_are_added_once_by_hand(sharded):
    """d/dw (CE + c * aux + z) = d CE + c * d aux + z * d z, each taken on its own."""
    model, _ = sharded
    batch = ragged_batch(4)
    plain, plain_gradients = accumulate(sharded, [batch])
    log = RouterLog()
    with torch.no_grad(), inference(model):
        model(batch.tokens, position=batch.position, document=batch.document, router_log=log)
    tokens = sum(layer.tokens for layer in log.layers)
    hits = sum(layer.counts for layer in log.layers) / tokens
    share = sum(layer.probability for layer in log.layers) / tokens
    aux = 8 * (hits * share).sum().item()
    z = (sum(layer.z for layer in log.layers) / tokens).item()
    assert 3.0 <= aux < 8.0  # perfect balance is worth k = 3
    sums, gradients = accumulate(sharded, [batch], RouterConfig(aux_loss=0.02, z_loss=0.001))
    assert sums.loss == plain.loss  # reported apart
    assert sums.router_loss.item() == pytest.approx(0.02 * aux + 0.001 * z, rel=1e-5)
    _, twice = accumulate(sharded, [batch], RouterConfig(aux_loss=0.04, z_loss=0.002))
    name = "blocks.0.moe.router.weight"
    added = gradients[name] - plain_gradients[name]
    torch.testing.assert_close(twice[name] - plain_gradients[name], 2 * added, rtol=1e-3, atol=1e-7)
    assert added.norm() > 0


def test_router_losses_are_a_mean_over_micro_batches(sharded):
    batch = ragged_batch(2)
    once, _ = accumulate(sharded, [batch], RouterConfig(z_loss=1.0))
    again, _ = accumulate(sharded, [batch, batch], RouterConfig(z_loss=1.0))
    assert again.router_loss.item() == pytest.approx(once.router_loss.item(), rel=1e-6)


def test_padding_changes_neither_loss_nor_counts_nor_router_losses(sharded):
    batch = ragged_batch(2, seq=32)
    filler = torch.full((2, 9), 3)
    padded = Batch(
        torch.cat([batch.tokens, filler], 1),
        torch.cat([batch.position, filler * 0], 1),
        torch.cat([batch.document, filler * 0 - 1], 1),
        torch.cat([batch.loss_mask, filler < 0], 1),
    )
    router = RouterConfig(aux_loss=0.02, z_loss=0.001)
    one, _ = accumulate(sharded, [batch], router)
    other, _ = accumulate(sharded, [padded], router)
    assert torch.equal(one.counts, other.counts)
    assert one.counts.sum() == (batch.document >= 0).sum() * 3 * TINY.num_hidden_layers
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(one.router_loss, other.router_loss, rtol=1e-6, atol=0)


def test_a_step_without_any_counted_token_has_no_loss_and_no_gradient(sharded):
    batch = ragged_batch(2)
    sums, gradients = accumulate(sharded, [batch._replace(loss_mask=batch.loss_mask & False)])
    assert sums.loss == 0
    assert all(not gradient.any() for gradient in gradients.values())


def test_the_router_is_not_looked_at_when_nobody_asks(sharded):
    sums, _ = accumulate(sharded, [ragged_batch(2)], log_router=False)
    assert sums.counts.shape[0] == 0 and sums.entropy.shape == (0,)


def test_the_balancing_bias_moves_towards_the_mean_load_in_every_layer_that_has_one():
    model = Transformer(TINY)
    counts = torch.tensor([[9, 1, 5, 5, 5, 5, 5, 5], [0, 10, 5, 5, 5, 5, 5, 5]]).float()
    # The first layer has none: the second must still be updated.
    router = model.blocks["1"].get_submodule("moe.router")
    router.register_buffer("balance_bias", torch.zeros(8))
    steps.update_balance(model, counts, rate=0.5)
    assert model.blocks["0"].get_submodule("moe.router").balance_bias is None
    expected = torch.tensor([0.5, -0.5, 0, 0, 0, 0, 0, 0])
    assert torch.equal(router.balance_bias, expected)
    steps.anneal_balance(model, 0.5)
    assert torch.equal(router.balance_bias, expected / 2)


def test_the_bias_changes_who_is_chosen_and_not_with_which_weight():
    model = Transformer(TINY)
    router = model.blocks["0"].get_submodule("moe.router")
    x = torch.randn(50, TINY.hidden_size)
    before, weight, _ = router(x, None)
    router.register_buffer("balance_bias", torch.tensor([100.0, *[0.0] * 7]))
    after, biased_weight, _ = router(x, None)
    assert (after == 0).any(dim=1).all() and not (before == 0).any(dim=1).all()
    same = before.sort(1).values.eq(after.sort(1).values).all(1)
    assert same.any()
    torch.testing.assert_close(biased_weight[same].sort(1).values, weight[same].sort(1).values)

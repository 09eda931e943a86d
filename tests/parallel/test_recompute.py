"""Activation checkpointing: the same numbers, and only the cheap work done twice."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ossature.model.moe import RouterLog
from ossature.model.transformer import Transformer
from ossature.parallel import recompute as recomputing
from ossature.parallel.recompute import offload, recompute, to_host
from ossature.train.step import targets
from tests.small_runs import TINY, ragged_batch


class Operators(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count[op.name().partition(".")[0]] += 1
        return op(*args, **(kwargs or {}))


def run(mode: str, offloaded: bool = False):
    """Loss, gradients, tokens per expert and operator counts of one forward and backward."""
    model = Transformer(TINY)
    for block in model.blocks.values():
        recompute(block, mode)
        if offloaded:
            offload(block)
    batch, log = ragged_batch(4), RouterLog()
    with Operators() as operators:
        loss = model(
            batch.tokens,
            position=batch.position,
            document=batch.document,
            targets=targets(batch),
            router_log=log,
        )
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss, gradients, [layer.counts for layer in log.layers], operators.count


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_and_expert_counts_are_bit_equal(mode):
    """So routing does not flip when it runs again, and a token is counted once."""
    loss, gradients, counts, _ = run("none")
    loss_again, gradients_again, counts_again, _ = run(mode)
    assert torch.equal(loss, loss_again)
    assert list(gradients) == list(gradients_again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    for before, after in zip(counts, counts_again, strict=True):
        assert torch.equal(before, after)


def test_selective_runs_no_product_expert_or_attention_again():
    plain, selective, full = (run(mode)[3] for mode in ("none", "selective", "full"))
    expensive = ["aten::addmm", "aten::mm", "aten::topk", "ossature::experts"]
    expensive += [name for name in plain if name.startswith("ossature::") and "attention" in name]
    assert "ossature::window_attention" in expensive and "ossature::full_attention" in expensive
    for name in expensive:
        assert selective[name] == plain[name], name
    assert full["ossature::experts"] == 2 * plain["ossature::experts"]
    assert selective["aten::rsqrt_"] > plain["aten::rsqrt_"]  # the norms do run again


def test_less_is_kept_the_more_is_computed_again():
    def kept(mode: str) -> int:
        model = Transformer(TINY)
        for block in model.blocks.values():
            recompute(block, mode)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = ragged_batch(4)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(batch.tokens, document=batch.document, targets=targets(batch))
        return sum(seen.values())

    assert kept("none") > kept("full")


def test_names_of_parameters_do_not_change():
    model = Transformer(TINY)
    names = [name for name, _ in model.named_parameters()]
    for block in model.blocks.values():
        recompute(block, "full")
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("mode", ["none", "full"])
def test_offloaded_activations_give_gradients_that_are_bit_equal(mode, monkeypatch):
    """offload_activations moves what the blocks keep, weights left out: with full, their inputs."""
    loss, gradients, counts, _ = run(mode)
    moved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor)
        return to_host(tensor)

    monkeypatch.setattr(recomputing, "to_host", note)
    loss_again, gradients_again, counts_again, _ = run(mode, offloaded=True)
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    for before, after in zip(counts, counts_again, strict=True):
        assert torch.equal(before, after)
    assert not any(isinstance(tensor, torch.nn.Parameter) for tensor in moved)
    hidden = (4, 32, TINY.hidden_size)
    blocks = TINY.num_hidden_layers
    if mode == "full":
        # torch 2.11 keeps an empty tensor beside the input.
        wide = [t for t in moved if t.is_floating_point() and t.requires_grad and t.numel()]
        assert [tuple(tensor.shape) for tensor in wide] == [hidden] * blocks
    else:
        assert sum(tuple(tensor.shape) == hidden for tensor in moved) >= 2 * blocks

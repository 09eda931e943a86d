"""AdamW with narrow moments and weights, Muon, and stepping during backward."""

import logging
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ossature.checkpoint.store import newest
from ossature.config import OptimConfig, ParallelConfig
from ossature.convert.folder import open_source
from ossature.model.transformer import Transformer
from ossature.parallel import mesh as meshes
from ossature.parallel import plan, weights
from ossature.parallel.gradients import local
from ossature.train import adamw, optim
from ossature.train.loop import train
from tests.ranks import run_ranks
from tests.small_runs import TINY, records, small_run

# full_tensor gathers shards of shards in two steps and says so.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

COINS = torch.Generator().manual_seed(0)


def gradients_of(step: int, name: str, shape: torch.Size) -> torch.Tensor:
    g = torch.Generator().manual_seed(zlib.crc32(f"{step} {name}".encode()))
    return torch.randn(shape, generator=g) * 10 ** (torch.rand(shape, generator=g) * 4 - 4)


def stepped(config: OptimConfig, steps: int = 3, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(TINY).to(dtype)
    optimizer = optim.build(model.named_parameters(), config)
    for step in range(steps):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients_of(step, name, parameter.shape).to(dtype)
        optimizer.step()
    return model


def lean(config: OptimConfig, **changes) -> Transformer:
    """With our optimizer also where torch's would be taken."""
    model = Transformer(TINY)
    groups = optim.build(model.named_parameters(), config).param_groups
    groups = [{k: g[k] for k in ("params", "weight_decay", "param_names")} for g in groups]
    named = [{**g, "params": list(zip(g["param_names"], g["params"], strict=True))} for g in groups]
    for group in named:
        del group["param_names"]
    optimizer = adamw.LeanAdamW(
        named, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, states="fp32"
    )
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients_of(step, name, parameter.shape)
        optimizer.step()
    return model


def test_in_fp32_it_is_torchs_adamw():
    config = OptimConfig(lr=1e-2)
    theirs, ours = stepped(config), lean(config)
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("states, bound", [("bf16", 0.02), ("8bit", 0.1)])
def test_narrow_moments_lead_near_the_wide_ones(states, bound):
    """Relative to how far the weights have moved."""
    start = dict(Transformer(TINY).named_parameters())
    wide = dict(stepped(OptimConfig(lr=1e-2), steps=8).named_parameters())
    narrow = dict(stepped(OptimConfig(lr=1e-2, states=states), steps=8).named_parameters())
    for name, a in wide.items():
        moved = (a - start[name]).norm()
        assert 0 <= (narrow[name] - a).norm() <= bound * moved, name


def test_rounding_to_bf16_is_right_on_average():
    value = torch.full((200_000,), 1 + 2**-10)  # an eighth of the way to the next bf16 number
    kept = torch.empty_like(value, dtype=torch.bfloat16)
    adamw.write(kept, value, COINS)
    assert set(kept.unique().tolist()) == {1.0, 1.0078125}
    share = (kept > 1).float().mean().item()
    assert share == pytest.approx(1 / 8, abs=0.005)
    negative = torch.empty_like(kept)
    adamw.write(negative, -value, COINS)
    assert negative.float().mean().item() == pytest.approx(-(1 + 2**-10), abs=1e-4)


def test_rounding_keeps_what_bf16_can_hold_and_infinity():
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, torch.inf, -torch.inf, 2.0**-130])
    kept = torch.empty_like(exact, dtype=torch.bfloat16)
    adamw.write(kept, exact, COINS)
    assert torch.equal(kept.float(), exact)


def test_a_bf16_weight_follows_updates_far_below_its_spacing():
    weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = adamw.LeanAdamW(
        [{"params": [("w", weight)]}], lr=1e-5, betas=(0.9, 0.95), eps=1e-8, states="bf16"
    )
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # Adam with a constant gradient moves by lr a step.  To nearest, it would not move at all.
    assert weight.float().mean().item() == pytest.approx(1 - 50 * 1e-5, abs=1.5e-4)


def test_codes_are_the_nearest_of_the_table():
    moment = torch.randn(5, 64) * torch.logspace(-6, 0, 5)[:, None]
    state = {
        "exp_avg_codes": torch.zeros(5, 64, dtype=torch.uint8),
        "exp_avg_scale": torch.zeros(5, 2),
    }
    adamw.write_moment(state, "exp_avg", moment, COINS)
    back = adamw.read_moment(state, "exp_avg")
    table = adamw._table(True, torch.device("cpu"))
    scale = moment.unflatten(-1, (2, 32)).abs().amax(-1).repeat_interleave(32, dim=1)
    best = ((moment / scale)[..., None] - table).abs().amin(-1) * scale
    assert (((back - moment).abs() - best).abs() <= 1e-6 * scale).all()
    assert torch.equal(state["exp_avg_scale"], moment.unflatten(-1, (2, 32)).abs().amax(-1))


def test_the_table_is_torchaos():
    quant_utils = pytest.importorskip("torchao.optim.quant_utils")
    for signed in (True, False):
        theirs = torch.tensor(quant_utils.create_dynamic_map(signed=signed))
        torch.testing.assert_close(adamw._table(signed, torch.device("cpu")), theirs)


def test_zero_moments_are_zero_in_eight_bits():
    model = Transformer(TINY)
    optimizer = optim.build(model.named_parameters(), OptimConfig(states="8bit"))
    state = optim.state(optimizer)
    name = "blocks.0.moe.experts.down_weight"
    assert state[f"{name}.exp_avg_codes"].dtype == torch.uint8
    parts = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(name)}
    for key in ("exp_avg", "exp_avg_sq"):
        assert not adamw.read_moment(parts, key).any()


@pytest.mark.parametrize(
    "states, dtype, bytes_each",
    [("fp32", torch.float32, 8), ("bf16", torch.bfloat16, 4), ("8bit", torch.bfloat16, 2.25)],
)
def test_state_takes_the_stated_bytes_a_parameter(states, dtype, bytes_each):
    weight = torch.nn.Parameter(torch.zeros(64, 96, dtype=dtype))
    optimizer = adamw.LeanAdamW(
        [{"params": [("w", weight)]}], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, states=states
    )
    state = optim.state(optimizer)
    assert sum(t.nbytes for key, t in state.items() if not key.endswith("step")) == (
        bytes_each * weight.numel()
    )


def test_muon_is_torchs_on_every_matrix():
    """Hidden matrices as torch.optim.Muon steps them, each expert's on its own."""
    config = OptimConfig(name="muon", lr=1e-2)
    ours = dict(stepped(config).named_parameters())
    start = dict(Transformer(TINY).named_parameters())
    plain = dict(stepped(OptimConfig(lr=1e-2)).named_parameters())
    for name, found in ours.items():
        if not optim.is_hidden_matrix(name):
            torch.testing.assert_close(found, plain[name], rtol=1e-6, atol=1e-7, msg=name)
            continue
        experts = start[name].detach().view(-1, *start[name].shape[-2:])
        for n, weight in enumerate(experts):
            theirs = torch.nn.Parameter(weight.clone())
            optimizer = torch.optim.Muon(
                [theirs], lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
            )
            for step in range(3):
                whole = gradients_of(step, name, start[name].shape)
                theirs.grad = whole.view(-1, *weight.shape)[n]
                optimizer.step()
            mine = found.view(-1, *weight.shape)[n]
            # torch iterates in bf16.
            assert (mine - theirs).norm() < 0.03 * (theirs - weight).norm(), (name, n)


def test_orthogonal_pulls_singular_values_towards_one():
    matrix = torch.randn(3, 24, 40)
    values = torch.linalg.svdvals(adamw.orthogonal(matrix))
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(
        adamw.orthogonal(matrix).flatten(1), (u @ v).flatten(1)
    )
    assert cosine.min() > 0.97


LAYOUTS = [
    ({"dp_shard": 2}, "fp32"),
    ({"tp": 2, "dp_shard": 1}, "fp32"),
    ({"dp_shard": 2, "ep": 2}, "fp32"),
    ({"tp": 2, "dp_shard": 1, "etp": 2}, "fp32"),
    ({"dp_shard": 2}, "8bit"),
]


def rank_steps(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for axes, states in LAYOUTS:
        settings = {"optim__name": "muon"} if states == "fp32" else {"optim__states": states}
        config = small_run(Path("unused"), parallel=ParallelConfig(**axes), **settings)
        mesh = meshes.build(meshes.sizes(config.parallel, world), "cpu")
        with torch.device("meta"):
            model = Transformer(TINY)
        plan.parallelize(model, mesh, config)
        model.to_empty(device="cpu")
        weights.initialise(model, 0)
        optimizer = optim.build(model.named_parameters(), config.optim)
        for step in range(3):
            for name, parameter in model.named_parameters():
                whole = gradients_of(step, name, parameter.shape)
                part = weights.own_part(whole, parameter).contiguous()
                parameter.grad = adamw._like(part, parameter, parameter.shape)
            optimizer.step()
        whole = {n: p.full_tensor() for n, p in model.named_parameters() if isinstance(p, DTensor)}
        found.append(whole if rank == 0 else {})
        assert all(local(t).numel() >= 0 for t in optim.state(optimizer).values())
    return found


def test_muon_and_8_bit_moments_do_not_depend_on_the_ranks():
    """Groups of 32 along a row are never cut, so that even 8-bit moments are the same."""
    sharded = run_ranks(2, rank_steps)[0]
    for (axes, states), found in zip(LAYOUTS, sharded, strict=True):
        settings = {"name": "muon"} if states == "fp32" else {"states": states}
        config = small_run(Path("unused"), **{f"optim__{k}": v for k, v in settings.items()}).optim
        alone = stepped(config)
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(
                found[name], parameter.detach(), rtol=1e-4, atol=2e-5, msg=f"{axes} {name}"
            )


def test_rows_that_ranks_would_cut_inside_a_group_are_refused():
    """A rank's part of a row must be whole groups, or 8-bit state could not change its layout."""
    message = run_ranks(2, rank_cut)[0]
    assert "optim.states = 8bit" in message and "48" in message and "32" in message


def rank_cut(rank: int, world: int) -> str:
    mesh = init_device_mesh("cpu", (world,))
    weight = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 96), mesh, [Shard(1)]))
    optimizer = adamw.LeanAdamW(
        [{"params": [("w", weight)]}], lr=1.0, betas=(0.9, 0.95), eps=1e-8, states="8bit"
    )
    with pytest.raises(ValueError) as error:
        optim.state(optimizer)
    return str(error.value)


IN_BACKWARD = {
    "optim__in_backward": True, "optim__clip": 0.0, "micro_batch_tokens": 128,
}  # fmt: skip


def test_steps_in_backward_equal_steps_after_it(tmp_path):
    plain = small_run(tmp_path / "after", optim__clip=0.0, micro_batch_tokens=128)
    train(plain)
    train(small_run(tmp_path / "during", **IN_BACKWARD))
    for a, b in zip(records(tmp_path / "after"), records(tmp_path / "during"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_no_gradient_outlives_its_step_in_backward(tmp_path):
    model = Transformer(TINY)
    config = OptimConfig(in_backward=True, clip=0.0)
    optimizer = optim.build(model.named_parameters(), config)
    assert isinstance(optimizer, adamw.LeanAdamW)
    hooks = optim.InBackward(optimizer)
    tokens = torch.arange(16).reshape(2, 8)
    model(tokens, targets=tokens.roll(-1)).backward()
    assert all(p.grad is None for p in model.parameters())
    assert hooks.norm() > 0 and not hooks.squares


@pytest.mark.parametrize(
    "settings",
    [
        {"optim__states": "8bit"},
        {"optim__states": "bf16", "optim__weights": "bf16", "precision": "bf16"},
        {"optim__name": "muon", "optim__states": "bf16"},
        {
            **IN_BACKWARD, "precision": "bf16", "optim__weights": "bf16", "optim__states": "8bit",
        },
    ],
)  # fmt: skip
def test_a_resumed_run_is_bitwise_the_one_never_stopped(tmp_path, settings):
    train(small_run(tmp_path / "whole", **settings))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(small_run(halves, **settings, checkpoint__every_steps=3))
    shutil.rmtree(halves / "checkpoints" / "step_00000006")
    train(small_run(halves, **settings, checkpoint__every_steps=3))
    a, b = (open_source(newest(run)) for run in (whole, halves))  # type: ignore[arg-type]
    for name in a.names():
        assert torch.equal(a.read(name), b.read(name)), name


def test_bf16_weights_are_saved_as_such(tmp_path):
    settings = {"optim__weights": "bf16", "precision": "bf16"}
    train(small_run(tmp_path / "run", **settings))
    folder = newest(tmp_path / "run")
    assert folder is not None
    assert open_source(folder).spec("blocks.0.moe.experts.down_weight").dtype == torch.bfloat16
    assert '"bfloat16"' in (folder / "config.json").read_text()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"optim__in_backward": True}, "optim.clip"),
        ({"optim__in_backward": True, "optim__clip": 0.0}, "global_batch_tokens"),
        ({**IN_BACKWARD, "precision": "bf16"}, "optim.weights"),
        ({"optim__weights": "bf16"}, "precision"),
        ({"optim__name": "muon", "optim__states": "8bit"}, "muon"),
        ({"optim__name": "muon", "lora__rank": 4}, "must be adamw with lora.rank"),
    ],
)
def test_settings_that_cannot_be_had_together_are_refused(tmp_path, changes, words):
    """optim.in_backward above all: it has one gradient at a time, and no second look at it."""
    with pytest.raises(ValueError, match=words):
        small_run(tmp_path, **changes)

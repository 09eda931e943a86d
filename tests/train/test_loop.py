"""The loop as a whole: what a run leaves behind, and that stopping and going on leaves no trace."""

import json
import math
import resource
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ossature.checkpoint import steps as checkpoint_steps
from ossature.checkpoint import store
from ossature.config import ParallelConfig, to_json
from ossature.model.transformer import Transformer
from ossature.train import loop
from ossature.train.loop import TrainingFailed, train
from ossature.train.signals import StopRequest
from tests.ranks import run_ranks
from tests.small_runs import TINY, change, records, small_run, text_corpus

TIMES = ("seconds", "tokens_per_second", "memory_bytes")


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    return {
        f"{folder.name}/{name}": store.read_weight(folder, name)
        for folder in (checkpoint, checkpoint / "optimizer")
        for name in store.list_weights(folder)
    }


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: newest weights, optimizer, and every line of the metrics but for times."""
    newest, newest_other = store.newest(one), store.newest(other)
    assert newest and newest_other and newest.name == newest_other.name
    expected, found = tensors(newest), tensors(newest_other)
    assert list(expected) == list(found)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    lines = [[{k: v for k, v in r.items() if k not in TIMES} for r in records(run)]
             for run in (one, other)]  # fmt: skip
    assert lines[0] == lines[1]


def worst_difference(one: Path, other: Path) -> float:
    newest, newest_other = store.newest(one), store.newest(other)
    assert newest and newest_other and newest.name == newest_other.name
    expected, found = tensors(newest), tensors(newest_other)
    assert set(expected) == set(found)
    return max(
        ((value - found[name]).norm() / value.norm().clamp(min=1e-6)).item()
        for name, value in expected.items()
        if value.is_floating_point()
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stopping_and_going_on_equals_never_having_stopped(tmp_path, precision):
    changes = {"precision": precision, "optim__decay_steps": 4, "router__bias_update_rate": 0.01}
    changes["router__bias_anneal_steps"] = 0
    train(small_run(tmp_path / "a", **changes))
    train(small_run(tmp_path / "b", steps=3, **changes))
    assert records(tmp_path / "b")[-1]["step"] == 3
    train(small_run(tmp_path / "b", **changes))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_random_numbers_of_a_step_are_the_same_after_a_resume(tmp_path, monkeypatch):
    """No dropout draws any today; what does one day must not change with a resume."""
    drawn = {}

    def accumulate(*args, **options):
        drawn.setdefault(len(drawn), float(torch.rand(())))
        return plain(*args, **options)

    plain = loop.accumulate
    monkeypatch.setattr(loop, "accumulate", accumulate)
    changes = {"optim__decay_steps": 4}
    train(small_run(tmp_path / "a", **changes))
    whole = list(drawn.values())
    drawn.clear()
    train(small_run(tmp_path / "b", steps=2, **changes))
    train(small_run(tmp_path / "b", **changes))
    assert list(drawn.values()) == whole
    assert len(set(whole)) == 6


def _train(rank: int, world: int, config) -> None:
    train(config)


# Adam divides a gradient by its own size: of one that is all rounding it makes a full step, and a
# token may then choose another expert.  A large eps keeps rounding what it is.
SMOOTH = {"optim__eps": 0.1, "optim__lr": 0.1}


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 4)])
def test_going_on_at_another_number_of_ranks_differs_by_rounding_alone(tmp_path, first, then):
    train(small_run(tmp_path / "a", optim__decay_steps=4, **SMOOTH))
    for ranks, steps in ((first, 3), (then, 6)):
        config = small_run(tmp_path / "b", steps=steps, optim__decay_steps=4, **SMOOTH)
        run_ranks(ranks, _train, config)
    assert worst_difference(tmp_path / "a", tmp_path / "b") < 1e-4
    for one, other in zip(records(tmp_path / "a"), records(tmp_path / "b"), strict=True):
        assert one["step"] == other["step"]
        assert one["counted_tokens"] == other["counted_tokens"]  # the same rows
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_copies_of_shards_train_as_one_rank_does(tmp_path):
    train(small_run(tmp_path / "a", **SMOOTH))
    layout = ParallelConfig(dp_replicate=2, dp_shard=2)
    config = small_run(tmp_path / "b", parallel=layout, **SMOOTH)
    run_ranks(4, _train, config)
    assert worst_difference(tmp_path / "a", tmp_path / "b") < 1e-4


def test_the_split_into_micro_batches_differs_by_rounding_alone(tmp_path):
    train(small_run(tmp_path / "a", **SMOOTH))
    train(small_run(tmp_path / "b", micro_batch_tokens=128, **SMOOTH))
    assert worst_difference(tmp_path / "a", tmp_path / "b") < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"eval__every_steps": 1, "eval__tokens": 64, "precision": "bf16"},
        {"checkpoint__every_steps": 1},
        {"checkpoint__every_steps": 2, "checkpoint__asynchronous": True},
        {"log__every_steps": 3},
        {"gc_every_steps": 1},
        {"recompute": "full"},
        {"recompute": "selective"},
        {"deterministic": True},
    ],
    ids=str,
)
def test_what_only_watches_or_saves_changes_no_weight(tmp_path, tmp_path_factory, changes):
    precision = changes.get("precision", "fp32")
    if precision not in PLAIN:
        folder = tmp_path_factory.mktemp(f"plain_{precision}")
        PLAIN[precision] = train(small_run(folder, precision=precision))
    expected = PLAIN[precision]
    found = train(small_run(tmp_path / "b", **changes))
    assert expected and found
    for name, value in tensors(expected).items():
        assert torch.equal(value, store_read(found, name)), name


PLAIN: dict[str, Path | None] = {}
"""Checkpoint of a run without anything on top, by precision."""


def store_read(checkpoint: Path, name: str) -> torch.Tensor:
    folder, _, tensor = name.partition("/")
    return store.read_weight(
        checkpoint / "optimizer" if folder == "optimizer" else checkpoint, tensor
    )


def test_a_checkpoint_has_the_names_of_the_model_and_fp32_values(tmp_path):
    checkpoint = train(small_run(tmp_path, precision="bf16", router__bias_update_rate=0.1))
    assert checkpoint == tmp_path / "checkpoints" / "step_00000006"
    stored = store.list_weights(checkpoint)
    assert set(stored) == {name for name, _ in Transformer(TINY).named_parameters()}
    assert {dtype for _, dtype in stored.values()} == {torch.float32}
    assert {path.name for path in checkpoint.iterdir()} == {
        ".metadata", "__0_0.distcp", "optimizer", "config.json", "state.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "run.json").read_text())["router.bias_update_rate"] == 0.1


def test_metrics_have_one_line_a_step_with_these_numbers(tmp_path):
    config = small_run(tmp_path, eval__every_steps=3, eval__tokens=64, router__aux_loss=0.01)
    train(config)
    lines = records(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [128 * n for n in range(1, 7)]
    assert [line["lr"] for line in lines[:2]] == [0.005, 0.01]
    assert ["validation_loss" in line for line in lines] == [False, False, True] * 2
    for line in lines:
        assert 0 < line["counted_tokens"] < line["tokens"]  # row and document starts carry none
        assert line["tokens_per_second"] == pytest.approx(128 / line["seconds"])
        assert line["memory_bytes"] > 2**20
        assert "mfu" not in line  # no peak is known for a CPU
        load = torch.tensor(line["router"]["load"])
        assert load.shape == (2, 8)
        torch.testing.assert_close(load.mean(1), torch.ones(2), atol=2e-3, rtol=0)
        assert all(0 < entropy <= math.log(8) + 1e-4 for entropy in line["router"]["entropy"])
        assert line["router_loss"] >= 0.03 - 1e-6
    assert lines[0]["loss"] == pytest.approx(math.log(96), rel=0.2)


def test_validation_is_a_fixed_set_and_pure_cross_entropy(tmp_path):
    """Bit-equal when repeated, the same on any number of ranks, and without router losses."""
    changes = {"eval__every_steps": 3, "eval__tokens": 160}  # 5 rows: not divisible by 2 or 4
    # AdamW makes a whole step of the sign of a tiny gradient, and with it of its rounding.
    changes["optim__eps"] = 1e-4
    train(small_run(tmp_path / "a", **changes))
    train(small_run(tmp_path / "again", **changes))
    run_ranks(4, _train, small_run(tmp_path / "ranks", **changes))
    run_ranks(2, _train, small_run(tmp_path / "two", **changes))
    losses = {
        run: [r["validation_loss"] for r in records(tmp_path / run) if r["step"] % 3 == 0]
        for run in ("a", "again", "ranks", "two")
    }
    assert losses["a"] == losses["again"]
    assert losses["ranks"] == pytest.approx(losses["a"], rel=1e-5)
    assert losses["two"] == pytest.approx(losses["a"], rel=1e-5)
    # With a rate of zero the weights stay: a router loss would show in the validation.
    still = {"optim__min_lr": 0.0, "optim__lr": 0.0, **changes}
    train(small_run(tmp_path / "plain", **still))
    train(small_run(tmp_path / "aux", router__aux_loss=10.0, **still))
    plain, aux = (records(tmp_path / run) for run in ("plain", "aux"))
    assert plain[2]["validation_loss"] == plain[5]["validation_loss"] == aux[2]["validation_loss"]


def poison(monkeypatch, bad_steps, what: str) -> None:
    """Makes the loss, or the gradients, of some calls not finite."""
    calls = []
    plain = loop.accumulate

    def accumulate(model, *args, **options):
        calls.append(len(calls) + 1)
        sums = plain(model, *args, **options)
        if calls[-1] in bad_steps:
            if what == "loss":
                return sums._replace(loss=sums.loss * float("nan"))
            next(iter(model.parameters())).grad.mul_(float("inf"))
        return sums

    monkeypatch.setattr(loop, "accumulate", accumulate)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch, what):
    train(small_run(tmp_path / "two", steps=2, optim__decay_steps=4))
    poison(monkeypatch, {3}, what)
    checkpoint = train(small_run(tmp_path / "a", steps=3, optim__decay_steps=4))
    before = store.newest(tmp_path / "two")
    assert checkpoint and before
    for name, value in tensors(before).items():
        assert torch.equal(value, store_read(checkpoint, name)), name  # nothing moved, not Adam
    last = records(tmp_path / "a")[-1]
    assert (last["step"], last["skipped_steps"]) == (3, 1)
    assert last["loss" if what == "loss" else "grad_norm"] is None


def test_a_run_that_is_never_finite_stops_and_keeps_its_last_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch, set(range(3, 99)), "loss")
    config = small_run(tmp_path, steps=20, max_skipped_steps=3, checkpoint__every_steps=2)
    with pytest.raises(TrainingFailed, match=r"step 6: loss or gradient not finite, for the 4th"):
        train(config)
    good = tmp_path / "checkpoints" / "step_00000002"
    assert all(tensor.isfinite().all() for tensor in tensors(good).values())
    assert len(records(tmp_path)) == 6


def test_fp16_lowers_its_loss_scale_and_does_not_give_up(tmp_path, monkeypatch):
    poison(monkeypatch, {1, 2, 3}, "gradient")
    train(small_run(tmp_path, precision="fp16", max_skipped_steps=0))
    lines = records(tmp_path)
    assert [line["loss_scale"] for line in lines] == [2.0**15, 2.0**14, 2.0**13, *[2.0**12] * 3]
    assert lines[-1]["skipped_steps"] == 3


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_moments_are_of_gradients_without_the_loss_scale(tmp_path, clip):
    """AdamW's steps would not show it: they do not depend on the size of gradients."""
    config = small_run(tmp_path, precision="fp16", steps=1, optim__warmup_steps=0, optim__clip=clip)
    folder = train(config)
    assert folder is not None
    moments = tensors(folder).items()
    squares = sum(x.square().sum() for name, x in moments if name.endswith(".exp_avg"))
    norm = records(tmp_path)[0]["grad_norm"]
    assert 1 < norm < 100
    expected = (1 - config.optim.beta1) * min(norm, clip or norm)
    assert math.sqrt(squares) == pytest.approx(expected, rel=1e-4)


def test_precisions_agree(tmp_path):
    for precision in ("fp32", "bf16", "fp16"):
        train(small_run(tmp_path / precision, precision=precision))
    exact = records(tmp_path / "fp32")
    for precision, close in (("bf16", 3e-2), ("fp16", 5e-3)):
        for one, other in zip(exact, records(tmp_path / precision), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=close)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.1)


def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(tmp_path, capsys):
    class AfterStep2(StopRequest):
        """Asked to stop while step 2 runs."""

        checks = 0

        @property
        def asked(self) -> bool:
            self.checks += 1
            return self.checks > 2

        @asked.setter
        def asked(self, value: bool) -> None: ...

    train(small_run(tmp_path / "a"))
    stopped = train(small_run(tmp_path / "b"), again="ossature train x.toml", stop=AfterStep2())
    assert stopped == tmp_path / "b" / "checkpoints" / "step_00000002"
    out = capsys.readouterr().out
    assert f"stopped by a signal after step 2; saved {stopped}" in out
    assert "to go on: ossature train x.toml" in out
    train(small_run(tmp_path / "b"))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_lines_after_the_checkpoint_are_cut_off_on_resume(tmp_path):
    """A killed run has logged steps that it has to take again; no step is there twice."""
    train(small_run(tmp_path, steps=3, optim__decay_steps=4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    train(small_run(tmp_path, optim__decay_steps=4))
    lines = records(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[3]["loss"] > 1


def test_a_run_with_other_settings_is_not_continued(tmp_path):
    config = small_run(tmp_path, steps=2)
    train(config)
    other = change(config, steps=4, optim__lr=1e-3, seed=7, log__every_steps=2)
    with pytest.raises(ValueError) as caught:
        train(other)
    assert str(caught.value) == (
        f"{tmp_path}/checkpoints/step_00000002: cannot go on with other settings: "
        "optim.lr (0.01, now 0.001), seed (1234, now 7); restore them, or give another run folder"
    )
    assert json.loads((tmp_path / "run.json").read_text()) == to_json(config)


def test_resume_false_refuses_a_folder_with_checkpoints(tmp_path):
    train(small_run(tmp_path, steps=1))
    with pytest.raises(ValueError, match="has checkpoints and resume is false"):
        train(small_run(tmp_path, resume=False))


def test_a_finished_run_has_nothing_left_to_do(tmp_path, capsys):
    first = train(small_run(tmp_path))
    assert train(small_run(tmp_path)) == first
    assert len(records(tmp_path)) == 6


@pytest.mark.parametrize(("keep", "left"), [(2, [5, 6]), (0, [1, 2, 3, 4, 5, 6])])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_checkpoints_stay(tmp_path, keep, left, asynchronous):
    train(
        small_run(
            tmp_path,
            checkpoint__every_steps=1,
            checkpoint__keep=keep,
            checkpoint__asynchronous=asynchronous,
        )
    )
    assert [store.step_of(folder) for folder in store.checkpoints(tmp_path)] == left
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_is_full_leaves_the_last_checkpoint_and_no_half_one(
    tmp_path, monkeypatch, asynchronous
):
    train(small_run(tmp_path, steps=2, optim__decay_steps=4))

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint_steps, "_write_synced", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(small_run(tmp_path, optim__decay_steps=4, checkpoint__asynchronous=asynchronous))
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def _cut_short(_rank: int, _world: int, folder: Path) -> str:
    """What is said where no file may grow beyond so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        store.save_weights(folder, {"weight": torch.ones(100_000)})
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "nothing"


@pytest.mark.parametrize("world", [1, 2])
def test_what_the_operating_system_said_of_a_file_is_said_on_every_rank(tmp_path, world):
    """torch says only that it is not where it expects to be in the file."""
    for said in run_ranks(world, _cut_short, tmp_path):
        assert said == f"{tmp_path}: rank 0: [Errno 27] File too large"


def test_the_balancing_bias_is_off_by_default_and_zero_at_the_end(tmp_path):
    plain = train(small_run(tmp_path / "plain"))
    assert plain
    assert not [name for name in tensors(plain) if "balance_bias" in name]
    changes = {"router__bias_update_rate": 0.01, "router__bias_anneal_steps": 3}
    changes["checkpoint__every_steps"] = 1
    end = train(small_run(tmp_path / "on", **changes))
    assert end
    sizes = []
    for folder in store.checkpoints(tmp_path / "on"):
        biases = [
            store.read_weight(folder / "optimizer", f"blocks.{n}.moe.router.balance_bias")
            for n in range(2)
        ]
        sizes.append(max(bias.abs().max().item() for bias in biases))
    assert sizes[:3] == pytest.approx([0.01, sizes[1], sizes[2]])
    # Steps 4, 5 and 6 are the last three: two thirds, one third, nothing.
    assert sizes[3:] == pytest.approx([sizes[2] * 2 / 3, sizes[2] / 3, 0.0])


def test_all_ranks_sample_together_and_say_what_one_says(tmp_path):
    """Weights are gathered by every forward: a rank that stayed away would hang the others."""
    corpus = text_corpus(tmp_path)
    changes = {"model": "tiny_text", "data__mock": False, "data__path": corpus, "steps": 2}
    changes |= {"sample__every_steps": 1, "sample__temperature": 0.0, "sample__prompts": ("def",)}
    said = {}
    for ranks in (1, 2):
        config = small_run(tmp_path / str(ranks), **changes, **SMOOTH)
        run_ranks(ranks, _train, config, seconds=60)
        lines = (tmp_path / str(ranks) / "samples.jsonl").read_text().splitlines()
        said[ranks] = [json.loads(line) for line in lines]
        checkpoint = store.newest(tmp_path / str(ranks))
        assert checkpoint and (checkpoint / "tokenizer.json").is_file()
    assert len(said[1]) == 2 and said[1][0]["text"]
    assert said[1] == said[2]


class Reads(TorchDispatchMode):
    """How often the training step itself reads a number from a tensor.

    What the model reads is left out: its CPU forms do, those for CUDA do not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.name().startswith("aten::_local_scalar_dense"):
            frames = [frame.filename for frame in traceback.extract_stack()]
            ours = [name for name in frames if "/ossature/" in name]
            self.count += "/ossature/train/" in ours[-1]
        return op(*args, **(kwargs or {}))


def test_the_host_does_not_wait_for_every_micro_batch(tmp_path, monkeypatch):
    """On a GPU each number read in the middle of a step would stop the queue of kernels."""
    counts = []

    def accumulate(*args, **options):
        with Reads() as reads:
            sums = plain(*args, **options)
        counts.append(reads.count)
        return sums

    plain = loop.accumulate
    monkeypatch.setattr(loop, "accumulate", accumulate)
    train(small_run(tmp_path / "a", steps=1))
    train(small_run(tmp_path / "b", steps=1, micro_batch_tokens=128))
    assert counts == [0, 0]


def test_a_model_learns_the_next_token_and_not_the_one_after(tmp_path, monkeypatch):
    """Counting sequences: a shift by two would predict x + 2."""
    from ossature.data.mock import MockRows

    def counting(self, number: int):
        row = plain(self, number)
        start = number % 90
        tokens = (start + torch.arange(len(row.tokens)).numpy()) % 90
        return row._replace(tokens=tokens, document=row.document * 0,
                            position=torch.arange(len(tokens)).numpy())  # fmt: skip

    plain = MockRows.row
    monkeypatch.setattr(MockRows, "row", counting)
    checkpoint = train(
        small_run(tmp_path, steps=40, global_batch_tokens=256, micro_batch_tokens=256)
    )
    model = Transformer(TINY)
    store.load_weights(checkpoint, dict(model.named_parameters()))
    with torch.no_grad():
        said = model(torch.arange(10, 40)[None]).argmax(-1)[0]
    assert (said[5:] == torch.arange(16, 41)).float().mean() > 0.9


def test_memory_does_not_grow_from_step_to_step(tmp_path):
    train(small_run(tmp_path, steps=60, gc_every_steps=10, log__tensorboard=True))
    memory = [line["memory_bytes"] for line in records(tmp_path)]
    assert memory[-1] - memory[20] < 8 * 2**20

"""`ossature prove`: what it says of layouts and of ranks that fail, and the model it does it on."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ossature.config import ParallelConfig, TrainConfig
from ossature.model.config import GPT_OSS_20B, ModelConfig
from ossature.parallel import mesh as meshes
from ossature.parallel import stages
from ossature.train import prove, prove_command, reduced, setup
from tests.small_runs import change, small_run

RUN = """
run = "unused"
model = "20b"
global_batch_tokens = 65536
micro_batch_tokens = 4096
recompute = "selective"
[data]
mock = true
[router]
aux_loss = 0.001
bias_update_rate = 0.001
"""


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    (tmp_path / "run.toml").write_text(RUN)
    return str(tmp_path / "run.toml")


def test_a_layout_that_computes_the_same_is_proved(run_file, tmp_path, capsys):
    output = tmp_path / "proof.json"
    axes = ["--parallel.tp", "2", "--parallel.ep", "2", "--parallel.dp-shard", "1"]

    status = prove_command.main([run_file, *axes, "--output", str(output)])

    said = capsys.readouterr().out
    assert status == 0 and "proved: all" in said
    assert said.startswith("tp 2 x ep 2, recompute selective\n")
    assert "precision bf16: compared in fp32\n" in said
    proof = json.loads(output.read_text())
    assert proof["passed"] and 0 < proof["largest_gradient_error"] < 1e-5
    assert proof["parallel"]["tp"] == 2 and proof["errors"]["counts"] == 0.0
    kinds = {name.partition(" ")[0] for name in proof["errors"]}
    assert {"loss", "router_loss", "norm", "gradients", "weights", "biases"} <= kinds
    assert "gradients blocks.1.attention.sinks.weight" in proof["errors"]


def _without_sinks(rank: int, world: int, case: prove.Case, true: bytes) -> dict[str, float]:
    from ossature.parallel import context

    plain = context.window_attention
    context.window_attention = lambda q, k, v, sinks, mask: plain(q, k, v, sinks * 0 - 100, mask)
    return prove_command.errors_of_rank(rank, world, case, true)


def test_a_layout_that_drops_sinks_is_not_proved_and_says_where_first(
    run_file, capsys, monkeypatch
):
    monkeypatch.setattr(prove_command, "errors_of_rank", _without_sinks)

    status = prove_command.main([run_file, "--parallel.cp", "2", "--ranks", "2"])

    said = capsys.readouterr().out
    assert status == 1 and "NOT PROVED: " in said and "proved: all" not in said
    verdicts = [line.split()[-1] for line in said.splitlines() if line.endswith(("FAILS", "equal"))]
    assert verdicts == sorted(verdicts, key=["FAILS", "equal"].index)
    # A sink that is never in the softmax has no gradient at all.
    row = next(x for x in said.splitlines() if "gradients blocks.0.attention.sinks.weight" in x)
    assert row.split()[2:] == ["1.0e+00", "FAILS"]


def _one_dies(rank: int, world: int, _case: prove.Case, _true: bytes) -> dict[str, float]:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
    return {}


def _one_raises(rank: int, world: int, _case: prove.Case, _true: bytes) -> dict[str, float]:
    if rank == 1:
        raise RuntimeError("no memory left")
    signal.pause()
    return {}


@pytest.mark.parametrize(
    ("function", "said"),
    [(_one_dies, "rank 1 of 2 ended with SIGKILL"), (_one_raises, "RuntimeError: no memory left")],
)
def test_a_rank_that_fails_ends_the_others_and_is_named(
    run_file, capsys, monkeypatch, function, said
):
    monkeypatch.setattr(prove_command, "errors_of_rank", function)

    assert prove_command.main([run_file, "--ranks", "2"]) == 1

    error = capsys.readouterr().err
    assert said in error and "rank 1 of 2" in error
    assert error.endswith("not proved: a rank failed\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        # tp x pp x ep need not be the number of ranks; each view of them must divide it.
        ("--ranks 6 --parallel.tp 4", r"tp \(4\) must divide the number of ranks \(6\)"),
        ("--ranks 4 --parallel.ep 8", r"ep \(8\) x etp \(1\) must divide .* \(4\)"),
        ("--ranks 16 --parallel.tp 16", r"tp \(16\) must divide num_key_value_heads \(8\)"),
        ("--ranks 4 --parallel.dp-shard 2", r"dp_shard \(2\) must be the number of ranks \(4\)"),
        ("--ranks 32", r"must be a multiple of micro_batch_tokens \(4096\) .* \(32\)"),
        ("--ranks 32 --parallel.pp 32", r"pp \(32\) .* num_hidden_layers \(24\)"),
        ("--parallel.tp 2", r"--ranks is needed: parallel.dp_shard \(0\) takes"),
    ],
)
def test_what_train_refuses_is_refused_with_both_numbers(run_file, words, sentence):
    with pytest.raises(ValueError, match=sentence):
        prove_command.main([run_file, *words.split()])


def test_the_number_of_ranks_is_what_the_axes_say(run_file):
    axes = {"pp": 2, "dp_replicate": 3, "dp_shard": 5, "cp": 7, "tp": 11}
    options = prove_command.ProveOptions(
        run=Path("unused"), data=change(small_run(Path("x"))).data, parallel=ParallelConfig(**axes)
    )
    assert prove_command.number_of_ranks(options) == 2 * 3 * 5 * 7 * 11


def reduced_case(world: int, **axes) -> tuple[TrainConfig, prove.Case]:
    config = small_run(
        Path("unused"),
        model="20b",
        data__seq_len=4096,
        micro_batch_tokens=8192,
        global_batch_tokens=2**21,
        parallel=ParallelConfig(**axes),
    )
    sizes, shape = setup.check_layout(config, world)
    return config, reduced.reduce(config, shape, sizes)


LAYOUTS = [
    (1, {}),
    (16, {"tp": 8, "cp": 2}),
    (8, {"dp_shard": 2, "tp": 4, "ep": 8}),
    (16, {"cp": 4, "tp": 2, "etp": 4, "ep": 2}),
    (32, {"pp": 4, "tp": 4, "ep": 4, "etp": 2, "pp_schedule": "DualPipeV"}),
    (64, {"cp": 16, "dp_replicate": 4}),
    (8, {"pp": 4, "dp_shard": 2, "pp_schedule": "Interleaved1F1B"}),
]


@pytest.mark.parametrize(("world", "axes"), LAYOUTS)
def test_no_two_dimensions_of_the_reduced_model_are_equal(world, axes):
    shape = reduced_case(world, **axes)[1].shape
    heads, key_heads = shape.num_attention_heads, shape.num_key_value_heads
    sizes = [
        shape.vocab_size, shape.hidden_size, shape.intermediate_size, 2 * shape.intermediate_size,
        heads, key_heads, heads // key_heads, shape.head_dim, heads * shape.head_dim,
        key_heads * shape.head_dim, shape.num_local_experts, shape.num_experts_per_tok,
    ]  # fmt: skip
    assert len(set(sizes)) == len(sizes), sizes


@pytest.mark.parametrize(("world", "axes"), LAYOUTS)
def test_the_layout_can_divide_the_reduced_model_and_batch(world, axes):
    """By the functions that refuse runs, and with what the run has."""
    config, case = reduced_case(world, **axes)
    sizes = meshes.sizes(config.parallel, world)
    assert case.config.parallel == config.parallel
    assert case.config.recompute == config.recompute
    meshes.check_model(config.parallel, case.shape, case.config.data.seq_len)
    setup.check_batch(case.config, sizes)
    count = setup.micro_batches(case.config, sizes)
    stages.check_pipeline(case.config, case.shape.num_hidden_layers, count)
    assert count >= 2  # gradients are added up over micro-batches
    assert set(case.shape.layer_types) == {"sliding_attention", "full_attention"}
    assert "sliding_attention" in case.shape.layer_types[-2:]
    batches = prove.batches(case)
    assert len({tuple(x) for batch in batches for x in batch.document.tolist()}) > 1


def test_a_window_longer_than_a_chunk_stays_so():
    """131,072 tokens over 512 ranks leave chunks of 128; the halo comes from one or from two."""
    for seq_len, longer in [(4096, False), (1024, True)]:
        config = small_run(
            Path("unused"), data__seq_len=seq_len, micro_batch_tokens=seq_len,
            global_batch_tokens=4 * seq_len, parallel=ParallelConfig(cp=8),
        )  # fmt: skip
        sizes = meshes.sizes(config.parallel, 8)
        case = reduced.reduce(config, GPT_OSS_20B, sizes)
        chunk = case.config.data.seq_len // 16
        assert (case.shape.sliding_window > chunk) is longer


def test_a_run_without_router_losses_and_clipping_is_compared_without():
    config = small_run(Path("unused"), optim__clip=0.0)
    case = reduced.reduce(config, ModelConfig(), meshes.sizes(config.parallel, 1))
    assert case.config.optim.clip == case.config.router.aux_loss == 0.0


def test_what_rounds_on_purpose_is_compared_in_fp32_and_that_is_said():
    for float8 in ("rowwise", "mxfp8"):
        config = small_run(
            Path("unused"), precision="bf16", float8=float8, parallel__reduce_dtype="bf16"
        )
        case = reduced.reduce(config, ModelConfig(), meshes.sizes(config.parallel, 2))
        assert (case.config.precision, case.config.float8) == ("fp32", "")
        assert case.config.parallel.reduce_dtype == "fp32"
        said = list(reduced.changes(config))
        assert f"float8 {float8}: compared in fp32" in said
        assert "parallel.reduce_dtype bf16: compared in fp32" in said


@pytest.mark.slow
def test_adapters_on_a_packed_base_are_proved(run_file, capsys):
    lora = "--lora.rank 8 --lora.dropout 0.1 --lora.base mxfp4 --router.bias-update-rate 0"
    axes = "--ranks 4 --parallel.tp 2 --parallel.ep 2 --parallel.etp 2"
    assert prove_command.main([run_file, *lora.split(), *axes.split()]) == 0
    said = capsys.readouterr().out
    assert "lora.dropout 0.1: compared without" in said
    assert "gradients blocks.*.moe.experts.gate_up_lora_a" in said
    assert "gradients blocks.*.attention.q_proj.weight" not in said  # it is frozen


@pytest.mark.slow
def test_torchrun_ranks_are_used_as_they_are(run_file):
    words = f"{run_file} --parallel.pp 2 --parallel.pp-schedule ZBVZeroBubble --recompute full"
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 4 -m"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command.split(), "ossature", "prove", *words.split()],
        env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("proved: all") == 1
    assert "pp 2 x dp_shard 2, schedule ZBVZeroBubble, recompute full" in done.stdout


def _compiled_anew(rank: int, world: int, case: prove.Case, true: bytes) -> dict[str, float]:
    """What a block sees changes with every micro-batch, and no number with it."""
    import torch

    from ossature.model.moe import Router
    from ossature.model.transformer import Transformer

    torch._dynamo.config.recompile_limit = 2  # type: ignore[attr-defined]
    forward, select, turns = Transformer.forward, Router.select, itertools.count()

    def turned(self: Transformer, *args, **kwargs):
        Router.turn = str(next(turns))  # type: ignore[attr-defined]
        return forward(self, *args, **kwargs)

    def selected(self: Router, logits: torch.Tensor) -> torch.Tensor:
        return select(self, logits) if self.turn != "none" else logits

    Transformer.forward, Router.select = turned, selected  # type: ignore[method-assign]
    return prove_command.errors_of_rank(rank, world, case, true)


@pytest.mark.slow
def test_compiled_blocks_are_proved_unless_they_are_compiled_again_and_again(
    run_file, capsys, monkeypatch
):
    """PAR-12 of the collection: at the limit dynamo goes on with eager blocks, and says nothing."""
    words = [run_file, "--parallel.tp", "2", "--parallel.ep", "2", "--ranks", "2", "--compile"]
    words += ["--recompute", "full"]
    assert prove_command.main(words) == 0
    assert "compile" in capsys.readouterr().out.splitlines()[0]

    monkeypatch.setattr(prove_command, "errors_of_rank", _compiled_anew)
    assert prove_command.main(words) == 1
    assert "FailOnRecompileLimitHit" in capsys.readouterr().err

"""The SLURM scripts, with a stand-in for srun: what they start, and a small run on two nodes."""

import json
import os
import re
import subprocess
import sys

import pytest

from ossature.config import TrainConfig, parse
from ossature.convert.config import hugging_face_config
from ossature.parallel import mesh as meshes
from ossature.parallel.nodes import divide
from ossature.train.loop import train
from ossature.train.setup import check_batch, check_pipeline, model_config
from tests.golden import ROOT
from tests.parallel.test_metrics import agree
from tests.small_runs import SIZES, text_corpus

SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sh"))
RANKS = {"pretrain": 32, "sft": 16, "lora": 16}

SAY = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$SAID"
"""
START = """#!/usr/bin/env bash
# 2 nodes of 2 tasks, all on this machine.
while [[ $1 == --* ]]; do shift; done
shift  # ossature
for task in 0 1 2 3; do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 SLURM_JOB_ID=$$ \\
        SLURM_NODELIST=localhost,other "$PYTHON" -m ossature "$@" &
    started+=($!)
done
for process in "${started[@]}"; do wait "$process" || exit; done
"""


@pytest.fixture
def job(tmp_path):
    """Runs a script where `srun` is another one; the variables of SLURM and of a site are unset."""

    def run(script: str, srun: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
        stand_in = tmp_path / "bin" / "srun"
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(srun)
        stand_in.chmod(0o755)
        kept = {"HOME", "LANG", "PYTHONPATH", "TMPDIR"}
        environment = {name: os.environ[name] for name in kept & os.environ.keys()}
        environment |= {
            "PATH": f"{stand_in.parent}:/usr/bin:/bin", "WORKSPACE": str(tmp_path / "workspace"),
            "SAID": str(tmp_path / "said"), "PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": "lo",
            **variables,
        }  # fmt: skip
        return subprocess.run(
            ["bash", f"examples/slurm/{script}.sh", *words], cwd=ROOT, env=environment,
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).stderr == b""


def test_every_job_stops_at_its_first_error_and_saves_before_its_time_is_up():
    assert {path.stem for path in SCRIPTS} == {*RANKS, "ranks"}
    for path in SCRIPTS:
        if path.stem != "ranks":
            assert "set -euo pipefail" in path.read_text()
            assert "#SBATCH --signal=TERM@" in path.read_text()


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Folders that are there, empty; what is in them is looked at by `ossature train`."""
    data = tmp_path / "data"
    data.mkdir()
    for n in (1, 2):
        (data / f"dclm_{n:02}_text_document.bin").touch()
    return {"DCLM_DATA_DIR": str(data), "SFT_DATA": str(data), "PRETRAINED_CHECKPOINT": str(data)}


@pytest.mark.parametrize(
    ("script", "missing"),
    [
        ("pretrain", "DCLM_DATA_DIR"),
        ("sft", "SFT_DATA"),
        ("lora", "SFT_DATA"),
        ("sft", "PRETRAINED_CHECKPOINT"),
        ("lora", "PRETRAINED_CHECKPOINT"),
    ],
)
def test_a_job_without_data_or_weights_starts_nothing(job, tmp_path, files, script, missing):
    """It is not run on mock data instead."""
    unset = {name: value for name, value in files.items() if name != missing}
    wrong = {**files, missing: str(tmp_path / "nowhere")}
    for variables in (unset, wrong):
        done = job(script, SAY, **variables)
        assert done.returncode == 2
        assert re.fullmatch(rf"error: {missing} .*\n", done.stderr), done.stderr
    assert not (tmp_path / "said").exists()


def test_a_folder_without_tokens_is_refused(job, tmp_path):
    done = job("pretrain", SAY, DCLM_DATA_DIR=str(tmp_path))
    assert done.returncode == 2 and "has neither manifest.json nor" in done.stderr


@pytest.mark.parametrize("script", RANKS)
def test_what_a_job_starts_is_a_run_that_its_ranks_can_hold(job, tmp_path, files, script):
    done = job(script, SAY, "--steps", "7", **files)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "said").read_text().splitlines()
    at = said.index("ossature")
    assert said[:at] == ["--kill-on-bad-exit=1"]
    assert said[at + 1] == "train"
    config = parse(TrainConfig, said[at + 2 :])
    assert config.steps == 7
    assert config.run.parent == tmp_path / "workspace" / "results"
    axes, shape = meshes.sizes(config.parallel, RANKS[script]), model_config(config.model)
    check_batch(config, axes)
    meshes.check_model(config.parallel, shape, config.data.seq_len)
    rows = config.micro_batch_tokens * axes["dp_replicate"] * axes["dp_shard"]
    check_pipeline(config, shape.num_hidden_layers, config.global_batch_tokens // rows)


def test_a_container_sees_the_workspace_and_what_else_it_is_given(job, tmp_path, files):
    job(
        "pretrain", SAY, CONTAINER_IMAGE="image.sqsh", CONTAINER_MOUNTS="/a:/b",
        SRUN_OPTIONS="--mpi=pmix --label", **files,
    )  # fmt: skip
    said = (tmp_path / "said").read_text().splitlines()
    workspace = tmp_path / "workspace"
    assert said[: said.index("ossature")] == [
        "--kill-on-bad-exit=1", "--container-image=image.sqsh",
        f"--container-mounts={workspace}:{workspace},{ROOT}:{ROOT},/a:/b",
        f"--container-workdir={ROOT}", "--mpi=pmix", "--label",
    ]  # fmt: skip


SMALL = """
run = "unused"
precision = "fp32"
steps = 3
global_batch_tokens = 256
micro_batch_tokens = 64
[data]
blend = ["unused"]
seq_len = 32
[optim]
lr = 1e-2
[log]
tensorboard = false
"""


@pytest.mark.slow
def test_pretraining_on_two_nodes_of_two_tasks_has_the_metrics_of_one_rank(job, tmp_path):
    corpus = text_corpus(tmp_path)
    shape = hugging_face_config(SIZES["tiny_text"], dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(shape))
    file = tmp_path / "small.toml"
    file.write_text(SMALL)
    words = [
        "--model", str(tmp_path), "--steps", "5", "--global-batch-tokens", "256",
        "--micro-batch-tokens", "64", "--optim.warmup-steps", "2", "--eval.tokens", "192",
        "--eval.every-steps", "5",
    ]  # fmt: skip
    done = job(
        "pretrain", START, *words, DCLM_DATA_DIR=str(corpus), CONFIG=str(file), TP="2", PP="2",
        EP="2", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    alone = tmp_path / "alone"
    blend = ["--data.blend", str(corpus)]
    train(parse(TrainConfig, [str(file), "--run", str(alone), *blend, *words]))
    agree(tmp_path / "workspace/results/gpt_oss_20b_pretrain_tp2_pp2_ep2_spTrue_cp1", alone)
    assert sum("step 5/5" in line for line in done.stdout.splitlines()) == 1


def test_the_container_commands_of_the_docs_are_commands_of_ours():
    text = (ROOT / "docs" / "launch.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^docker run .* ossature\s+ossature launch (.*)$", text, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        options, (verb, *rest) = divide(line.replace("/opt/ossature/", f"{ROOT}/").split())
        assert options == ["--config", "distributed_config.env"] and verb == "train"
        config = parse(TrainConfig, rest)
        check_batch(config, meshes.sizes(config.parallel, 8))
        meshes.check_model(config.parallel, model_config(config.model), config.data.seq_len)

"""`ossature launch`: what describes the nodes, and two agents that train as one rank does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ossature.checkpoint import store
from ossature.convert.config import hugging_face_config
from ossature.parallel.nodes import Launch, agent_words, divide, main, own_address, read
from ossature.train.loop import train
from tests.parallel.test_metrics import agree
from tests.small_runs import TINY, records, small_run

EXAMPLE = """\
# of the published guide
GPUS_PER_NODE=4
NUM_NODES=2
export MASTER_ADDR="node0"   # where node 1 finds it
MASTER_PORT='6000'

NODE_RANK=0
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "distributed_config.env"
    path.write_text(EXAMPLE)
    return path


def test_a_flag_wins_over_a_variable_and_that_over_the_file_and_that_over_the_default(file):
    words, variables = ["--config", str(file), "--node-rank=1"], {"MASTER_PORT": "6001"}
    launch = read(words, {**variables, "NODE_RANK": "7"})
    assert launch == Launch(
        config=file, gpus_per_node=4, num_nodes=2, master_addr="node0", master_port=6001,
        node_rank=1,
    )  # fmt: skip
    assert read([], {}) == Launch()  # the published defaults
    assert (Launch().gpus_per_node, Launch().num_nodes, Launch().master_port) == (8, 1, 29500)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("GPU_PER_NODE=8\n", "distributed_config.env: GPU_PER_NODE: unknown key; it takes GPUS_PE"),
        ("NUM_NODES=two\n", "distributed_config.env: NUM_NODES = two: must be a whole number"),
        ("NUM_NODES=2 3\n", "distributed_config.env: line 1 is not KEY=value"),
        ("NUM_NODES=$(hostname)\nrm -rf x", "distributed_config.env: NUM_NODES|line 2 is not KEY"),
        ("NUM_NODES=2\nNODE_RANK=2\n", r"node_rank \(2\) must be less than num_nodes \(2\)"),
        ("GPUS_PER_NODE=0\n", r"gpus_per_node \(0\) must be at least 1"),
        ("MASTER_ADDR=\n", "master_addr is empty: give the address of node 0"),
        ("MASTER_PORT=70000\n", r"master_port \(70000\) must be from 1 to 65535"),
    ],
)
def test_a_mistake_in_the_file_is_named(file, text, rule):
    file.write_text(text)
    with pytest.raises(ValueError, match=rule):
        read(["--config", str(file)], {})


def test_a_file_that_is_no_text_is_named(file):
    file.write_bytes(b"NUM_NODES=\xff\n")
    with pytest.raises(ValueError, match=r"distributed_config.env: not UTF-8 text, at byte 10$"):
        read(["--config", str(file)], {})


def test_a_file_that_is_named_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.env: no such file"):
        read(["--config", str(tmp_path / "nowhere.env")], {})


def test_a_mistake_in_a_variable_is_named():
    with pytest.raises(ValueError, match=r"^NODE_RANK = first: must be a whole number$"):
        read([], {"NODE_RANK": "first"})


def test_a_command_must_be_given():
    with pytest.raises(ValueError, match="say what to run, as in"):
        main(["--num-nodes", "1"])


@pytest.mark.parametrize("dashes", [["--"], []])
def test_the_command_begins_after_our_own_flags(dashes):
    own = ["--num-nodes=2", "--node-rank", "1"]
    command = ["train", "run.toml", "--run", "a", "--num-nodes", "7", "--", "x"]
    assert divide([*own, *dashes, *command]) == (own, command)
    assert divide([*dashes, *command]) == ([], command)
    assert divide(own) == (own, [])


def test_node_0_alone_opens_the_place_where_nodes_meet():
    two = [Launch(num_nodes=2, master_addr="127.0.0.1", node_rank=rank) for rank in (0, 1)]
    words = [agent_words(launch) for launch in two]
    assert "--rdzv-conf=is_host=1" in words[0] and "--rdzv-conf=is_host=0" in words[1]
    assert all("--rdzv-endpoint=127.0.0.1:29500" in each for each in words)
    assert [own_address(launch) for launch in two] == ["127.0.0.1", "127.0.0.1"]


def test_two_jobs_on_one_node_do_not_meet():
    one, other = agent_words(Launch()), agent_words(Launch())
    assert "--rdzv-endpoint=localhost:0" in one
    assert one != other  # the name of the meeting


def shape(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(hugging_face_config(TINY, dtype="float32")))
    return folder


def command(folder: Path, run: str, steps: int, *more: str) -> list[str]:
    """small_run of the tiny model, for a command line."""
    return [
        "train", "--run", str(folder / run), "--model", str(folder), "--steps", str(steps),
        "--precision", "fp32", "--global_batch_tokens", "256", "--micro_batch_tokens", "64",
        "--data.mock", "true", "--data.seq_len", "32", "--optim.lr", "1e-2",
        "--optim.warmup_steps", "2", "--log.tensorboard", "false", "--timeout_seconds", "60", *more,
    ]  # fmt: skip


def launch(words: list[str], **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, "-m", "ossature", "launch", *words], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment, **options,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_agents(folder: Path, words: list[str], *options: str) -> list[subprocess.Popen]:
    """Two nodes of two ranks each on this machine, described by one file and a flag."""
    file = folder / "distributed_config.env"
    file.write_text(
        f"GPUS_PER_NODE=2\nNUM_NODES=2\nMASTER_ADDR=127.0.0.1\nMASTER_PORT={free_port()}\n"
    )
    return [
        launch(["--config", str(file), "--node-rank", str(node), *options, "--", *words])
        for node in (0, 1)
    ]


def all_out(agents: list[subprocess.Popen], seconds: float = 120) -> list[tuple[str, str]]:
    try:
        return [agent.communicate(timeout=seconds) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    train(small_run(run, steps=5, global_batch_tokens=256, micro_batch_tokens=64))
    return run


@pytest.mark.slow
def test_two_agents_of_two_ranks_have_the_metrics_of_one_rank(tmp_path, alone):
    words = command(shape(tmp_path), "run", 5, "--parallel.tp", "2", "--parallel.ep", "4")
    agents = two_agents(tmp_path, words)
    said = all_out(agents)
    assert [agent.returncode for agent in agents] == [0, 0], said
    agree(tmp_path / "run", alone)
    lines = "".join(out for out, _ in said).splitlines()
    assert sum(line.startswith("step 5/5") for line in lines) == 1  # one rank of one node prints


def processes(agents: list[subprocess.Popen]) -> dict[int, int]:
    """Rank -> process."""
    children = [child for agent in agents for child in psutil.Process(agent.pid).children()]
    return {int(child.environ()["RANK"]): child.pid for child in children}


def wait_for_step(run: Path, step: int, agents: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 90
    while not ((run / "metrics.jsonl").exists() and len(records(run)) >= step):
        assert time.monotonic() < deadline and agents[0].poll() is None, all_out(agents)
        time.sleep(0.02)


@pytest.mark.slow
def test_a_rank_killed_on_one_node_starts_both_again_from_the_last_checkpoint(tmp_path):
    """And what it finds at the end is bitwise what a run finds that nobody has killed."""
    from tests.train.test_loop import assert_same_run

    more = ["--parallel.tp", "2", "--checkpoint.every_steps", "5", "--checkpoint.keep", "0"]
    shape(tmp_path)
    whole = two_agents(tmp_path, command(tmp_path, "whole", 60, *more))
    all_out(whole)
    agents = two_agents(tmp_path, command(tmp_path, "run", 60, *more), "--max-restarts", "2")
    wait_for_step(tmp_path / "run", 12, agents)
    os.kill(processes(agents)[3], signal.SIGKILL)
    said = all_out(agents)
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "steps done" in said[0][0] + said[1][0]
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_agent_saves_once_and_leaves_on_all_ranks(tmp_path, number):
    agent = launch(
        ["--gpus-per-node", "2", "--", *command(shape(tmp_path), "run", 10_000)],
        start_new_session=True,
    )
    wait_for_step(tmp_path / "run", 2, [agent])
    ranks = processes([agent])
    if number == signal.SIGINT:  # ctrl-c: the terminal tells the ranks too
        os.killpg(agent.pid, number)
    else:
        agent.send_signal(number)
    ((out, err),) = all_out([agent])
    assert agent.returncode == 128 + number and "Traceback" not in err
    assert out.count("stopped by a signal") == 1
    last = store.newest(tmp_path / "run")
    assert last and store.step_of(last) == len(records(tmp_path / "run"))
    assert not any(psutil.pid_exists(pid) for pid in ranks.values())


@pytest.mark.slow
def test_the_status_of_the_ranks_is_that_of_the_launch(tmp_path):
    words = command(shape(tmp_path), "run", 2)
    mistake = launch(["--gpus-per-node", "2", "--", *words, "--parallel.tp", "3"])
    ((out, err),) = all_out([mistake])
    assert mistake.returncode == 2 and out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors[0].startswith("error: parallel: ") and "number of ranks (2)" in errors[0]
    assert errors[1].startswith("error: rank ") and "exit status 2" in errors[1]
    assert len(errors) == 2 and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("restarts", ["0", "3"])
def test_a_mistake_is_said_once_however_often_ranks_may_start_again(tmp_path, restarts):
    words = command(shape(tmp_path), "run", 2, "--parallel.tp", "3")
    agent = launch(["--gpus-per-node", "2", "--max-restarts", restarts, "--", *words])
    ((_, err),) = all_out([agent])
    assert agent.returncode == 2
    assert err.count("error: parallel: ") == 1 and err.count("exit status 2") == 1


@pytest.mark.slow
def test_a_killed_rank_is_named_when_no_restart_is_left(tmp_path):
    agent = launch(["--gpus-per-node", "2", "--", *command(shape(tmp_path), "run", 10_000)])
    wait_for_step(tmp_path / "run", 2, [agent])
    os.kill(processes([agent])[1], signal.SIGKILL)
    ((_, err),) = all_out([agent])
    assert agent.returncode == 1
    assert "error: rank 1 ended with SIGKILL (local rank 1, process " in err

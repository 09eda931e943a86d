"""`ossature launch ... COMMAND`: start the ranks of this node, and meet those of the others.

A thin layer over torchrun: its agent starts one process a GPU, ends all of them when one dies, and
starts them again as often as it may.  The nodes are described by a file of the form
`distributed_config.env`, by variables of the same names, or by flags; a flag wins over a variable,
a variable over the file.

Nodes meet at MASTER_ADDR:MASTER_PORT, which node 0 opens (torchrun's `c10d` rendezvous): after a
failure on one node all of them start again together.  Ranks are dealt in the order of the nodes'
addresses, so rank 0, which prints, may be on another node than node 0.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ossature.config import parse


@dataclass(frozen=True, kw_only=True)
class Launch:
    config: Path | None = None
    """File of KEY=value lines, such as distributed_config.env."""
    gpus_per_node: int = 8
    """GPUS_PER_NODE: ranks on this node; on a machine without GPUs they share its CPU."""
    num_nodes: int = 1
    """NUM_NODES"""
    master_addr: str = "localhost"
    """MASTER_ADDR: where the other nodes reach node 0."""
    master_port: int = 29500
    """MASTER_PORT: a free port there; one node alone needs none."""
    node_rank: int = 0
    """NODE_RANK: number of this node, from 0."""
    max_restarts: int = 0
    """Times that all ranks are started again, after one has died, from their last checkpoint; not
    after a mistake in the command, its files or its data (exit status 2): it would come again."""


KEYS = {name.upper(): name for name in
        ("gpus_per_node", "num_nodes", "master_addr", "master_port", "node_rank")}  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the command on the ranks of this node; its own exit status where all ranks agree."""
    own, command = divide(argv)
    launch = read(own, os.environ)
    if not command:
        raise ValueError("launch: say what to run, as in: ossature launch train RUN.toml")
    return start(launch, command)


def divide(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our own words, and those of the command: from `--` on, or from the first word after flags."""
    at = 0
    while argv[at : at + 1] and argv[at] != "--" and argv[at].startswith("-"):
        at += 1 if "=" in argv[at] or argv[at] in ("-h", "--help") else 2
    return argv[:at], argv[at + 1 :] if argv[at : at + 1] == ["--"] else argv[at:]


def read(argv: list[str], variables: Mapping[str, str]) -> Launch:
    """Flags over variables over the file over defaults.

    Raises:
        ValueError: the file is missing or has an unknown key, or a value is not of its type.
    """
    file = parse(Launch, argv, prog="ossature launch ... COMMAND").config
    written = {} if file is None else read_file(file)
    places = dict.fromkeys(written, f"{file}: ")
    for key in KEYS.keys() & variables.keys():
        written[key], places[key] = variables[key], ""
    for key, value in written.items():
        if key != "MASTER_ADDR" and not value.isdigit():
            raise ValueError(f"{places[key]}{key} = {value}: must be a whole number")
    # Files and variables are flags written down: the later one wins.
    launch = parse(Launch, [*(f"--{KEYS[key]}={value}" for key, value in written.items()), *argv])
    check(launch)
    return launch


def check(launch: Launch) -> None:
    least = {"gpus_per_node": 1, "num_nodes": 1, "node_rank": 0, "max_restarts": 0}
    for name, bound in least.items():
        if getattr(launch, name) < bound:
            raise ValueError(f"{name} ({getattr(launch, name)}) must be at least {bound}")
    if not launch.master_addr:
        raise ValueError("master_addr is empty: give the address of node 0")
    if launch.node_rank >= launch.num_nodes:
        raise ValueError(
            f"node_rank ({launch.node_rank}) must be less than num_nodes ({launch.num_nodes})"
        )
    if not 0 < launch.master_port < 2**16:
        raise ValueError(f"master_port ({launch.master_port}) must be from 1 to 65535")


def read_file(path: Path) -> dict[str, str]:
    """KEY=value lines as a shell would source them: `export`, quotes and # comments are allowed."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text, at byte {error.start}") from None
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = re.fullmatch(
            r"""\s*(?:export\s+)?(\w+)=("[^"]*"|'[^']*'|[^\s"'#]*)\s*(?:#.*)?""", line
        )
        if parts is None:
            raise ValueError(f"{path}: line {number} is not KEY=value")
        if parts[1] not in KEYS:
            raise ValueError(f"{path}: {parts[1]}: unknown key; it takes {', '.join(KEYS)}")
        found[parts[1]] = parts[2].strip("\"'")
    return found


def agent_words(launch: Launch) -> list[str]:
    """torchrun's options."""
    alone = launch.num_nodes == 1
    # One node meets itself at a port that is free: two jobs on a machine cannot take the same.
    endpoint = "localhost:0" if alone else f"{launch.master_addr}:{launch.master_port}"
    address = "localhost" if alone else own_address(launch)
    return [
        f"--nproc-per-node={launch.gpus_per_node}", f"--nnodes={launch.num_nodes}",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--local-addr={address}",
        f"--rdzv-id={uuid.uuid4() if alone else 'ossature'}",
        f"--rdzv-conf=is_host={int(launch.node_rank == 0)}",
        f"--max-restarts={launch.max_restarts}",
    ]  # fmt: skip


def own_address(launch: Launch) -> str:
    """Where the other nodes reach this one: needs no name service, unlike torchrun's own guess."""
    if launch.node_rank == 0:
        return launch.master_addr
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((launch.master_addr, launch.master_port))  # sends nothing
        except OSError as error:
            raise ValueError(f"MASTER_ADDR = {launch.master_addr}: {error.strerror}") from None
        return probe.getsockname()[0]


MISTAKE = 2
"""Exit status of a rank that has said what is wrong with what it was given."""


def give_up_after_mistakes() -> None:
    """Let torchrun's agent of this process start nothing again after one; it has no switch for it.

    A node whose agent ends closes the meeting, so the agents of the others end too.
    """
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher import api

    class Agent(LocalElasticAgent):
        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # pyright: ignore
            result: RunResult = super()._monitor_workers(worker_group)  # pyright: ignore
            if any(failure.exitcode == MISTAKE for failure in result.failures.values()):
                self._remaining_restarts = 0
            return result

    api.LocalElasticAgent = Agent  # type: ignore[misc]


def start(launch: Launch, command: list[str]) -> int:
    # A store for every start, opened by rank 0: torchrun's own would keep what ranks of an
    # earlier start have written.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # After SIGTERM a rank ends its step and saves: torchrun's own 30 s are few.  One that waits for
    # a dead rank is killed then.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, without its warning
    words = agent_words(launch)
    give_up_after_mistakes()
    try:
        run(parse_args([*words, "--module", "--", "ossature", *command]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"exit status {failure.exitcode}"
        if failure.exitcode < 0:
            how = signal.Signals(-failure.exitcode).name
        where = f"local rank {failure.local_rank}, process {failure.pid} on {socket.gethostname()}"
        print(f"error: rank {rank} ended with {how} ({where})", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except RendezvousError as error:
        where = f"{launch.master_addr}:{launch.master_port}"
        raise ValueError(f"the nodes did not meet at {where}: {error}") from error
    return 0

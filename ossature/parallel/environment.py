"""The place of this process among the ranks of a launch: from torchrun's variables, or SLURM's.

torchrun, and whatever imitates it, says RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
`srun` starts one process a rank and says the same in words of its own.  No torch here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple


class Place(NamedTuple):
    rank: int
    """Of this process among all, from 0."""
    local_rank: int
    """Of this process among those of its machine, from 0."""
    world: int
    """Processes in all."""
    address: str
    """Of the machine where ranks meet; empty for a lone process."""
    port: int
    one_machine: bool
    """All ranks are known to be on this machine."""


def environment(variables: Mapping[str, str] = os.environ) -> Place:
    """Where torchrun or srun has put this process; a lone process is rank 0 of 1.

    Raises:
        ValueError: half of a launch is described.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = [name for name in names if name in variables]
    if not given:
        variables = from_slurm(variables)
        if not variables:
            return Place(0, 0, 1, "", 0, True)
        given = ["SLURM_PROCID"]
    for name in names:
        if not variables.get(name, "").isdigit():
            raise ValueError(
                f"{name} ({variables.get(name, 'not set')}) must be a whole number, since "
                f"{given[0]} is set: launch with torchrun, or unset it"
            )
    rank, local_rank, world = (int(variables[name]) for name in names)
    if rank >= world:
        raise ValueError(f"RANK ({rank}) must be less than WORLD_SIZE ({world})")
    address, port = variables.get("MASTER_ADDR", ""), variables.get("MASTER_PORT", "")
    if world > 1 and not (address and port.isdigit()):
        raise ValueError(
            f"MASTER_ADDR ({address or 'not set'}) and MASTER_PORT ({port or 'not set'}) must say "
            f"where the {world} ranks meet"
        )
    one_machine = world == 1 or variables.get("LOCAL_WORLD_SIZE") == str(world)
    return Place(rank, local_rank, world, address, int(port or 0), one_machine)


def from_slurm(variables: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a process that `srun` has started; empty for any other.

    MASTER_ADDR and MASTER_PORT win where they are set.  The port is 15000 + the last four digits
    of the job's number, so that two jobs on one machine do not meet.

    Raises:
        ValueError: a variable of SLURM that is needed is not set.
    """
    if not {"SLURM_PROCID", "SLURM_NTASKS"} <= variables.keys():
        return {}  # the shell of `salloc`, or no SLURM at all
    lists = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    hosts = next((variables[name] for name in lists if variables.get(name)), "")
    needed = {"SLURM_LOCALID": variables.get("SLURM_LOCALID"), "SLURM_NODELIST": hosts}
    job = variables.get("SLURM_JOB_ID", "")
    if "MASTER_PORT" not in variables:
        needed["SLURM_JOB_ID"] = job if job.isdigit() else ""
    for name, value in needed.items():
        if not value:
            raise ValueError(f"{name} must be set, since SLURM_PROCID is: launch with srun")
    found = {
        "RANK": variables["SLURM_PROCID"],
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "WORLD_SIZE": variables["SLURM_NTASKS"],
        "MASTER_ADDR": variables.get("MASTER_ADDR") or first_host(hosts),
        "MASTER_PORT": variables.get("MASTER_PORT") or str(15000 + int(job[-4:])),
    }
    if not re.search(r"[,\[]", hosts):
        found["LOCAL_WORLD_SIZE"] = found["WORLD_SIZE"]
    return found


def first_host(hosts: str) -> str:
    """The first machine of SLURM's short form: `a,b` -> a; `n[001-004]`, `n[001,003]` -> n001."""
    # Text and [first of some numbers, ...], up to a comma between machines.
    first = re.match(r"(?:[^,\[\]]|\[\w[^\[\]]*\])+(?=,|$)", hosts)
    if first is None:
        raise ValueError(f"SLURM_NODELIST ({hosts}): not a list of hosts")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])

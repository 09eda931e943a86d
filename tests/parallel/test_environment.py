"""Ranks from the variables of torchrun and of SLURM; hand-made lists of hosts."""

import pytest

from ossature.parallel.environment import Place, environment, first_host

TASK = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "4021234",
    "SLURM_JOB_NODELIST": "gpu[07,09-12]",
}  # fmt: skip
TORCHRUN = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node", "MASTER_PORT": "6000",
}  # fmt: skip


def test_a_lone_process_is_the_only_rank():
    assert environment({"PATH": "/bin"}) == Place(0, 0, 1, "", 0, True)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("a", "a"), ("a,b", "a"), ("n[001-004]", "n001"), ("n[001,003]", "n001"),
        ("a,b[1-3]", "a"), ("n[3-5,9],m1", "n3"), ("r[1-2]n[07-09].lan", "r1n07.lan"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
    ],
)  # fmt: skip
def test_the_first_host_of_slurms_short_form(hosts, first):
    assert first_host(hosts) == first


@pytest.mark.parametrize("hosts", ["", ",a", "n[", "n[]", "n[-3]"])
def test_what_is_no_list_of_hosts_is_refused(hosts):
    with pytest.raises(ValueError, match="not a list of hosts"):
        first_host(hosts)


def test_srun_says_what_torchrun_says():
    assert environment(TASK) == Place(5, 1, 16, "gpu07", 15000 + 1234, False)


def test_a_step_on_some_of_the_nodes_meets_on_its_own_first_node():
    step = {**TASK, "SLURM_STEP_NODELIST": "gpu[10-11]", "SLURM_NODELIST": "gpu[07,09-12]"}
    assert environment(step).address == "gpu10"


def test_one_node_of_slurm_needs_no_name_lookups():
    assert environment({**TASK, "SLURM_JOB_NODELIST": "gpu07"}).one_machine


def test_an_address_that_is_set_wins_over_slurms():
    given = environment({**TASK, "MASTER_ADDR": "ib0", "MASTER_PORT": "6000"})
    assert (given.address, given.port) == ("ib0", 6000)


def test_torchrun_inside_of_srun_is_torchruns():
    assert environment({**TASK, **TORCHRUN}) == Place(3, 1, 4, "node", 6000, False)
    assert environment({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}).one_machine


def test_the_shell_of_an_allocation_is_no_rank():
    """`salloc` sets the number of tasks and starts none."""
    shell = {name: value for name, value in TASK.items() if name != "SLURM_PROCID"}
    assert environment(shell).world == 1


@pytest.mark.parametrize(
    ("variables", "rule"),
    [
        ({"WORLD_SIZE": "2"}, r"RANK \(not set\) must be a whole number, since WORLD_SIZE is set"),
        ({**TORCHRUN, "RANK": "4"}, r"RANK \(4\) must be less than WORLD_SIZE \(4\)"),
        ({**TORCHRUN, "MASTER_PORT": ""}, r"MASTER_PORT \(not set\) must say where the 4 ranks"),
        ({**TASK, "SLURM_JOB_ID": "x"}, "SLURM_JOB_ID must be set"),
        ({**TASK, "SLURM_JOB_NODELIST": ""}, "SLURM_NODELIST must be set"),
        ({**TASK, "SLURM_NTASKS": "many"}, r"WORLD_SIZE \(many\) must be a whole number"),
    ],
)
def test_half_of_a_launch_is_refused(variables, rule):
    with pytest.raises(ValueError, match=rule):
        environment(variables)

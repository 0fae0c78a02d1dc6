"""How learning reaches several GPUs and nodes; processes are not started here."""

import os
import signal

import pytest

from patch.artefacts import PatchError
from patch.cluster import launch

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""Of batch systems."""


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch):
    """What `relaunch` would have become."""
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execvp", lambda file, command: commands.append(command))
    before = {number: signal.getsignal(number) for number in WARNINGS}
    yield commands
    for number, handler in before.items():
        signal.signal(number, handler)


def test_one_node_becomes_one_torchrun(became) -> None:
    launch.relaunch(["learn", "--model", "m"], nodes=1, processes=4)
    assert became[0][1:] == [
        "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone", "-m", "patch", "learn", "--model", "m",
    ]  # fmt: skip
    assert all(signal.getsignal(number) == signal.SIG_IGN for number in WARNINGS)  # torchrun shall not die of them


def test_several_nodes_become_one_torchrun_each_that_meet_at_the_first(became, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    launch.relaunch(["learn", "--set", "steps=5 x"], nodes=2, processes=4)
    assert became[0][:7] == [
        "srun",
        "--overlap",
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        "--cpus-per-task=8",
    ]
    script = became[0][-1]
    assert script.startswith("trap '' USR1 USR2; exec ")
    assert "--nnodes 2" in script
    assert "--node-rank $SLURM_NODEID -m patch learn --set 'steps=5 x'" in script


def test_allocation_of_another_size_is_refused(became, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    with pytest.raises(PatchError, match="--nodes 2: this runs in a Slurm job of 1 nodes"):
        launch.relaunch(["learn"], nodes=2, processes=1)


def test_number_of_processes_is_checked_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    launch.check_processes(2, 4)
    with pytest.raises(PatchError, match="8 processes were started, --nodes 1 x --processes 4 ask for 4"):
        launch.check_processes(1, 4)

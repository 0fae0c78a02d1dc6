"""Learning on several GPUs and nodes: one torchrun per node, started by `srun` where there are several nodes."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from patch.artefacts import PatchError


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def check_processes(nodes: int, processes: int) -> None:
    """Raises PatchError where torchrun has started another number of processes than was asked for."""
    started = int(os.environ["WORLD_SIZE"])
    if started != nodes * processes:
        raise PatchError(
            f"{started} processes were started, --nodes {nodes} x --processes {processes} ask for {nodes * processes}; "
            "leave both out under a torchrun of your own."
        )


def relaunch(arguments: Sequence[str], nodes: int, processes: int) -> NoReturn:
    """Become torchrun, which runs `python -m patch ARGUMENTS` as `processes` processes on each of `nodes` nodes.

    Raises PatchError where there are several nodes and this is no Slurm job of so many.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    # A warning signal of Slurm reaches every process: the learning ones act on it, torchrun must not die of it.
    for warning in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(warning, signal.SIG_IGN)
    if nodes == 1:
        command += ["--standalone", "-m", "patch", *arguments]
    else:
        allocated = os.environ.get("SLURM_JOB_NUM_NODES", "0")
        if int(allocated) != nodes:
            raise PatchError(f"--nodes {nodes}: this runs in a Slurm job of {allocated} nodes (0: in none).")
        command = _on_every_node(command, arguments, nodes)
    os.execvp(command[0], command)


def _on_every_node(torchrun: list[str], arguments: Sequence[str], nodes: int) -> list[str]:
    """This process runs on the first node, which becomes the meeting point."""
    meeting = ["--nnodes", str(nodes), "--master-addr", socket.gethostname(), "--master-port", str(_free_port())]
    shared = shlex.join([*torchrun, *meeting])
    script = f"trap '' USR1 USR2; exec {shared} --node-rank $SLURM_NODEID -m patch {shlex.join(arguments)}"
    # --overlap: the step that this process runs in holds the whole allocation.
    srun = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    return [*srun, *([f"--cpus-per-task={cpus}"] if cpus else []), "bash", "-c", script]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

"""What runs inside a Slurm job: one shell command, told in time when it has to stop, and requeued where it may go on.

Slurm asks with SIGUSR2 some time before the time limit, and at a preemption where the partition allows it
a grace time. submitit calls `checkpoint` then: the command is asked to save its state and stop, and the same Slurm
job is put into the queue again. An interruption is no failure; who waits for the job sees it as running.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from types import FrameType
from typing import Any

import psutil
from submitit.helpers import Checkpointable, DelayedSubmission

SECONDS_TO_DIE = 5


class CommandError(Exception):
    """The command failed; the message says how."""


class Command(Checkpointable):
    """A shell command as the payload of a Slurm job.

    grace_s: seconds that it gets between being asked to stop and being killed, at most what Slurm leaves.
    limit_s: its time limit. timeouts: how often it may run into that and go on from its saved state; 0 for commands
    that save none. requeues: how often it may be put back for other reasons.
    """

    def __init__(self, command: str, directory: str, grace_s: int, limit_s: int, timeouts: int, requeues: int):
        self.command, self.directory = command, directory
        self.grace_s, self.limit_s, self.timeouts, self.requeues = grace_s, limit_s, timeouts, requeues
        self.timed_out = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._told = False
        self._started = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None, "_told": False}

    def __call__(self) -> None:
        self._started = time.monotonic()
        if self._restarts() > self.requeues + self.timeouts:
            raise CommandError(f"was requeued {self._restarts()} times, more than allowed")
        signal.signal(signal.SIGTERM, self._note)
        environment = {name: value for name, value in os.environ.items() if name != "SNAKEMAKE_PROFILE"}
        self._child = subprocess.Popen(
            ["bash", "-c", self.command], cwd=self.directory, env=environment, preexec_fn=_ignore_warning
        )
        status = self._child.wait()
        if status and self._told:
            # Slurm is ending this run. A result now would say that the job failed, though it may be requeued: leave
            # none and wait for the end, after which the job's state tells.
            time.sleep(2 * self.grace_s)
        if status:
            raise CommandError(f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}")

    def checkpoint(self) -> DelayedSubmission:
        """Stop the command in an orderly way and say how it goes on. Raises CommandError where it may not."""
        self._stop()  # first of all: what is left of the command would outlive this process
        at_limit = time.monotonic() - self._started >= self.limit_s - self.grace_s - 90  # Slurm asks up to 60 s early
        if at_limit and self.timed_out >= self.timeouts:
            often = f", {self.timed_out + 1} times" if self.timed_out else ""
            raise CommandError(f"reached its time limit of {self.limit_s // 60} min{often}")
        if self._restarts() >= self.requeues + self.timeouts:
            raise CommandError(f"was interrupted again after {self._restarts()} requeues")
        self.timed_out += at_limit
        return DelayedSubmission(self)

    def _stop(self) -> None:
        """SIGTERM to all processes of the command, and SIGKILL to those that are left after the grace time."""
        if self._child is None or self._child.poll() is not None:
            return
        root = psutil.Process(self._child.pid)
        tree = [root, *root.children(recursive=True)]  # the rule's shell has a process group of its own
        for number, seconds in ((signal.SIGTERM, self.grace_s), (signal.SIGKILL, SECONDS_TO_DIE)):
            for process in tree:
                try:
                    process.send_signal(number)
                except psutil.NoSuchProcess:
                    continue
            if not psutil.wait_procs(tree, timeout=seconds)[1]:
                return

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    @staticmethod
    def _restarts() -> int:
        return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _ignore_warning() -> None:
    """Slurm sends the warning to every process of the job: only those that handle it themselves shall see it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)

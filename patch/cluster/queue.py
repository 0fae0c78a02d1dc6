"""What Slurm says about jobs: one question for all of them, however many they are.

Accounting (`sacct`) answers where it runs, else the controller (`squeue`). Jobs are named as Slurm prints them, "12" or
"12_3" for task 3 of array 12.
"""

from __future__ import annotations

import getpass
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Source = Literal["sacct", "squeue"]

LIVE = frozenset({
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING",
    "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "SPECIAL_EXIT", "RESV_DEL_HOLD",
})  # fmt: skip
FORGOTTEN = "FORGOTTEN"
"""Neither accounting nor the controller knows the job: it ended longer ago than the controller remembers."""
SECONDS_TO_ANSWER = 60
IDS_PER_QUESTION = 2000
"""A limit of the command line, not of Slurm."""


class NoAnswer(Exception):  # noqa: N818 - Slurm is away, which is no error of ours
    """Slurm did not answer; ask again later."""


@dataclass(frozen=True)
class JobState:
    name: str
    """Slurm's word: PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, ..., or FORGOTTEN."""
    reason: str = ""
    """Why it waits, or why it ended, in Slurm's words."""
    exit: str = ""
    """Exit status and signal, "1:0"; accounting only."""
    nodes: str = ""

    @property
    def live(self) -> bool:
        return self.name in LIVE

    def __str__(self) -> str:
        details = [f"exit {self.exit}"] if self.exit not in ("", "0:0") else []
        details += [self.reason] if self.reason not in ("", "None") else []
        details += [f"on {self.nodes}"] if self.nodes not in ("", "None assigned") else []
        return f"{self.name} ({', '.join(details)})" if details else self.name


class Queue:
    """Asks Slurm. `source` None: accounting where it runs."""

    def __init__(self, source: Source | None = None):
        self.source: Source = source or ("sacct" if accounting_runs() else "squeue")

    def states(self, ids: Iterable[str]) -> dict[str, JobState]:
        """State of every job. Raises NoAnswer where Slurm is away.

        A failure that accounting reports is believed only if the controller does not hold the job any more: a requeued
        job has failed in accounting for a moment.
        """
        wanted = list(ids)
        if not wanted:
            return {}
        if self.source == "squeue":
            return find(wanted, _squeue(wanted))
        found = find(wanted, _sacct(wanted))
        doubtful = [job for job, state in found.items() if not state.live and state.name != "COMPLETED"]
        if doubtful:
            held = find(doubtful, _squeue(doubtful))
            found |= {job: state for job, state in held.items() if state.live or found[job].name == FORGOTTEN}
        return found

    def live_by_comment(self) -> dict[str, list[str]]:
        """This user's waiting and running jobs by their comment. Raises NoAnswer where Slurm is away."""
        jobs: dict[str, list[str]] = {}
        for line in _ask("squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i|%k").splitlines():
            job, _, comment = line.strip().partition("|")
            jobs.setdefault(comment, []).append(job)
        return jobs


def accounting_runs() -> bool:
    """Whether `sacct` answers. Where there is no accounting it exists and fails."""
    try:
        _ask("sacct", "-n", "-X", "-j", "1")
    except NoAnswer:
        return False
    return True


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs; those that are over already do not matter."""
    wanted = list(ids)
    for start in range(0, len(wanted), IDS_PER_QUESTION):
        _run("scancel", *wanted[start : start + IDS_PER_QUESTION])


def find(wanted: Iterable[str], rows: Mapping[str, JobState]) -> dict[str, JobState]:
    """The state of every wanted job in Slurm's rows.

    Tasks of an array that have not started share one row, "12_[3-9%4]".
    """
    waiting = {job.partition("_[")[0]: state for job, state in rows.items() if "_[" in job}
    return {job: rows.get(job) or waiting.get(job.split("_")[0]) or JobState(FORGOTTEN) for job in wanted}


def parse(text: str) -> dict[str, JobState]:
    """Rows of "id|state|reason|exit|nodes". The last row of a job counts, and "CANCELLED by 1000" is CANCELLED."""
    rows = (line.split("|") for line in text.splitlines() if line.count("|") == 4)
    return {
        job.strip(): JobState(state.split()[0].rstrip("+"), reason.strip(), code.strip(), nodes.strip())
        for job, state, reason, code, nodes in rows
        if state.strip()
    }


def _sacct(wanted: list[str]) -> dict[str, JobState]:
    return _rows(wanted, "sacct", "-n", "-X", "-P", "-o", "JobID,State,Reason,ExitCode,NodeList", "-j")


def _squeue(wanted: list[str]) -> dict[str, JobState]:
    return _rows(wanted, "squeue", "-h", "-r", "--states=all", "-o", "%i|%T|%r||%N", "-j")


def _rows(wanted: list[str], *command: str) -> dict[str, JobState]:
    """Ask for whole arrays: their number is what counts, not that of their tasks."""
    arrays = sorted({job.split("_")[0] for job in wanted}, key=int)
    rows: dict[str, JobState] = {}
    for start in range(0, len(arrays), IDS_PER_QUESTION):
        rows |= parse(_ask(*command, ",".join(arrays[start : start + IDS_PER_QUESTION])))
    return rows


def _ask(*command: str) -> str:
    done = _run(*command)
    if done.returncode and "Invalid job id" not in done.stderr:  # squeue's way to say that it knows none of them
        raise NoAnswer(f"{command[0]}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:  # in a session of its own: Ctrl-C at the terminal must not end the question
        return subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, start_new_session=True
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(f"{command[0]}: {error}") from None

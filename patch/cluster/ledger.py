"""Which Slurm job computes which files: written before and after every submission, read after a crash.

JSON lines, only ever appended to, each to the disk before the next step is taken:

    {"event": "submitting", "token": T, "tasks": [...]}     about to call sbatch; T is the comment of the Slurm job
    {"event": "submitted", "token": T, "jobs": [...]}       Slurm's ids, in the order of the tasks
    {"event": "ended", "job": "12_3", "state": "FAILED"}    seen to be over

A process that is killed between the first two leaves a token by which Slurm still finds the job, so none is lost
and none is submitted twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

_LATER = ("job", "token", "state", "log")
"""What other lines of the ledger say about a task."""


@dataclass(frozen=True)
class Task:
    """One task of a Slurm job."""

    rule: str
    cell: str
    outputs: tuple[str, ...]
    identity: str
    """Hash of what it computes: other settings have another, though the outputs are the same files."""
    logs: tuple[str, ...] = ()
    job: str = ""
    """Slurm's id; empty as long as it is not known."""
    token: str = ""
    state: str = ""
    """How it ended; empty as long as that has not been seen."""
    log: str = ""
    """What the Slurm job itself wrote."""

    @property
    def key(self) -> str:
        return "\0".join(sorted(self.outputs))


class Ledger:
    """The tasks of a working directory, newest for every set of outputs."""

    def __init__(self, path: Path):
        self.path = path
        self.tasks: dict[str, Task] = {}
        self._jobs: dict[str, str] = {}  # Slurm's id -> key
        self._tokens: dict[str, list[str]] = {}  # token -> keys, in order
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                self._apply(json.loads(line))
            except ValueError:
                continue  # cut off while it was written: nothing had happened yet

    def submitting(self, token: str, tasks: Sequence[Task]) -> None:
        told = [{name: value for name, value in asdict(task).items() if name not in _LATER} for task in tasks]
        self._append({"event": "submitting", "token": token, "tasks": told})

    def submitted(self, token: str, jobs: Sequence[str], logs: Sequence[str]) -> None:
        self._append({"event": "submitted", "token": token, "jobs": list(jobs), "logs": list(logs)})

    def ended(self, job: str, state: str) -> None:
        self._append({"event": "ended", "job": job, "state": state})

    def open(self) -> list[Task]:
        """Tasks that have not been seen to end."""
        return [task for task in self.tasks.values() if not task.state]

    def without_job(self) -> Iterable[str]:
        """Tokens of submissions of which it is not known whether Slurm got them."""
        return {task.token for task in self.open() if not task.job}

    def _append(self, event: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as stream:
            if stream.tell() and not self._ends_with_newline():
                stream.write("\n")  # after a line that was cut off
            stream.write(json.dumps(event) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._apply(event)

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read() == b"\n"

    def _apply(self, event: dict[str, Any]) -> None:
        if event["event"] == "submitting":
            tasks = [_task(content, event["token"]) for content in event["tasks"]]
            self.tasks |= {task.key: task for task in tasks}
            self._tokens[event["token"]] = [task.key for task in tasks]
        elif event["event"] == "submitted":
            for key, job, log in zip(self._tokens[event["token"]], event["jobs"], event["logs"], strict=True):
                self.tasks[key] = replace(self.tasks[key], job=job, log=log)
                self._jobs[job] = key
        elif event["event"] == "ended":
            key = self._jobs.get(event["job"], "")
            if key in self.tasks and self.tasks[key].job == event["job"]:
                self.tasks[key] = replace(self.tasks[key], state=event["state"])


def _task(content: dict[str, Any], token: str) -> Task:
    known: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
    return Task(**{**known, "token": token})

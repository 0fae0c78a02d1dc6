"""How far a grid is, while it runs: what is done, what Slurm computes, what failed and where its log is, what waits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from patch.artefacts import PatchError
from patch.cluster.ledger import Ledger, Task
from patch.cluster.queue import JobState, NoAnswer, Queue
from patch.experiments import Cell, Experiment, Stage
from patch.records import Record

LEDGER = Path(".snakemake/submitit/ledger.jsonl")
Word = Literal["done", "running", "queued", "failed", "waiting"]


@dataclass(frozen=True)
class StageStatus:
    """A stage of a cell."""

    cell: str
    stage: Stage
    word: Word
    job: str = ""
    """Slurm's id."""
    detail: str = ""
    """Slurm's state with its reason."""
    log: str = ""


def grid_status(
    experiment: Experiment, results: Path = Path("results"), ledger: Path = LEDGER, slurm: Queue | None = None
) -> list[StageStatus]:
    """Every stage of every cell, those of cells that others only learn from included, in the order of the grid.

    Done is what has a record of the settings and code of now. slurm: whom to ask; None to ask nobody.
    Raises PatchError where Slurm does not answer.
    """
    tasks = {output: task for task in Ledger(ledger).tasks.values() for output in task.outputs}
    states: dict[str, JobState] = {}
    open_jobs = [task.job for task in tasks.values() if task.job and not task.state]
    if slurm and open_jobs:
        try:
            states = slurm.states(set(open_jobs))
        except NoAnswer as error:
            raise PatchError(f"Slurm does not answer: {error}") from None
    found = []
    for cell, stage in experiment.expand().stages():
        folder = results / experiment.name / cell.folder(stage)
        found.append(_stage_status(cell, stage, folder, tasks.get(str(folder / "record.json")), states))
    return found


def _stage_status(
    cell: Cell, stage: Stage, folder: Path, task: Task | None, states: dict[str, JobState]
) -> StageStatus:
    if _done(cell, stage, folder):
        return StageStatus(cell.path, stage, "done")
    if task is None or not task.job:
        return StageStatus(cell.path, stage, "waiting")
    state = states.get(task.job) or JobState(task.state or "UNKNOWN")
    log = next(iter(task.logs), task.log)
    if state.live:
        word: Word = "queued" if state.name in ("PENDING", "CONFIGURING", "REQUEUED") else "running"
        return StageStatus(cell.path, stage, word, task.job, str(state), log)
    if state.name in ("COMPLETED", "UNKNOWN"):  # by older settings or code, or just now
        return StageStatus(cell.path, stage, "waiting")
    return StageStatus(cell.path, stage, "failed", task.job, str(state), log)


def _done(cell: Cell, stage: Stage, folder: Path) -> bool:
    try:
        return Record.read(folder).key == cell.key(stage)
    except PatchError:
        return False

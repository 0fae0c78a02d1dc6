"""How far a grid is, while it runs: what is done, what Slurm computes, what failed and where its log is, what waits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from patch.artefacts import PatchError
from patch.benchmark_jobs import benchmark_jobs
from patch.cluster.ledger import Ledger, Task
from patch.cluster.queue import JobState, NoAnswer, Queue
from patch.experiments import Experiment
from patch.records import Record

LEDGER = Path(".snakemake/submitit/ledger.jsonl")
Word = Literal["done", "running", "queued", "failed", "waiting"]


@dataclass(frozen=True)
class StageStatus:
    """A stage of a cell, or a benchmark."""

    cell: str
    """Path below results/NAME; of benchmarks of random tiles, their folder."""
    stage: str
    word: Word
    job: str = ""
    """Slurm's id."""
    detail: str = ""
    """Slurm's state with its reason."""
    log: str = ""


def grid_status(
    experiment: Experiment,
    results: Path = Path("results"),
    ledger: Path = LEDGER,
    slurm: Queue | None = None,
    on_gpu: bool = False,
) -> list[StageStatus]:
    """Every stage of every cell, those of cells that others only learn from included, in the order of the grid; then
    every benchmark.

    Done is what has a record of the settings and code of now. slurm: whom to ask; None to ask nobody. on_gpu: whether
    jobs compute on GPUs, which benchmarks may need.
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
    grid, run = experiment.expand(), results / experiment.name
    wanted = [(cell.path, str(stage), cell.key(stage), run / cell.folder(stage)) for cell, stage in grid.stages()]
    for job in benchmark_jobs(experiment, grid.cells, on_gpu):
        wanted.append((job.cell.path if job.cell else job.folder, job.stage, job.key, run / job.folder))
    return [
        StageStatus(path, stage, "done")
        if _done(key, folder)
        else _not_done(path, stage, tasks.get(str(folder / "record.json")), states)
        for path, stage, key, folder in wanted
    ]


def _not_done(path: str, stage: str, task: Task | None, states: dict[str, JobState]) -> StageStatus:
    if task is None or not task.job:
        return StageStatus(path, stage, "waiting")
    state = states.get(task.job) or JobState(task.state or "UNKNOWN")
    log = next(iter(task.logs), task.log)
    if state.live:
        word: Word = "queued" if state.name in ("PENDING", "CONFIGURING", "REQUEUED") else "running"
        return StageStatus(path, stage, word, task.job, str(state), log)
    if state.name in ("COMPLETED", "UNKNOWN"):  # by older settings or code, or just now
        return StageStatus(path, stage, "waiting")
    return StageStatus(path, stage, "failed", task.job, str(state), log)


def _done(key: str, folder: Path) -> bool:
    try:
        return Record.read(folder).key == key
    except PatchError:
        return False

"""The state of a grid, from records, the ledger and Slurm's answers."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from patch.artefacts import PatchError
from patch.benchmark_jobs import benchmark_jobs, skipped
from patch.cluster.ledger import Ledger, Task
from patch.cluster.queue import JobState, NoAnswer
from patch.cluster.status import grid_status
from patch.experiments import Benchmarks, Experiment
from patch.records import Metric, Record

EXPERIMENT = Experiment.model_validate(
    {
        "name": "run",
        "models": {"tiny": {"source": "./tiny"}},
        "grid": [{"methods": ["dense", "magnitude", "wanda"]}],
        "evaluation": {"tasks": None},
    }
)


def test_every_stage_is_done_running_queued_failed_or_waiting(tmp_path: Path) -> None:
    dense, magnitude, wanda = EXPERIMENT.cells()
    Record("prune", magnitude.key("prune"), {}, [Metric("model", "sparsity", 0.5)]).write(
        tmp_path / "run" / magnitude.path / "prune"
    )
    Record("prune", "of other settings", {}).write(tmp_path / "run" / wanda.path / "prune")
    ledger = Ledger(tmp_path / "ledger.jsonl")
    outputs = [str(tmp_path / "run" / cell.path / stage / "record.json") for cell, stage in (
        (dense, "evaluate"), (magnitude, "evaluate"), (wanda, "prune"))]  # fmt: skip
    tasks = [Task("rule", "cell", (output,), "1", (f"{number}.log",)) for number, output in enumerate(outputs)]
    ledger.submitting("token", tasks)
    ledger.submitted("token", ["7_0", "7_1", "7_2"], ["", "", ""])
    ledger.ended("7_2", "OUT_OF_MEMORY")
    answers = {"7_0": JobState("RUNNING", nodes="n1"), "7_1": JobState("PENDING", "Priority")}
    slurm = SimpleNamespace(states=lambda ids: {job: answers[job] for job in ids})
    found = grid_status(EXPERIMENT, tmp_path, ledger.path, slurm)  # type: ignore[arg-type]
    assert [(stage.cell, stage.stage, stage.word, stage.job, stage.log) for stage in found] == [
        ("tiny/dense", "evaluate", "running", "7_0", "0.log"),
        ("tiny/magnitude/50-2of4", "prune", "done", "", ""),
        ("tiny/magnitude/50-2of4", "evaluate", "queued", "7_1", "1.log"),
        ("tiny/wanda/50-2of4", "prune", "failed", "7_2", "2.log"),
        ("tiny/wanda/50-2of4", "evaluate", "waiting", "", ""),
    ]
    assert found[2].detail == "PENDING (Priority)"


TIMED = EXPERIMENT.model_copy(
    update={"benchmarks": Benchmarks.model_validate({"layers": {}, "memory": {}, "masks": {"methods": ["wanda"]}})}
)


def test_benchmarks_are_done_running_failed_or_waiting_after_the_stages(tmp_path: Path) -> None:
    jobs = benchmark_jobs(TIMED, TIMED.cells(), on_gpu=True)
    layers, of_mask, memory, old = [tmp_path / "run" / job.folder for job in jobs]
    Record("benchmark", jobs[0].key, {}).write(layers)
    Record("benchmark", "of other settings", {}).write(old)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    tasks = [
        Task("rule", "cell", tuple(str(folder / name) for name in ("rows.csv", "record.json")), "1", (f"{number}.log",))
        for number, folder in enumerate((of_mask, memory))
    ]
    ledger.submitting("token", tasks)
    ledger.submitted("token", ["7_0", "7_1"], ["", ""])
    ledger.ended("7_0", "FAILED")
    slurm = SimpleNamespace(states=lambda ids: dict.fromkeys(ids, JobState("RUNNING", nodes="n1")))
    found = grid_status(TIMED, tmp_path, ledger.path, slurm, on_gpu=True)  # type: ignore[arg-type]
    assert [(stage.cell, stage.stage, stage.word, stage.job, stage.log) for stage in found[5:]] == [
        ("benchmarks/layers/random/llama-2-7b", "benchmark layers", "done", "", ""),
        ("tiny/wanda/50-2of4", "benchmark layers", "failed", "7_0", "0.log"),
        ("benchmarks/memory/random/llama-2-7b", "benchmark memory", "running", "7_1", "1.log"),
        ("tiny/wanda/50-2of4", "benchmark memory", "waiting", "", ""),
    ]


def test_benchmarks_that_are_left_out_without_a_gpu_do_not_wait(tmp_path: Path) -> None:
    assert len(grid_status(TIMED, tmp_path, tmp_path / "none", on_gpu=False)) == 5
    assert skipped(TIMED, on_gpu=False).startswith("skipped: benchmarks of layers, memory (no GPU")
    assert skipped(TIMED, on_gpu=True) == skipped(EXPERIMENT, on_gpu=False) == ""


def test_grid_that_never_ran_waits(tmp_path: Path) -> None:
    assert {stage.word for stage in grid_status(EXPERIMENT, tmp_path, tmp_path / "none")} == {"waiting"}


def test_silence_of_slurm_is_an_error_that_says_so(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.submitting("token", [Task("rule", "cell", ("file",), "1")])
    ledger.submitted("token", ["7"], [""])

    def silent(ids: object) -> dict[str, JobState]:
        raise NoAnswer("squeue: connect failure")

    with pytest.raises(PatchError, match="Slurm does not answer: squeue"):
        grid_status(EXPERIMENT, tmp_path, ledger.path, SimpleNamespace(states=silent))  # type: ignore[arg-type]

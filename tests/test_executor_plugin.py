"""The executor plugin without a cluster: parameters, batches, taking up, verdicts, retries."""

import asyncio
import pickle
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

SLURM = Path(__file__).parents[1] / "slurm"
sys.path.append(str(SLURM))  # where the installed plugin's .pth would put it
import snakemake_executor_plugin_submitit as plugin  # noqa: E402
from snakemake_executor_plugin_submitit.parameters import slurm_parameters  # noqa: E402

from patch.cluster.ledger import Ledger  # noqa: E402
from patch.cluster.queue import FORGOTTEN, JobState, NoAnswer  # noqa: E402


class Job(SimpleNamespace):
    """As much of a Snakemake job as the executor looks at."""

    def __init__(self, cell: str, command: str = "prune", attempt: int = 1, retries: int = 2, **resources: Any):
        super().__init__(
            name="prune",
            rule=SimpleNamespace(name="prune"),
            wildcards_dict={"cell": cell},
            shellcmd=command,
            params={},
            output=[f"{cell}/mask"],
            log=[f"{cell}.log"],
            resources={"runtime": 30, "mem_mb": 1000, **resources},
            threads=1,
            attempt=attempt,
            restart_times=retries,
        )

    def is_group(self) -> bool:
        return False


class Slurm:
    """Answers with what it is told to."""

    def __init__(self) -> None:
        self.answers: dict[str, JobState] = {}
        self.away = False

    def states(self, ids) -> dict[str, JobState]:
        if self.away:
            raise NoAnswer("squeue: connect failure")
        return {job: self.answers.get(job, JobState("RUNNING")) for job in ids}

    def live_by_comment(self) -> dict[str, list[str]]:
        return {}


@pytest.fixture
def executor(tmp_path: Path) -> plugin.Executor:
    made = object.__new__(plugin.Executor)  # the constructor starts a thread and asks a real Slurm
    made._settings = plugin.ExecutorSettings(folder=tmp_path)
    made._folder, made._queue, made._ledger = tmp_path, Slurm(), Ledger(tmp_path / "ledger.jsonl")
    made._waiting, made._lock, made._unanswered, made._left = {}, threading.Lock(), False, {}
    made.workflow = SimpleNamespace(execution_settings=SimpleNamespace(latency_wait=0.0), workdir_init=tmp_path)
    made.logger = SimpleNamespace(info=print, error=print)
    made.status_rate_limiter = AsyncNull()
    made.finished, made.failed = [], []
    made.report_job_submission = lambda info: None
    made.report_job_success = lambda info: made.finished.append(info.job)
    made.report_job_error = lambda info, msg, aux_logs: made.failed.append((info.job, msg, aux_logs))
    return made


class AsyncNull(nullcontext):
    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


def submitted(executor: plugin.Executor, *jobs: Job) -> None:
    """As if sbatch had accepted the jobs as array 7."""
    executor._ledger.submitting("token", [plugin._task(job) for job in jobs])
    ids = [f"7_{index}" for index in range(len(jobs))]
    executor._ledger.submitted("token", ids, [str(executor._folder / f"{name}.out") for name in ids])
    for job, name in zip(jobs, ids, strict=True):
        executor._wait_for(job, name, str(executor._folder / f"{name}.out"))


def ended(executor: plugin.Executor, state: str, result: tuple[str, str] | None = None, log: str = "") -> list[str]:
    """One round of questions, all jobs being in `state`; returns the ids that are still waited for."""
    for name in list(executor._waiting):
        if result:
            path = executor._paths(name).result_pickle
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(result))
        Path(executor._folder / f"{name}.out").write_text(log)
        executor._queue.answers[name] = JobState(state)
    return round_of_questions(executor)


def round_of_questions(executor: plugin.Executor) -> list[str]:
    async def ask() -> list[str]:
        return [info.external_jobid async for info in executor.check_active_jobs(list(executor._waiting.values()))]

    return asyncio.run(ask())


def test_resources_of_the_stock_plugin_become_options_of_sbatch() -> None:
    places = {"slurm_partition": "gpu", "slurm_account": "lab", "qos": "short", "constraint": "ib"}
    size = {"runtime": 90, "mem_mb": 5000, "gpu": 4, "gpu_model": "h100", "nodes": 2, "cpus_per_task": 16}
    found = slurm_parameters({**places, **size, "slurm_extra": "--nice=5 --exclusive"}, threads=1)
    assert (found["time"], found["mem"], found["nodes"], found["cpus_per_task"]) == (90, "5000M", 2, 16)
    extra = {"partition": "gpu", "account": "lab", "qos": "short", "constraint": "ib", "gres": "gpu:h100:4"}
    assert found["additional_parameters"] == {**extra, "nice": "5", "exclusive": True, "requeue": True}
    assert slurm_parameters({}, threads=3)["cpus_per_task"] == 3
    assert slurm_parameters({"gpu": 1}, 1)["additional_parameters"]["gres"] == "gpu:1"
    assert slurm_parameters({"gres": "mps:2", "gpu": 1}, 1)["additional_parameters"]["gres"] == "mps:2"


def test_jobs_of_equal_needs_share_an_array() -> None:
    assert plugin._needs(Job("a")) == plugin._needs(Job("b"))
    for other in (Job("c", mem_mb=2000), Job("d", requeues=5), Job("e", gpu=1)):
        assert plugin._needs(Job("a")) != plugin._needs(other)


def test_batches_are_cut_at_the_size_of_arrays(executor: plugin.Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    executor._settings.max_array = 2
    sizes: list[int] = []
    executor.run_job_pre = lambda job: None
    monkeypatch.setattr(executor, "_submit", lambda batch: sizes.append(len(batch)))
    executor.run_jobs([Job(name) for name in "abcde"])
    assert sizes == [2, 2, 1]


def test_success_needs_the_result_and_not_only_the_state(executor: plugin.Executor) -> None:
    submitted(executor, Job("a"))
    assert ended(executor, "COMPLETED", ("success", "")) == []
    assert len(executor.finished) == 1
    assert not executor._ledger.open()
    executor._waiting.clear()
    submitted(executor, Job("b"))
    executor._paths("7_0").result_pickle.unlink()
    assert ended(executor, "COMPLETED") == []
    assert "ended before it could report a result" in executor.failed[0][1]


def test_late_result_is_waited_for(executor: plugin.Executor) -> None:
    executor.workflow.execution_settings.latency_wait = 60.0
    submitted(executor, Job("a"))
    assert ended(executor, "COMPLETED") == ["7_0"]
    assert ended(executor, "COMPLETED", ("success", "")) == []


def test_failure_names_job_state_reason_and_log_and_is_final(executor: plugin.Executor) -> None:
    job = Job("tiny/wanda")
    submitted(executor, job)
    ended(executor, "FAILED", ("error", "Traceback\npatch.cluster.task.CommandError: exit status 1\n"))
    failed, message, logs = executor.failed[0]
    assert failed is job
    assert message == "prune tiny/wanda: Slurm job 7_0, FAILED: exit status 1. "
    assert logs == [str(executor._folder / "7_0.out")]
    assert job.attempt > job.restart_times  # Snakemake does not try again


@pytest.mark.parametrize(
    ("state", "log"),
    [
        ("OUT_OF_MEMORY", ""),
        ("FAILED", "slurmstepd: error: Step 7.0 exceeded memory limit (9 > 8), being killed"),
        ("FAILED", "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0"),
        ("TIMEOUT", ""),
        ("NODE_FAIL", ""),
    ],
)
def test_lack_of_memory_or_time_and_lost_nodes_are_tried_again(executor: plugin.Executor, state: str, log: str) -> None:
    job = Job("a")
    submitted(executor, job)
    ended(executor, state, log=log)
    assert len(executor.failed) == 1
    assert job.attempt == 1
    assert ("out of memory, it had 1000 MB" in executor.failed[0][1]) == (state not in ("TIMEOUT", "NODE_FAIL"))


def test_silence_of_slurm_is_waited_out(executor: plugin.Executor) -> None:
    submitted(executor, Job("a"))
    executor._queue.away = True
    assert round_of_questions(executor) == ["7_0"]
    executor._queue.away = False
    assert ended(executor, "COMPLETED", ("success", "")) == []


def test_job_that_slurm_has_forgotten_counts_by_its_result(executor: plugin.Executor) -> None:
    submitted(executor, Job("a"))
    assert ended(executor, FORGOTTEN) == ["7_0"]  # perhaps too new for it
    assert ended(executor, FORGOTTEN, ("success", "")) == []
    assert executor.finished


def test_job_of_an_earlier_run_is_taken_up_and_one_of_other_settings_cancelled(
    executor: plugin.Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(executor, Job("a"), Job("b"))
    executor._waiting.clear()
    executor._left = executor._left_by_an_earlier_run()
    cancelled: list[str] = []

    def cancel(ids: list[str]) -> None:
        cancelled.extend(ids)
        executor._queue.answers |= {name: JobState("CANCELLED") for name in ids}

    monkeypatch.setattr(plugin.queue, "cancel", cancel)
    assert executor._take_up(Job("a"))
    assert list(executor._waiting) == ["7_0"]
    assert not executor._take_up(Job("b", command="prune --sparsity 60"))
    assert cancelled == ["7_1"]
    assert not executor._take_up(Job("c"))


def test_refusal_fails_every_job_of_the_batch_with_the_reason(executor: plugin.Executor, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise plugin.FailedJobError(
            "sbatch: error: invalid partition specified: nowhere\nsbatch: error: Batch job failed"
        )

    monkeypatch.setattr(plugin.submitit, "SlurmExecutor", refuse)
    executor._submit([Job("a"), Job("b")])
    assert [message for _, message, _ in executor.failed] == [
        f"prune {cell}: Slurm refused the job: invalid partition specified: nowhere. " for cell in "ab"
    ]


def test_every_setting_of_the_profile_is_an_option_of_snakemake(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text("rule all:\n    output: 'file'\n    shell: 'touch {output}'\n")
    run = subprocess.run(
        [sys.executable, "-m", "snakemake", "--profile", str(SLURM), "--dry-run"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SLURM.parent), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    settings = yaml.safe_load((SLURM / "config.yaml").read_text())
    fields = {f"submitit-{name.replace('_', '-')}" for name in plugin.ExecutorSettings.__dataclass_fields__}
    assert {name for name in settings if name.startswith("submitit-")} < fields

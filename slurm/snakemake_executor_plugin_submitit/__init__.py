"""Snakemake executor `submitit`: jobs run on a Slurm cluster, ready jobs of equal needs as one array.

What it promises:

* A job that was submitted is waited for, whatever happens to Snakemake in between, and never submitted twice: the next
  Snakemake in the same folder takes up what the last one left (`patch.cluster.ledger`).
* An interruption is no failure. A job that was preempted, whose node failed, or that reached its time limit and can go
  on from a saved state (resource `requeues`) is put back into the queue, with the same Slurm id, a bounded number of
  times.
* A failure is Snakemake's to retry (`retries`), and only where a retry may help: too little memory, too little time,
  a node's fault. An error of the command itself is final at once.

Parameters: see `parameters.py`. Settings: see `ExecutorSettings`.
"""

# No `from __future__ import annotations` here: Snakemake reads the types of the settings' fields at run time.

import hashlib
import json
import re
import subprocess
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.jobs import JobExecutorInterface
from snakemake_interface_executor_plugins.settings import CommonSettings, ExecutorSettingsBase
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths, pickle_load

from patch.cluster import queue
from patch.cluster.ledger import Ledger, Task
from patch.cluster.queue import FORGOTTEN, JobState, NoAnswer, Queue
from patch.cluster.task import Command
from snakemake_executor_plugin_submitit.parameters import minutes, slurm_parameters

OUT_OF_MEMORY = re.compile(r"slurmstepd.*(exceeded memory limit|oom[_-]kill)|CommandError: out of memory", re.I)
"""What Slurm writes into the log of a job that it killed for its memory; the state is often just FAILED."""
SECONDS_UNTIL_FORGOTTEN = 120
"""A job that Slurm does not know may be too new for the accounting daemon, for so long."""
TAIL_BYTES = 8192


@dataclass
class ExecutorSettings(ExecutorSettingsBase):
    folder: Path = field(
        default=Path(".snakemake/submitit"),
        metadata={"help": "Ledger, scripts and logs of Slurm jobs; the nodes must see it."},
    )
    states: str = field(default="auto", metadata={"help": "Where job states come from: sacct, squeue, or auto."})
    max_array: int = field(
        default=1000, metadata={"help": "Most tasks in an array, below the cluster's MaxArraySize; 1 for no arrays."}
    )
    array_parallelism: int = field(default=256, metadata={"help": "Most tasks of an array that run at a time."})
    grace: int = field(default=120, metadata={"help": "Seconds before the time limit at which a job is told to stop."})
    max_requeues: int = field(
        default=10, metadata={"help": "How often a job may be requeued after preemptions and failures of nodes."}
    )
    on_interrupt: str = field(
        default="cancel", metadata={"help": "Ctrl-C: cancel the Slurm jobs, or leave them running for the next start."}
    )


common_settings = CommonSettings(
    non_local_exec=True,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    auto_deploy_default_storage_provider=False,
    init_seconds_before_status_checks=1,
)


class Executor(RemoteExecutor):
    def __init__(self, workflow: Any, logger: Any) -> None:
        # Before super().__init__, which starts the thread that asks for states.
        self._settings: ExecutorSettings = workflow.executor_settings
        self._check_settings()
        self._folder = Path(self._settings.folder).absolute()
        self._waiting: dict[str, SubmittedJobInfo] = {}  # by Slurm's id; Snakemake's own list is empty during a check
        self._lock = threading.Lock()
        self._unanswered = False
        self._left_running = False
        try:
            self._queue = Queue(None if self._settings.states == "auto" else self._settings.states)
            self._ledger = Ledger(self._folder / "ledger.jsonl")
            self._left = self._left_by_an_earlier_run()
        except (NoAnswer, OSError) as error:
            raise WorkflowError(f"Slurm does not answer ({error}), so it is unknown which jobs run already.") from None
        super().__init__(workflow, logger)

    def _check_settings(self) -> None:
        choices = {"states": ("auto", "sacct", "squeue"), "on_interrupt": ("cancel", "leave")}
        for name, allowed in choices.items():
            value = getattr(self._settings, name)
            if value not in allowed:
                raise WorkflowError(f"--submitit-{name.replace('_', '-')} {value}: choose one of {', '.join(allowed)}.")

    # Submitting

    def run_job(self, job: JobExecutorInterface) -> None:
        self.run_jobs([job])

    def run_jobs(self, jobs: list[JobExecutorInterface]) -> None:
        batches: dict[str, list[JobExecutorInterface]] = defaultdict(list)
        for job in jobs:
            self.run_job_pre(job)
            if not self._take_up(job):
                batches[_needs(job)].append(job)
        for batch in batches.values():
            for start in range(0, len(batch), max(1, self._settings.max_array)):
                self._submit(batch[start : start + self._settings.max_array])

    def _submit(self, batch: Sequence[JobExecutorInterface]) -> None:
        """One call of sbatch. The ledger knows of it before and after."""
        resources = batch[0].resources
        limit = minutes(resources)
        # Of a short limit the grace time leaves at least two thirds.
        grace = min(self._settings.grace, limit * 60 // 3)
        timeouts = int(resources.get("requeues") or 0)
        token = f"patch-{uuid.uuid4().hex[:16]}"
        try:
            executor = submitit.SlurmExecutor(
                self._folder / "jobs" / "%j", max_num_timeout=timeouts + self._settings.max_requeues + 1
            )
            executor.update_parameters(
                job_name=batch[0].name,
                comment=token,
                array_parallelism=self._settings.array_parallelism,
                signal_delay_s=grace,
                **slurm_parameters(resources, batch[0].threads),
            )
            commands = [
                Command(
                    self.format_job_exec(job),
                    str(self.workflow.workdir_init),
                    # What is left after saving goes into requeueing.
                    grace_s=max(1, grace - 10),
                    limit_s=60 * limit,
                    timeouts=timeouts,
                    requeues=self._settings.max_requeues,
                )
                for job in batch
            ]
            self._ledger.submitting(token, [_task(job) for job in batch])
            with executor.batch():
                submitted = [executor.submit(command) for command in commands]
        except (FailedJobError, FailedSubmissionError, OSError, subprocess.CalledProcessError, ValueError) as error:
            # The ledger keeps the token: should Slurm have got the job all the same, the next run finds it.
            for job in batch:
                self._fail(SubmittedJobInfo(job), f"Slurm refused the job: {_first_line(str(error))}", again=False)
            return
        logs = [str(job.paths.stdout) for job in submitted]
        self._ledger.submitted(token, [job.job_id for job in submitted], logs)
        for job, found in zip(batch, submitted, strict=True):
            self._wait_for(job, found.job_id, str(found.paths.stdout))
        number = submitted[0].job_id.split("_")[0]
        self.logger.info(f"Slurm job {number}: {len(batch)} x {batch[0].name}")

    def _wait_for(self, job: JobExecutorInterface, job_id: str, log: str) -> None:
        info = SubmittedJobInfo(job, external_jobid=job_id, aux={"log": log})
        with self._lock:
            self._waiting[job_id] = info
        self.report_job_submission(info)

    # Taking up what an interrupted Snakemake left

    def _left_by_an_earlier_run(self) -> dict[str, Task]:
        """Unfinished tasks of the ledger that Slurm still runs or will run, by their outputs."""
        if not (tasks := self._ledger.open()):
            return {}
        if unsure := set(self._ledger.without_job()):
            for token, jobs in self._queue.live_by_comment().items():
                if token in unsure:
                    self._complete(token, jobs)
            tasks = self._ledger.open()
        states = self._queue.states(task.job for task in tasks if task.job)
        for job, state in states.items():
            if not state.live:
                self._ledger.ended(job, state.name)
        return {task.key: task for task in tasks if task.job and states[task.job].live}

    def _complete(self, token: str, found: Sequence[str]) -> None:
        """Enter the Slurm ids of a submission after which Snakemake was killed at once."""
        number = len([task for task in self._ledger.open() if task.token == token])
        first = found[0].split("_")[0]
        jobs = [first] if number == 1 else [f"{first}_{index}" for index in range(number)]
        self._ledger.submitted(token, jobs, [str(self._paths(job).stdout) for job in jobs])

    def _take_up(self, job: JobExecutorInterface) -> bool:
        """Whether Slurm computes this already. What computes the same files with other settings is cancelled first."""
        task = _task(job)
        left = self._left.pop(task.key, None)
        if left is None:
            return False
        if left.identity == task.identity:
            self.logger.info(f"Slurm job {left.job} of an earlier run computes {_name(job)}: waiting for it")
            self._wait_for(job, left.job, left.log)
            return True
        self.logger.info(f"Cancelling Slurm job {left.job}: it computes {_name(job)} with other settings")
        while not self._cancelled(left.job):
            time.sleep(1)
        self._ledger.ended(left.job, "CANCELLED")
        return False

    def _cancelled(self, job_id: str) -> bool:
        try:
            queue.cancel([job_id])
            return not self._queue.states([job_id])[job_id].live
        except NoAnswer:
            return False

    # Watching

    async def check_active_jobs(self, active_jobs: list[SubmittedJobInfo]) -> AsyncGenerator[SubmittedJobInfo, None]:
        try:
            async with self.status_rate_limiter:
                states = self._queue.states(str(info.external_jobid) for info in active_jobs)
        except NoAnswer as error:
            if not self._unanswered:
                self.logger.info(f"Slurm does not answer ({error}); asking again until it does.")
            self._unanswered = True
            for info in active_jobs:
                yield info
            return
        self._unanswered = False
        for info in active_jobs:
            if not self._ended(info, states[str(info.external_jobid)]):
                yield info

    def _ended(self, info: SubmittedJobInfo, state: JobState) -> bool:
        """Report a job that is over; False while it is not."""
        if state.live:
            info.aux.pop("over since", None)
            return False
        job_id = str(info.external_jobid)
        outcome, trace = self._result(job_id)
        patience = SECONDS_UNTIL_FORGOTTEN if state.name == FORGOTTEN else self._latency
        since = info.aux.setdefault("over since", time.monotonic())
        if not outcome and state.name in ("COMPLETED", FORGOTTEN) and time.monotonic() - since < patience:
            return False  # the file system or the accounting daemon may be late
        with self._lock:
            self._waiting.pop(job_id, None)
        # The result is written last, so one that says success counts whatever became of the job then.
        self._ledger.ended(job_id, "COMPLETED" if outcome == "success" else state.name)
        if outcome == "success":
            self.report_job_success(info)
        else:
            self._report_failure(info, state, trace)
        return True

    def _report_failure(self, info: SubmittedJobInfo, state: JobState, trace: str) -> None:
        reason = trace.strip().splitlines()[-1].rpartition("CommandError: ")[2] if trace else ""
        starved = state.name == "OUT_OF_MEMORY" or OUT_OF_MEMORY.search(_tail(info.aux["log"]))
        if starved:
            reason = f"out of memory, it had {info.job.resources.get('mem_mb', '?')} MB"
        elif not reason:
            reason = "it was ended before it could report a result"
        late = state.name == "TIMEOUT" or "time limit" in reason
        # The last: it was interrupted, and the cluster did not let it requeue itself.
        lost = state.name in ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", FORGOTTEN) or "'scontrol', 'requeue'" in reason
        message = f"Slurm job {info.external_jobid}, {state}: {reason}"
        self._fail(info, message, again=bool(starved or late or lost))

    def _fail(self, info: SubmittedJobInfo, message: str, *, again: bool) -> None:
        """Report a failure. `again`: whether Snakemake's retries, which get more memory and time, may help."""
        job = info.job
        if not again and job.attempt <= job.restart_times:
            job.attempt = job.restart_times + 1
        log = [info.aux["log"]] if info.aux else []
        self.report_job_error(info, msg=f"{_name(job)}: {message}. ", aux_logs=log)

    @property
    def _latency(self) -> float:
        return float(self.workflow.execution_settings.latency_wait)

    def _paths(self, job_id: str) -> JobPaths:
        return JobPaths(self._folder / "jobs" / "%j", job_id)

    def _result(self, job_id: str) -> tuple[str, str]:
        """ "success" or "error" with its traceback; empty where the job has left no result."""
        path = self._paths(job_id).result_pickle
        try:
            outcome, content = pickle_load(path)
        except (OSError, EOFError):
            return "", ""
        return outcome, str(content or "")

    # Ending

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        with self._lock:
            jobs = sorted(self._waiting)
        if self._settings.on_interrupt == "leave":
            self._leave()
            self.logger.info(f"{len(jobs)} Slurm jobs go on; the same command waits for them.")
            return
        try:
            queue.cancel(jobs)
        except NoAnswer as error:
            self._leave()
            self.logger.error(f"Slurm does not answer ({error}): {len(jobs)} jobs go on. The next run takes them up.")

    def _leave(self) -> None:
        """Keep Snakemake from removing what its jobs still need: empty output folders, and a folder they look for."""
        self._left_running = True
        self.workflow.dag.cleanup_workdir = lambda: None

    def shutdown(self) -> None:
        if not self._left_running:
            super().shutdown()
            return
        with self.lock:
            self.wait = False
        self.wait_thread.join()


def _needs(job: JobExecutorInterface) -> str:
    """Jobs of equal needs share an array; those of different rules do not, for the sake of the job's name."""
    parameters = slurm_parameters(job.resources, job.threads) | {"requeues": job.resources.get("requeues")}
    return json.dumps([job.name, parameters], sort_keys=True, default=str)


def _members(job: JobExecutorInterface) -> Iterable[Any]:
    return job.jobs if job.is_group() else [job]


def _task(job: JobExecutorInterface) -> Task:
    members = sorted(_members(job), key=lambda member: str(member))
    content = [
        [member.rule.name, dict(member.wildcards_dict), str(member.shellcmd), sorted(map(str, member.params.items()))]
        for member in members
    ]
    return Task(
        rule=job.name,
        cell=_cell(job),
        outputs=tuple(str(path) for member in members for path in member.output),
        identity=hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16],
        logs=tuple(str(path) for path in job.log),
    )


def _cell(job: JobExecutorInterface) -> str:
    cells = {" ".join(map(str, member.wildcards_dict.values())): None for member in _members(job)}
    return ", ".join(name for name in cells if name)


def _name(job: JobExecutorInterface) -> str:
    return f"{job.name} {_cell(job)}".strip()


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("sbatch: error:")]
    return (said or lines or ["no reason given"])[0].removeprefix("sbatch: error:").strip().rstrip(".")


def _tail(path: str) -> str:
    try:
        with Path(path).open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - TAIL_BYTES))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""

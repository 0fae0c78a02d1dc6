"""Snakemake logger plugin `patch`: a grid's progress as plain lines, `snakemake --logger patch`.

One line says what will run, then one per start and end of a job with its cell and the time left, and every quarter of
a minute the last log line of each running job. A failed job shows the end of its log at once. The lines read the same
on a terminal and in a captured log. Dry runs print what Snakemake itself would print.
"""

import io
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from logging import DEBUG, ERROR, WARNING, LogRecord
from pathlib import Path
from typing import Any, TextIO

import snakemake
from rich.console import Console
from rich.text import Text
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.settings import LogHandlerSettingsBase

from snakemake_logger_plugin_patch.estimate import TimeLeft
from snakemake_logger_plugin_patch.logfiles import last_lines

# No `from __future__ import annotations` here: Snakemake reads the types of the settings' fields at run time.

INDENT = " " * 10
TAIL_LINES = 5
MIN_CELL_WIDTH, MAX_CELL_WIDTH = 30, 60

# What Snakemake says about itself at level INFO on every run; --verbose shows it.
ROUTINE = (
    "Assuming unrestricted shared filesystem usage.",
    "Building DAG of jobs...",
    "Using shell:",
    "Group jobs: inactive",
    "Conda environments: ignored",
    "Singularity containers: ignored",
    "Select jobs to execute...",
    "Updating checkpoint dependencies.",
    "DAG of jobs will be updated after completion.",
    "Job rate limit reached",
)
ROUTINE_EVENTS = {
    LogEvent.WORKFLOW_STARTED,
    LogEvent.RESOURCES_INFO,
    LogEvent.JOB_STARTED,
    LogEvent.GROUP_INFO,
    LogEvent.RULEGRAPH,
}
# Snakemake's two closing sentences after a failed job; our summary says the same with numbers.
LOOK_ABOVE = "Exiting because a job execution failed."
JOBS_FAILED = "At least one job did not complete successfully."
EXIT = re.compile(r"(exit status \d+|died with .+?)\.?\s*$")
KILLED = re.compile(r"status 137|SIGKILL")
LOCKED = (
    "another run is working in this folder ({folder}): wait for it or stop it; "
    "if there is none, run the same command with --unlock once"
)


@dataclass
class LogHandlerSettings(LogHandlerSettingsBase):
    interval: int = field(
        default=15,
        metadata={"help": "Seconds between two looks at the logs of the running jobs; 0 for never.", "required": False},
    )


@dataclass
class Job:
    rule: str
    cell: str
    logs: list[str]
    start: float  # epoch seconds
    last_line: str = ""


def duration(seconds: float) -> str:
    """In words as coarse as one would say them: '12 s', '7 min', '2 h 10 min', '3 d 4 h'."""
    minutes = round(seconds / 60)
    if seconds < 1:
        return "<1 s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def cell_name(wildcards: Mapping[str, Any]) -> str:
    """The wildcard `cell` where the rule has it, else all of them joined."""
    return str(wildcards.get("cell") or "/".join(str(value) for value in wildcards.values()))


def job_counts(counts: Mapping[str, int]) -> str:
    """'54 jobs: 18 prune, 36 evaluate' from Snakemake's statistics, which count the total too."""
    by_rule = {rule: n for rule, n in counts.items() if rule != "total"}
    total = sum(by_rule.values())
    return f"{total} job{'s' * (total != 1)}: " + ", ".join(f"{n} {rule}" for rule, n in by_rule.items())


def error_text(message: str, exception: str | None = None) -> str:
    """Snakemake's message without the name of its commonest exception and the call chain inside the Snakefile."""
    if exception == "LockException":
        return LOCKED.format(folder=Path.cwd())
    lines = [line for line in message.splitlines() if line.strip()]
    if "Traceback (most recent call last)" not in message:
        lines = [line for line in lines if not re.match(r'\s+File ".*", line \d+, in ', line)]
    if len(lines) > 1 and re.fullmatch(r"\w+:", lines[0]):
        name = lines.pop(0)
        if name != "WorkflowError:":
            lines[0] = f"{name} {lines[0].strip()}"
    return "\n".join(lines)


class LogHandler(LogHandlerBase):
    """Runs in Snakemake's log thread; the look at the running jobs has its own. Both hold the handler's lock."""

    writes_to_stream = True
    writes_to_file = False
    has_filter = False  # Snakemake's own filter: --quiet, --printshellcmds, --debug-dag keep their meaning
    has_formatter = False  # Snakemake's own formatter: for dry runs and for events that have no form of their own here
    needs_rulegraph = False

    def __post_init__(self) -> None:
        self.stream: TextIO = sys.stdout if self.common_settings.dryrun else sys.stderr
        colour = self.stream.isatty() and not self.common_settings.nocolor and not os.environ.get("NO_COLOR")
        # Rendered to text first: a closed pipe must end neither the log thread nor the run.
        self._console = Console(
            file=io.StringIO(),
            force_terminal=colour,
            color_system="auto" if colour else None,
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
        )
        self._began = time.time()
        self._time_left = TimeLeft()
        self._done = 0
        self._running: dict[int, Job] = {}
        self._failed: dict[int, Job] = {}
        self._exit_messages: list[str] = []  # of failed commands, until the job that each belongs to is known
        self._last_error = ""
        self._complete_log = ""
        self._has_summary = True  # nothing to sum up before the first job
        self._rule_width, self._cell_width = 0, MIN_CELL_WIDTH
        self._stop = threading.Event()
        self._timer: threading.Thread | None = None

    def emit(self, record: LogRecord) -> None:
        try:
            if self.common_settings.dryrun and record.levelno < WARNING:
                self._write(self._snakemake_text(record))
            else:
                self._emit(record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        self._stop.set()
        if self._timer is not None and self._timer is not threading.current_thread():
            self._timer.join(timeout=1)
        if hasattr(self, "_exit_messages"):  # close is called for a handler that failed to start, too
            for message in self._exit_messages:
                self._error(message)
            self._exit_messages.clear()
            if not self._has_summary:
                self._summary()
        super().close()

    # What to do with a record

    def _emit(self, record: LogRecord) -> None:
        event = getattr(record, "event", None)
        by_event = {
            LogEvent.RUN_INFO: self._run_info,
            LogEvent.JOB_INFO: self._job_info,
            LogEvent.JOB_FINISHED: self._job_finished,
            LogEvent.PROGRESS: self._progress,
            LogEvent.JOB_ERROR: self._job_error,
            LogEvent.GROUP_ERROR: self._group_error,
        }
        if event in by_event:
            by_event[event](record)
        elif record.levelno >= ERROR:
            self._error_record(record)
        elif record.levelno >= WARNING:
            self._write(f"warning: {self._snakemake_text(record)}", "yellow")
        else:
            self._information(record, event)

    def _information(self, record: LogRecord, event: LogEvent | None) -> None:
        text = self._snakemake_text(record)
        is_snakemakes = Path(record.pathname).is_relative_to(Path(snakemake.__file__).parent)
        if is_snakemakes and text.startswith("Elapsed time:"):
            if self._done and self._done >= self._time_left.total and not self._failed:
                self._summary()
        elif is_snakemakes and text.startswith("Complete log(s):"):
            self._complete_log = text.partition(":")[2].strip()
        elif event in ROUTINE_EVENTS or (is_snakemakes and text.startswith(ROUTINE)):
            if self.common_settings.verbose:
                self._write(text, "dim")
        else:
            self._write(text, "dim" if record.levelno <= DEBUG or event == LogEvent.SHELLCMD else "")

    def _run_info(self, record: LogRecord) -> None:
        counts = {rule: n for rule, n in record.stats.items() if rule != "total"}
        self._time_left = TimeLeft(counts)
        self._rule_width = max(map(len, counts), default=0)
        self._has_summary = False
        self._write(job_counts(counts), "bold")

    def _job_info(self, record: LogRecord) -> None:
        job = Job(record.rule_name, cell_name(record.wildcards), list(record.log), record.created)
        self._running[record.jobid] = job
        self._failed.pop(record.jobid, None)  # a retry
        self._time_left.started(record.jobid, job.rule, record.created)
        if record.output or record.shellcmd:  # else a target: it only collects others
            self._job_line(job, "started" if record.local else "submitted", "dim")
        if record.rule_msg:
            self._write(f"{INDENT}{record.rule_msg}", "dim")
        self._start_timer()

    def _job_finished(self, record: LogRecord) -> None:
        job = self._running.pop(record.job_id, None)
        self._time_left.finished(record.job_id, record.created)
        self._done += 1
        if job is not None:
            left = self._time_left.seconds_left(record.created)
            about = f"   about {duration(left)} left" if left is not None and left >= 1 else ""
            self._job_line(job, f"{duration(record.created - job.start):<6}{about}")

    def _progress(self, record: LogRecord) -> None:
        # Checkpoints change the total while the run goes on.
        self._done, self._time_left.total = record.done, record.total

    # Errors

    def _job_error(self, record: LogRecord) -> None:
        job = self._running.pop(record.jobid, None)
        job = job or self._failed.get(record.jobid) or Job(record.rule_name, "", [], record.created)
        self._failed[record.jobid] = job
        self._time_left.failed(record.jobid, record.created)
        after = duration(record.created - job.start)
        self._job_line(job, f"failed after {after}{self._exit_status(record.shellcmd)}", "bold red")
        if record.rule_msg:
            self._write(f"{INDENT}{record.rule_msg}", "red")
        for name, value in (record.aux or {}).items():
            self._write(f"{INDENT}{name}: {value}")
        if not self._log_tails(record.log, job.start) and record.shellcmd:
            self._write(f"{INDENT}command: {' '.join(record.shellcmd.split())}")

    def _group_error(self, record: LogRecord) -> None:
        self._write(f"error: {record.getMessage()}", "bold red")  # its jobs follow, each with its own error
        self._log_tails(record.aux_logs, self._began)

    def _log_tails(self, paths: list[str], since: float) -> bool:
        """Names the logs and shows the end of the first that says anything; False if none does."""
        has_shown = False
        for path in paths:
            lines = last_lines(path, TAIL_LINES, since)
            is_silent = "" if lines else " (nothing written)"
            self._write(f"{INDENT}log: {path}{is_silent}")
            if lines and not has_shown:
                self._write("\n".join(f"{INDENT}  | {line}" for line in lines), "red")
                has_shown = True
        return has_shown

    def _exit_status(self, command: str | None) -> str:
        """Takes the message of the command's exit, which Snakemake logs before it names the job."""
        for message in self._exit_messages:
            if command and command.strip() in message:
                self._exit_messages.remove(message)
                reason = EXIT.search(message)[1]
                return f", {reason}{' (killed: often out of memory)' if KILLED.search(reason) else ''}"
        return ""

    def _error_record(self, record: LogRecord) -> None:
        message = self._snakemake_text(record)
        if "CalledProcessError" in message and EXIT.search(message) and self._running:
            self._exit_messages.append(message)
        elif JOBS_FAILED in message:
            self._summary()
        elif not message.startswith(LOOK_ABOVE):
            self._error(message, getattr(record, "exception", None))

    def _error(self, message: str, exception: str | None = None) -> None:
        text = error_text(message, exception)
        if text != self._last_error:
            self._last_error = text
            self._write(f"error: {text}", "bold red")

    def _summary(self) -> None:
        self._has_summary = True
        total, took = self._time_left.total, duration(time.time() - self._began)
        if self._done >= total and not self._failed:
            self._write(f"{f'all {total} jobs' if total > 1 else '1 job'} done in {took}", "bold green")
            return
        names = ", ".join(f"{job.rule} {job.cell}".strip() for job in self._failed.values())
        failed = f"; {len(self._failed)} failed: {names}" if names else ""
        self._write(f"stopped after {took}: {self._done} of {total} jobs done{failed}", "bold red")
        if self._complete_log:
            self._write(f"complete log: {self._complete_log}")

    # The running jobs' own logs

    def _start_timer(self) -> None:
        interval = self.settings.interval if self.settings is not None else LogHandlerSettings().interval
        if self._timer is None and interval > 0:
            self._timer = threading.Thread(target=self._look_every, args=(interval,), name="progress", daemon=True)
            self._timer.start()

    def _look_every(self, interval: float) -> None:
        while not self._stop.wait(interval):
            self._look_at_running()

    def _look_at_running(self) -> None:
        with self.lock:
            jobs = dict(self._running)
        for jobid, job in jobs.items():
            line = next((lines[-1] for path in job.logs if (lines := last_lines(path, 1, job.start))), "").strip()
            with self.lock:
                if line and line != job.last_line and jobid in self._running and not self._stop.is_set():
                    job.last_line = line
                    self._write(f"{INDENT}… {f'{job.rule} {job.cell}'.strip()}: {line}", "dim")

    # Output

    def _snakemake_text(self, record: LogRecord) -> str:
        text = self.format(record)
        return "" if text in (None, "None") else text

    def _job_line(self, job: Job, status: str, style: str = "") -> None:
        total = self._time_left.total
        self._rule_width = max(self._rule_width, len(job.rule))
        self._cell_width = max(self._cell_width, min(len(job.cell), MAX_CELL_WIDTH))
        count = f"[{self._done:>{len(str(total))}}/{total}]"
        self._write(f"{count}  {job.rule:<{self._rule_width}}  {job.cell:<{self._cell_width}}  {status}", style)

    def _write(self, text: str, style: str = "") -> None:
        if not text:
            return
        with self._console.capture() as rendered:
            self._console.print(Text(text.rstrip(" "), style=style))
        try:
            self.stream.write(rendered.get())
            self.stream.flush()
        except (OSError, ValueError):
            self._stop.set()  # nobody reads any more; the run itself goes on

"""The logger plugin that shows a grid's progress: its estimate, its reading of log files, its lines in real runs."""

import importlib
import io
import os
import signal
import subprocess
import sys
import time
from logging import ERROR, INFO, WARNING, LogRecord
from pathlib import Path
from types import SimpleNamespace

import pytest

PLUGINS = Path(__file__).parents[1] / "workflow" / "plugins"
sys.path.append(str(PLUGINS))  # where the installed plugin's .pth would put it
plugin = importlib.import_module("snakemake_logger_plugin_patch")
estimate = importlib.import_module("snakemake_logger_plugin_patch.estimate")
logfiles = importlib.import_module("snakemake_logger_plugin_patch.logfiles")

SNAKEFILE = """
logger.info("grid: 2 cells")
CELLS = ["tiny/wanda/50-2of4", "tiny/magnitude/50-2of4"]

rule collect:
    input: expand("{cell}/mask.txt", cell=CELLS)
    output: "collected.txt"
    shell: "cat {input} > {output}"

rule prune:
    output: "{cell}/mask.txt"
    log: "logs/{cell}.log"
    params: bad=config.get("bad", ""), seconds=config.get("seconds", 0)
    shell:
        "( echo block 1/2; sleep {params.seconds}; "
        "[ {wildcards.cell} != '{params.bad}' ] || {{ echo; echo ValueError: 576 inputs; echo; exit 3; }}; "
        "echo x > {output} ) > {log} 2>&1"
"""


# The estimate


def test_no_estimate_before_a_job_has_finished():
    left = estimate.TimeLeft({"prune": 4})
    assert left.seconds_left(0) is None
    left.started(1, "prune", 0)
    assert left.seconds_left(5) is None
    left.failed(1, 5)
    assert left.seconds_left(5) is None


def test_one_job_after_the_other():
    left = estimate.TimeLeft({"prune": 4, "all": 1})
    left.started(1, "prune", 0)
    left.finished(1, 10)
    assert left.seconds_left(10) == pytest.approx(30)
    left.started(2, "prune", 10)
    assert left.seconds_left(14) == pytest.approx(26)
    left.finished(2, 30)  # a slower one: mean 15, two remain
    assert left.seconds_left(30) == pytest.approx(30)


def test_each_rule_counts_with_its_own_mean():
    left = estimate.TimeLeft({"prune": 3, "evaluate": 2})
    left.started(1, "prune", 0)
    left.finished(1, 10)
    left.started(2, "evaluate", 10)
    left.finished(2, 110)
    assert left.seconds_left(110) == pytest.approx(2 * 10 + 1 * 100)


def test_parallel_jobs_share_the_work():
    left = estimate.TimeLeft({"prune": 6})
    for job in (1, 2):
        left.started(job, "prune", 0)
    for job in (1, 2):
        left.finished(job, 10)
    assert left.seconds_left(10) == pytest.approx(4 * 10 / 2)


def test_the_last_job_cannot_be_shared():
    left = estimate.TimeLeft({"prune": 3})
    for job in (1, 2, 3):
        left.started(job, "prune", 0)
    left.finished(1, 8)
    left.finished(2, 12)
    assert left.seconds_left(12) == 0  # overdue: nothing better is known
    left = estimate.TimeLeft({"prune": 3})
    for job in (1, 2):
        left.started(job, "prune", 0)
        left.finished(job, 10)
    left.started(3, "prune", 10)
    assert left.seconds_left(12) == pytest.approx(8)


def test_a_small_first_job_is_no_basis_for_the_grid():
    left = estimate.TimeLeft({"prepare": 1, "prune": 8})
    left.started(1, "prepare", 0)
    left.finished(1, 1)
    assert left.seconds_left(1) is None


def test_unknown_rules_take_the_mean_of_all():
    left = estimate.TimeLeft({"prune": 2, "collect": 1, "tables": 1})
    for job, start in ((1, 0), (2, 10)):
        left.started(job, "prune", start)
        left.finished(job, start + 10)
    assert left.seconds_left(20) == pytest.approx(2 * 10)


def test_a_failed_job_is_gone_until_it_is_retried():
    left = estimate.TimeLeft({"prune": 3})
    left.started(1, "prune", 0)
    left.finished(1, 10)
    left.started(2, "prune", 10)
    left.failed(2, 20)
    assert left.seconds_left(20) == pytest.approx(10)
    left.started(2, "prune", 20)
    assert left.seconds_left(20) == pytest.approx(20)


def test_jobs_that_a_checkpoint_adds_count():
    left = estimate.TimeLeft({"prune": 2})
    left.started(1, "prune", 0)
    left.finished(1, 10)
    left.total = 3
    assert left.seconds_left(10) == pytest.approx(20)


# Texts


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "<1 s"),
        (12.4, "12 s"),
        (99, "99 s"),
        (100, "2 min"),
        (420, "7 min"),
        (5999, "1 h 40 min"),
        (7800, "2 h 10 min"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_duration(seconds, text):
    assert plugin.duration(seconds) == text


def test_cell_name():
    assert plugin.cell_name({"run": "demo", "cell": "opt/wanda/50"}) == "opt/wanda/50"
    assert plugin.cell_name({"run": "demo", "model": "opt"}) == "demo/opt"
    assert plugin.cell_name({}) == ""


def test_error_text_is_short():
    message = 'WorkflowError:\nno such model: opt\n  File "Snakefile", line 3, in cells\n'
    assert plugin.error_text(message) == "no such model: opt"
    assert (
        plugin.error_text("MissingRuleException:\nNo rule to produce x") == "MissingRuleException: No rule to produce x"
    )
    traceback = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\nKeyError: 1'
    assert plugin.error_text(traceback) == traceback
    assert "--unlock once" in plugin.error_text("LockException:\nError: Directory cannot be locked.", "LockException")


# Log files


def test_last_lines_of_messy_logs(tmp_path):
    log = tmp_path / "job.log"
    log.write_bytes(b"old\n" * 5000 + b"0%\r 50%\r100% done\r\n\n-----\n\x1b[31mValueError\x1b[0m: \xff\n  ^^^^\n")
    assert logfiles.last_lines(str(log), 2, since=0) == ["100% done", "ValueError: \ufffd"]
    assert len(logfiles.last_lines(str(log), 10**6, since=0)) < 4096 / 4 + 2
    log.write_text("x" * 10_000)
    assert len(logfiles.last_lines(str(log), 1, since=0)[0]) == logfiles.LINE_LENGTH


def test_last_lines_of_missing_and_old_logs(tmp_path):
    assert logfiles.last_lines(str(tmp_path / "none.log"), 5, since=0) == []
    assert logfiles.last_lines(str(tmp_path), 5, since=0) == []
    log = tmp_path / "job.log"
    log.write_text("from an earlier run\n")
    assert logfiles.last_lines(str(log), 5, since=time.time() + 3600) == []


# The handler, fed with records


@pytest.fixture
def handler():
    common = SimpleNamespace(dryrun=False, nocolor=False, verbose=False, quiet=None, printshellcmds=False)
    handler = plugin.LogHandler(common, plugin.LogHandlerSettings(interval=0))
    handler.stream = io.StringIO()
    yield handler
    handler.close()


def record(message, level=INFO, **attributes):
    record = LogRecord("snakemake.logging", level, "/grid/Snakefile", 1, message, None, None)
    record.__dict__.update(attributes)
    return record


def test_nothing_of_weight_is_lost(handler):
    handler.handle(record("a grid of 3 cells"))
    handler.handle(record("disk is nearly full", WARNING))
    handler.handle(record("no such partition", ERROR))
    handler.handle(record("no such partition", ERROR))
    handler.handle(record("CalledProcessError\nCommand 'x' died with <Signals.SIGKILL: 9>.", ERROR, event="error"))
    printed = handler.stream.getvalue()
    assert "a grid of 3 cells\n" in printed
    assert "warning: disk is nearly full\n" in printed
    assert printed.count("error: no such partition\n") == 1
    assert "SIGKILL" in printed


def test_a_closed_pipe_does_not_end_the_run(handler):
    with Path(os.devnull).open() as handler.stream:  # for reading: a write fails
        handler.handle(record("unheard"))
    handler.handle(record("unheard"))


def test_running_jobs_show_each_new_log_line_once(handler, tmp_path):
    log = tmp_path / "prune.log"
    job = {"jobid": 1, "rule_name": "prune", "wildcards": {"cell": "tiny/wanda"}, "log": [str(log)], "local": False}
    handler.handle(record("", event="job_info", **job, output=["mask"], shellcmd="true", rule_msg=None))
    handler._look_at_running()
    log.write_text("block 1/2\n")
    handler._look_at_running()
    handler._look_at_running()
    log.write_text("block 1/2\nblock 2/2\n")
    handler._look_at_running()
    first, *others = handler.stream.getvalue().splitlines()
    assert first.endswith("submitted")
    assert others == [f"{' ' * 10}… prune tiny/wanda: block {i}/2" for i in (1, 2)]


# Real runs


def snakemake(folder, *arguments):
    (folder / "Snakefile").write_text(SNAKEFILE)
    command = [sys.executable, "-m", "snakemake", "--logger", "patch", "--logger-patch-interval", "1", *arguments]
    environment = os.environ | {"PYTHONPATH": str(PLUGINS)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def test_a_good_run(tmp_path):
    process = snakemake(tmp_path, "--cores", "2", "--config", "seconds=1.5")
    lines = process.communicate(timeout=600)[1].splitlines()
    assert process.returncode == 0, lines
    assert lines[:2] == ["grid: 2 cells", "3 jobs: 2 prune, 1 collect"]
    assert sum(line.startswith("[0/3]  prune ") and line.endswith("started") for line in lines) == 2
    assert f"{' ' * 10}… prune tiny/wanda/50-2of4: block 1/2" in lines
    assert any(line.startswith("[2/3]  prune ") and "left" in line for line in lines)
    assert lines[-2].startswith("[3/3]  collect")
    assert lines[-1].startswith("all 3 jobs done in ")
    assert not any("\x1b" in line for line in lines)


def test_a_failing_run_shows_the_reason(tmp_path):
    process = snakemake(tmp_path, "--cores", "1", "--keep-going", "--config", "bad=tiny/wanda/50-2of4")
    lines = process.communicate(timeout=600)[1].splitlines()
    assert process.returncode == 1
    failed = next(i for i, line in enumerate(lines) if "failed after" in line)
    assert "prune    tiny/wanda/50-2of4" in lines[failed]
    assert lines[failed].endswith("exit status 3")
    assert [line.strip() for line in lines[failed + 1 : failed + 4]] == [
        "log: logs/tiny/wanda/50-2of4.log",
        "| block 1/2",
        "| ValueError: 576 inputs",
    ]
    assert lines[-2].endswith("1 of 3 jobs done; 1 failed: prune tiny/wanda/50-2of4")
    assert lines[-1].startswith("complete log: ")


def test_an_interrupted_run_and_its_lock(tmp_path):
    first = snakemake(tmp_path, "--cores", "1", "--config", "seconds=30")
    try:
        while "started" not in (line := first.stderr.readline()):
            assert line, "the run ended before its first job started"
        second = snakemake(tmp_path, "--cores", "1")
        lines = second.communicate(timeout=600)[1].splitlines()
        assert second.returncode == 1
        assert lines[-1].startswith("error: another run is working in this folder")
    finally:
        os.killpg(first.pid, signal.SIGINT)  # what Ctrl-C sends: to Snakemake and to its jobs
        lines = first.communicate(timeout=600)[1].splitlines()
    assert any(line.startswith("stopped after") and "0 of 3 jobs done" in line for line in lines), lines


def test_a_dry_run_is_snakemakes_own(tmp_path):
    process = snakemake(tmp_path, "--dry-run")
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0
    assert "Job stats:" in printed
    assert printed.count("reason: Missing output files") == 3

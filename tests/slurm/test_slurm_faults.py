"""What clusters do to jobs, done to a real one. Each time: nothing is lost, and nothing runs twice."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from grids import Grid, finish, slurm, wait_until

CLUSTER = Path(os.environ.get("SLURM_CONF", "/")).parent.parent
pytestmark = pytest.mark.slurm


def test_cancelled_job_fails_with_its_name_state_and_log_and_runs_again(grid: Grid) -> None:
    run = grid.start(cells="a,b", steps=15)
    wait_until(lambda: grid.counts("start")["a"])
    first = grid.job("a")
    slurm("scancel", first)
    status, output = finish(run)
    assert status != 0
    assert f"work a: Slurm job {first}, CANCELLED" in output
    assert f"{first}_0_log.out" in output
    assert "logs/a.log" in output
    assert grid.counts("end") == {"b": 1}
    assert grid.run(cells="a,b", steps=15)[0] == 0
    assert grid.counts("end") == {"a": 1, "b": 1}


def test_job_of_a_node_that_goes_down_is_requeued_and_goes_on(grid: Grid) -> None:
    run = grid.start(cells="a", steps=40)
    wait_until((grid.folder / "state/a").exists)
    job = grid.jobs()[0]
    node = slurm("squeue", "-h", "-j", job, "-o", "%N")
    lose_power(node)
    try:
        slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        wait_until(lambda: slurm("squeue", "-h", "-j", job, "-o", "%T") != "RUNNING")
    finally:
        slurm("slurmd", "-N", node)
    status, output = finish(run)
    assert status == 0, output
    assert grid.jobs() == [job]
    starts = grid.journal("start")
    assert len(starts) == 2
    assert starts[1][1] > 0  # went on from the state, under the same id
    assert starts[0][2] == starts[1][2]
    assert grid.counts("end") == {"a": 1}


def lose_power(node: str) -> None:
    """Kill the node's daemon and all it started; first what could still tell the controller."""
    managers = [psutil.Process(int((CLUSTER / f"run/slurmd-{node}.pid").read_text()))]
    of_jobs = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if process.environ().get("SLURMD_NODENAME") == node:
                of_jobs.append(process)
                managers += [parent for parent in process.parents() if parent.name() == "slurmstepd"]
    for process in [*managers, *of_jobs]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_preempted_job_saves_its_state_is_requeued_and_goes_on(grid: Grid) -> None:
    whole_node = ("--set-resources", "work:slurm_extra='--nodelist=sim1'", "work:cpus_per_task=4")
    run = grid.start(*whole_node, cells="a", steps=40)
    wait_until((grid.folder / "state/a").exists)
    slurm("sbatch", "--partition=urgent", "--nodelist=sim1", "-c4", "--output=/dev/null", "--wrap=sleep 1")
    status, output = finish(run)
    assert status == 0, output
    assert grid.counts("saved") == {"a": 1}
    saved, resumed = grid.journal("saved")[0], grid.journal("start")[1]
    assert resumed[1] == saved[1]
    assert grid.counts("end") == {"a": 1}
    assert len(grid.jobs()) == 1


def test_time_limit_requeues_what_can_go_on_and_ends_what_cannot(grid: Grid) -> None:
    status, output = grid.run(cells="resumes,stops", steps=250, runtime=1)
    assert status != 0
    stopped = grid.job("stops")
    assert f"work stops: Slurm job {stopped}" in output
    assert "reached its time limit of 1 min" in output
    assert grid.counts("end") == {"resumes": 1}
    assert grid.counts("start")["stops"] == 1
    starts = [step for cell, step, _ in grid.journal("start") if cell == "resumes"]
    saved = [step for cell, step, _ in grid.journal("saved") if cell == "resumes"]
    assert len(starts) > 1
    assert starts == [0, *saved]


def test_job_without_enough_memory_is_retried_with_more(grid: Grid) -> None:
    take_384_mb = "python3 -c 'import time; x = bytearray(3 << 27); time.sleep(9)'"
    grid.write("hungry.sh", f"set -e\n{take_384_mb}\necho end $1 0 0 >> journal; echo $1 > $3")
    status, output = grid.run("--retries", "1", cells="a", script="hungry.sh")
    assert status == 0, output
    assert "out of memory, it had 200 MB" in output
    assert len(grid.jobs()) == 2
    assert grid.counts("end") == {"a": 1}


def test_error_of_the_command_itself_is_not_retried(grid: Grid) -> None:
    grid.write("wrong.sh", "echo start $1 0 0 >> journal; echo no such file; exit 3")
    status, output = grid.run("--retries", "3", cells="a", script="wrong.sh")
    assert status != 0
    assert "work a: Slurm job" in output
    assert grid.counts("start") == {"a": 1}


def test_run_outlives_a_restart_of_the_controller(grid: Grid) -> None:
    run = grid.start("--submitit-states", "squeue", cells="a,b", steps=40)
    wait_until(lambda: len(grid.journal("start")) == 2)
    os.kill(int((CLUSTER / "run/slurmctld.pid").read_text()), signal.SIGTERM)
    time.sleep(4)
    slurm("slurmctld")
    status, output = finish(run)
    assert status == 0, output
    assert grid.counts("start") == grid.counts("end") == {"a": 1, "b": 1}


@pytest.mark.parametrize("moment", ["while it waits", "right after sbatch"])
def test_killed_snakemake_is_continued_by_the_next(grid: Grid, moment: str) -> None:
    run = grid.start(cells="a,b", steps=30)
    wait_until(lambda: len(grid.journal("start")) == 2)
    first = grid.job("a")
    os.killpg(run.pid, signal.SIGKILL)
    finish(run)
    if moment == "right after sbatch":  # before the ledger got Slurm's answer
        ledger = grid.folder / ".snakemake/submitit/ledger.jsonl"
        ledger.write_text(ledger.read_text().splitlines()[0] + '\n{"event": "subm')
    grid.unlock()
    status, output = grid.run(cells="a,b", steps=30)
    assert status == 0, output
    assert f"Slurm job {first} of an earlier run computes work a: waiting for it" in output
    assert grid.counts("start") == grid.counts("end") == {"a": 1, "b": 1}


def test_job_left_with_other_settings_is_cancelled_first(grid: Grid) -> None:
    run = grid.start(cells="a", steps=300)
    wait_until(lambda: grid.counts("start")["a"])
    os.killpg(run.pid, signal.SIGKILL)
    finish(run)
    grid.unlock()
    status, output = grid.run(cells="a", steps=20)
    assert status == 0, output
    assert "with other settings" in output
    assert grid.counts("end") == {"a": 1}
    assert grid.result("a").startswith("a ")


def test_interrupt_cancels_the_jobs(grid: Grid) -> None:
    run = grid.start(cells="a,b", steps=300)
    wait_until(lambda: len(grid.journal("start")) == 2)
    os.killpg(run.pid, signal.SIGINT)
    assert finish(run)[0] != 0
    wait_until(lambda: not slurm("squeue", "-h"))
    assert not grid.counts("end")


def test_interrupt_can_leave_the_jobs_to_the_next_start(grid: Grid) -> None:
    leave = ("--submitit-on-interrupt", "leave")
    run = grid.start(*leave, cells="a", steps=40)
    wait_until(lambda: grid.counts("start")["a"])
    os.killpg(run.pid, signal.SIGINT)
    assert "go on" in finish(run)[1]
    status, output = grid.run(*leave, cells="a", steps=40)
    assert status == 0, output
    assert grid.counts("start") == grid.counts("end") == {"a": 1}


def test_refused_submission_names_the_reason_and_costs_nothing(grid: Grid) -> None:
    status, output = grid.run("--set-resources", "work:slurm_partition=nowhere", cells="a")
    assert status != 0
    assert "work a: Slurm refused the job: " in output
    assert "invalid partition" in output
    assert not grid.counts("start")
    assert grid.run(cells="a")[0] == 0
    assert grid.counts("end") == {"a": 1}


def test_success_without_the_output_file_is_a_failure(grid: Grid) -> None:
    grid.write("forgets.sh", "echo start $1 0 0 >> journal")
    status, output = grid.run("--latency-wait", "1", cells="a", script="forgets.sh")
    assert status != 0
    assert "work a: Slurm job" in output
    assert grid.run(cells="a", steps=2)[0] == 0
    assert grid.counts("end") == {"a": 1}


def test_full_disk_fails_the_job_and_only_it(grid: Grid) -> None:
    full = grid.folder / "state"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "scratch", str(full)], check=True)
    try:
        (full / "fill").write_bytes(bytes(64 << 10))
        grid.write("fills.sh", "set -e; echo data > state/probe; bash work.sh $*")
        status, output = grid.run(cells="a", script="fills.sh")
        assert status != 0
        assert "work a: Slurm job" in output
        assert "No space left on device" in (grid.folder / "logs/a.log").read_text()
        assert not (grid.folder / "out/a.txt").exists()
        (full / "fill").unlink()
        assert grid.run(cells="a", steps=2)[0] == 0
    finally:
        subprocess.run(["umount", "--lazy", str(full)], check=True)
    assert grid.counts("end") == {"a": 1}


def test_two_hundred_short_jobs_are_one_array(grid: Grid) -> None:
    grid.write("short.sh", "echo end $1 0 0 >> journal; echo $1 > $3")
    cells = [f"c{number}" for number in range(200)]
    status, output = grid.run(cells=",".join(cells), script="short.sh")
    assert status == 0, output
    assert len(grid.ledger("submitting")) == 1
    assert len({job.split("_")[0] for job in grid.jobs()}) == 1
    assert grid.counts("end") == dict.fromkeys(cells, 1)


def test_grouped_jobs_share_one_slurm_job(grid: Grid) -> None:
    groups = ("--groups", "work=short", "--group-components", "short=10", "--cores", "2")
    cells = [f"c{number}" for number in range(20)]
    status, output = grid.run(*groups, cells=",".join(cells), steps=1)
    assert status == 0, output
    assert len(grid.jobs()) == 2
    assert grid.counts("end") == dict.fromkeys(cells, 1)

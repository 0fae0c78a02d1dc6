"""Reading what Slurm says, without a Slurm: commands are stood in for by scripts."""

import os
from pathlib import Path

import pytest

from patch.cluster import queue
from patch.cluster.queue import FORGOTTEN, JobState, NoAnswer, Queue, find, parse


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`fake_slurm("sacct", "text", status=0)` puts a command on the PATH that prints the text and notes its calls."""

    def make(name: str, output: str = "", error: str = "", status: int = 0) -> None:
        for file, text in ((f"{name}.out", output), (f"{name}.err", error)):
            (tmp_path / file).write_text(text)
        script = tmp_path / name
        script.write_text(
            f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\ncat {tmp_path}/{name}.out\n'
            f"cat {tmp_path}/{name}.err >&2\nexit {status}\n"
        )
        script.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    make.calls = lambda: (tmp_path / "calls").read_text().splitlines()  # type: ignore[attr-defined]
    return make


def test_rows_of_accounting_are_parsed() -> None:
    rows = parse(
        "12_0|COMPLETED|None|0:0|n1\n12_1|CANCELLED by 1000|None|0:15|n2\n12_[2-9%4]|PENDING|None|0:0|\nnonsense\n"
    )
    assert rows["12_0"] == JobState("COMPLETED", "None", "0:0", "n1")
    assert rows["12_1"].name == "CANCELLED"
    assert str(rows["12_1"]) == "CANCELLED (exit 0:15, on n2)"


def test_tasks_that_have_not_started_share_the_row_of_their_array() -> None:
    states = find(
        ["12_0", "12_7", "13", "14_1"], parse("12_0|RUNNING|||n1\n12_[2-9%4]|PENDING|Priority||\n13|FAILED|||n1\n")
    )
    assert {job: state.name for job, state in states.items()} == {
        "12_0": "RUNNING", "12_7": "PENDING", "13": "FAILED", "14_1": FORGOTTEN,
    }  # fmt: skip


@pytest.mark.parametrize("tasks", [1, 5000])
def test_one_question_however_many_tasks(fake_slurm, tasks: int) -> None:
    fake_slurm("sacct", "7_[0-4999]|PENDING|None|0:0|\n")
    assert len(Queue("sacct").states(f"7_{task}" for task in range(tasks))) == tasks
    assert fake_slurm.calls() == ["sacct -n -X -P -o JobID,State,Reason,ExitCode,NodeList -j 7"]


def test_failure_in_accounting_is_not_believed_while_the_controller_holds_the_job(fake_slurm) -> None:
    fake_slurm("sacct", "1|NODE_FAIL|None|1:0|n1\n2|FAILED|None|2:0|n1\n")
    fake_slurm("squeue", "1|PENDING|BeginTime||\n")
    states = Queue("sacct").states(["1", "2"])
    assert states["1"].live
    assert states["2"] == JobState("FAILED", "None", "2:0", "n1")


def test_job_that_is_too_new_for_accounting_is_found_at_the_controller(fake_slurm) -> None:
    fake_slurm("sacct")
    fake_slurm("squeue", "5|PENDING|Priority||\n")
    assert Queue("sacct").states(["5"])["5"].live


def test_job_that_nobody_knows_is_forgotten(fake_slurm) -> None:
    fake_slurm("squeue", error="slurm_load_jobs error: Invalid job id specified", status=1)
    assert Queue("squeue").states(["5"]) == {"5": JobState(FORGOTTEN)}


def test_silence_is_no_answer(fake_slurm) -> None:
    fake_slurm("squeue", error="Unable to contact slurm controller (connect failure)", status=1)
    with pytest.raises(NoAnswer, match="Unable to contact"):
        Queue("squeue").states(["5"])


def test_accounting_is_preferred_and_squeue_the_resort(fake_slurm) -> None:
    fake_slurm("sacct")
    assert Queue().source == "sacct"
    fake_slurm("sacct", error="Slurm accounting storage is disabled", status=1)
    assert Queue().source == "squeue"


def test_jobs_are_found_by_their_comment(fake_slurm) -> None:
    fake_slurm("squeue", "4_0|patch-ab\n4_1|patch-ab\n9|(null)\n")
    assert Queue("squeue").live_by_comment()["patch-ab"] == ["4_0", "4_1"]


def test_cancelling_asks_in_bulk(fake_slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm("scancel")
    monkeypatch.setattr(queue, "IDS_PER_QUESTION", 2)
    queue.cancel(["1", "2", "3"])
    assert fake_slurm.calls() == ["scancel 1 2", "scancel 3"]

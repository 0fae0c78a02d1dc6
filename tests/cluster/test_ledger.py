"""The ledger survives crashes at any point."""

from pathlib import Path

from patch.cluster.ledger import Ledger, Task

A = Task("prune", "tiny/wanda", ("a/mask", "a/record"), "1", ("a.log",))
B = Task("prepare_tasks", "", ("b/tasks",), "1")  # belongs to no cell


def test_what_was_submitted_is_open_until_its_end_was_seen(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "ledger.jsonl")
    ledger.submitting("t1", [A, B])
    ledger.submitted("t1", ["7_0", "7_1"], ["0.out", "1.out"])
    ledger.ended("7_1", "FAILED")
    for read in (ledger, Ledger(ledger.path)):
        assert [(task.cell, task.job, task.log, task.logs) for task in read.open()] == [
            ("tiny/wanda", "7_0", "0.out", ("a.log",))
        ]
        assert read.tasks[B.key].state == "FAILED"


def test_submission_without_an_answer_is_known_by_its_token(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.submitting("t1", [A])
    assert set(Ledger(ledger.path).without_job()) == {"t1"}


def test_line_that_was_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.submitting("t1", [A])
    with ledger.path.open("a") as stream:
        stream.write('{"event": "submi')
    again = Ledger(ledger.path)
    again.submitted("t1", ["7"], ["7.out"])
    assert [task.job for task in Ledger(ledger.path).open()] == ["7"]


def test_newer_job_of_the_same_files_takes_the_place_of_the_older(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for token, job in (("t1", "7"), ("t2", "8")):
        ledger.submitting(token, [A])
        ledger.submitted(token, [job], ["out"])
    ledger.ended("7", "CANCELLED")  # seen late: says nothing about its successor
    assert [task.job for task in Ledger(ledger.path).open()] == ["8"]

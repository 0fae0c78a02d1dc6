"""Live curves, with a stand-in for the wandb package."""

import sys
import types
from typing import Any

import pytest

from patch.learning.curves import observer


class FakeRun:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, row: dict[str, float], step: int) -> None:
        assert not self.finished
        self.rows.append((step, row))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """`wandb.run` and `wandb.started`: what the module was asked for."""
    fake = types.SimpleNamespace(run=FakeRun(), started=[])

    def init(**arguments: Any) -> FakeRun:
        fake.started.append(arguments)
        return fake.run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_every_row_goes_to_the_project_with_its_step(wandb: types.SimpleNamespace) -> None:
    with observer("curves", {"seed": 0}) as observe:
        assert observe is not None
        for step in (1, 2):
            observe({"step": step, "loss": 3.5 / step, "seconds_left": 2.0 - step})
    assert wandb.started == [{"project": "curves", "config": {"seed": 0}}]
    assert wandb.run.rows == [
        (1, {"train/step": 1, "train/loss": 3.5, "train/seconds_left": 1.0}),
        (2, {"train/step": 2, "train/loss": 1.75, "train/seconds_left": 0.0}),
    ]


def test_the_run_is_finished_whatever_happens(wandb: types.SimpleNamespace) -> None:
    with pytest.raises(KeyError), observer("curves", {}):
        raise KeyError
    assert wandb.run.finished


def test_without_a_project_or_on_other_processes_nothing_is_started(
    wandb: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with observer(None, {}) as observe:
        assert observe is None
    monkeypatch.setattr("patch.learning.distributed.rank", lambda: 1)
    with observer("curves", {}) as observe:
        assert observe is None
    assert wandb.started == []

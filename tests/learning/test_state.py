from pathlib import Path

import pytest
import torch

from patch.artefacts import PatchError
from patch.learning.state import State, StateDirectory, kept


def state(step: int) -> State:
    return State(step, {"logits.0": torch.full((3,), float(step))}, [{"step": float(step), "loss": 1.5}])


def test_the_last_two_states_are_kept_and_come_back_whole(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path, {"key": "a"}, rank=0)
    assert directory.newest() == 0
    for step in (10, 20, 30):
        directory.save(state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000020.rank-0.safetensors",
        "step-000030.rank-0.safetensors",
    ]
    assert directory.newest() == 30
    loaded = directory.load(30)
    assert loaded.step == 30
    assert loaded.curves == [{"step": 30.0, "loss": 1.5}]
    assert torch.equal(loaded.tensors["logits.0"], torch.full((3,), 30.0))


def test_half_written_files_of_a_killed_process_are_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".step-000010.rank-0.safetensors.x1.safetensors").write_bytes(b"half")
    StateDirectory(tmp_path, {}, rank=0).save(state(20))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000020.rank-0.safetensors"]


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    StateDirectory(tmp_path, {"key": "a"}, rank=0).save(state(10))
    with pytest.raises(PatchError, match="other settings"):
        StateDirectory(tmp_path, {"key": "b"}, rank=0).load(10)


def test_a_truncated_state_is_refused_with_its_name(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path, {}, rank=0)
    directory.save(state(10))
    path = tmp_path / "step-000010.rank-0.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(PatchError, match="step-000010"):
        directory.load(10)


def test_processes_keep_their_parts_apart(tmp_path: Path) -> None:
    for rank in (0, 1):
        StateDirectory(tmp_path, {}, rank).save(state(10 + rank))
    assert StateDirectory(tmp_path, {}, 0).newest() == 10
    assert StateDirectory(tmp_path, {}, 1).newest() == 11


def test_a_run_goes_on_after_states_that_are_there_and_from_the_start_while_none_was_deleted(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path, {}, rank=0)
    assert directory.leads_from(0)
    directory.save(state(10))
    assert [directory.leads_from(step) for step in (0, 5, 10)] == [True, False, True]
    directory.save(state(20))
    assert [directory.leads_from(step) for step in (0, 10, 20)] == [False, True, True]


def test_states_newer_than_the_agreed_one_are_discarded_unless_they_are_of_another_run(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path, {"key": "a"}, rank=0)
    for step in (10, 20):
        directory.save(state(step))
    with pytest.raises(PatchError, match="other settings"):
        StateDirectory(tmp_path, {"key": "b"}, rank=0).discard_after(10)
    assert directory.newest() == 20
    directory.discard_after(10)
    assert directory.newest() == 10


def test_errors_mention_the_newest_state_of_any_process_where_there_is_one(tmp_path: Path) -> None:
    assert kept(None) == kept(tmp_path / "none") == kept(tmp_path) == ""
    for rank in (0, 1):
        StateDirectory(tmp_path, {}, rank).save(state(10 + rank))
    assert kept(tmp_path) == " The state after step 11 is kept."

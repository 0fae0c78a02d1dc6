"""Atomic writes, checked reads, and the lock on a directory, on the unhappy paths above all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patch.artefacts import (
    PatchError,
    atomic_path,
    checksum_json,
    checksum_tensors,
    exclusive,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# atomic writes


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, failure):
    write_text(tmp_path / "result.txt", "old")

    def write() -> None:
        with atomic_path(tmp_path / "result.txt") as temporary:
            temporary.write_text("half of the ne")
            raise failure

    with pytest.raises(failure):
        write()
    assert (tmp_path / "result.txt").read_text() == "old"
    assert names(tmp_path) == ["result.txt"]


def test_until_the_block_ends_readers_see_the_old_content(tmp_path):
    write_text(tmp_path / "result.txt", "old")
    with atomic_path(tmp_path / "result.txt") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "result.txt").read_text() == "old"
    assert (tmp_path / "result.txt").read_text() == "new"
    assert names(tmp_path) == ["result.txt"]


def test_missing_folders_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "result.txt", "text")
    assert (tmp_path / "a" / "b" / "result.txt").read_text() == "text"


def test_colleagues_may_read_what_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "result.txt", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "result.txt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_in_one_line(tmp_path, code):
    write_text(tmp_path / "result.txt", "old")

    def write() -> None:
        with atomic_path(tmp_path / "result.txt"):
            raise OSError(code, os.strerror(code))

    with pytest.raises(PatchError, match=r"result\.txt: no space left to write it; nothing was changed"):
        write()
    assert (tmp_path / "result.txt").read_text() == "old"
    assert names(tmp_path) == ["result.txt"]


def test_a_disk_too_full_for_even_an_empty_file_is_told_in_one_line(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("patch.artefacts.tempfile.mkstemp", full)
    with pytest.raises(PatchError, match="no space left"):
        write_text(tmp_path / "result.txt", "text")


@pytest.mark.parametrize("what", ["text", "tensors"])
def test_a_write_that_really_runs_out_of_space_leaves_the_old_file(tmp_path, what):
    """A file size limit makes the kernel refuse the write half way, as a full disk does."""
    code = f"""
import resource, signal, sys
from patch.artefacts import PatchError, write_tensors, write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    if {what!r} == "text":
        write_text("out", "x" * 100_000)
    else:
        import torch
        write_tensors("out", {{"w": torch.zeros(100_000)}}, "test/1", {{}})
except PatchError as error:
    sys.exit("PatchError: " + str(error))
"""
    (tmp_path / "out").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "PatchError: out: no space left to write it" in done.stderr
    assert (tmp_path / "out").read_text() == "old"
    assert names(tmp_path) == ["out"]


# JSON


def test_json_survives_a_round_trip(tmp_path):
    content = {"schema": "patch.test/1", "text": "naïve 你好", "numbers": [1, 0.1, None]}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json", "patch.test/1") == content


def test_json_that_other_programs_cannot_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"value": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; run the stage that writes it first"),
        ("", "not valid JSON .*; delete it and run its stage again"),
        ('{"schema": "patch.test/1", "val', "not valid JSON"),
        ('{"schema": "patch.test/2"}', "written in schema patch.test/2, this version reads patch.test/1"),
        ('{"schema": "patch.other/1"}', "not a patch.test file of this project"),
        ('{"schema": 3}', "not a patch.test file of this project"),
        ("{}", "not a patch.test file of this project"),
        ("[1, 2]", "not a patch.test file of this project"),
    ],
)
def test_unreadable_json_is_refused_by_name(tmp_path, text, message):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(PatchError, match=message) as error:
        read_json(tmp_path / "a.json", "patch.test/1")
    assert str(error.value).startswith(str(tmp_path / "a.json"))


def test_binary_content_is_not_valid_json(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(PatchError, match="not valid JSON"):
        read_json(tmp_path / "a.json", "patch.test/1")


def test_the_checksum_of_json_ignores_the_order_of_keys():
    assert checksum_json({"a": 1, "b": [1, 2]}) == checksum_json({"b": [1, 2], "a": 1})
    assert checksum_json({"a": 1, "b": [1, 2]}) != checksum_json({"a": 1, "b": [2, 1]})


# tensors

TENSORS = {
    "float": torch.arange(6.0).reshape(2, 3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(5),
}


def test_tensors_survive_a_round_trip(tmp_path):
    checksum = write_tensors(tmp_path / "a", TENSORS, "patch.test/1", {"deep": {"list": [1]}})
    tensors, metadata, read_checksum = read_tensors(tmp_path / "a", "patch.test/1")
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert metadata == {"deep": {"list": [1]}}
    assert read_checksum == checksum == checksum_tensors(TENSORS)


def test_tensors_need_not_be_contiguous(tmp_path):
    matrix = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "a", {"t": matrix.T}, "patch.test/1", {})
    assert torch.equal(read_tensors(tmp_path / "a", "patch.test/1")[0]["t"], matrix.T)


def test_the_checksum_sees_names_types_shapes_and_bytes():
    base = {"a": torch.zeros(4), "b": torch.ones(2)}
    assert checksum_tensors(base) == checksum_tensors(dict(reversed(base.items())))
    others = [
        {"a": torch.zeros(4), "c": torch.ones(2)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(2)},
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"a": torch.tensor([0, 0, 0, 1e-30]), "b": torch.ones(2)},
    ]
    assert len({checksum_tensors(tensors) for tensors in [base, *others]}) == 5


def test_missing_tensors_say_what_to_do(tmp_path):
    with pytest.raises(PatchError, match="no such file; run the stage that writes it first"):
        read_tensors(tmp_path / "a", "patch.test/1")


def test_safetensors_of_other_programs_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "a")
    with pytest.raises(PatchError, match=r"not a patch\.test file of this project"):
        read_tensors(tmp_path / "a", "patch.test/1")


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    write_tensors(tmp_path / "a", {"w": torch.zeros(64)}, "patch.test/1", {})
    whole = (tmp_path / "a").read_bytes()
    for position in range(len(whole) - 256, len(whole), 37):
        content = bytearray(whole)
        content[position] ^= 4
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(PatchError, match="checksum does not match"):
            read_tensors(tmp_path / "a", "patch.test/1")


def test_altered_metadata_is_found(tmp_path):
    write_tensors(tmp_path / "a", {"w": torch.zeros(64)}, "patch.test/1", {"seed": 10})
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content.replace(b'seed\\": 10', b'seed\\": 11'))
    assert (tmp_path / "a").read_bytes() != content
    with pytest.raises(PatchError, match="checksum does not match"):
        read_tensors(tmp_path / "a", "patch.test/1")


# the lock

HOLD = """
import sys, time
from patch.artefacts import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone_even_if_killed(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(PatchError, match="another run is writing here"), exclusive(tmp_path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with exclusive(tmp_path):
        pass


def test_the_lock_is_released_when_the_block_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "new"):
        _ = 1 / 0
    with exclusive(tmp_path / "new"):
        pass


def test_the_lock_holds_within_one_process_too(tmp_path):
    with exclusive(tmp_path), pytest.raises(PatchError, match="another run"), exclusive(tmp_path):
        pass


def test_written_json_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == {"a": 1}

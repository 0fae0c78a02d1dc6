"""The kernels for Hopper without a GPU: when they refuse, what they say of it, and where they keep their schedules."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from patch.artefacts import PatchError
from patch.kernels.hybrid import build, hopper, pack, supports


@pytest.fixture
def weight():
    return pack(torch.ones(8, 8).bfloat16(), torch.ones(8, 8, dtype=torch.bool))


@pytest.fixture
def gpu(monkeypatch):
    """Calls it one of a compute capability, in a process that has not warned yet."""
    hopper._warn_of_no_compiler.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield lambda *capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    hopper._warn_of_no_compiler.cache_clear()


def test_hopper_without_a_compiler_is_warned_of_once(gpu, weight, monkeypatch, caplog):
    gpu(9, 0)
    monkeypatch.setattr(build, "compiler", lambda: None)
    for _ in range(3):
        assert (
            supports("cuda", 1, weight) == "no CUDA compiler; install the CUDA toolkit, or set CUDA_HOME to its folder"
        )
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "cannot be built (no CUDA compiler; install the CUDA toolkit" in record.getMessage()


@pytest.mark.parametrize(("capability", "nvcc"), [((9, 0), "/cuda/bin/nvcc"), ((8, 0), None), ((12, 0), None)])
def test_other_gpus_and_hopper_with_a_compiler_are_not(capability, nvcc, gpu, weight, monkeypatch, caplog):
    gpu(*capability)
    monkeypatch.setattr(build, "compiler", lambda: nvcc)
    assert (supports("cuda", 1, weight) is None) == (capability == (9, 0))
    assert not caplog.records


class Stream:
    waited = 0

    def synchronize(self):
        self.waited += 1


@pytest.fixture
def stream(monkeypatch):
    """The current one of a GPU that is none."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "stream", lambda used: contextlib.nullcontext(used))
    return stream


def test_schedules_are_made_once_by_a_thread_whose_memory_no_graph_takes(stream, weight):
    made = []
    for _ in range(2):
        assert hopper._kept(weight, "key", lambda: made.append(threading.get_ident()) or 7) == 7
    assert len(made) == 1
    assert made[0] != threading.get_ident()
    assert stream.waited == 1


def test_schedules_that_cannot_be_made_say_why(stream, weight, monkeypatch):
    def fail():
        raise PatchError("no room")

    with pytest.raises(PatchError, match="no room"):
        hopper._kept(weight, "key", fail)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(PatchError, match=r"hybrid weight of 8x8: .* during the capture .* call the layer once before"):
        hopper._kept(weight, "key", lambda: 7)
    assert not weight.plans

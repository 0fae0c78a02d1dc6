"""Which kernel runs: measured once per case, kept in a file, explained; with kernels and times made up here."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from patch.artefacts import PatchError
from patch.kernels.hybrid import HybridWeight, dispatch
from patch.kernels.hybrid.dispatch import Kernel, Times, bucket, case_of, choose, matmul
from patch.kernels.hybrid.format import pack, unpack


def make_weight(sparse_columns=2, seed=0):
    """[128, 256] with 4 tiles, of which the first ones are 2:4."""
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(seed)).bfloat16()
    keep = torch.ones(128, 256, dtype=torch.bool)
    keep[:, : 64 * sparse_columns].unflatten(1, (-1, 4))[..., :2] = False
    return pack(weight, keep)


class Machine:
    """A GPU that is none: kernels `few` (to 16 tokens), `many` and `other`, whose times are set."""

    def __init__(self, monkeypatch, path):
        self.path = path
        self.times = {"few": 1.0, "many": 2.0, "other": 3.0, "dense": 2.5}
        self.measured: list[str] = []
        self.capturing = False
        self.wrong: set[str] = set()
        few = lambda device, tokens, weight: "for up to 16 tokens" if tokens > 16 else None  # noqa: E731
        always = lambda device, tokens, weight: None  # noqa: E731
        kernels = {
            name: Kernel(few if name == "few" else always, self.kernel(name)) for name in ("few", "many", "other")
        }
        monkeypatch.setattr(dispatch, "kernels", lambda: kernels)
        monkeypatch.setattr(dispatch, "_microseconds", self.microseconds)
        monkeypatch.setattr(dispatch, "_rule_of_thumb", lambda tokens: ["other", "many", "few"])
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        self.monkeypatch = monkeypatch
        self.restart()

    def kernel(self, name):
        def multiply(x, weight, bias=None):
            self.last = name
            if name in self.wrong:
                return F.linear(x, unpack(weight), bias) * 1.5
            return F.linear(x, unpack(weight), bias)

        return multiply

    def microseconds(self, call, device):
        self.last = "dense"
        call()
        self.measured.append(self.last)
        return self.times[self.last]

    def restart(self):
        """Another process on the same machine."""
        self.measured.clear()
        times = Times(self.path)
        self.monkeypatch.setattr(dispatch, "_times", lambda device: times)
        self.monkeypatch.setattr(dispatch, "_CHOICES", {})


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path / "times" / "gpu.json")


def test_the_fastest_kernel_is_chosen_and_explained(machine):
    choice = choose(16, make_weight())
    assert choice.kernel == "few"
    assert choice.reason == "few 1.0 us, many 2.0 us, dense 2.5 us, other 3.0 us"
    assert choice.over_dense == pytest.approx(0.4)
    choice = choose(17, make_weight())
    assert choice.kernel == "many"
    assert choice.reason == "many 2.0 us, dense 2.5 us, other 3.0 us; few: for up to 16 tokens"


def test_it_multiplies(machine):
    weight, bias = make_weight(), torch.randn(128).bfloat16()
    x = torch.randn(5, 256).bfloat16()
    assert torch.equal(matmul(x, weight, bias), F.linear(x, unpack(weight), bias))
    assert machine.last == "few"
    assert matmul(x[:0], weight, bias).shape == (0, 128)


def test_a_case_is_measured_once_also_by_later_processes(machine):
    assert choose(16, make_weight()).kernel == "few"
    assert sorted(machine.measured) == ["dense", "few", "many", "other"]
    choose(16, make_weight(seed=1))
    assert len(machine.measured) == 4
    machine.restart()
    machine.times = dict.fromkeys(machine.times, 9.0)
    assert choose(9, make_weight()).reason == "few 1.0 us, many 2.0 us, dense 2.5 us, other 3.0 us"
    assert machine.measured == []


def test_kernels_that_a_process_can_run_and_an_earlier_one_could_not_are_measured_then(machine):
    choose(16, make_weight())
    content = json.loads(machine.path.read_text())
    for times in content["times"].values():
        del times["few"]
    machine.path.write_text(json.dumps(content))
    machine.restart()
    assert choose(16, make_weight()).kernel == "few"
    assert sorted(machine.measured) == ["dense", "few"]


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (8192, 8192), (9000, 8192)]
)
def test_tokens_count_up_to_the_next_power_of_two(tokens, expected):
    assert bucket(tokens) == expected


def test_cases_differ_in_shape_dtype_tokens_and_tiles():
    assert case_of(10, make_weight(2)) == "bfloat16 128x256, 50 % of tiles 2:4, 16 tokens"
    assert case_of(10, make_weight(0)) == "bfloat16 128x256, 0 % of tiles 2:4, 16 tokens"
    assert case_of(10, make_weight(4)) == "bfloat16 128x256, 100 % of tiles 2:4, 16 tokens"


def test_nothing_is_measured_while_a_graph_is_captured(machine):
    machine.capturing = True
    choice = choose(16, make_weight())
    assert (choice.kernel, choice.over_dense) == ("other", None)
    assert "capture of a CUDA graph" in choice.reason
    assert machine.measured == []
    machine.capturing = False
    assert choose(16, make_weight()).kernel == "few"
    machine.capturing = True
    assert choose(16, make_weight()).kernel == "few"


@pytest.mark.parametrize("capturing", [False, True])
def test_where_every_kernel_refuses_the_case_and_a_way_out_are_named(capturing, machine, monkeypatch):
    refusing = {name: Kernel(lambda *_, name=name: f"{name} does not", machine.kernel(name)) for name in ("a", "b")}
    monkeypatch.setattr(dispatch, "kernels", lambda: refusing)
    machine.capturing = capturing
    refusals = r"\(a: a does not; b: b does not\)"
    with pytest.raises(
        PatchError, match=rf"^bfloat16 128x256, .* 4 tokens: no kernel runs on cpu {refusals}; .*float16"
    ):
        choose(3, make_weight())
    with pytest.raises(PatchError, match="1 tokens: no kernel runs"):
        dispatch.check(make_weight())


def test_bfloat16_on_a_gpu_without_it_is_refused_with_the_way_out(monkeypatch):
    """With Triton, as on a V100: neither its kernels nor the reference are for this."""
    old = lambda device, tokens, weight: "bfloat16 needs compute capability 8.0, this GPU has (7, 0)"  # noqa: E731
    known = dispatch.kernels()
    monkeypatch.setattr(
        dispatch, "kernels", lambda: known | {name: Kernel(old, known[name].multiply) for name in ("triton", "unpack")}
    )
    monkeypatch.setattr(dispatch, "runs_triton", lambda tensor: True)
    monkeypatch.setattr(dispatch, "_CHOICES", {})
    with pytest.raises(PatchError, match=r'this GPU has \(7, 0\); .*; load the model with dtype="float16"'):
        choose(16, make_weight())


def test_on_a_gpu_the_only_kernel_is_measured_beside_the_dense_layer(machine, monkeypatch):
    monkeypatch.setattr(HybridWeight, "device", torch.device("cuda"))
    monkeypatch.setattr(dispatch, "kernels", lambda: {"other": Kernel(lambda *_: None, machine.kernel("other"))})
    monkeypatch.setattr(dispatch, "measure", lambda tokens, weight, names: {"dense": 2.0} | dict.fromkeys(names, 5.0))
    assert choose(16, make_weight()).over_dense == 2.5


@pytest.mark.parametrize("tokens", [1, 128, 129, 9000])
def test_the_rule_of_thumb_knows_all_kernels(tokens):
    assert sorted(dispatch._rule_of_thumb(tokens)) == sorted(dispatch.kernels())


def test_a_kernel_with_a_wrong_product_is_left_out(machine, caplog):
    machine.wrong = {"few"}
    assert choose(16, make_weight()).kernel == "many"
    assert "kernel few is not used for bfloat16 128x256" in caplog.text
    machine.wrong = {"few", "many", "other"}
    with pytest.raises(PatchError, match="no kernel gives the right product"):
        choose(17, make_weight())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": "other/1", "times": {}}', '{"schema": "x"}'])
def test_a_file_that_is_not_one_of_times_is_replaced(machine, content):
    machine.path.parent.mkdir()
    machine.path.write_text(content)
    machine.restart()
    assert choose(16, make_weight()).kernel == "few"
    machine.restart()
    assert choose(16, make_weight()).kernel == "few"
    assert machine.measured == []


def test_processes_keep_each_others_times(tmp_path):
    first, second = Times(tmp_path / "times.json"), Times(tmp_path / "times.json")
    first["a"] = {"few": 1.0}
    second["b"] = {"many": 2.0}
    assert Times(tmp_path / "times.json") == {"a": {"few": 1.0}, "b": {"many": 2.0}}


def test_where_the_file_cannot_be_written_choices_last_for_the_process(machine, caplog):
    machine.path.parent.write_text("a file where the folder should be")
    assert choose(16, make_weight()).kernel == "few"
    assert "not kept for later runs" in caplog.text


def test_without_a_gpu_the_reference_runs_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_CHOICES", {})
    caplog.set_level(logging.WARNING)
    choice = choose(4, make_weight())
    assert choice.kernel == "reference"
    assert choice.reason.startswith(
        "nothing else runs here (decode: the kernels need a CUDA GPU; prefill: for 33 tokens"
    )
    assert not caplog.records


class Clock:
    """A device of 2 GHz and a host that launches on it; times in microseconds."""

    def __init__(self, monkeypatch, launch: float, kernel: float):
        self.host = self.device = 0.0
        self.launch, self.kernel = launch, kernel
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.device = max(clock.device, clock.host)

            def query(self):
                return clock.host >= self.at

            def synchronize(self):
                clock.host = max(clock.host, self.at)

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=8))

    def sleep(self, cycles: int) -> None:
        self.device = max(self.device, self.host) + cycles / 2e3

    def call(self) -> None:
        self.host += self.launch
        self.device = max(self.device, self.host) + self.kernel


def test_the_time_of_a_kernel_is_that_of_the_device_however_slow_the_host(monkeypatch):
    for launch in (20.0, 700.0):
        clock = Clock(monkeypatch, launch, kernel=30.0)
        assert dispatch._microseconds(clock.call, torch.device("cpu")) == pytest.approx(30.0)


def test_a_host_that_no_wait_is_long_enough_for_is_measured_all_the_same(monkeypatch):
    clock = Clock(monkeypatch, launch=1e6, kernel=30.0)
    assert dispatch._microseconds(clock.call, torch.device("cpu")) > 30.0

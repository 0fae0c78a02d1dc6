"""Compiling on first use: where there is a compiler, where there is none, and where it fails."""

from __future__ import annotations

import functools
import subprocess

import pytest
import torch

from patch.artefacts import PatchError
from patch.kernels.hybrid import build, pack, supports


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("PATCH_LLM_CACHE", str(tmp_path / "cache"))
    build.compiler.cache_clear()
    build.load.cache_clear()
    yield
    build.compiler.cache_clear()
    build.load.cache_clear()


def fake_compiler(folder, monkeypatch, body):
    """An nvcc in a CUDA_HOME of its own."""
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(f"#!/bin/sh\n{body}\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder / "cuda"))
    build.compiler.cache_clear()


def shared_objects(tmp_path):
    return sorted((tmp_path / "cache" / "kernels").glob("*.so"))


@pytest.mark.parametrize(("name", "function"), [("decode", "patch_decode"), ("prefill", "patch_prefill")])
def test_the_real_compiler_accepts_the_kernels_without_spills(name, function, tmp_path, monkeypatch):
    if build.compiler() is None:
        pytest.skip("no nvcc here")
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-Xptxas", "-v"))
    log = tmp_path / "log"
    run = subprocess.run

    def logged(command, **options):
        result = run(command, **options)
        log.write_text(result.stderr)
        return result

    monkeypatch.setattr(subprocess, "run", logged)
    assert getattr(build.load(name), function)
    text = log.read_text()
    assert "Used" in text
    spills = [line.strip() for line in text.splitlines() if "spill" in line and " 0 bytes spill stores" not in line]
    assert not spills
    assert "wgmma" not in text  # ptxas says so if it has to run the tensor cores one instruction at a time


def test_no_compiler_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(build, "compiler", functools.cache(lambda: None))
    with pytest.raises(
        PatchError, match=r"no CUDA compiler; install the CUDA toolkit, or set CUDA_HOME to its folder\."
    ):
        build.load("decode")


def test_a_failing_compiler_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch):
    fake_compiler(
        tmp_path, monkeypatch, '[ "$1" = --version ] && exit 0\necho "noise" >&2\necho "x.cu(3): error: no" >&2\nexit 2'
    )
    with pytest.raises(PatchError, match=r"nvcc: failed \(x.cu\(3\): error: no\)"):
        build.load("decode")
    assert not shared_objects(tmp_path)


def test_compiles_once_per_source_and_compiler_version(tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    for version in ("1", "1", "2"):
        fake_compiler(
            tmp_path,
            monkeypatch,
            f'[ "$1" = --version ] && {{ echo {version}; exit 0; }}\n'
            f'echo call >> {calls}\nfor last; do :; done\necho object > "$last"',
        )
        build.load.cache_clear()
        with pytest.raises(OSError, match="decode-"):  # what this compiler writes cannot be loaded
            build.load("decode")
    assert calls.read_text().splitlines() == ["call", "call"]
    assert len(shared_objects(tmp_path)) == 2


def test_supports_says_why_not_on_a_cpu():
    weight = pack(torch.ones(8, 8).bfloat16(), torch.ones(8, 8, dtype=torch.bool))
    assert supports("cpu", 1, weight) == "the kernels need a CUDA GPU"

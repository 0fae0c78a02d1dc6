"""The GPU kernels of inference under compute-sanitizer: no access outside of what they were given, no race in shared
memory.

It comes with the CUDA toolkit; `$CUDA_HOME/bin`, the PATH and /usr/local/cuda/bin are searched. This file is also the
program that it watches, so that a report can be looked at by hand:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --kernel-name kns=decode \
        --kernel-name kns=prefill --kernel-name kns=_attend --kernel-name kns=_matmul --kernel-name kns=_unpack \
        python tests/kernels/test_sanitizer.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patch.benchmarking.shapes import random_mask
from patch.kernels import runs_triton
from patch.kernels.attention import decode_attention
from patch.kernels.hybrid import HybridWeight, decode, pack, prefill, supports

KERNELS = ("decode", "prefill", "_attend", "_combine", "_matmul", "_unpack")
"""Parts of their names: CUDA C++ ones, and the Triton kernels of attention and of hybrid weights."""
FOUND = 9
"""What the sanitizer exits with where it found something."""
CASES = [
    ((129, 136), 0.35, (1, 3, 17)),
    ((256, 64), 0.5, (33, 128)),
    ((300, 264), 0.0, (5, 40)),
    ((128, 512), 0.5, (8,)),
]
"""Shape, share of pruned weights, numbers of tokens: ragged edges, all-2:4 and all-dense rows, odd token counts."""
DEEP = (1024, 16384)
"""So many tiles for every block that decode uses its memory for them over and over."""


def run_kernels() -> None:
    from patch.kernels.hybrid import triton_matmul  # here: pytest reads this file on machines without Triton

    generator = torch.Generator().manual_seed(0)

    def packed(shape: tuple[int, int], share: float) -> HybridWeight:
        weight = torch.randn(shape, generator=generator).bfloat16()
        mask = random_mask(weight, share, (128, 64), generator)
        return pack(weight.cuda(), mask.keep_mask().cuda())

    for shape, share, counts in CASES:
        hybrid = packed(shape, share)
        bias = torch.randn(shape[0], generator=generator).bfloat16().cuda()
        for tokens in counts:
            x = torch.randn(tokens, shape[1], generator=generator).bfloat16().cuda()
            for kernel in (decode, prefill) if shape[0] % 8 == 0 else (decode,):  # prefill takes no others
                if reason := supports("cuda", tokens, hybrid):
                    sys.exit(f"not run: {reason}")
                assert kernel(x, hybrid).isfinite().all()
            # with the inputs split and in one piece, with a bias and without
            assert triton_matmul.matmul(x, hybrid).isfinite().all()
            assert triton_matmul.matmul(x, hybrid, bias).isfinite().all()
        assert triton_matmul.unpack(hybrid).isfinite().all()
    assert decode(torch.randn(128, DEEP[1], device="cuda").bfloat16(), packed(DEEP, 0.25)).isfinite().all()
    for heads, key_heads, length in ((4, 4, 70), (8, 2, 600)):
        query, keys, values = (
            torch.randn(1, count, size, 64, device="cuda").bfloat16()
            for count, size in ((heads, 1), (key_heads, length), (key_heads, length))
        )
        assert runs_triton(query)
        for position in (0, length - 1):
            assert decode_attention(query, keys, values, torch.tensor([position], device="cuda")).isfinite().all()


def sanitizer() -> str | None:
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME",) if name in os.environ]
    folders += [*map(Path, os.environ.get("PATH", "").split(os.pathsep)), Path("/usr/local/cuda/bin")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(map(str, folders)))


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    program = sanitizer()
    if program is None:
        pytest.skip("needs compute-sanitizer, a part of the CUDA toolkit; there is none in CUDA_HOME or on the PATH")
    options = ["--error-exitcode", str(FOUND), "--launch-timeout", "300"]
    kernels = [item for name in KERNELS for item in ("--kernel-name", f"kns={name}")]
    done = subprocess.run(
        [program, "--tool", tool, *options, *kernels, sys.executable, __file__],
        # Each tensor in memory of its own: what lies behind it is not another tensor.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if "not run: " in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "RACECHECK SUMMARY: 0 hazards" in done.stdout


if __name__ == "__main__":
    run_kernels()

"""The operator of `proximal` as one Triton kernel, which reads and writes every weight once."""
# Compile-time constants are in capitals, and kernels without types, as is the custom in Triton:
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patch.kernels.proximal import MAXIMUM_SWEEPS, RESOLUTION, SWEEPS

BLOCK = 64
"""Groups that iterate together, until the last of them stands still."""

_SWEEPS, _MAXIMUM_SWEEPS = tl.constexpr(SWEEPS), tl.constexpr(MAXIMUM_SWEEPS)
_TOLERANCE = tl.constexpr(RESOLUTION * torch.finfo(torch.float32).eps)


def solve_(weight: Tensor, strength: float) -> None:
    """Replace `weight` [out, in], float32, bfloat16 or float16, contiguous and on a GPU, by the operator's result."""
    groups = weight.numel() // 4
    with torch.cuda.device(weight.device):
        _solve[(triton.cdiv(groups, BLOCK),)](weight, groups, strength, BLOCK=BLOCK, num_warps=BLOCK // 32)


@triton.jit
def _solve(weight_ptr, groups, strength, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, at = group < groups, weight_ptr + group * 4
    x0, x1, x2, x3 = _load(at, inside), _load(at + 1, inside), _load(at + 2, inside), _load(at + 3, inside)
    z0, z1, s0 = _exchange(tl.abs(x0) * strength, tl.abs(x1) * strength)
    z2, z3, s1 = _exchange(tl.abs(x2) * strength, tl.abs(x3) * strength)
    z0, z2, s2 = _exchange(z0, z2)
    z1, z3, s3 = _exchange(z1, z3)
    z1, z2, s4 = _exchange(z1, z2)

    w0, w1, w2, w3 = _converge(z0, z1, z2, z3)
    hard = 2 * (z0 + z1 + z2) > 1  # elsewhere the objective is convex, and its only minimum found
    if tl.max(hard.to(tl.int32)) > 0:
        none = tl.zeros_like(z0)
        four = _objective(z0, z1, z2, z3, w0, w1, w2, w3)
        a0, a1, a2, _ = _converge(z0, z1, z2, none)
        three = _objective(z0, z1, z2, z3, a0, a1, a2, none)
        two = _objective(z0, z1, z2, z3, z0, z1, none, none)
        to_three = hard & (three <= four)
        w0, w1 = tl.where(to_three, a0, w0), tl.where(to_three, a1, w1)
        w2, w3 = tl.where(to_three, a2, w2), tl.where(to_three, none, w3)
        to_two = hard & (two <= three) & (two <= four)
        w0, w1 = tl.where(to_two, z0, w0), tl.where(to_two, z1, w1)
        w2, w3 = tl.where(to_two, none, w2), tl.where(to_two, none, w3)

    w1, w2 = tl.where(s4, w2, w1), tl.where(s4, w1, w2)
    w1, w3 = tl.where(s3, w3, w1), tl.where(s3, w1, w3)
    w0, w2 = tl.where(s2, w2, w0), tl.where(s2, w0, w2)
    w2, w3 = tl.where(s1, w3, w2), tl.where(s1, w2, w3)
    w0, w1 = tl.where(s0, w1, w0), tl.where(s0, w0, w1)
    _store(at, x0, w0, strength, inside)
    _store(at + 1, x1, w1, strength, inside)
    _store(at + 2, x2, w2, strength, inside)
    _store(at + 3, x3, w3, strength, inside)


@triton.jit
def _load(at, inside):
    return tl.load(at, inside, 0).to(tl.float32)


@triton.jit
def _store(at, x, w, strength, inside):
    # what the operator leaves alone comes back as it was, without the rounding of scaling
    found = tl.where(tl.abs(x) * strength == w, x, tl.where(x < 0, -w, w) / strength)
    tl.store(at, found.to(at.dtype.element_ty), inside)


@triton.jit
def _exchange(x, y):
    """The larger, the smaller, and whether they changed places."""
    return tl.maximum(x, y), tl.minimum(x, y), y > x


@triton.jit
def _sweep(z0, z1, z2, z3, w0, w1, w2):
    w3 = tl.maximum(z3 - (w0 * (w1 + w2) + w1 * w2), 0)
    w2 = tl.maximum(z2 - (w0 * (w1 + w3) + w1 * w3), 0)
    w1 = tl.maximum(z1 - (w0 * (w2 + w3) + w2 * w3), 0)
    w0 = tl.maximum(z0 - (w1 * (w2 + w3) + w2 * w3), 0)
    return w0, w1, w2, w3


@triton.jit
def _converge(z0, z1, z2, z3):
    """Where sweeps from 0 on end."""
    none = tl.zeros_like(z0)
    w0, w1, w2, w3 = none, none, none, none
    moving, sweeps = 1, 0
    while moving > 0 and sweeps < _MAXIMUM_SWEEPS:
        for _ in tl.static_range(_SWEEPS - 1):
            w0, w1, w2, w3 = _sweep(z0, z1, z2, z3, w0, w1, w2)
        n0, n1, n2, n3 = _sweep(z0, z1, z2, z3, w0, w1, w2)
        moved = tl.maximum(tl.maximum(tl.abs(n0 - w0), tl.abs(n1 - w1)), tl.maximum(tl.abs(n2 - w2), tl.abs(n3 - w3)))
        moving = tl.max((moved > _TOLERANCE * z0).to(tl.int32))
        w0, w1, w2, w3 = n0, n1, n2, n3
        sweeps += _SWEEPS
    return w0, w1, w2, w3


@triton.jit
def _objective(z0, z1, z2, z3, w0, w1, w2, w3):
    """At strength 1."""
    d0, d1, d2, d3 = w0 - z0, w1 - z1, w2 - z2, w3 - z3
    return 0.5 * (d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3) + w0 * w1 * (w2 + w3) + w2 * w3 * (w0 + w1)

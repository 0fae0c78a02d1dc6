"""The update of `adamw` as one Triton kernel, which reads and writes every byte of parameters and states once."""
# Compile-time constants are in capitals, and kernels without types, as is the custom in Triton:
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patch.kernels.adamw import BLOCK, LEVELS, SMALLEST_SCALE, STREAM
from patch.kernels.triton_functions import (
    bytes_to_float,
    copy_sign,
    exp2,
    float_to_bytes,
    log2,
    philox,
    reciprocal,
    share_of_byte,
    square_root,
    whole_part,
)

WARPS = 2

_BLOCK, _STREAM = tl.constexpr(BLOCK), tl.constexpr(STREAM)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_LEVELS_SIGNED, _LEVELS_UNSIGNED = tl.constexpr(LEVELS[torch.int8]), tl.constexpr(LEVELS[torch.uint8])


@triton.jit
def _eighth_power(x):
    square = x * x
    return square * square * (square * square)


@triton.jit
def _decode(codes_ptr, scales_ptr, at, inside, block, entries, LEVELS: tl.constexpr):
    codes = bytes_to_float(tl.load(codes_ptr + at, inside, 0))
    unit = tl.load(scales_ptr + block, block * _BLOCK < entries, 0) * (1 / LEVELS**8)
    return copy_sign(_eighth_power(codes) * unit, codes)


@triton.jit
def _encode(
    values, noise, codes_ptr, scales_ptr, at, inside, block, entries, LEVELS: tl.constexpr, SIGNED: tl.constexpr
):
    magnitude = tl.abs(values)
    # in the order of integers, which a warp compares by one instruction
    largest = tl.max(magnitude.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    scale = tl.maximum(largest, _SMALLEST_SCALE)
    power = magnitude * (LEVELS**8 * reciprocal(scale))
    lower = whole_part(exp2(log2(power) * 0.125))
    below, above = _eighth_power(lower), _eighth_power(lower + 1)
    codes = tl.where(below + noise * (above - below) < power, lower + 1, lower)
    codes = tl.minimum(codes, LEVELS)
    codes = copy_sign(codes, values) if SIGNED else tl.maximum(codes, (magnitude > 0).to(tl.float32))
    tl.store(codes_ptr + at, float_to_bytes(codes, SIGNED), inside)
    tl.store(scales_ptr + block, scale, block * _BLOCK < entries)


@triton.jit
def _round_stochastically(values, noise):
    bits = values.to(tl.uint32, bitcast=True) + noise
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["seed", "index"])
def _update(
    parameter_ptr,
    gradient_ptr,
    m_ptr,
    m_scale_ptr,  # None for states in float32
    v_ptr,
    v_scale_ptr,
    coefficients_ptr,  # float64 [4], as `adamw._coefficients`
    step_ptr,  # int64 []
    entries,
    seed,
    index,
    m_share,  # 1 - beta1, since in float32 the difference would lose digits
    v_keep,
    v_share,
    eps,
    STOCHASTIC: tl.constexpr,
    EVEN: tl.constexpr,  # entries are a multiple of 4 * _BLOCK
):
    row, lane = tl.program_id(0), tl.arange(0, _BLOCK)
    step_size = tl.load(coefficients_ptr).to(tl.float32)
    root_correction = tl.load(coefficients_ptr + 1).to(tl.float32)
    decay = tl.load(coefficients_ptr + 2).to(tl.float32)
    scale = tl.load(coefficients_ptr + 3).to(tl.float32)
    # the four words of one call go to the same place of four consecutive blocks
    words = philox(
        row * _BLOCK + lane,
        index,
        tl.load(step_ptr).to(tl.int32),
        tl.full([], _STREAM, tl.uint32),
        seed,
    )
    for quarter in tl.static_range(4):
        block = row.to(tl.int64) * 4 + quarter
        at = block * _BLOCK + lane
        inside = tl.full([_BLOCK], True, tl.int1) if EVEN else at < entries
        noise = words[quarter]
        p = tl.load(parameter_ptr + at, inside, 0).to(tl.float32)
        g = tl.load(gradient_ptr + at, inside, 0).to(tl.float32) * scale
        if m_scale_ptr is None:
            m = tl.load(m_ptr + at, inside, 0)
            v = tl.load(v_ptr + at, inside, 0)
        else:
            m = _decode(m_ptr, m_scale_ptr, at, inside, block, entries, _LEVELS_SIGNED)
            v = _decode(v_ptr, v_scale_ptr, at, inside, block, entries, _LEVELS_UNSIGNED)
            v = v * v
        m += m_share * (g - m)
        v = v_keep * v + v_share * g * g
        root = square_root(v)
        if m_scale_ptr is None:
            tl.store(m_ptr + at, m, inside)
            tl.store(v_ptr + at, v, inside)
        else:
            for_m, for_v = share_of_byte(noise, 2), share_of_byte(noise, 3)
            _encode(m, for_m, m_ptr, m_scale_ptr, at, inside, block, entries, _LEVELS_SIGNED, True)
            _encode(root, for_v, v_ptr, v_scale_ptr, at, inside, block, entries, _LEVELS_UNSIGNED, False)
        p = p * decay - step_size * m * reciprocal(root * root_correction + eps)
        if STOCHASTIC:
            p = _round_stochastically(p, noise & 0xFFFF)
        tl.store(parameter_ptr + at, p.to(parameter_ptr.dtype.element_ty), inside)


def update_(
    parameter: Tensor,
    gradient: Tensor,
    state: list[Tensor],
    coefficients: Tensor,
    step: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    stochastic_rounding: bool,
    seed: int,
    index: int,
) -> None:
    """As `adamw.update_torch_`."""
    m, m_scale, v, v_scale = state if len(state) == 4 else (state[0], None, state[1], None)
    entries = len(parameter)
    _update[triton.cdiv(entries, 4 * BLOCK),](
        parameter,
        gradient,
        m,
        m_scale,
        v,
        v_scale,
        coefficients,
        step,
        entries,
        seed,
        index,
        1 - betas[0],
        betas[1],
        1 - betas[1],
        eps,
        STOCHASTIC=stochastic_rounding,
        EVEN=entries % (4 * BLOCK) == 0,
        num_warps=WARPS,
    )

"""The two passes of `soft_mask` as one Triton kernel each; formulas and names are there.

Both work at the speed of memory: they read logits and weights once, write the effective weights or the gradients, and
draw the noise anew from counters. A program covers ROWS x 4 * GROUPS weights at a time, a shape in which every thread
owns whole groups and 16 bytes of bfloat16 weights, so that nothing moves between threads; it goes down its column for
`steps` such blocks. Special functions are the GPU's approximations. The noise is `philox.spacings`: up
to a shift that the six of a group share, their logarithm is that of exponentials, which would take a second one.

Sums are deterministic. That of (W * M)^2 is finished by the last program to arrive, in a fixed order. A program stays
inside one tile where the tile size allows it, and the sums of the tiles are then one small reduction; other tile sizes
go through a buffer with one entry per group.
"""
# Compile-time constants are in capitals, and kernels without types, as is the custom in Triton:
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from patch.kernels.triton_functions import exp2, high_bytes, log2, philox, reciprocal, to_float
from patch.sparsity.packing import PATTERNS_2_4
from patch.sparsity.tiles import grid_shape, tile_sums

if TYPE_CHECKING:
    from patch.kernels.soft_mask import Call

ROWS, GROUPS, WARPS = 8, 32, 4
MOST_STEPS = 16
STAGES = 2
"""A block's loads are asynchronous and issued together; the GPU's other programs have their turn meanwhile. Plain loads
of the old gradient would be put off until it is used, and one block more ahead would take the registers of programs."""
FEWEST_PROGRAMS = 4096
"""Fewer steps per program rather than fewer programs: several per place on the GPU, so that its last wave is short."""

_ROWS, _GROUPS, _STAGES = tl.constexpr(ROWS), tl.constexpr(GROUPS), tl.constexpr(STAGES)
_SUMMANDS = tl.constexpr(2048)
_LOG2_E = tl.constexpr(1.4426950408889634)
# bit i of entry j: whether pattern i keeps place j
_KEPT = [sum(1 << i for i in range(6) if PATTERNS_2_4[i, j]) for j in range(4)]
_KEPT_0, _KEPT_1, _KEPT_2, _KEPT_3 = (tl.constexpr(bits) for bits in _KEPT)


@triton.jit
def _store_planes(pointer, offsets, plane, inside, x0, x1, x2, x3, x4, x5):
    dtype: tl.constexpr = pointer.dtype.element_ty
    tl.store(pointer + offsets, x0.to(dtype), inside)
    tl.store(pointer + plane + offsets, x1.to(dtype), inside)
    tl.store(pointer + 2 * plane + offsets, x2.to(dtype), inside)
    tl.store(pointer + 3 * plane + offsets, x3.to(dtype), inside)
    tl.store(pointer + 4 * plane + offsets, x4.to(dtype), inside)
    tl.store(pointer + 5 * plane + offsets, x5.to(dtype), inside)


@triton.jit
def _uniform(word, TAG: tl.constexpr):
    """1 + (k + TAG / 8) / 2**20 for the 20 random bits k above the lowest three and below the exponent's place."""
    return ((word & 0x7FFFF8) | (0x3F800000 + TAG)).to(tl.float32, bitcast=True)


@triton.jit
def _ascending(x, y):
    return tl.minimum(x, y), tl.maximum(x, y)


@triton.jit
def _beside(x, y):
    """x, which Triton then keeps in the threads that have float32 y, and all that is computed from it."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,f", [x, y], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _spacings(r0, r1, r2, r3):
    """As `philox.spacings`. No two of the numbers are equal, and every difference is exact."""
    u0, u1, u2, u3 = _uniform(r0, 1), _uniform(r1, 2), _uniform(r2, 3), _uniform(r3, 4)
    u4 = _uniform(high_bytes(r0, r1, r2), 5)
    u0, u3 = _ascending(u0, u3)
    u1, u4 = _ascending(u1, u4)
    u0, u2 = _ascending(u0, u2)
    u1, u3 = _ascending(u1, u3)
    u0, u1 = _ascending(u0, u1)
    u2, u4 = _ascending(u2, u4)
    u1, u2 = _ascending(u1, u2)
    u3, u4 = _ascending(u3, u4)
    u2, u3 = _ascending(u2, u3)
    return u0 - 1, u1 - u0, u2 - u1, u3 - u2, u4 - u3, 2 - u4


@triton.jit
def _load_planes(pointer, offsets, plane, inside):
    """One block of each of the six planes, in float32."""
    x0 = to_float(tl.load(pointer + offsets, inside, 0))
    x1 = to_float(tl.load(pointer + plane + offsets, inside, 0))
    x2 = to_float(tl.load(pointer + 2 * plane + offsets, inside, 0))
    x3 = to_float(tl.load(pointer + 3 * plane + offsets, inside, 0))
    x4 = to_float(tl.load(pointer + 4 * plane + offsets, inside, 0))
    x5 = to_float(tl.load(pointer + 5 * plane + offsets, inside, 0))
    return x0, x1, x2, x3, x4, x5


@triton.jit
def _soft_probabilities(logits, offsets, seed, layer, micro_step, rank, scale, inverse_temperature):
    """Six probabilities of each group, to be multiplied by the seventh result, and the code of the largest."""
    r0, r1, r2, r3 = philox(_beside(offsets, logits[0]), layer, micro_step, rank, seed)
    e0, e1, e2, e3, e4, e5 = _spacings(r0, r1, r2, r3)
    # log2 of exp(scale * l + g), up to a constant
    y0, y1 = logits[0] * scale - log2(e0), logits[1] * scale - log2(e1)
    y2, y3 = logits[2] * scale - log2(e2), logits[3] * scale - log2(e3)
    y4, y5 = logits[4] * scale - log2(e4), logits[5] * scale - log2(e5)
    largest = tl.maximum(tl.maximum(tl.maximum(y0, y1), tl.maximum(y2, y3)), tl.maximum(y4, y5))
    code = tl.where(y3 == largest, 3, tl.where(y4 == largest, 4, 5))
    code = tl.where(y0 == largest, 0, tl.where(y1 == largest, 1, tl.where(y2 == largest, 2, code)))
    shift = largest * inverse_temperature
    p0, p1 = exp2(y0 * inverse_temperature - shift), exp2(y1 * inverse_temperature - shift)
    p2, p3 = exp2(y2 * inverse_temperature - shift), exp2(y3 * inverse_temperature - shift)
    p4, p5 = exp2(y4 * inverse_temperature - shift), exp2(y5 * inverse_temperature - shift)
    return p0, p1, p2, p3, p4, p5, reciprocal(p0 + p1 + p2 + (p3 + p4) + p5), code


@triton.jit
def _mix(p0, p1, p2, p3, p4, p5):
    """The soft mask of each of the four places of a group."""
    return p0 + p1 + p2, p3 + p4 + p0, p1 + p3 + p5, p4 + p5 + p2


@triton.jit
def _kept_by(code):
    """0 or 1 for each of the four places of a group."""
    code = code.to(tl.int32)
    m0, m1 = (_KEPT_0 >> code & 1).to(tl.float32), (_KEPT_1 >> code & 1).to(tl.float32)
    m2, m3 = (_KEPT_2 >> code & 1).to(tl.float32), (_KEPT_3 >> code & 1).to(tl.float32)
    return m0, m1, m2, m3


@triton.jit
def _join(x0, x1, x2, x3):
    """Four [ROWS, GROUPS] -> [ROWS, 4 * GROUPS], interleaved."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [_ROWS, 4 * _GROUPS])


@triton.jit
def _split(x):
    """Inverse of `_join`."""
    even, odd = tl.split(tl.reshape(x, [_ROWS, _GROUPS, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _inside(rows, columns, out, width, EVEN: tl.constexpr):
    """Which entries of a block exist."""
    if EVEN:
        inside = tl.full([rows.shape[0], columns.shape[0]], True, tl.int1)
    else:
        inside = (rows < out)[:, None] & (columns < width)[None, :]
    return inside


@triton.jit
def _tile_of_program(tile_ptr, tile_columns, steps, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Share of density of the one tile that all of a program's weights are in."""
    row, column = tl.program_id(1) * steps * _ROWS, tl.program_id(0) * 4 * _GROUPS
    return tl.load(tile_ptr + row // HEIGHT * tile_columns + column // WIDTH)


@triton.jit
def _tile_of_groups(tile_ptr, rows, group, inside, tile_columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Share of density of each group's tile, [ROWS, GROUPS]."""
    tiles = (rows // HEIGHT)[:, None] * tile_columns + (group // (WIDTH // 4))[None, :]
    return tl.load(tile_ptr + tiles, inside, 0)


@triton.jit(do_not_specialize=["seed", "rank", "layer"])
def _forward(
    patterns_ptr,  # float [6, out, groups] or uint8 [out, groups]
    weight_ptr,  # [out, 4 * groups]
    tile_ptr,  # float32 [tile rows, tile_columns] or None
    effective_ptr,  # [out, 4 * groups]
    square_sum_ptr,  # float32 []
    partial_ptr,  # float32 [programs]
    arrivals_ptr,  # int32 [1], 0 before and after
    reals_ptr,  # float32 [2]: scale, temperature
    integers_ptr,  # int32 [2]: micro-step, accumulate
    seed,
    rank,
    layer,
    out,
    groups,
    tile_columns,
    steps,
    EVEN: tl.constexpr,
    HARD: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    column, strip = tl.program_id(0), tl.program_id(1)
    group = column * _GROUPS + tl.arange(0, _GROUPS)
    place = column * 4 * _GROUPS + tl.arange(0, 4 * _GROUPS)
    scale = tl.load(reals_ptr) * _LOG2_E
    inverse_temperature = 1 / tl.load(reals_ptr + 1)
    micro_step = tl.load(integers_ptr)
    tile_share = _tile_of_program(tile_ptr, tile_columns, steps, HEIGHT, WIDTH) if ALIGNED else 0.0
    squares = tl.zeros([_ROWS, 4 * _GROUPS], tl.float32)
    for step in tl.range(steps, num_stages=_STAGES):
        rows = (strip * steps + step) * _ROWS + tl.arange(0, _ROWS)
        offsets = rows[:, None] * groups + group[None, :]
        weights_at = rows[:, None] * (4 * groups) + place[None, :]
        inside = _inside(rows, group, out, groups, EVEN)
        weights_inside = _inside(rows, place, out, 4 * groups, EVEN)
        weight = tl.load(weight_ptr + weights_at, weights_inside, 0).to(tl.float32)
        unit = 1.0  # of m0 to m3
        if patterns_ptr.dtype.element_ty == tl.uint8:
            m0, m1, m2, m3 = _kept_by(tl.load(patterns_ptr + offsets, inside, 0))
        else:
            logits = _load_planes(patterns_ptr, offsets, out * groups, inside)
            p0, p1, p2, p3, p4, p5, inverse, code = _soft_probabilities(
                logits, offsets, seed, layer, micro_step, rank, scale, inverse_temperature
            )
            if HARD:
                m0, m1, m2, m3 = _kept_by(code)
            else:
                m0, m1, m2, m3 = _mix(p0, p1, p2, p3, p4, p5)
                unit = inverse
        t = tile_share
        if tile_ptr is not None and not ALIGNED:
            t = _tile_of_groups(tile_ptr, rows, group, inside, tile_columns, HEIGHT, WIDTH)
        unit = (1 - t) * unit
        m0, m1, m2, m3 = t + unit * m0, t + unit * m1, t + unit * m2, t + unit * m3
        effective = weight * _join(m0, m1, m2, m3)
        tl.store(effective_ptr + weights_at, effective.to(effective_ptr.dtype.element_ty), weights_inside)
        squares += effective * effective
    _finish_sum(tl.sum(squares), square_sum_ptr, partial_ptr, arrivals_ptr)


@triton.jit
def _finish_sum(value, sum_ptr, partial_ptr, arrivals_ptr):
    """sum_ptr = sum of `value` over all programs, by the last of them."""
    programs = tl.num_programs(0) * tl.num_programs(1)
    tl.store(partial_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), value)
    if tl.atomic_add(arrivals_ptr, 1) == programs - 1:
        total = tl.zeros([_SUMMANDS], tl.float32)
        for first in range(0, programs, _SUMMANDS):
            number = first + tl.arange(0, _SUMMANDS)
            total += tl.load(partial_ptr + number, number < programs, 0, cache_modifier=".cg")
        tl.store(sum_ptr, tl.sum(total))
        tl.store(arrivals_ptr, 0)


@triton.jit(do_not_specialize=["seed", "rank", "layer"])
def _backward(
    patterns_ptr,
    weight_ptr,
    tile_ptr,
    d_effective_ptr,  # [out, 4 * groups]
    d_square_sum_ptr,  # float32 [] or None
    d_logits_ptr,  # float [6, out, groups] or None
    d_tile_ptr,  # float32 [strips, columns] if ALIGNED, else [out, groups]
    squares_ptr,  # float32 [programs] or None: sums of the squares of d_logits
    reals_ptr,
    integers_ptr,
    seed,
    rank,
    layer,
    out,
    groups,
    tile_columns,
    steps,
    EVEN: tl.constexpr,
    HARD: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    BUFFER: tl.constexpr,
):
    column, strip = tl.program_id(0), tl.program_id(1)
    group = column * _GROUPS + tl.arange(0, _GROUPS)
    place = column * 4 * _GROUPS + tl.arange(0, 4 * _GROUPS)
    plane = out * groups
    scale = tl.load(reals_ptr) * _LOG2_E
    inverse_temperature = 1 / tl.load(reals_ptr + 1)
    slope = tl.load(reals_ptr) * inverse_temperature
    micro_step = tl.load(integers_ptr)
    accumulate = tl.load(integers_ptr + 1) != 0
    twice = 2 * tl.load(d_square_sum_ptr) if d_square_sum_ptr is not None else 0.0
    tile_share = _tile_of_program(tile_ptr, tile_columns, steps, HEIGHT, WIDTH) if ALIGNED else 0.0
    d_tile = tl.zeros([_ROWS, _GROUPS], tl.float32)
    squares = tl.zeros([_ROWS, _GROUPS], tl.float32)
    for step in tl.range(steps, num_stages=_STAGES):
        rows = (strip * steps + step) * _ROWS + tl.arange(0, _ROWS)
        offsets = rows[:, None] * groups + group[None, :]
        weights_at = rows[:, None] * (4 * groups) + place[None, :]
        inside = _inside(rows, group, out, groups, EVEN)
        weights_inside = _inside(rows, place, out, 4 * groups, EVEN)
        weight = tl.load(weight_ptr + weights_at, weights_inside, 0).to(tl.float32)
        d_effective = tl.load(d_effective_ptr + weights_at, weights_inside, 0).to(tl.float32)
        unit = 1.0  # of m0 to m3
        if patterns_ptr.dtype.element_ty == tl.uint8:
            m0, m1, m2, m3 = _kept_by(tl.load(patterns_ptr + offsets, inside, 0))
        else:
            logits = _load_planes(patterns_ptr, offsets, plane, inside)
            if BUFFER:
                before = _load_planes(d_logits_ptr, offsets, plane, inside & accumulate)
            else:
                before = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
            p0, p1, p2, p3, p4, p5, inverse, code = _soft_probabilities(
                logits, offsets, seed, layer, micro_step, rank, scale, inverse_temperature
            )
            if HARD:
                m0, m1, m2, m3 = _kept_by(code)
            else:
                m0, m1, m2, m3 = _mix(p0, p1, p2, p3, p4, p5)
                unit = inverse
        w0, w1, w2, w3 = _split(weight)
        g0, g1, g2, g3 = _split(d_effective)
        t = tile_share
        if tile_ptr is not None and not ALIGNED:
            t = _tile_of_groups(tile_ptr, rows, group, inside, tile_columns, HEIGHT, WIDTH)
        least, span = twice * t, twice * (1 - t) * unit
        d0, d1 = (g0 + (least + span * m0) * w0) * w0, (g1 + (least + span * m1) * w1) * w1
        d2, d3 = (g2 + (least + span * m2) * w2) * w2, (g3 + (least + span * m3) * w3) * w3
        mean = (d0 * m0 + d1 * m1 + d2 * m2 + d3 * m3) * unit
        if tile_ptr is not None:
            d_share = d0 + d1 + d2 + d3 - mean
            if ALIGNED:
                d_tile += d_share
            else:
                tl.store(d_tile_ptr + offsets, d_share, inside)
        if d_logits_ptr is not None:
            if HARD:
                m0, m1, m2, m3 = _mix(p0, p1, p2, p3, p4, p5)
                mean = (d0 * m0 + d1 * m1 + d2 * m2 + d3 * m3) * inverse
            # the mean over the patterns of what each keeps of d0 to d3 is the mean of d under the soft mask
            factor = slope * (1 - t) * inverse
            c1, c2, c3 = d1 - mean, d2 - mean, d3 - mean
            x0, x1 = before[0] + p0 * factor * (d0 + c1), before[1] + p1 * factor * (d0 + c2)
            x2, x3 = before[2] + p2 * factor * (d0 + c3), before[3] + p3 * factor * (d1 + c2)
            x4, x5 = before[4] + p4 * factor * (d1 + c3), before[5] + p5 * factor * (d2 + c3)
            _store_planes(d_logits_ptr, offsets, plane, inside, x0, x1, x2, x3, x4, x5)
            if squares_ptr is not None:
                squares += x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3 + x4 * x4 + x5 * x5
    if ALIGNED:
        tl.store(d_tile_ptr + strip * tl.num_programs(0) + column, tl.sum(d_tile))
    if squares_ptr is not None:
        tl.store(squares_ptr + strip * tl.num_programs(0) + column, tl.sum(squares))


class _Plan(NamedTuple):
    """How a layer is cut into programs."""

    columns: int
    strips: int
    steps: int
    even: bool
    aligned: bool
    """Every program is inside one tile."""

    @classmethod
    def of(cls, weight: Tensor, tile: tuple[int, int]) -> _Plan:
        out, width = weight.shape
        columns, blocks = triton.cdiv(width, 4 * GROUPS), triton.cdiv(out, ROWS)
        aligned = _divides(ROWS, tile[0], out) and _divides(4 * GROUPS, tile[1], width)
        steps = MOST_STEPS
        while steps > 1 and (
            columns * triton.cdiv(blocks, steps) < FEWEST_PROGRAMS
            or (aligned and not _divides(ROWS * steps, tile[0], out))
        ):
            steps //= 2
        even = out % (ROWS * steps) == 0 and width % (4 * GROUPS) == 0
        return cls(columns, triton.cdiv(blocks, steps), steps, even, aligned)

    def programs_per_tile(self, tile: tuple[int, int]) -> tuple[int, int]:
        return (
            min(self.strips, triton.cdiv(tile[0], ROWS * self.steps)),
            min(self.columns, triton.cdiv(tile[1], 4 * GROUPS)),
        )


def _divides(part: int, size: int, whole: int) -> bool:
    """Whether parts that start at multiples of `part` stay within pieces of `size`, of which the first may be all."""
    return size % part == 0 or size >= whole


def programs(weight: Tensor, tile: tuple[int, int]) -> int:
    """As `soft_mask.programs`."""
    plan = _Plan.of(weight, tile)
    return plan.columns * plan.strips


def forward(weight: Tensor, patterns: Tensor, tile_sample: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """As `soft_mask.forward`."""
    plan, sampling = _Plan.of(weight, call.tile), call.sampling
    effective = torch.empty_like(weight, memory_format=torch.contiguous_format)
    square_sum = weight.new_empty((), dtype=torch.float32)
    partial = weight.new_empty(plan.columns * plan.strips, dtype=torch.float32)
    _forward[plan.columns, plan.strips](
        patterns.contiguous(),
        weight.contiguous(),
        None if tile_sample is None else tile_sample.contiguous(),
        effective,
        square_sum,
        partial,
        sampling.arrivals,
        **_common(weight, tile_sample, call, plan),
    )
    return effective, square_sum


def backward(
    weight: Tensor,
    patterns: Tensor,
    tile_sample: Tensor | None,
    d_effective: Tensor,
    d_square_sum: Tensor | None,
    call: Call,
) -> tuple[Tensor | None, Tensor | None]:
    """As `soft_mask.backward`."""
    plan = _Plan.of(weight, call.tile)
    d_logits = call.gradient
    if d_logits is None and patterns.is_floating_point():
        d_logits = torch.empty_like(patterns, memory_format=torch.contiguous_format)
    d_tile = None
    if tile_sample is not None:
        parts = (plan.strips, plan.columns) if plan.aligned else (weight.shape[0], weight.shape[1] // 4)
        d_tile = torch.empty(parts, dtype=torch.float32, device=weight.device)
    _backward[plan.columns, plan.strips](
        patterns.contiguous(),
        weight.contiguous(),
        None if tile_sample is None else tile_sample.contiguous(),
        d_effective.contiguous(),
        d_square_sum,
        d_logits,
        d_tile,
        call.gradient_squares,
        **_common(weight, tile_sample, call, plan),
        BUFFER=call.gradient is not None,
    )
    if d_tile is not None and plan.aligned:
        d_tile = _sum_tiles(d_tile, plan.programs_per_tile(call.tile))
    elif d_tile is not None:  # rows first: both reductions then read whole lines of memory
        d_tile = tile_sums(tile_sums(d_tile, (call.tile[0], 1)), (1, call.tile[1] // 4))
    return d_logits if call.gradient is None else None, d_tile


def _common(weight: Tensor, tile_sample: Tensor | None, call: Call, plan: _Plan) -> dict[str, Any]:
    return {
        "reals_ptr": call.sampling.reals,
        "integers_ptr": call.sampling.integers,
        "seed": call.sampling.seed,
        "rank": call.sampling.rank,
        "layer": call.layer,
        "out": weight.shape[0],
        "groups": weight.shape[1] // 4,
        "tile_columns": 0 if tile_sample is None else tile_sample.shape[1],
        "steps": plan.steps,
        "EVEN": plan.even,
        "HARD": call.hard,
        "HEIGHT": call.tile[0],
        "WIDTH": call.tile[1],
        "ALIGNED": plan.aligned and tile_sample is not None,
        "num_warps": WARPS,
    }


def _sum_tiles(parts: Tensor, tile: tuple[int, int]) -> Tensor:
    """`tile_sums`, by one launch where the tiles are whole."""
    rows, columns = grid_shape((parts.shape[0], parts.shape[1]), tile)
    if parts.shape == (rows * tile[0], columns * tile[1]):
        return parts.view(rows, tile[0], columns, tile[1]).sum(dim=(1, 3))
    return tile_sums(parts, tile)

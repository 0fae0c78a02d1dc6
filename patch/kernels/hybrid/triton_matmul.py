"""Products with a hybrid weight, and its unpacking, in Triton: for GPUs that the CUDA kernels do not cover.

Triton has no sparse dot product, so a 2:4 tile becomes a dense one in registers. The weight still comes from memory
compressed, which is what counts for few tokens. Index maps follow the layout of `patch.kernels.hybrid.format`.
"""
# Kernels without types, as is the custom in Triton:
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patch.kernels.hybrid.format import DTYPES, TILE_COLUMNS, TILE_ROWS, HybridWeight

_ROWS = tl.constexpr(TILE_ROWS)
_COLUMNS = tl.constexpr(TILE_COLUMNS)
_GROUPS = tl.constexpr(TILE_COLUMNS // 4)
_VALUES_OF_SPARSE = tl.constexpr(TILE_ROWS * TILE_COLUMNS // 2)


@triton.jit
def _dense_tile(values):
    """[rows, columns] of the dense tile at `values`."""
    row = tl.arange(0, _ROWS)[:, None, None]
    chunk = tl.arange(0, _COLUMNS // 8)[None, :, None]
    place = row * _COLUMNS + (chunk ^ (row % 8)) * 8 + tl.arange(0, 8)[None, None, :]
    return tl.load(values + place, eviction_policy="evict_first").reshape(_ROWS, _COLUMNS)


@triton.jit
def _sparse_tile(values, halves):
    """[rows, columns] of the 2:4 tile at `values`; halves: the same address as int16, for its metadata."""
    row = tl.arange(0, _ROWS)[:, None, None]
    chunk = tl.arange(0, _COLUMNS // 16)[None, :, None]
    place = row * (_COLUMNS // 2) + (chunk ^ (row // 2 % 4)) * 8 + tl.arange(0, 8)[None, None, :]
    kept = tl.load(values + place, eviction_policy="evict_first").reshape(_ROWS, _GROUPS, 2)
    first, second = tl.split(kept)  # [rows, groups]
    r = tl.arange(0, _ROWS)[:, None]
    lane = 4 * (r % 8) + tl.arange(0, _GROUPS // 4)[None, :]
    half = tl.load(halves + _VALUES_OF_SPARSE + (r // 16) * 64 + lane * 2 + r // 8 % 2)  # four groups in each
    codes = (half[:, :, None].to(tl.int32) >> (4 * tl.arange(0, 4)[None, None, :])).reshape(_ROWS, _GROUPS)
    first_column, second_column = codes & 3, (codes >> 2) & 3
    zero = tl.zeros_like(first)
    c0 = tl.where(first_column == 0, first, tl.where(second_column == 0, second, zero))
    c1 = tl.where(first_column == 1, first, tl.where(second_column == 1, second, zero))
    c2 = tl.where(first_column == 2, first, tl.where(second_column == 2, second, zero))
    c3 = tl.where(first_column == 3, first, tl.where(second_column == 3, second, zero))
    return tl.join(tl.join(c0, c2), tl.join(c1, c3)).reshape(_ROWS, _COLUMNS)


@triton.jit
def _tile(values, halves, descriptor):
    """[rows, columns] of the tile that `descriptor` points to."""
    start = (descriptor & 0x7FFFFFFF).to(tl.int64) * 512  # KB to values
    if descriptor < 0:  # noqa: SIM108, a branch and not a selection
        tile = _sparse_tile(values + start, halves + start)
    else:
        tile = _dense_tile(values + start)
    return tile


# Not compiled anew for numbers of tokens and splits that are 1 or multiples of 16: nothing is gained by that.
@triton.jit(do_not_specialize=["tokens", "tile_columns", "columns_per_split"])
def _matmul(
    x, values, halves, descriptors, bias, y, tokens, out_features, in_features, tile_columns, columns_per_split,
    block: tl.constexpr, splits: tl.constexpr, has_bias: tl.constexpr,
):  # fmt: skip
    """128 outputs of `block` tokens over a part of the inputs; with `splits` into float32 y [splits, tokens, out]."""
    tile_row, split = tl.program_id(0), tl.program_id(2)
    token = tl.program_id(1) * block + tl.arange(0, block)
    first = split * columns_per_split
    last = tl.minimum(first + columns_per_split, tile_columns)
    sums = tl.zeros([_ROWS, block], dtype=tl.float32)
    for tile_column in range(first, last):
        weight = _tile(values, halves, tl.load(descriptors + tile_row * tile_columns + tile_column))
        column = tile_column * _COLUMNS + tl.arange(0, _COLUMNS)
        inside = (column < in_features)[:, None] & (token < tokens)[None, :]
        inputs = tl.load(x + token.to(tl.int64)[None, :] * in_features + column[:, None], mask=inside, other=0.0)
        sums = tl.dot(weight, inputs, sums)
    row = tile_row * _ROWS + tl.arange(0, _ROWS)
    if has_bias:
        sums += tl.load(bias + row, mask=row < out_features, other=0.0).to(tl.float32)[:, None]
    place = token.to(tl.int64)[None, :] * out_features + row[:, None]
    if splits:
        place += split.to(tl.int64) * tokens * out_features
    inside = (row < out_features)[:, None] & (token < tokens)[None, :]
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _unpack(values, halves, descriptors, weight, out_features, in_features, tile_columns):
    tile_row, tile_column = tl.program_id(0), tl.program_id(1)
    tile = _tile(values, halves, tl.load(descriptors + tile_row * tile_columns + tile_column))
    row = tile_row * _ROWS + tl.arange(0, _ROWS)
    column = tile_column * _COLUMNS + tl.arange(0, _COLUMNS)
    inside = (row < out_features)[:, None] & (column < in_features)[None, :]
    tl.store(weight + row.to(tl.int64)[:, None] * in_features + column[None, :], tile, mask=inside)


def refusal(device: torch.device, tokens: int, weight: HybridWeight) -> str | None:
    """Why these kernels cannot work on `device`, or None."""
    if weight.dtype == DTYPES[0] and torch.cuda.get_device_capability(device) < (8, 0):
        return f"bfloat16 needs compute capability 8.0, this GPU has {torch.cuda.get_device_capability(device)}"
    return None


def matmul(x: Tensor, weight: HybridWeight, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] @ weight^T + bias -> [tokens, out].

    Few tokens leave most of the GPU idle with one program per 128 outputs. The inputs are split then, and the parts'
    float32 sums added up afterwards, always in the same order.
    """
    tokens = len(x)
    block = min(max(16, triton.next_power_of_2(tokens)), 128)
    rows, columns = weight.descriptors.shape
    programs = rows * triton.cdiv(tokens, block)
    wanted = triton.cdiv(2 * _multiprocessors(x.device), programs)
    per_split = triton.cdiv(columns, min(wanted, max(1, columns // 4)))
    splits = triton.cdiv(columns, per_split)
    if splits > 1:
        y = torch.empty(splits, tokens, weight.out_features, dtype=torch.float32, device=x.device)
    else:
        y = torch.empty(tokens, weight.out_features, dtype=x.dtype, device=x.device)
    fused_bias = bias if splits == 1 else None
    values, halves = weight.payload.view(weight.dtype), weight.payload.view(torch.int16)
    _matmul[rows, triton.cdiv(tokens, block), splits](
        x.contiguous(), values, halves, weight.descriptors, fused_bias, y, tokens, weight.out_features,
        weight.in_features, columns, per_split, block=block, splits=splits > 1, has_bias=fused_bias is not None,
        num_warps=8,
    )  # fmt: skip
    if splits == 1:
        return y
    total = y.sum(0)
    return (total if bias is None else total + bias).to(x.dtype)


def unpack(weight: HybridWeight) -> Tensor:
    """[out, in], bit for bit; unlike the plain version it reads nothing back, so a CUDA graph can hold it."""
    dense = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    rows, columns = weight.descriptors.shape
    values, halves = weight.payload.view(weight.dtype), weight.payload.view(torch.int16)
    _unpack[rows, columns](values, halves, weight.descriptors, dense, *weight.shape, columns, num_warps=4)
    return dense


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

"""The systems of `patch.pruning.thanos` by Triton kernels, in float32.

Small systems exist in registers alone: a program finds the multipliers of a row, from its mask to the result. Of larger
ones a kernel fills the matrices, and another inverts their panels. Inverting is Gauss-Jordan elimination in place,
which needs no pivoting where a matrix is positive definite; a diagonal of 1, by scaling, keeps all pivots below 1.
"""
# Compile-time constants are in capitals, and kernels without types, as is the custom in Triton:
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 128
"""Unknowns of the largest matrix that fits the registers of a program."""
SMALLEST = 16
TILE = 16
"""Rows of a system that a program fills."""


def joint_multipliers(inverse: Tensor, block: Tensor, kept: Tensor, size: int, failed: Tensor) -> Tensor:
    """As `patch.pruning.thanos.joint_multipliers`, for systems of up to `size` unknowns, LARGEST at most.

    inverse: float32 [columns, columns]; block: float32 [out, columns]; kept: bool [out, columns]; their rows may lie
    apart, the entries of a row may not. failed: int32 [], set to 1 where a system is not positive definite.
    """
    rows, columns = block.shape
    multipliers = block.new_empty(rows, columns)
    unknowns = _unknowns(size)
    with torch.cuda.device(block.device):
        _solve[(rows,)](
            inverse,
            inverse.stride(0),
            block,
            block.stride(0),
            kept,
            kept.stride(0),
            multipliers,
            failed,
            columns,
            COLUMNS=triton.next_power_of_2(columns),
            UNKNOWNS=unknowns,
            num_warps=max(1, unknowns // 32),  # a thread holds a row of the matrix
        )
    return multipliers


def systems(inverse: Tensor, columns: Tensor, real: Tensor) -> Tensor:
    """inverse[columns, columns] for every row of `columns`, int64 [rows, size], as float32 [rows, size, size].

    inverse: float32 [all columns, all columns], whose rows may lie apart; real: bool [rows, size], where the result is
    not that of the identity.
    """
    rows, size = columns.shape
    filled = inverse.new_empty(rows, size, size)
    with torch.cuda.device(inverse.device):
        _fill[rows, triton.cdiv(size, TILE)](
            inverse, inverse.stride(0), columns, real, filled, size, TILE=TILE, WIDTH=triton.next_power_of_2(size)
        )
    return filled


def inverses(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses of symmetric matrices, float32 [n, size, size] of any strides but one in rows, size up to LARGEST.

    Returns them and where a matrix is not positive definite, bool [n].
    """
    count, size, _ = matrices.shape
    found = matrices.new_empty(count, size, size)
    failed = torch.empty(count, dtype=torch.bool, device=matrices.device)
    unknowns = _unknowns(size)
    with torch.cuda.device(matrices.device):
        _invert_all[(count,)](
            matrices,
            matrices.stride(0),
            matrices.stride(1),
            found,
            failed,
            size,
            UNKNOWNS=unknowns,
            num_warps=max(1, unknowns // 32),
        )
    return found, failed


def _unknowns(size: int) -> int:
    return int(max(SMALLEST, triton.next_power_of_2(size)))


@triton.jit
def _invert(matrix, unknown, size):
    """Of the first `size` rows and columns, and whether it failed; what pads them, 0, stays out of it.

    matrix: [UNKNOWNS, UNKNOWNS], symmetric, with a diagonal of 1; unknown: 0, 1, ... [UNKNOWNS]. With S the unknowns
    that are eliminated and R the rest, matrix[S, S] is inv(A[S, S]), matrix[R, S] is -A[R, S] inv(A[S, S]),
    matrix[S, R] its transpose but for the sign, and matrix[R, R] symmetric too: a step looks up nothing but a column.
    """
    failed = tl.full([], False, tl.int1)
    for k in range(size):
        column = tl.sum(tl.where(unknown[None, :] == k, matrix, 0), 1)
        here = unknown == k
        pivot = tl.sum(tl.where(here, column, 0), 0)
        failed = failed | (pivot <= 0) | (pivot != pivot)
        # What these make of row and column k is right too, and no digits are lost as no pivot is above 1: a row of
        # x - (1 - 1 / pivot) x = x / pivot, a column of x - x / pivot (pivot + 1) = -x / pivot.
        reciprocal = 1 / pivot
        factor = tl.where(here, 1 - reciprocal, column * reciprocal)
        row = tl.where(here, pivot + 1, tl.where(unknown < k, -column, column))
        matrix -= factor[:, None] * row[None, :]
    return matrix, failed


@triton.jit
def _solve(
    inverse_ptr,
    inverse_stride,
    block_ptr,
    block_stride,
    kept_ptr,
    kept_stride,
    multipliers_ptr,
    failed_ptr,
    columns,
    COLUMNS: tl.constexpr,
    UNKNOWNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block_ptr += row * block_stride
    multipliers_ptr += row * columns
    column, unknown = tl.arange(0, COLUMNS), tl.arange(0, UNKNOWNS)
    inside = column < columns
    pruned = inside & (tl.load(kept_ptr + row * kept_stride + column, inside, 1) == 0)
    tl.store(multipliers_ptr + column, tl.zeros([COLUMNS], tl.float32), inside & (pruned == 0))

    # the pruned columns in order: each where the number of those before it says
    size = tl.sum(pruned.to(tl.int32), 0)
    place = tl.where(pruned, tl.cumsum(pruned.to(tl.int32), 0) - 1, -1)
    source = tl.sum(tl.where(place[:, None] == unknown[None, :], column[:, None], 0), 0)
    real = unknown < size
    scale = tl.where(real, 1 / tl.sqrt(tl.load(inverse_ptr + source * (inverse_stride + 1), real, 1)), 0)
    # a warp's threads hold different rows: of a symmetric matrix, they read neighbouring columns
    matrix = tl.load(inverse_ptr + source[None, :] * inverse_stride + source[:, None])
    matrix, failed = _invert(matrix * scale[:, None] * scale[None, :], unknown, size)
    values = tl.load(block_ptr + source, real, 0) * scale
    values = tl.sum(matrix * values[None, :], 1) * scale
    tl.store(multipliers_ptr + source, values, real)
    tl.store(failed_ptr, 1, failed)


@triton.jit
def _fill(
    inverse_ptr, inverse_stride, columns_ptr, real_ptr, systems_ptr, size, TILE: tl.constexpr, WIDTH: tl.constexpr
):
    system = tl.program_id(0).to(tl.int64)
    columns_ptr += system * size
    real_ptr += system * size
    systems_ptr += system * size * size
    j, first = tl.arange(0, WIDTH), tl.program_id(1) * TILE
    at_j, real_j = tl.load(columns_ptr + j, j < size, 0), tl.load(real_ptr + j, j < size, 0) != 0
    for i in range(first, tl.minimum(first + TILE, size)):
        real = real_j & (tl.load(real_ptr + i) != 0)
        found = tl.load(inverse_ptr + tl.load(columns_ptr + i) * inverse_stride + at_j, real, 0)
        tl.store(systems_ptr + i * size + j, tl.where(real, found, (i == j).to(tl.float32)), j < size)


@triton.jit
def _invert_all(matrices_ptr, matrix_stride, row_stride, found_ptr, failed_ptr, size, UNKNOWNS: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    matrices_ptr += index * matrix_stride
    unknown = tl.arange(0, UNKNOWNS)
    real = unknown < size
    inside = real[:, None] & real[None, :]
    scale = tl.where(real, 1 / tl.sqrt(tl.load(matrices_ptr + unknown * (row_stride + 1), real, 1)), 0)
    # transposed in and out, as the threads of a warp hold different rows: symmetric matrices do not mind
    matrix = tl.load(matrices_ptr + unknown[None, :] * row_stride + unknown[:, None], inside, 0)
    matrix, failed = _invert(matrix * scale[:, None] * scale[None, :], unknown, size)
    matrix *= scale[:, None] * scale[None, :]
    tl.store(found_ptr + index * size * size + unknown[None, :] * size + unknown[:, None], matrix, inside)
    tl.store(failed_ptr + index, failed)

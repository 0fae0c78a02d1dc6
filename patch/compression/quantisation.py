"""Symmetric 4-bit quantisation: levels -8 to 7, and a scale of max / 7 per block of a matrix.

Follows SLIM `slim/quantization/quantization.py`. A block is (128, 1), (1, 128) or the whole matrix. Codes are
rounded half to even, in float32; SLIM rounds half toward zero by groups, which costs as much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patch.compression.options import Compression

LARGEST = 7
"""Of the levels; the smallest is -8."""
COARSE_POINTS = 10
CELLS_PER_CHUNK = 2**20
"""Distances evaluated at a time in the scan of `slim_quant`: about 9 bytes each."""


@dataclass(frozen=True)
class Quantised:
    """A matrix as codes and scales."""

    codes: Tensor
    """int8 [rows, columns], -8 to 7"""
    maxima: Tensor
    """[row blocks, column blocks], what code 7 stands for; at least 0"""
    block: tuple[int, int]
    """Rows and columns of a block; those at the edges may be smaller."""

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, columns] in `dtype`, computed in float32."""
        values = _in_blocks(self.codes, self.block).float().div_(LARGEST).mul_(_beside_blocks(self.maxima.float()))
        return _matrix_of(values, self.codes.shape).to(dtype)


def quantise(matrix: Tensor, options: Compression) -> Quantised:
    """Quantise a finite matrix [rows, columns] of any float dtype with the quantiser of `options`.

    Maxima by AbsMax keep the matrix's dtype, in which they are exact; that of SLiM-Quant is float32.
    """
    if options.quantiser == "group_absmax":
        return quantise_blocks(matrix, group_block(options))
    shape = (matrix.shape[0], matrix.shape[1])
    if options.quantiser == "absmax":
        return quantise_blocks(matrix, shape)
    return _with_maxima(matrix, slim_quant_maximum(matrix).reshape(1, 1), shape)


def quantise_blocks(matrix: Tensor, block: tuple[int, int]) -> Quantised:
    """AbsMax per block: the largest magnitude of a block gets code 7 or -7."""
    block = min(block[0], matrix.shape[0]), min(block[1], matrix.shape[1])
    maxima = _in_blocks(matrix.abs(), block).amax((1, 3))
    return _with_maxima(matrix, maxima, block)


def group_block(options: Compression) -> tuple[int, int]:
    """The block of a weight matrix [out, in] that `grouping` stands for."""
    return (options.group_size, 1) if options.grouping == "outputs" else (1, options.group_size)


def slim_quant_maximum(matrix: Tensor) -> Tensor:
    """SLiM-Quant: the clipping point a with the least expected error, a scalar in float32 on the matrix's device.

    With p the density of |w|, on a histogram with max(512, min(size / 1000, 20000)) bins between the smallest and the
    largest |w|, the error is E(a) = sum_{v<a} p(v) (v - q_a(v))^2 + sum_{v>=a} p(v) (v - a)^2, where q_a rounds down
    to multiples of a / 16: SLIM's model of rounding to the nearest multiple of a / 7. E is evaluated at ten bins and
    then at all bins between the neighbours of the best of them. SLIM's second scan is empty, and its clipping point
    almost 0, where the number of bins is a multiple of 10 and the largest of the ten is best; ours ends at the last.
    """
    magnitudes = matrix.float().abs().flatten()
    low, high = magnitudes.aminmax()
    if low == high:  # nothing to choose from, a matrix of zeros included
        return high
    bins = max(512, min(matrix.numel() // 1000, 20000))
    density = torch.histc(magnitudes, bins, low.item(), high.item()) / magnitudes.numel()
    del magnitudes  # as large as the matrix
    width = (high - low) / bins
    values = low + width * (torch.arange(bins, device=matrix.device) + 0.5)
    coarse = torch.arange(0, bins, bins // COARSE_POINTS, device=matrix.device)
    best = int(_expected_errors(density, values, coarse).argmin())
    start = int(coarse[max(best - 1, 0)])
    end = int(coarse[best + 1]) if best + 1 < len(coarse) else bins
    fine = torch.arange(start, end, device=matrix.device)
    return values[start + _expected_errors(density, values, fine).argmin()]


def _expected_errors(density: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """E(values[i]) for every i in `indices`; density and values [bins]."""
    errors = []
    for chunk in indices.split(max(1, CELLS_PER_CHUNK // len(values))):
        clip = values[chunk].unsqueeze(1)
        step = clip / 2**4
        rounded = (values / step).floor_().mul_(step)
        inside = torch.arange(len(values), device=values.device) < chunk.unsqueeze(1)
        errors.append(torch.where(inside, rounded, clip).sub_(values).square_().mul_(density).sum(1))
    return torch.cat(errors)


def _with_maxima(matrix: Tensor, maxima: Tensor, block: tuple[int, int]) -> Quantised:
    scales = maxima.float()
    scales = torch.where(scales > 0, scales, 1.0)  # a block of zeros gets codes of 0
    codes = (_in_blocks(matrix.float(), block) / _beside_blocks(scales)).mul_(LARGEST).round_()
    codes = codes.clamp_(-LARGEST - 1, LARGEST).to(torch.int8)
    return Quantised(_matrix_of(codes, matrix.shape), maxima, block)


def _in_blocks(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """[rows, columns] -> [row blocks, height, column blocks, width]: a view, or a copy with zeros beyond the edges."""
    (rows, columns), (height, width) = matrix.shape, block
    if rows % height or columns % width:
        matrix = torch.nn.functional.pad(matrix, (0, -columns % width, 0, -rows % height))
    return matrix.unflatten(1, (-1, width)).unflatten(0, (-1, height))


def _beside_blocks(values: Tensor) -> Tensor:
    """One value per block [row blocks, column blocks], to broadcast over what `_in_blocks` makes."""
    return values.unsqueeze(1).unsqueeze(3)


def _matrix_of(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `_in_blocks`."""
    rows, columns = shape
    return blocks.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 [n], -8 to 7 -> uint8 [ceil(n / 2)]: two codes to a byte as two's complement, the first one low."""
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2).to(torch.uint8) & 15
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 -> int8 [count]."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:count].to(torch.int8)
    return nibbles - 16 * (nibbles > 7).to(torch.int8)

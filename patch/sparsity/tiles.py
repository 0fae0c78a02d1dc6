"""Tile grids over weight matrices. Tiles at the lower and right edge may be smaller than the rest."""

from __future__ import annotations

import torch
from torch import Tensor


def grid_shape(shape: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """Number of tile rows and columns that cover a matrix of `shape`."""
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def expand(tiles: Tensor, shape: tuple[int, int], tile: tuple[int, int]) -> Tensor:
    """[tile rows, tile columns] -> [out, in]: every weight gets the value of its tile."""
    rows = tiles.repeat_interleave(tile[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(tile[1], dim=1)[:, : shape[1]]


def weights_in(tiles: Tensor, shape: tuple[int, int], tile: tuple[int, int]) -> int:
    """Number of weights of a matrix of `shape` that lie in the chosen tiles, bool [tile rows, tile columns]."""
    heights = expand(tiles, (shape[0], tiles.shape[1]), (tile[0], 1)).sum(0)  # rows of weights, per column of tiles
    return int(expand(heights.unsqueeze(0), (1, shape[1]), (1, tile[1])).sum())


def tile_sums(matrix: Tensor, tile: tuple[int, int]) -> Tensor:
    """[out, in] -> [tile rows, tile columns]: sum of each tile's entries, in float32 or wider."""
    rows, columns = grid_shape(tuple(matrix.shape), tile)  # type: ignore[arg-type]
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    padding = (0, columns * tile[1] - matrix.shape[1], 0, rows * tile[0] - matrix.shape[0])
    padded = torch.nn.functional.pad(matrix.to(dtype), padding)
    return padded.view(rows, tile[0], columns, tile[1]).sum(dim=(1, 3))

"""Tile grids, ragged ones too, against loops."""

from __future__ import annotations

import pytest
import torch

from patch.sparsity.tiles import expand, grid_shape, tile_sums

# like 576 inputs in tiles of 128, scaled down; whole grids; tiles larger than the matrix; single rows
CASES = [((72, 40), (32, 32)), ((64, 64), (32, 16)), ((5, 12), (128, 128)), ((7, 8), (1, 4)), ((33, 36), (32, 4))]


def naive_grid(shape, tile):
    rows = sum(1 for _ in range(0, shape[0], tile[0]))
    return rows, sum(1 for _ in range(0, shape[1], tile[1]))


@pytest.mark.parametrize(("shape", "tile"), CASES)
def test_every_weight_gets_the_value_of_its_tile(shape, tile):
    grid = naive_grid(shape, tile)
    assert grid_shape(shape, tile) == grid
    tiles = torch.arange(grid[0] * grid[1]).reshape(grid)
    expected = [[int(tiles[r // tile[0], c // tile[1]]) for c in range(shape[1])] for r in range(shape[0])]
    assert expand(tiles, shape, tile).tolist() == expected


@pytest.mark.parametrize(("shape", "tile"), CASES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64])
def test_tile_sums_add_what_is_inside(shape, tile, dtype):
    matrix = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = matrix < 0.5 if dtype == torch.bool else matrix.to(dtype)
    rows, columns = naive_grid(shape, tile)
    expected = torch.zeros(rows, columns, dtype=torch.float64)
    for r in range(shape[0]):
        for c in range(shape[1]):
            expected[r // tile[0], c // tile[1]] += float(matrix[r, c])
    sums = tile_sums(matrix, tile)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=1e-4)


def test_bfloat16_is_not_summed_in_bfloat16():
    assert tile_sums(torch.ones(64, 64, dtype=torch.bfloat16), (64, 64)).item() == 4096
    assert tile_sums(torch.ones(20, 20, dtype=torch.bfloat16), (20, 13)).tolist() == [[260.0, 140.0]]


def test_edge_tiles_count_only_what_exists():
    assert tile_sums(torch.ones(72, 40, dtype=torch.bool), (32, 32)).tolist() == [
        [1024, 256],
        [1024, 256],
        [256, 64],
    ]

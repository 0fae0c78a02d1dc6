"""Work of the CUDA kernels, shared out: everything once, in order, in nearly equal pieces."""

from __future__ import annotations

import pytest
import torch

from patch.kernels.hybrid.schedule import NO_TILE, decode_schedule, prefill_order, tile_bytes


def random_descriptors(rows, columns, share=0.5):
    generator = torch.Generator().manual_seed(rows)
    places = torch.arange(rows * columns).view(rows, columns)
    sparse = torch.rand(rows, columns, generator=generator) < share
    return torch.where(sparse, places - 2**31, places).int()


@pytest.mark.parametrize("share", [0, 0.9, 1])
@pytest.mark.parametrize("blocks", [1, 7, 132, 1000])
@pytest.mark.parametrize(("rows_of_tiles", "columns"), [(1, 1), (3, 5), (32, 64), (7, 152)])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_tile_is_streamed_once_in_order(rows, rows_of_tiles, columns, blocks, share):
    descriptors = random_descriptors(rows_of_tiles, columns, share)
    table = decode_schedule(descriptors, rows, blocks, 2048)
    groups = -(-rows_of_tiles // rows)
    assert len(table) - 1 == min(blocks, groups * columns)
    assert table.shape[1] % 32 == 0
    starts = table[:, 0]
    assert (starts.diff() > 0).all()  # a block without work would leave sums that nobody wrote
    assert torch.equal(table[:-1, 1], starts[1:])
    assert (starts[0], starts[-1]) == (0, groups * columns)
    streamed = []
    for line in table[:-1].tolist():
        streamed += line[2 : 2 + (line[1] - line[0]) * rows]
    expected = []
    for group in range(groups):
        for column in range(columns):
            for row in range(group * rows, group * rows + rows):
                expected.append(descriptors[row, column].item() if row < rows_of_tiles else NO_TILE)
    assert streamed == expected


def test_shares_differ_by_a_unit_at_most():
    descriptors = random_descriptors(172, 64, 0.7)
    table = decode_schedule(descriptors, 2, 132, 2048)
    costs = []
    for first, end, *held in table[:-1].tolist():
        tiles = torch.tensor(held[: (end - first) * 2])
        costs.append(tile_bytes(tiles).sum().item() + 2048 * (end - first))
    assert max(costs) - min(costs) <= 2 * (2 * 16384 + 2048)
    assert max(costs) <= sum(costs) / len(costs) + 2 * 16384 + 2048


def test_rows_with_most_work_come_first_and_groups_are_filled_up():
    descriptors = torch.tensor([[-1, -1, 5], [1, 2, 3], [-1, -1, -1], [1, -1, 5], [-1, -1, 5]], dtype=torch.int32)
    assert prefill_order(descriptors, 4, 0.6).tolist() == [1, 3, 0, 4, 2, 5, 6, 7]
    assert prefill_order(descriptors, 1, 0.6).tolist() == [1, 3, 0, 4, 2]

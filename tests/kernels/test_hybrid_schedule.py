"""Work of the CUDA kernels, shared out: everything once, in order, in nearly equal pieces, and who adds up what."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from patch.kernels.hybrid.format import DENSE_BYTES, SPARSE_BYTES
from patch.kernels.hybrid.hopper import DecodeTuning, _tuning
from patch.kernels.hybrid.schedule import NO_TILE, decode_schedule, prefill_order, tile_bytes

HEADER = 8


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
    table = decode_schedule(descriptors, rows, blocks, 2048).table
    groups = -(-rows_of_tiles // rows)
    assert len(table) == min(blocks, groups * columns)
    assert table.shape[1] % 32 == 0
    starts, ends = table[:, 0], table[:, 1]
    assert (starts < ends).all()  # a block without work would leave sums that nobody wrote
    assert torch.equal(ends[:-1], starts[1:])
    assert (starts[0], ends[-1]) == (0, groups * columns)
    streamed = []
    for line in table.tolist():
        streamed += line[HEADER : HEADER + (line[1] - line[0]) * rows]
    expected = []
    for group in range(groups):
        for column in range(columns):
            for row in range(group * rows, group * rows + rows):
                expected.append(descriptors[row, column].item() if row < rows_of_tiles else NO_TILE)
    assert streamed == expected


@pytest.mark.parametrize("blocks", [1, 7, 132, 1000])
@pytest.mark.parametrize(("rows_of_tiles", "columns"), [(1, 1), (3, 5), (32, 64), (7, 152)])
def test_blocks_that_share_a_row_agree_on_its_partial_sums(rows_of_tiles, columns, blocks):
    schedule = decode_schedule(random_descriptors(rows_of_tiles, columns), 1, blocks, 2048)
    slots = {}
    for first, end, *sums in schedule.table[:, :HEADER].tolist():
        unit = first
        while unit < end:
            row, later = unit // columns, unit > first
            row_end = min(end, (row + 1) * columns)
            if row_end - unit < columns:
                slots.setdefault((row, *sums[2 + later : 6 : 2]), []).append(sums[later])
            unit = row_end
    assert len({row for row, *_ in slots}) == len(slots)
    for (_, first, last), own in slots.items():
        assert own == list(range(first, last + 1))  # from left to right
        assert len(own) > 1
    assert sorted(slot for own in slots.values() for slot in own) == list(range(schedule.slots))


def rows_of_a_kind(rows, columns):
    """Every other pair of rows of tiles is dense, the others are 2:4."""
    places = torch.arange(rows * columns).view(rows, columns)
    return torch.where((torch.arange(rows) // 2 % 2 == 1)[:, None], places - 2**31, places).int()


@pytest.mark.parametrize("make", [functools.partial(random_descriptors, share=0.7), rows_of_a_kind])
def test_shares_differ_by_a_unit_at_most(make):
    descriptors = make(172, 64)
    costs = []
    for line in decode_schedule(descriptors, 2, 132, 2048).table.tolist():
        units = line[1] - line[0]
        tiles = torch.tensor(line[HEADER : HEADER + units * 2])
        costs.append(tile_bytes(tiles).sum().item() + 2048 * units)
    assert max(costs) - min(costs) <= 2 * (2 * 16384 + 2048)
    assert max(costs) <= sum(costs) / len(costs) + 2 * 16384 + 2048


@pytest.mark.parametrize(
    ("out_features", "in_features", "width", "share", "fastest"),
    [
        (4096, 4096, 16, 0.9, DecodeTuning(1, 111)),
        (6144, 4096, 8, 0.5, DecodeTuning(2, 225)),
        (4096, 11008, 16, 0.9, DecodeTuning(2, 225)),
        (22016, 4096, 16, 0.9, DecodeTuning(2, 111)),
        (28672, 4096, 64, 0.7, DecodeTuning(2, 111)),
        (14336, 4096, 64, 0.9, DecodeTuning(2, 225)),
        (14336, 4096, 64, 0.5, DecodeTuning(1, 225)),
        (4096, 14336, 64, 0.9, DecodeTuning(1, 225)),
        (28672, 4096, 128, 0.9, DecodeTuning(1, 225)),  # the only one with registers for it
    ],
)
def test_decode_runs_as_was_measured_to_be_fastest(out_features, in_features, width, share, fastest):
    tile_rows, columns = out_features // 128, in_features // 64
    sparse = round(share * tile_rows * columns)
    payload = torch.empty(sparse * SPARSE_BYTES + (tile_rows * columns - sparse) * DENSE_BYTES, device="meta")
    weight = SimpleNamespace(payload=payload, descriptors=torch.empty(tile_rows, columns, device="meta"))
    assert _tuning(weight, width) == fastest


def test_rows_with_most_work_come_first():
    descriptors = torch.tensor([[-1, -1, 5], [1, 2, 3], [-1, -1, -1], [1, -1, 5], [-1, -1, 5]], dtype=torch.int32)
    assert prefill_order(descriptors, 0.6).tolist() == [1, 3, 0, 4, 2]

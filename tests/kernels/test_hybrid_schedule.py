"""Work of the CUDA kernels, shared out: everything once, in order, in nearly equal pieces, and who adds up what."""

from __future__ import annotations

import pytest
import torch

from patch.kernels.hybrid.schedule import NO_TILE, decode_schedule, prefill_schedule, tile_bytes, unit_costs

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


def test_shares_differ_by_a_unit_at_most():
    descriptors = random_descriptors(172, 64, 0.7)
    costs = []
    for line in decode_schedule(descriptors, 2, 132, 2048).table.tolist():
        units = line[1] - line[0]
        tiles = torch.tensor(line[HEADER : HEADER + units * 2])
        costs.append(tile_bytes(tiles).sum().item() + 2048 * units)
    assert max(costs) - min(costs) <= 2 * (2 * 16384 + 2048)
    assert max(costs) <= sum(costs) / len(costs) + 2 * 16384 + 2048


def test_costs_of_units():
    descriptors = torch.tensor([[-1, 5], [1, 2], [-1, -1]], dtype=torch.int32)
    assert unit_costs(descriptors, 1, 0.5).tolist() == [[0.5, 1], [1, 1], [0.5, 0.5]]
    assert unit_costs(descriptors, 2, 0.5).tolist() == [[1.5, 2], [0.5, 0.5]]


def loads(schedule, costs):
    """Work of each block; asserts that the segments cover every piece once and agree on partial sums."""
    token_tiles = int(schedule.table[..., 1].max()) + 1
    covered = torch.zeros(costs.shape[0], token_tiles, costs.shape[1], dtype=torch.int64)
    result, shared = [], {}
    for block in schedule.table.tolist():
        segments = block[: next(i for i, segment in enumerate(block) if segment[0] == -1)]
        assert all(segment == [-1] * 8 for segment in block[len(segments) :])
        result.append(0.0)
        for row, tile, begin, end, slot, first, last, _ in segments:
            covered[row, tile, begin:end] += 1
            result[-1] += float(costs[row, begin:end].sum())
            if first == last:
                assert (begin, end) == (0, costs.shape[1])
            else:
                shared.setdefault((row, tile, first, last), []).append((begin, slot))
    assert (covered == 1).all()
    assert len({piece[:2] for piece in shared}) == len(shared)
    for (_, _, first, last), parts in shared.items():
        assert [slot for _, slot in sorted(parts)] == list(range(first, last + 1))
    slots = sorted(slot for parts in shared.values() for _, slot in parts)
    assert slots == list(range(schedule.slots))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("cutting_cost", [-1e9, 0, 14, float("inf")])
@pytest.mark.parametrize("token_tiles", [1, 16, 33])
@pytest.mark.parametrize(("rows_of_tiles", "columns"), [(1, 1), (3, 5), (32, 64), (5, 152)])
def test_every_piece_is_made_once(rows_of_tiles, columns, token_tiles, cutting_cost):
    costs = unit_costs(random_descriptors(rows_of_tiles, columns, 0.9), 2, 0.65)
    schedule = prefill_schedule(costs, token_tiles, 132, 32, cutting_cost)
    assert len(schedule.table) == 132
    assert loads(schedule, costs).sum() == pytest.approx(float(costs.sum()) * token_tiles)
    if cutting_cost == float("inf"):
        assert not schedule.slots


def test_pieces_are_cut_where_that_balances():
    costs = unit_costs(random_descriptors(86, 64, 0.9), 2, 0.65)  # 688 pieces: 5.2 for each block
    whole = loads(prefill_schedule(costs, 16, 132, 32, float("inf")), costs)
    cut = loads(prefill_schedule(costs, 16, 132, 32, 14), costs)
    assert whole.max() > 1.12 * whole.mean()
    assert cut.max() < 1.03 * cut.mean()
    even = unit_costs(random_descriptors(88, 64, 0), 2, 0.65)  # 44 x 3 pieces: one for each block
    assert not prefill_schedule(even, 3, 132, 32, 0).slots


def test_pieces_with_most_work_come_first_and_light_ones_join_heavy_ones():
    costs = torch.tensor([[1.0], [4.0], [3.0], [2.0]], dtype=torch.float64)
    table = prefill_schedule(costs, 1, 2, 1, float("inf")).table
    assert table[:, :, 0].tolist() == [[1, 0, -1], [2, 3, -1]]

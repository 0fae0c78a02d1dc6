"""Who works on which tiles: equal shares for the blocks of the CUDA kernels, and who adds up sums that they share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from patch.kernels.hybrid.format import DENSE_BYTES, SPARSE_BYTES

NO_TILE = 2**31 - 1
"""Descriptor of a tile that is not there: it fills up groups of tile rows."""
_LINE = 32  # numbers, 128 bytes
_LEAST_COLUMNS = 8
"""Pieces are not cut closer to their ends than this."""


@dataclass(frozen=True)
class Schedule:
    """A table for the kernel, and how many partial sums there are to be room for."""

    table: Tensor
    """int32 [blocks, ...]"""
    slots: int


def decode_schedule(descriptors: Tensor, rows: int, blocks: int, unit_bytes: int) -> Schedule:
    """Share out the stream of units (`rows` tiles under one another) in contiguous pieces of nearly equal cost.

    descriptors: int32 [tile rows, tile columns]. A unit costs the bytes of its tiles and `unit_bytes` besides.
    The table has no more blocks than units. A block's line, padded to 128 bytes: its first unit, the first of the next
    block; of the rows of units that it starts and ends in, if it shares them: slots of its own partial sums (two
    numbers), first and last slot of all partial sums of these rows (two numbers each); the descriptors of its units.
    """
    units = _grouped(descriptors, rows).transpose(1, 2).reshape(-1, rows)  # going down the columns of a group of rows
    columns = descriptors.shape[1]
    blocks = min(blocks, len(units))
    costs = tile_bytes(units).sum(1) + unit_bytes
    ends = costs.cumsum(0)
    shares = torch.arange(blocks + 1, device=descriptors.device)
    wanted = shares * int(ends[-1]) // blocks
    starts = torch.searchsorted(ends - costs // 2, wanted)
    # at least a unit for everyone
    starts = ((starts - shares).cummax(0).values + shares).minimum(len(units) - blocks + shares)
    starts[0], starts[-1] = 0, len(units)

    segments = _segments(starts, columns, len(units))
    edges = torch.stack([starts[:-1], starts[1:] - 1]) // columns  # rows that a block starts and ends in
    # a block's segments follow one another
    own = torch.stack([segments.of_block[:-1], segments.of_block[1:] - 1])
    header = [starts[:-1], starts[1:], *segments.slot[own], *segments.first_slot[edges], *segments.last_slot[edges]]

    most = int(starts.diff().max())
    line = -(-(len(header) + most * rows) // _LINE) * _LINE
    places = starts[:-1, None] * rows + torch.arange(line - len(header), device=descriptors.device)
    lines = units.flatten()[places.clamp(max=units.numel() - 1)]
    return Schedule(torch.cat([torch.stack(header, 1), lines], 1).int(), segments.slots)


def prefill_schedule(costs: Tensor, token_tiles: int, blocks: int, tiles_at_once: int, cutting_cost: float) -> Schedule:
    """Share out all pieces, a row of units by a tile of tokens each, so that the blocks finish together.

    costs: float64 [rows of units, columns], on the CPU. Each block makes whole pieces, those with most work first, of
    `tiles_at_once` tiles of tokens at a time; then, where that saves more than `cutting_cost`, the last one or two
    pieces of each are cut along the columns into equal shares.
    The table is int32 [blocks, most segments + 1, 8]. A segment: row of units (-1: no more), tile of tokens, first and
    last + 1 column, slot of its partial sums, first and last slot of those of its piece (the same for whole pieces), 0.
    """
    columns = costs.shape[1]
    row_costs = costs.sum(1)
    rows = row_costs.argsort(descending=True, stable=True)
    pieces = torch.cat([torch.cartesian_prod(rows, tiles) for tiles in torch.arange(token_tiles).split(tiles_at_once)])
    work = row_costs[pieces[:, 0]]
    of_block, loads = _whole_pieces(work, blocks)
    segments, slots = _whole_segments(pieces, columns), 0

    kept = max(len(pieces) // blocks - 1, 0) * blocks
    of_kept, loads_of_kept = _whole_pieces(work[:kept], blocks)
    shares = (work.sum() / blocks - loads_of_kept).clamp(min=0)
    cut, of_cut, loads_of_cut, slots_of_cut = _cut_segments(pieces[kept:], costs, shares)
    if (loads_of_kept + loads_of_cut).max() + cutting_cost < loads.max():
        of_block, slots = torch.cat([of_kept, of_cut]), slots_of_cut
        segments = torch.cat([segments[:kept], cut])
    return Schedule(_by_block(segments, of_block, blocks), slots)


def tile_bytes(descriptors: Tensor) -> Tensor:
    """int64, of the same shape: what each tile occupies."""
    sizes = torch.where(descriptors < 0, SPARSE_BYTES, DENSE_BYTES)
    return torch.where(descriptors == NO_TILE, 0, sizes)


def unit_costs(descriptors: Tensor, rows: int, sparse_cost: float) -> Tensor:
    """float64 [rows of units, columns]: dense tiles cost 1, 2:4 ones `sparse_cost`, missing ones nothing."""
    units = _grouped(descriptors, rows)
    costs = torch.where(units < 0, sparse_cost, 1.0).double()
    return torch.where(units == NO_TILE, 0.0, costs).sum(1)


def _grouped(descriptors: Tensor, rows: int) -> Tensor:
    """[tile rows, tile columns] -> [groups, rows, tile columns]."""
    padded = F.pad(descriptors, (0, 0, 0, -len(descriptors) % rows), value=NO_TILE)
    return padded.view(-1, rows, descriptors.shape[1])


@dataclass(frozen=True)
class _Segments:
    """A stream of rows, cut where blocks start and where rows end; all int64."""

    begin: Tensor
    """[segments]: first unit"""
    slot: Tensor
    """[segments]: number among the segments that are not whole rows, 0 for whole rows"""
    of_block: Tensor
    """[blocks + 1]: first segment of each block, and the number of segments"""
    first_slot: Tensor
    """[rows]: of the row's segments, likewise last_slot; 0 for whole rows"""
    last_slot: Tensor
    slots: int


def _segments(starts: Tensor, columns: int, units: int) -> _Segments:
    """starts: int64 [blocks + 1], 0 to `units`, not descending."""
    ends_of_rows = torch.arange(0, units + 1, columns, device=starts.device)
    cuts = torch.cat([starts, ends_of_rows]).unique()
    begin, end = cuts[:-1], cuts[1:]
    shared = end - begin < columns
    number = shared.cumsum(0) - 1
    slot = torch.where(shared, number, 0)
    first = torch.searchsorted(begin, ends_of_rows)  # of each row, and the number of segments
    return _Segments(
        begin, slot, torch.searchsorted(cuts, starts), slot[first[:-1]], slot[first[1:] - 1], int(shared.sum())
    )


def _whole_pieces(costs: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Block of each piece, and the blocks' loads: `blocks` pieces at a time go to the blocks with least work so far."""
    loads = torch.zeros(blocks, dtype=torch.float64)
    takers = [torch.empty(0, dtype=torch.int64)]
    for wave in costs.split(blocks) if len(costs) else ():
        takers.append(loads.argsort(stable=True)[: len(wave)])
        loads[takers[-1]] += wave
    return torch.cat(takers), loads


def _cut_segments(pieces: Tensor, costs: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """The pieces one behind another, cut in proportion to `shares` [blocks].

    Returns the segments [segments, 8], the block of each, the blocks' loads, and the number of slots.
    """
    columns = costs.shape[1]
    ends = costs[pieces[:, 0]].flatten().cumsum(0)
    wanted = shares.cumsum(0) / shares.sum() * ends[-1]
    inside = torch.searchsorted(ends, wanted[:-1])
    over = inside % columns
    inside = torch.where(over < _LEAST_COLUMNS, inside - over, inside)
    inside = torch.where(over > columns - _LEAST_COLUMNS, inside + columns - over, inside)
    starts = torch.cat([inside.new_zeros(1), inside, inside.new_tensor([len(ends)])])
    segments = _segments(starts, columns, len(ends))
    piece = segments.begin // columns
    table = _whole_segments(pieces[piece], columns)
    table[:, 2] = segments.begin % columns
    table[:, 3] = torch.cat([segments.begin[1:], starts[-1:]]) - piece * columns
    table[:, 4] = segments.slot
    table[:, 5], table[:, 6] = segments.first_slot[piece], segments.last_slot[piece]
    loads = F.pad(ends, (1, 0))[starts].diff()
    return table, torch.searchsorted(starts, segments.begin, right=True) - 1, loads, segments.slots


def _whole_segments(pieces: Tensor, columns: int) -> Tensor:
    """Pieces [pieces, 2] as segments [pieces, 8]."""
    table = pieces.new_zeros(len(pieces), 8)
    table[:, :2], table[:, 3] = pieces, columns
    return table


def _by_block(segments: Tensor, of_block: Tensor, blocks: int) -> Tensor:
    """int32 [blocks, most + 1, 8], in the segments' order; -1 behind the last."""
    counts = of_block.bincount(minlength=blocks)
    order = of_block.argsort(stable=True)
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[of_block[order]]
    table = torch.full((blocks, int(counts.max()) + 1, 8), -1, dtype=torch.int32)
    table[of_block[order], place] = segments[order].int()
    return table

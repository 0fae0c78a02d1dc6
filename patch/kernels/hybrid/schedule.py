"""Who works on which tiles: equal shares for the blocks of the decode kernel, a good order for those of prefill."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from patch.kernels.hybrid.format import DENSE_BYTES, SPARSE_BYTES

NO_TILE = 2**31 - 1
"""Descriptor of a tile that is not there: it fills up groups of tile rows."""
_LINE = 32  # numbers, 128 bytes


@dataclass(frozen=True)
class DecodeSchedule:
    """A table for the kernel, and how many partial sums there are to be room for."""

    table: Tensor
    """int32 [blocks, line]"""
    slots: int


def decode_schedule(descriptors: Tensor, rows: int, blocks: int, unit_bytes: int) -> DecodeSchedule:
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
    return DecodeSchedule(torch.cat([torch.stack(header, 1), lines], 1).int(), segments.slots)


def prefill_order(descriptors: Tensor, sparse_cost: float) -> Tensor:
    """int32 [tile rows]: the rows of tiles, those with most work first; a dense tile is 1, a 2:4 one `sparse_cost`."""
    costs = torch.where(descriptors < 0, sparse_cost, 1.0).sum(1)
    return costs.argsort(descending=True, stable=True).int()


def tile_bytes(descriptors: Tensor) -> Tensor:
    """int64, of the same shape: what each tile occupies."""
    sizes = torch.where(descriptors < 0, SPARSE_BYTES, DENSE_BYTES)
    return torch.where(descriptors == NO_TILE, 0, sizes)


def _grouped(descriptors: Tensor, rows: int) -> Tensor:
    """[tile rows, tile columns] -> [groups, rows, tile columns]."""
    padded = F.pad(descriptors, (0, 0, 0, -len(descriptors) % rows), value=NO_TILE)
    return padded.view(-1, rows, descriptors.shape[1])


@dataclass(frozen=True)
class _Segments:
    """A stream of rows, cut where blocks start and where rows end; all int64."""

    slot: Tensor
    """[segments]: number among the segments that are not whole rows, 0 for whole rows"""
    of_block: Tensor
    """[blocks + 1]: first segment of each block, and the number of segments"""
    first_slot: Tensor
    """[rows]: of the row's segments, likewise last_slot; 0 for whole rows"""
    last_slot: Tensor
    slots: int


def _segments(starts: Tensor, columns: int, units: int) -> _Segments:
    """starts: int64 [blocks + 1], ascending from 0 to `units`."""
    ends_of_rows = torch.arange(0, units + 1, columns, device=starts.device)
    cuts = torch.cat([starts, ends_of_rows]).unique()
    begin, end = cuts[:-1], cuts[1:]
    shared = end - begin < columns
    number = shared.cumsum(0) - 1
    slot = torch.where(shared, number, 0)
    first = torch.searchsorted(begin, ends_of_rows)  # of each row, and the number of segments
    return _Segments(slot, torch.searchsorted(cuts, starts), slot[first[:-1]], slot[first[1:] - 1], int(shared.sum()))

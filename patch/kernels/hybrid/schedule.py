"""Who works on which tiles: equal shares for the blocks of the decode kernel, a good order for those of prefill."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from patch.kernels.hybrid.format import DENSE_BYTES, SPARSE_BYTES

NO_TILE = 2**31 - 1
"""Descriptor of a tile that is not there: it fills up groups of tile rows."""
_HEADER = 2
_LINE = 32  # numbers, 128 bytes


def decode_schedule(descriptors: Tensor, rows: int, blocks: int, unit_bytes: int) -> Tensor:
    """Share out the stream of units (`rows` tiles under one another) in contiguous pieces of nearly equal cost.

    descriptors: int32 [tile rows, tile columns]. A unit costs the bytes of its tiles and `unit_bytes` besides.
    Returns int32 [blocks + 1, line], with no more blocks than units. A block's line: its first unit, the first of the
    next block, then the descriptors of its units. The last line marks the end.
    """
    units = _grouped(descriptors, rows).transpose(1, 2).reshape(-1, rows)  # going down the columns of a group of rows
    blocks = min(blocks, len(units))
    costs = tile_bytes(units).sum(1) + unit_bytes
    ends = costs.cumsum(0)
    shares = torch.arange(blocks + 1, device=descriptors.device)
    wanted = shares * int(ends[-1]) // blocks
    starts = torch.searchsorted(ends - costs // 2, wanted)
    # at least a unit for everyone
    starts = ((starts - shares).cummax(0).values + shares).minimum(len(units) - blocks + shares)
    starts[0] = 0
    most = int(starts.diff().max())
    line = -(-(_HEADER + most * rows) // _LINE) * _LINE
    places = starts[:, None] * rows + torch.arange(line - _HEADER, device=descriptors.device)
    lines = units.flatten()[places.clamp(max=units.numel() - 1)]
    next_starts = torch.cat([starts[1:], starts[-1:]])
    return torch.cat([starts[:, None], next_starts[:, None], lines], 1).int()


def prefill_order(descriptors: Tensor, group: int, sparse_cost: float) -> Tensor:
    """int32 [tile rows, rounded up to a multiple of `group`]: the rows of tiles, those with most work first.

    A dense tile costs 1, a 2:4 one `sparse_cost`. Rows that are not there, at the end, are numbered past the others.
    """
    costs = torch.where(descriptors < 0, sparse_cost, 1.0).sum(1)
    rows = len(descriptors)
    order = costs.argsort(descending=True, stable=True)
    return torch.cat([order, torch.arange(rows, rows + -rows % group, device=order.device)]).int()


def tile_bytes(descriptors: Tensor) -> Tensor:
    """int64, of the same shape: what each tile occupies."""
    sizes = torch.where(descriptors < 0, SPARSE_BYTES, DENSE_BYTES)
    return torch.where(descriptors == NO_TILE, 0, sizes)


def _grouped(descriptors: Tensor, rows: int) -> Tensor:
    """[tile rows, tile columns] -> [groups, rows, tile columns]."""
    padded = F.pad(descriptors, (0, 0, 0, -len(descriptors) % rows), value=NO_TILE)
    return padded.view(-1, rows, descriptors.shape[1])

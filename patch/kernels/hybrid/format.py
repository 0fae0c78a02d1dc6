"""A weight matrix whose tiles are dense or 2:4, in the byte order that Hopper's tensor cores read from shared memory.

One format serves decode and prefill: a tile is copied to shared memory as it is, in one piece, and is then a valid
operand of `wgmma` (dense) or `wgmma.sp` (2:4), rows of the weight along M. Version 1:

    weight [out, in], zero-padded to whole tiles of 128 rows x 64 columns

            column 0   column 1   column 2
          +----------+----------+----------+
    row 0 |  dense   |   2:4    |  dense   |     payload, in the order of the decode kernel:
          +----------+----------+----------+     two rows of tiles go down their columns together
    row 1 |   2:4    |   2:4    |  dense   |
          +----------+----------+----------+     [0,0][1,0] [0,1][1,1] [0,2][1,2] [2,0] [2,1] [2,2]
    row 2 |  dense   |   2:4    |   2:4    |     16 K  9 K   9 K  9 K  16 K 16 K   16 K  9 K   9 K
          +----------+----------+----------+

    payload       uint8 [bytes]: the tiles, each a multiple of 1 KiB
    descriptors   int32 [tile rows, tile columns]: where a tile starts in the payload, in KiB; bit 31: it is 2:4

    dense tile, 16 KiB   128 rows of 128 bytes: 64 values, of which the 16 bytes with values 8c to 8c + 7 of row r lie
                         at place c ^ (r % 8) of the row (the tensor cores' 128-byte swizzle)
    2:4 tile, 9 KiB      128 rows of 64 bytes: the 32 kept values in order, 8c to 8c + 7 of row r at place
                         c ^ (r // 2 % 4) (64-byte swizzle); then 1 KiB of metadata
    metadata             uint32 [8 slices of 16 rows, 32 lanes]: the register that each lane hands to wgmma.sp (and to
                         mma.sp.m16n8k32). Group g of 4 columns (0 to 15), row 8a + q of the slice (a = 0 or 1):

                             lane 4q + g // 4,  bits 16a + 4 (g % 4) to + 3

                         The 4 bits of a group are first + 4 * second: which two of its four columns are kept.

A tile is stored as 2:4 if each of its groups keeps at most two weights, whatever the tiles of the mask: those may be
smaller, larger, or ragged. Weights pruned inside other tiles are stored as zeros. A dense tile costs 2 bytes per
weight, a 2:4 tile 1.125.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from patch.artefacts import PatchError
from patch.sparsity.tiles import expand, grid_shape, tile_sums

VERSION = 1
DTYPES = (torch.bfloat16, torch.float16)
TILE_ROWS, TILE_COLUMNS = 128, 64
DENSE_BYTES = 2 * TILE_ROWS * TILE_COLUMNS
SPARSE_BYTES = TILE_ROWS * TILE_COLUMNS + TILE_ROWS * TILE_COLUMNS // 8

_GROUPS = TILE_COLUMNS // 4
_BLOCK = 1024  # bytes; the payload is addressed in these, so that descriptors fit 31 bits
_SPARSE_BIT = -(2**31)
# kept columns of a group as bits -> metadata. Groups that keep fewer than two, at the edges, take a zero along.
_METADATA = {0b0011: 0x4, 0b0101: 0x8, 0b1001: 0xC, 0b0110: 0x9, 0b1010: 0xD, 0b1100: 0xE}
_METADATA |= {0b0000: 0x4, 0b0001: 0x4, 0b0010: 0x4, 0b0100: 0x8, 0b1000: 0xC}


@dataclass(frozen=True, eq=False)
class HybridWeight:
    """A weight [out_features, in_features] in this format; `payload` and `descriptors` are all there is to save."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    payload: Tensor
    """uint8 [bytes]"""
    descriptors: Tensor
    """int32 [tile rows, tile columns]"""
    version: int = VERSION
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """What kernels derive from the descriptors on first use, by kernel and shape."""

    def __post_init__(self) -> None:
        place = f"weight of {self.out_features}x{self.in_features}"
        if self.version != VERSION:
            raise PatchError(
                f"{place}: its format has version {self.version}, this is version {VERSION}; pack it again."
            )
        if self.dtype not in DTYPES:
            raise PatchError(f"{place}: {self.dtype} cannot be packed; convert it to bfloat16 or float16.")
        grid = grid_shape((self.out_features, self.in_features), (TILE_ROWS, TILE_COLUMNS))
        if tuple(self.descriptors.shape) != grid or self.descriptors.dtype != torch.int32:
            found = f"{self.descriptors.dtype} {tuple(self.descriptors.shape)}"
            raise PatchError(f"{place}: descriptors are {found}, not int32 {grid}; pack it again.")
        if self.payload.dim() != 1 or self.payload.dtype != torch.uint8 or self.payload.numel() % _BLOCK:
            found = f"{self.payload.dtype} {tuple(self.payload.shape)}"
            raise PatchError(f"{place}: the payload is {found}, not bytes in whole KiB; pack it again.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def device(self) -> torch.device:
        return self.payload.device

    @property
    def nbytes(self) -> int:
        """What the weight occupies, padding and descriptors included."""
        return self.payload.numel() + self.descriptors.numel() * self.descriptors.element_size()

    @property
    def sparse_tiles(self) -> Tensor:
        """bool [tile rows, tile columns], True = 2:4."""
        return self.descriptors < 0

    @property
    def sparsity(self) -> float:
        """Share of weights that the format leaves out, 0 to 0.5."""
        rows = _extents(self.out_features, TILE_ROWS, self.device)
        columns = _extents(self.in_features, TILE_COLUMNS, self.device)
        return float(rows @ self.sparse_tiles.double() @ columns) / 2 / (self.out_features * self.in_features)

    def to(self, device: torch.device | str) -> HybridWeight:
        """The same weight on `device`."""
        return replace(self, payload=self.payload.to(device), descriptors=self.descriptors.to(device))


@torch.no_grad()
def pack(
    weight: Tensor, keep_mask: Tensor, dense_tiles: Tensor | None = None, tile: tuple[int, int] = (128, 128)
) -> HybridWeight:
    """The kept weights in the format above, on the weight's device. Exact: no value changes.

    weight: bfloat16 or float16 [out, in]. keep_mask: bool [out, in], True = kept.
    dense_tiles: bool, True = dense, the mask's own grid of tiles of size `tile`; where it is given, every group of
    every other tile must keep exactly two of four.
    Raises PatchError for weights, masks and shapes that have no such form.
    """
    _check(weight, keep_mask, dense_tiles, tile)
    rows, columns = grid_shape(tuple(weight.shape), (TILE_ROWS, TILE_COLUMNS))  # type: ignore[arg-type]
    padding = (0, columns * TILE_COLUMNS - weight.shape[1], 0, rows * TILE_ROWS - weight.shape[0])

    def tiled(matrix: Tensor) -> Tensor:  # [out, in] -> [tile rows, tile columns, 128, 16 groups, 4]
        padded = F.pad(matrix, padding).view(rows, TILE_ROWS, columns, _GROUPS, 4)
        return padded.permute(0, 2, 1, 3, 4)

    # whole numbers from here on: no arithmetic can touch a value
    values = tiled(torch.where(keep_mask, weight, 0).view(torch.int16))
    keep = tiled(keep_mask)
    nibbles = (keep * torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=weight.device)).sum(-1, dtype=torch.uint8)
    sparse = (keep.sum(-1, dtype=torch.uint8) <= 2).flatten(2).all(-1)
    offsets, total = _offsets(sparse)
    payload = torch.empty(total, _BLOCK // 8, dtype=torch.int64, device=weight.device)
    _put(payload, offsets[~sparse], _dense_images(values[~sparse]))
    _put(payload, offsets[sparse], _sparse_images(values[sparse], nibbles[sparse]))
    descriptors = torch.where(sparse, offsets + _SPARSE_BIT, offsets).int()
    return HybridWeight(
        weight.shape[0], weight.shape[1], weight.dtype, payload.view(torch.uint8).flatten(), descriptors
    )


@torch.no_grad()
def unpack(hybrid: HybridWeight) -> Tensor:
    """[out, in]: the kept weights, bit for bit, and zeros elsewhere."""
    sparse = hybrid.sparse_tiles
    rows, columns = sparse.shape
    offsets = hybrid.descriptors.long() - torch.where(sparse, _SPARSE_BIT, 0)
    blocks = hybrid.payload.view(-1, _BLOCK)
    tiles = torch.empty(rows, columns, TILE_ROWS, TILE_COLUMNS, dtype=torch.int16, device=hybrid.device)
    tiles[~sparse] = _values_of_dense(_get(blocks, offsets[~sparse], DENSE_BYTES))
    tiles[sparse] = _values_of_sparse(_get(blocks, offsets[sparse], SPARSE_BYTES))
    padded = tiles.transpose(1, 2).reshape(rows * TILE_ROWS, columns * TILE_COLUMNS)
    return padded[: hybrid.out_features, : hybrid.in_features].contiguous().view(hybrid.dtype)


def reference_matmul(x: Tensor, hybrid: HybridWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] @ weight^T + bias -> [..., out], on any device."""
    return F.linear(x, unpack(hybrid), bias)


def _check(weight: Tensor, keep_mask: Tensor, dense_tiles: Tensor | None, tile: tuple[int, int]) -> None:
    if weight.dim() != 2 or not weight.numel():
        raise PatchError(f"weight of shape {tuple(weight.shape)}: only matrices [out, in] can be packed.")
    place = f"weight of {weight.shape[0]}x{weight.shape[1]}"
    if weight.dtype not in DTYPES:
        raise PatchError(f"{place}: {weight.dtype} cannot be packed; convert it to bfloat16 or float16.")
    if keep_mask.dtype != torch.bool or keep_mask.shape != weight.shape:
        found = f"{keep_mask.dtype} {tuple(keep_mask.shape)}"
        raise PatchError(f"{place}: the mask is {found}; it must be bool and of the weight's shape.")
    if not weight.isfinite().all():
        raise PatchError(f"{place}: it holds NaN or infinite values; repair the checkpoint before packing.")
    if weight.shape[1] % 4 and not keep_mask.all():
        raise PatchError(f"{place}: {weight.shape[1]} inputs do not split into 4s; only a dense mask can be packed.")
    if dense_tiles is None:
        return
    grid = grid_shape(tuple(weight.shape), tile)  # type: ignore[arg-type]
    if dense_tiles.dtype != torch.bool or tuple(dense_tiles.shape) != grid:
        found = f"{dense_tiles.dtype} {tuple(dense_tiles.shape)}"
        raise PatchError(f"{place}: dense_tiles is {found}; tiles of {tile[0]}x{tile[1]} need bool {grid}.")
    if weight.shape[1] % 4:
        if not dense_tiles.all():
            raise PatchError(f"{place}: {weight.shape[1]} inputs do not split into 4s; every tile must be dense.")
        return
    odd_groups = keep_mask.unflatten(1, (-1, 4)).sum(-1) != 2
    declared = ~expand(dense_tiles, tuple(weight.shape), tile)  # type: ignore[arg-type]
    wrong = odd_groups.repeat_interleave(4, 1) & declared
    if wrong.any():
        row, column = (tile_sums(wrong, tile) > 0).nonzero()[0].tolist()
        raise PatchError(
            f"{place}: the mask is not 2:4 in tile ({row}, {column}) of {tile[0]}x{tile[1]}, which is not marked "
            "dense; mark it, or make the mask again."
        )


def _offsets(sparse: Tensor) -> tuple[Tensor, int]:
    """Start of each tile [tile rows, tile columns] and the payload's length, in KiB."""
    rows, columns = sparse.shape
    sizes = torch.where(sparse, SPARSE_BYTES // _BLOCK, DENSE_BYTES // _BLOCK)
    pairs = F.pad(sizes, (0, 0, 0, rows % 2)).view(-1, 2, columns).transpose(1, 2)  # pair, column, row of the pair
    ends = pairs.flatten().cumsum(0)
    total = int(ends[-1])
    if total >= 2**31:
        raise PatchError(f"a weight of {total} KiB when packed is too large; split it.")
    starts = (ends - pairs.flatten()).view_as(pairs)
    return starts.transpose(1, 2).reshape(-1, columns)[:rows], total


def _put(payload: Tensor, offsets: Tensor, images: Tensor) -> None:
    """Write tile images, int64 [tiles, bytes / 8], at `offsets` of the payload int64 [KiB, 128]."""
    blocks = images.view(-1, payload.shape[1])
    per_tile = len(blocks) // max(len(offsets), 1)
    places = offsets.unsqueeze(1) + torch.arange(per_tile, device=offsets.device)
    payload[places.flatten()] = blocks


def _get(blocks: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Inverse of `_put`: uint8 [tiles, size]."""
    places = offsets.unsqueeze(1) + torch.arange(size // _BLOCK, device=offsets.device)
    return blocks[places].view(-1, size)


def _swizzle(rows: Tensor) -> Tensor:
    """[tiles, 128, chunks, 16 bytes] in order <-> as in shared memory; the same permutation both ways."""
    chunks = rows.shape[2]
    row = torch.arange(TILE_ROWS, device=rows.device).unsqueeze(1) // (8 // chunks) % chunks
    places = torch.arange(chunks, device=rows.device) ^ row
    return rows[:, torch.arange(TILE_ROWS, device=rows.device).unsqueeze(1), places]


def _dense_images(values: Tensor) -> Tensor:
    """int16 [tiles, 128, 16, 4] -> int64 [tiles, bytes / 8]."""
    return _swizzle(values.reshape(-1, TILE_ROWS, 8, 8).view(torch.int64)).flatten(1)


def _values_of_dense(images: Tensor) -> Tensor:
    """uint8 [tiles, bytes] -> int16 [tiles, 128, 64]."""
    return _swizzle(images.view(torch.int64).view(-1, TILE_ROWS, 8, 2)).view(torch.int16).flatten(2)


def _sparse_images(values: Tensor, nibbles: Tensor) -> Tensor:
    """int16 [tiles, 128, 16, 4], uint8 [tiles, 128, 16] -> int64 [tiles, bytes / 8]."""
    table = torch.tensor([_METADATA.get(nibble, 0) for nibble in range(16)], dtype=torch.int32, device=values.device)
    codes = table[nibbles.int()]
    places = torch.stack([codes & 3, codes >> 2], -1)
    kept = values.gather(-1, places.long()).reshape(-1, TILE_ROWS, 4, 8)
    # rows: slice, a, q; groups: lane of the four, place in the half word
    fields = codes.view(-1, 8, 2, 8, 4, 4) << (4 * torch.arange(4, dtype=torch.int32, device=values.device))
    halves = fields.sum(-1, dtype=torch.int32).permute(0, 1, 3, 4, 2)  # tile, slice, q, lane of the four, a
    metadata = halves.short().flatten(1).view(torch.int64)
    return torch.cat([_swizzle(kept.view(torch.int64)).flatten(1), metadata], 1)


def _values_of_sparse(images: Tensor) -> Tensor:
    """uint8 [tiles, bytes] -> int16 [tiles, 128, 64]."""
    kept, metadata = images.split([TILE_ROWS * TILE_COLUMNS, TILE_ROWS * TILE_COLUMNS // 8], 1)
    values = _swizzle(kept.contiguous().view(torch.int64).view(-1, TILE_ROWS, 4, 2)).view(torch.int16)
    halves = metadata.contiguous().view(torch.int16).view(-1, 8, 8, 4, 2).permute(0, 1, 4, 2, 3)
    codes = (halves.unsqueeze(-1).int() >> (4 * torch.arange(4, dtype=torch.int32, device=images.device))) & 15
    places = torch.stack([codes & 3, codes >> 2], -1).view(-1, TILE_ROWS, _GROUPS, 2).long()
    tiles = torch.zeros(len(images), TILE_ROWS, _GROUPS, 4, dtype=torch.int16, device=images.device)
    return tiles.scatter_(-1, places, values.view(-1, TILE_ROWS, _GROUPS, 2)).flatten(2)


def _extents(length: int, tile: int, device: torch.device) -> Tensor:
    """float64 [tiles]: how many of `length` rows or columns each tile covers."""
    starts = torch.arange(0, length, tile, device=device, dtype=torch.float64)
    return (length - starts).clamp(max=tile)

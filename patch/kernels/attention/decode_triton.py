"""`decode_attention` in Triton, after FlashDecoding: the keys of a sequence are split over programs."""
# Kernels without types, as is the custom in Triton:
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUP = 16
"""Query heads per key head are filled up to so many, the fewest rows that tensor cores take."""
_BLOCK = 64
"""Keys at a time."""
_PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def _attend(
    query, keys, values, position, output, largest, total, length, scale,
    group: tl.constexpr, rows: tl.constexpr, size: tl.constexpr, block: tl.constexpr, splits: tl.constexpr,
):  # fmt: skip
    """One key head of one sequence over a part of the filled positions; with `splits` > 1 into float32 partial sums."""
    pair, split = tl.program_id(0), tl.program_id(1)  # pair: of a sequence and a key head
    row, feature = tl.arange(0, rows), tl.arange(0, size)
    inside = row < group
    head = pair * group + row
    q = tl.load(query + head[:, None] * size + feature[None, :], mask=inside[:, None], other=0.0)
    filled = tl.load(position).to(tl.int32) + 1
    share = tl.cdiv(tl.cdiv(filled, block), splits) * block
    first = split * share
    last = tl.minimum(first + share, filled)
    start_of_pair = pair.to(tl.int64) * length * size
    best = tl.full([rows], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([rows], dtype=tl.float32)
    sums = tl.zeros([rows, size], dtype=tl.float32)
    for start in range(first, last, block):
        place = start + tl.arange(0, block)
        k = tl.load(
            keys + start_of_pair + place[None, :] * size + feature[:, None], mask=(place < last)[None, :], other=0.0
        )
        scores = tl.where((place < last)[None, :], tl.dot(q, k) * scale, float("-inf"))
        new = tl.maximum(best, tl.max(scores, 1))
        factor, exponentials = tl.exp2(best - new), tl.exp2(scores - new[:, None])
        v = tl.load(
            values + start_of_pair + place[:, None] * size + feature[None, :], mask=(place < last)[:, None], other=0.0
        )
        sums = sums * factor[:, None] + tl.dot(exponentials.to(v.dtype), v)
        weight = weight * factor + tl.sum(exponentials, 1)
        best = new
    if splits == 1:
        result = (sums / weight[:, None]).to(output.dtype.element_ty)
        tl.store(output + head[:, None] * size + feature[None, :], result, mask=inside[:, None])
    else:
        part = head * splits + split
        tl.store(output + part[:, None] * size + feature[None, :], sums, mask=inside[:, None])
        tl.store(largest + part, best, mask=inside)
        tl.store(total + part, weight, mask=inside)


@triton.jit
def _combine(sums, largest, total, output, size: tl.constexpr, splits: tl.constexpr, padded: tl.constexpr):
    """The parts of one query head; those without positions have a total of 0."""
    head = tl.program_id(0)
    split, feature = tl.arange(0, padded), tl.arange(0, size)
    part = head * splits + split
    best = tl.load(largest + part, mask=split < splits, other=float("-inf"))
    factor = tl.exp2(best - tl.max(best, 0))
    weight = tl.sum(factor * tl.load(total + part, mask=split < splits, other=0.0), 0)
    parts = tl.load(sums + part[:, None] * size + feature[None, :], mask=(split < splits)[:, None], other=0.0)
    result = tl.sum(parts * factor[:, None], 0) / weight
    tl.store(output + head * size + feature, result.to(output.dtype.element_ty))


def supports(query: Tensor, keys: Tensor) -> bool:
    """Whether heads are of a size, and as many per key head, as the kernel has room for."""
    size, group = query.shape[3], query.shape[1] // keys.shape[1]
    return query.dtype in (torch.bfloat16, torch.float16) and size in (16, 32, 64, 128, 256) and group <= _GROUP


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """As in `patch.kernels.attention`."""
    batch, heads, _, size = query.shape
    _, key_heads, length, _ = keys.shape
    pairs = batch * key_heads
    splits = _splits(pairs, length, query.device)
    output = torch.empty_like(query)
    parts, largest, total = output, output, output  # not used with one split
    if splits > 1:
        parts = query.new_empty(batch * heads, splits, size, dtype=torch.float32)
        largest, total = query.new_empty(2, batch * heads, splits, dtype=torch.float32)
    _attend[(pairs, splits)](
        query, keys, values, position, parts, largest, total, length, math.log2(math.e) / math.sqrt(size),
        heads // key_heads, _GROUP, size, _BLOCK, splits, num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _combine[(batch * heads,)](
            parts, largest, total, output, size, splits, triton.next_power_of_2(splits), num_warps=4
        )
    return output


def _splits(pairs: int, length: int, device: torch.device) -> int:
    """As many as fill the GPU, of at least two blocks where the cache is full."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(_PROGRAMS_PER_PROCESSOR * processors // pairs, length // (2 * _BLOCK)))

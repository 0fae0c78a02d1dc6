"""Sparsity patterns, and the two ways of choosing which weights to keep from scores.

"N:M" counts the N weights *kept* in every M consecutive inputs (NVIDIA's convention; the wanda and
SparseGPT repositories count the pruned ones, which is the same only for 2:4 and 4:8).
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from patch.artefacts import PatchError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCORES_PER_CHUNK = 2**22
"""Scores that are ranked at a time, in whole rows: ranking takes some 17 bytes for each."""


@dataclass(frozen=True)
class Pattern:
    """One of four kinds: dense, unstructured, n:m, or tiles (each tile dense or 2:4).

    Written as in configs and on the command line: "dense", "unstructured", "2:4", "tiles:128x128", or
    "tiles:128xK" for panels as wide as the layer has inputs.
    """

    kind: str
    n: int = 0
    m: int = 0
    tile: tuple[int, int] = (0, 0)
    """Tile height (outputs) and width (inputs); tiles at the lower and right edge may be smaller. A width of 0
    stands for all inputs of a layer, whatever their number (see `for_layer`)."""

    @classmethod
    def parse(cls, text: str) -> Pattern:
        if text in ("dense", "unstructured"):
            return cls(text)
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            n, m = map(int, found.groups())
            if 0 < n < m:
                return cls("n:m", n=n, m=m)
        if found := re.fullmatch(r"tiles:([1-9]\d*)x([1-9]\d*|K)", text):
            height, width = int(found[1]), 0 if found[2] == "K" else int(found[2])
            if width % 4 == 0:
                return cls("tiles", n=2, m=4, tile=(height, width))
        raise PatchError(
            f"pattern {text!r}: not one of dense, unstructured, N:M with 0 < N < M, or tiles:HEIGHTxWIDTH "
            "with a width that is a multiple of 4, or K for all inputs of a layer."
        )

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.n}:{self.m}"
        if self.kind == "tiles":
            return f"tiles:{self.tile[0]}x{self.tile[1] or 'K'}"
        return self.kind

    @property
    def slug(self) -> str:
        """The pattern as a part of a file name."""
        return str(self).replace("n:m", "").replace("tiles:", "tiles").replace(":", "of")

    @property
    def fixed_sparsity(self) -> float | None:
        """Share of pruned weights where the pattern alone determines it, else None."""
        if self.kind == "n:m":
            return 1 - self.n / self.m
        return 0.0 if self.kind == "dense" else None

    def for_layer(self, out_features: int, in_features: int) -> Pattern:
        """The pattern in a layer of this shape: tiles as wide as the layer get its width, others stay as they are."""
        if self.kind == "tiles" and self.tile[1] == 0:
            return replace(self, tile=(self.tile[0], in_features))
        return self

    def check_sparsity(self, share: float) -> None:
        """Raise PatchError where no mask of this pattern prunes `share` (0 to 1) of the weights."""
        if self.kind == "tiles" and share > 0.5:
            raise PatchError(
                f"pattern {self}: its tiles are dense or 2:4, so at most 50 % can be pruned, not {100 * share:g} %."
            )

    def check_shape(self, out_features: int, in_features: int, name: str) -> None:
        """Raise PatchError where the groups along the inputs of layer `name` do not divide."""
        if self.m and in_features % self.m:
            raise PatchError(
                f"layer {name} ({out_features}x{in_features}): {in_features} inputs do not split into "
                f"{self.m}s, as the pattern {self} needs; use the pattern unstructured, or leave this model out."
            )


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` largest scores in every `m` consecutive entries of a row.

    scores: [rows, columns], columns divisible by m. Returns a bool mask of the same shape with exactly n per
    group. Between equal scores the later entry is kept, so the result is the same on any device.
    """
    import torch

    entries = scores.unflatten(1, (-1, m)).unbind(2)
    # rank of each entry in its group, by m(m-1)/2 comparisons: much faster than sorting groups of 4
    dtype = torch.uint8 if m <= 256 else torch.int32
    ranks = [torch.zeros_like(entry, dtype=dtype) for entry in entries]
    for later in range(1, m):
        for earlier in range(later):
            later_wins = entries[later] >= entries[earlier]
            ranks[later] += later_wins
            ranks[earlier] += ~later_wins
    return (torch.stack(ranks, 2) >= m - n).flatten(1)


def keep_n_of_column(scores: Tensor, n: int) -> Tensor:
    """Keep the `n` largest scores [m, columns] of every column; ties as in `keep_n_of_m`.

    For one group per column, again and again: six kernels instead of its thirty, at the price of some memory.
    """
    earlier, later, balance, bar = _tournament(len(scores), n, scores.device)
    later_wins = scores[later] >= scores[earlier]
    return balance @ later_wins.to(balance.dtype) >= bar


@functools.cache
def _tournament(m: int, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The earlier and the later member of all pairs of m entries, and how an entry is among the n best of them.

    Its rank is the number of pairs that it wins: as the later one, and as the earlier one all that the later does not
    win. With `balance`, float32 [m, pairs], 1 at the later and -1 at the earlier member, the rank reaches m - n where
    balance @ later_wins reaches `bar` [m, 1].
    """
    import torch

    earlier, later = torch.triu_indices(m, m, 1)
    entry = torch.arange(m).unsqueeze(1)
    balance = (entry == later).float() - (entry == earlier).float()
    bar = m - n - (entry == earlier).sum(1, keepdim=True)
    return earlier.to(device), later.to(device), balance.to(device), bar.to(device)


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """Drop the `floor(columns * sparsity)` lowest scores of every row.

    scores: [rows, columns]. Returns a bool mask of the same shape. Exact also where scores are equal:
    between equal scores the later column is kept.
    """
    return drop_lowest(scores, pruned_count(scores.shape[1], sparsity))


def drop_lowest(scores: Tensor, count: int) -> Tensor:
    """Drop the `count` lowest scores of every row, ties as in `keep_largest`; returns a bool mask, True = kept."""
    import torch

    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    rows = max(1, SCORES_PER_CHUNK // scores.shape[1])
    if len(scores) > rows:
        return torch.cat([drop_lowest(part, count) for part in scores.split(rows)])
    if scores.is_cuda and len(scores) == 1:  # kthvalue leaves a row to a single multiprocessor
        threshold = scores.sort(dim=1).values[:, count - 1 : count]
    else:
        threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    still_to_drop = count - below.sum(dim=1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= still_to_drop)))


def pruned_count(total: int, sparsity: float) -> int:
    """floor(total * sparsity), safe against 0.29 * 100 being 28.999999999999996."""
    if not 0 <= sparsity < 1:
        raise PatchError(f"sparsity {sparsity}: must be at least 0 and below 1 (0.45 means that 45 % are pruned).")
    return math.floor(total * sparsity + 1e-6)

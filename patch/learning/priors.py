"""Where the logits start: random, moved by one-shot masks (PATCH section 6.4; the official `learnable_mask.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from patch.sparsity.maskset import LinearMask
from patch.sparsity.packing import PATTERNS_2_4, unpack_codes
from patch.sparsity.tiles import tile_sums

# Inputs that two of the six patterns both keep, 0 to 2: [pattern, pattern].
OVERLAP = PATTERNS_2_4.float() @ PATTERNS_2_4.float().T


def random_logits(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """float32 of `shape`, normal with mean 0, on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device) * std


def pattern_offsets(codes: Tensor, strength: float, std: float) -> Tensor:
    """Offset of all six logits of every group towards its one-shot pattern.

    codes: [out, in / 4], index of each group's pattern. Returns float32 [6, out, in / 4]: strength * std for
    the pattern itself, 0 for those that share one kept input with it, -strength * std for its opposite.
    """
    table = (OVERLAP.to(codes.device) - 1) * strength * std
    return table[codes.int()].permute(2, 0, 1)


def tile_offsets(keep_mask: Tensor, tile: tuple[int, int], sparsity: float, strength: float, std: float) -> Tensor:
    """Offset of the tile logits of one layer towards the density of an unstructured reference.

    keep_mask: bool [out, in] of the reference; sparsity: target share of pruned weights, at most 0.5. Of N tiles
    the round(N * (1 - 2 * sparsity)) that keep the largest share of their weights get +strength * std, the others
    the negative; so every layer starts at the same density although the target is global. Ties go to the
    earlier tile. Returns float32 [tile rows, tile columns].
    """
    kept = tile_sums(keep_mask, tile) / tile_sums(torch.ones_like(keep_mask), tile)
    dense = round(kept.numel() * (1 - 2 * sparsity))
    chosen = kept.flatten().argsort(descending=True, stable=True)[:dense]
    signs = torch.full_like(kept, -1.0)
    signs.view(-1)[chosen] = 1.0
    return signs * strength * std


def codes_of_mask(mask: LinearMask) -> Tensor:
    """uint8 [out, in / 4], pattern codes of a 2:4 mask of one layer."""
    out_features, in_features = mask.shape
    return unpack_codes(mask.packed, out_features * in_features // 4).view(out_features, in_features // 4)

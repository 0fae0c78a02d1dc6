"""From learned logits to the final mask (PATCH section 6.5), and the two ways to end exactly on target."""

from __future__ import annotations

import torch
from torch import Tensor

from patch.learning.parametrisation import LearnableMasks
from patch.methods import LearnedTiles
from patch.sparsity.maskset import LinearMask, MaskSet
from patch.sparsity.packing import patterns_of
from patch.sparsity.tiles import expand


@torch.no_grad()
def final_masks(masks: LearnableMasks, base_fingerprint: str) -> MaskSet:
    """The hard masks of all linears: the arg-max pattern per group, and dense tiles by the method's `selection`.

    With sharded logits every process has to call it; all get the whole result.
    """
    tiles = dense_tiles(masks) if masks.learns_tiles else {}
    found: dict[str, LinearMask] = {}
    for block in masks.blocks:
        codes = block.final_codes()
        for linear in block.linears:
            keep = patterns_of(codes[linear.name].flatten(), linear.shape)
            if not masks.learns_tiles:
                found[linear.name] = LinearMask.from_keep_mask(keep, masks.pattern).to("cpu")
                continue
            dense = tiles[linear.name]
            keep |= expand(dense, linear.shape, linear.tile)
            pattern = masks.pattern.for_layer(*linear.shape)
            found[linear.name] = LinearMask.from_keep_mask(keep, pattern, dense_tiles=dense).to("cpu")
    return MaskSet(found, base_fingerprint)


def dense_tiles(masks: LearnableMasks) -> dict[str, Tensor]:
    """bool [tile rows, tile columns] of every linear, True = dense."""
    assert isinstance(masks.method, LearnedTiles)

    def by_layer(flat: Tensor) -> list[Tensor]:
        parts = flat.split([linear.tiles for linear in masks.linears])
        return [part.view(linear.grid) for part, linear in zip(parts, masks.linears, strict=True)]

    logits, sizes = masks.tile_logits.detach().float(), masks.tile_sizes
    if masks.method.selection == "balanced":
        chosen = balanced(by_layer(logits), by_layer(sizes), masks.sparsity)
    else:
        flat = logits > 0 if masks.method.selection == "sign" else largest(logits, sizes, masks.sparsity)
        chosen = by_layer(flat)
    return {linear.name: dense for linear, dense in zip(masks.linears, chosen, strict=True)}


def largest(logits: Tensor, sizes: Tensor, sparsity: float) -> Tensor:
    """The tiles with the largest logits, as many as bring the sparsity down to `sparsity`, to within half a tile.

    logits, sizes (weights per tile): float32 [tiles]; a sparse tile prunes half of its weights. Returns bool [tiles].
    """
    order = logits.argsort(descending=True, stable=True)
    wanted = (1 - 2 * sparsity) * sizes.double().sum()
    reached = sizes[order].double().cumsum(0)
    dense = torch.zeros_like(logits, dtype=torch.bool)
    dense[order] = reached - sizes[order].double() / 2 <= wanted
    return dense


def balanced(logits: list[Tensor], sizes: list[Tensor], sparsity: float) -> list[Tensor]:
    """Equally many dense tiles in every tile row of a layer; how many differs between layers.

    logits, sizes: [tile rows, tile columns] of every layer. Columns of sorted rows are taken like single tiles by
    `largest`, each with its mean logit, so a layer's k-th best tiles of all rows come together. Returns bools of
    the same shapes.
    """
    ranked = [layer.sort(dim=1, descending=True, stable=True) for layer in logits]
    means = torch.cat([values.mean(dim=0) for values, _ in ranked])
    weights = torch.cat([size.gather(1, order).sum(dim=0) for size, (_, order) in zip(sizes, ranked, strict=True)])
    taken = largest(means, weights, sparsity).split([layer.shape[1] for layer in logits])
    return [
        torch.zeros_like(layer, dtype=torch.bool).scatter_(1, order, columns.expand(layer.shape))
        for layer, (_, order), columns in zip(logits, ranked, taken, strict=True)
    ]

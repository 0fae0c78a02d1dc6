from collections.abc import Callable

import pytest
import torch

from patch.learning.parametrisation import LearnableMasks
from patch.learning.selection import balanced, dense_tiles, final_masks, largest
from patch.sparsity.packing import PATTERNS_2_4


def test_final_pattern_is_the_largest_logit_and_dense_tiles_have_positive_ones(
    learnable: Callable[..., LearnableMasks],
) -> None:
    masks = learnable("patch_joint")
    with torch.no_grad():
        masks.tile_logits.uniform_(-1, 1)
        for block in masks.blocks:
            block.pattern_logits.uniform_(-1, 1)  # type: ignore[union-attr]
    result = final_masks(masks, "base")
    linear = masks.linears[3]
    logits = masks.blocks[0].patterns_of(linear)
    first = sum(other.tiles for other in masks.linears[:3])
    tiles = masks.tile_logits[first : first + linear.tiles].view(linear.grid)
    keep = result.linears[linear.name].keep_mask()
    for row in range(linear.shape[0]):
        for group in range(linear.shape[1] // 4):
            dense = tiles[row // 16, group // 4] > 0
            expected = torch.ones(4).bool() if dense else PATTERNS_2_4[int(logits[:, row, group].argmax())]
            assert torch.equal(keep[row, 4 * group : 4 * group + 4], expected)


def test_top_k_meets_the_target_to_within_half_a_tile() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, generator=generator)
    sizes = torch.where(torch.rand(500, generator=generator) < 0.2, 30.0, 64.0)
    for sparsity in (0.0, 0.1, 0.25, 0.45, 0.5):
        dense = largest(logits, sizes, sparsity)
        pruned = (sizes[~dense] / 2).sum() / sizes.sum()
        assert abs(float(pruned) - sparsity) * sizes.sum() <= 32 / 2
        if dense.any() and not dense.all():
            assert logits[dense].min() >= logits[~dense].max()


def test_balanced_tiles_are_equally_many_in_every_row_of_a_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(3, 7, generator=generator), torch.randn(5, 11, generator=generator)]
    chosen = balanced(layers, [torch.full(layer.shape, 16.0) for layer in layers], 0.3)
    for layer, dense in zip(layers, chosen, strict=True):
        counts = dense.sum(dim=1)
        assert (counts == counts[0]).all()
        for values, row in zip(layer, dense, strict=True):
            assert not row.any() or row.all() or values[row].min() >= values[~row].max()
    share = sum(int(dense.sum()) for dense in chosen) / sum(layer.numel() for layer in layers)
    assert share == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("selection", ["topk", "balanced"])
def test_selection_is_applied_over_all_layers(learnable: Callable[..., LearnableMasks], selection: str) -> None:
    masks = learnable("patch_tile", selection=selection, sparsity=0.3)
    with torch.no_grad():
        masks.tile_logits.uniform_(0.1, 1)  # by sign, all would be dense
    assert final_masks(masks, "base").sparsity == pytest.approx(0.3, abs=0.02)
    if selection == "balanced":
        assert all((dense.sum(1) == dense.sum(1)[0]).all() for dense in dense_tiles(masks).values())

"""What is told of a MaskSet: numbers by layer, block and module, and the figure of its tiles."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from patch.reporting.inspection import layer_table, sparsity_by, tile_map
from patch.sparsity.maskset import LinearMask, MaskSet
from patch.sparsity.patterns import Pattern, keep_n_of_m
from patch.sparsity.tiles import expand


def two_four(shape) -> torch.Tensor:
    return keep_n_of_m(torch.rand(shape, generator=torch.Generator().manual_seed(0)), 2, 4)


def tiled(shape, tiles: list[list[bool]], tile=(8, 8)) -> LinearMask:
    dense = torch.tensor(tiles)
    keep = two_four(shape) | expand(dense, shape, tile)
    return LinearMask.from_keep_mask(keep, Pattern("tiles", 2, 4, tile), dense_tiles=dense)


@pytest.fixture
def masks() -> MaskSet:
    half = torch.ones(8, 8, dtype=torch.bool)
    half[:, ::2] = False
    return MaskSet(
        {
            "model.layers.0.self_attn.q_proj": tiled((12, 20), [[True, False, False], [False, False, True]]),
            "model.layers.0.mlp.up_proj": LinearMask.from_keep_mask(two_four((16, 8)), Pattern.parse("2:4")),
            "model.layers.1.self_attn.q_proj": LinearMask.dense((12, 20)),
            "model.layers.1.mlp.up_proj": LinearMask.from_keep_mask(half, Pattern("unstructured")),
        }
    )


def test_every_layer_has_a_row_with_its_numbers(masks):
    table = layer_table(masks).set_index("layer")
    q = table.loc["model.layers.0.self_attn.q_proj"]
    # dense: a whole tile of 64, and one at the lower right corner of 4 x 4
    assert (q["weights"], q["pruned"], q["tiles"], q["dense_tiles"]) == (240, (240 - 64 - 16) // 2, 6, 2)
    assert (q["block"], q["module"], q["pattern"], q["outputs"], q["inputs"]) == (0, "q_proj", "tiles:8x8", 12, 20)
    for name, mask in masks.linears.items():
        assert table.loc[name, "pruned"] == int((~mask.keep_mask()).sum())
    assert table["tiles"].isna().sum() == 3


def test_blocks_and_modules_count_by_their_weights(masks):
    layers = layer_table(masks)
    assert sparsity_by(layers, "block").tolist() == [100 * (80 + 64) / (240 + 128), 100 * 32 / (240 + 64)]
    assert sparsity_by(layers, "module").tolist() == [100 * 80 / 480, 100 * (64 + 32) / (128 + 64)]


def test_the_figure_shows_the_tiles_of_every_layer_in_its_place(masks):
    figure = tile_map(masks)
    try:
        shown = {
            (int(image.get_extent()[0]), int(image.get_extent()[3])): np.asarray(image.get_array())
            for image in figure.axes[0].images
        }
    finally:
        plt.close(figure)
    assert shown[0, 0].tolist() == [[1, 0.5, 0.5], [0.5, 0.5, 1]]
    assert shown[1, 0].tolist() == [[0.5]]
    assert shown[0, 1].tolist() == [[1]]
    assert shown[1, 1].tolist() == [[0.5]]


def test_shades_keep_their_order_in_grey(masks):
    figure = tile_map(masks)
    try:
        image = figure.axes[0].images[0]
        red, green, blue = np.moveaxis(image.to_rgba(np.array([[0.5, 1.0]]))[0, :, :3], -1, 0)
    finally:
        plt.close(figure)
    sparse, dense = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert sparse > 0.7
    assert dense < 0.25


def test_a_mask_without_decoder_blocks_says_so():
    figure = tile_map(MaskSet({"head": LinearMask.dense((4, 4))}))
    texts = [text.get_text() for text in figure.axes[0].texts]
    plt.close(figure)
    assert texts == ["No layer of this mask belongs to a decoder block."]

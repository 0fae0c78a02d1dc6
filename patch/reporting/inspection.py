"""What a MaskSet prunes where: a table of its layers, and the figure of its tiles."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pandas as pd
import torch

from patch.reporting.figures.style import placeholder, print_style
from patch.sparsity.maskset import LinearMask, MaskSet
from patch.sparsity.tiles import tile_sums

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TILE = (128, 128)
"""Tiles in which the figure shows layers whose pattern has none."""
_WIDTH, _HEIGHT = 6.1, 8.4
"""Of the maps of a model that fills a page, inches."""


def layer_table(masks: MaskSet) -> pd.DataFrame:
    """One row per layer, in the set's order.

    Columns: layer (its name in the model), block (number of its decoder block; missing where the name has none), module
    (last part of the name), pattern, outputs, inputs, weights, pruned (numbers of them), sparsity (percent), tiles and
    dense_tiles (numbers; missing where the pattern has no tiles).
    """
    rows = []
    for name, mask in masks.linears.items():
        place = re.search(r"\.(\d+)\.", name)
        dense = mask.dense_tiles()
        pruned = mask.size - mask.kept
        rows.append(
            {
                "layer": name,
                "block": int(place[1]) if place else None,
                "module": name.rpartition(".")[2],
                "pattern": str(mask.pattern),
                "outputs": mask.shape[0],
                "inputs": mask.shape[1],
                "weights": mask.size,
                "pruned": pruned,
                "sparsity": 100 * pruned / mask.size,
                "tiles": None if dense is None else dense.numel(),
                "dense_tiles": None if dense is None else int(dense.sum()),
            }
        )
    return pd.DataFrame(rows).astype(dict.fromkeys(("block", "tiles", "dense_tiles"), "Int64"))


def sparsity_by(layers: pd.DataFrame, column: str) -> pd.Series:
    """Sparsity in percent over all weights with the same value in `column` ("block" or "module"), in their order."""
    sums = layers.groupby(column, sort=False)[["pruned", "weights"]].sum()
    return 100 * sums["pruned"] / sums["weights"]


def tile_map(masks: MaskSet) -> Figure:
    """All tiles of a model: decoder blocks down, modules across, in each cell the layer's tiles, outputs down.

    Dark tiles are dense, light ones 2:4; smaller ones at a layer's edges are drawn as large as the others. Where a
    layer has no tiles, what its weights keep in squares of 128 is shown. Beside and above: the sparsity of the block
    and of the module, percent.
    """
    layers = layer_table(masks).dropna(subset=["block"])
    if layers.empty:
        return placeholder("no layer of this mask belongs to a decoder block")
    blocks, modules = sorted(layers["block"].unique()), list(dict.fromkeys(layers["module"]))
    maps = {name: _kept(masks.linears[name]) for name in layers["layer"]}
    lowest = min(0.5, *(float(kept.min()) for kept in maps.values()))
    with print_style():
        import matplotlib.pyplot as plt
        from matplotlib.colors import Normalize
        from matplotlib.patches import Patch

        height = min(_HEIGHT, 0.45 * len(blocks))
        width = min(_WIDTH, 0.9 * len(modules))
        figure, ax = plt.subplots(figsize=(width + 0.9, height + 0.9), layout="constrained")
        shades, norm = plt.get_cmap("Blues"), Normalize(lowest - 0.15 * (1 - lowest), 1)  # light, but not the paper's
        for name, block, module in layers[["layer", "block", "module"]].itertuples(index=False):
            left, top = modules.index(module), blocks.index(block)
            edges = (left + 0.03, left + 0.97, top + 0.94, top + 0.06)
            ax.imshow(maps[name], extent=edges, cmap=shades, norm=norm, interpolation="nearest", aspect="auto")
        _label(ax, layers, len(blocks), modules)
        ax.set(xlim=(0, len(modules)), ylim=(len(blocks), 0))
        kinds = {"dense": 1.0, "2:4": 0.5}
        handles = [Patch(facecolor=shades(norm(kept)), edgecolor="0.4", label=kind) for kind, kept in kinds.items()]
        if {float(value) for kept in maps.values() for value in kept.unique()} <= set(kinds.values()):
            figure.legend(handles=handles, loc="outside lower center", ncols=2)
        else:
            bar = figure.colorbar(ax.images[0], ax=ax, location="bottom", fraction=0.03, pad=0.02, aspect=40)
            bar.set_label("Kept share of a tile's weights")
    return figure


def _label(ax: Axes, layers: pd.DataFrame, blocks: int, modules: list[str]) -> None:
    """Names and sparsity of modules above, of blocks at the sides."""
    by_module, by_block = sparsity_by(layers, "module"), sparsity_by(layers, "block").sort_index()
    names = [f"{name.removesuffix('_proj')}\n{by_module[name]:.1f} %" for name in modules]
    ax.set_xticks([place + 0.5 for place in range(len(modules))], names)
    ax.xaxis.tick_top()
    places = [place + 0.5 for place in range(blocks)]
    ax.set_yticks(places, list(by_block.index))
    ax.set_ylabel("Decoder block")
    side = ax.secondary_yaxis("right")
    side.set_yticks(places, [f"{value:.1f} %" for value in by_block])
    for axis in (ax, side):
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    ax.grid(visible=False)


def _kept(mask: LinearMask) -> torch.Tensor:
    """float [tile rows, tile columns]: share of its weights that each tile keeps, by what the pattern says of it."""
    tiles = mask.dense_tiles()
    if tiles is not None:
        return torch.where(tiles, 1.0, 0.5)
    keep = mask.keep_mask()
    return tile_sums(keep, TILE) / tile_sums(torch.ones_like(keep), TILE)

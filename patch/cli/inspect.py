"""Look into a mask."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patch.artefacts import write_text

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from patch.sparsity.maskset import MaskSet

log = logging.getLogger("patch")


def inspect(
    mask: Annotated[Path, typer.Argument(help="A mask.safetensors of `prune` or `learn`, or beside an export.")],
    csv: Annotated[Path | None, typer.Option(help="File to write: a row per layer.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw all tiles of the model, as PDF and PNG with this name.")
    ] = None,
) -> None:
    """Print what a mask prunes, by decoder block and module, and what it was made from; draw its tiles.

    Reading it verifies it: checksums, shapes, and the pattern in every group.
    """
    from rich.console import Console

    from patch.reporting.figures import write_figure
    from patch.reporting.inspection import layer_table, tile_map
    from patch.sparsity.maskset import MaskSet

    masks = MaskSet.load(mask)
    layers = layer_table(masks)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(_summary(masks, layers), _sparsities(layers), sep="\n")
    if csv:
        write_text(csv, layers.to_csv(index=False))
        log.info("%s", csv)
    if picture:
        name = picture.stem if picture.suffix in (".pdf", ".png") else picture.name
        for path in write_figure(tile_map(masks), name, picture.parent):
            log.info("%s", path)


def _summary(masks: MaskSet, layers: pd.DataFrame) -> Table:
    from rich.table import Table

    recipe = masks.recipe
    target = f" (target {recipe['sparsity']:g} %)" if isinstance(recipe.get("sparsity"), int | float) else ""
    rows = {
        "pattern": ", ".join(f"{name} in {count} layers" for name, count in layers["pattern"].value_counts().items()),
        "realised": f"{100 * masks.sparsity:.3f} %{target}",
        "weights": f"{layers['weights'].sum():,}, of which {layers['pruned'].sum():,} are 0",
        "tiles": f"{layers['tiles'].sum():,}, of which {layers['dense_tiles'].sum():,} are dense",
        "new weights": f"in {sum(mask.values is not None for mask in masks.linears.values())} layers",
        "base model": f"fingerprint {masks.base_fingerprint or 'unknown'}",
        "checksum": masks.checksum,
    }
    if layers["tiles"].isna().all():
        del rows["tiles"]
    if all(mask.values is None for mask in masks.linears.values()):
        del rows["new weights"]
    rows |= {
        name: _plain(value)
        for name, value in recipe.items()
        if name not in ("pattern", "sparsity") and value is not None
    }
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {content}" for name, content in value.items() if content is not None)
    return str(value)


def _sparsities(layers: pd.DataFrame) -> Table:
    """Blocks down, modules across, percent; the last row and column over all weights of a module and block."""
    from rich.table import Table

    from patch.reporting.inspection import sparsity_by

    layers = layers.assign(block=layers["block"].astype("string").fillna("none"))
    modules, blocks = sparsity_by(layers, "module"), sparsity_by(layers, "block")
    cells = layers.pivot_table(index="block", columns="module", values="sparsity", sort=False)
    table = Table("block", title="Sparsity, %", title_justify="left", box=None)
    for name in [*modules.index, "all"]:
        table.add_column(name.removesuffix("_proj"), justify="right")
    for block in blocks.index:
        values = [cells.loc[block, module] for module in modules.index]
        table.add_row(block, *("" if value != value else f"{value:.1f}" for value in values), f"{blocks[block]:.1f}")
    total = 100 * layers["pruned"].sum() / layers["weights"].sum()
    table.add_section()
    table.add_row("all", *(f"{value:.1f}" for value in modules), f"{total:.1f}", style="bold")
    return table

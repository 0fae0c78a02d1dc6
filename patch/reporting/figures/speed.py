"""Measured speed: of generation, beside the published values, and of single layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from patch.benchmarking.options import RANDOM
from patch.reporting.figures.style import legend_below, level_style, panels, placeholder, print_style
from patch.reporting.published import load_throughput

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def throughput(generation: pd.DataFrame) -> Figure:
    """Tokens per second over those of the dense model, by sparsity; a panel for each model of ours, one for the paper.

    generation: `study.Study.generation`; random tiles only, where it has both. A series per batch, lengths (prompt +
    generated tokens), GPU and stack.
    """
    if "mask" in generation and generation["mask"].eq(RANDOM).any():
        generation = generation[generation["mask"] == RANDOM]
    theirs = load_throughput().assign(model="published: LLaMA-2-7B")
    table = pd.concat([generation, theirs], ignore_index=True)
    gpu = table["gpu"].fillna("").map(_short) if "gpu" in table else pd.Series("", index=table.index)
    if "stack" in table:
        gpu = gpu.str.cat(table["stack"].map(", {}".format, na_action="ignore").fillna(""))
    table["series"] = [
        f"{row.prefill_tokens:.0f} + {row.generated_tokens:.0f}, batch {row.batch:.0f}{f', {name}' if name else ''}"
        for row, name in zip(table.itertuples(), gpu, strict=True)
    ]
    figure = _speed_ups(table, "model", "series", "sparsity_percent", "Sparsity, %")
    for ax in figure.axes[1:]:
        ax.sharex(figure.axes[0])
        ax.sharey(figure.axes[0])
    figure.axes[0].autoscale()
    return figure


def layer_speed(layers: pd.DataFrame) -> Figure:
    """Speed of a layer over that of the dense one, by tokens, a panel per shape, a series per sparsity.

    layers: `study.Study.layers`; of several kernels the one that is fastest at a point. Sparsities are rounded to whole
    percents, because small layers cannot meet them exactly.
    """
    if layers.empty:
        return placeholder("no layers.csv in the benchmark folder")
    table = layers.assign(
        shape=[f"{row.out_features:.0f} × {row.in_features:.0f}" for row in layers.itertuples()],
        series=layers["sparsity_percent"].round().map("{:g} %".format),
    )
    table = table.groupby(["shape", "series", "tokens"], sort=False)["speedup"].max().reset_index()
    figure = _speed_ups(table, "shape", "series", "tokens", "Tokens")
    ticks = sorted(table["tokens"].unique())
    for ax in figure.axes:
        ax.sharex(figure.axes[0])
        ax.sharey(figure.axes[0])
    figure.axes[0].autoscale()
    for ax in figure.axes:
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{n / 1024:g}k" if n >= 1024 else f"{n:g}" for n in ticks])
        ax.minorticks_off()
    return figure


def _speed_ups(table: pd.DataFrame, panel: str, series: str, over: str, label: str) -> Figure:
    names = list(dict.fromkeys(table[panel]))
    lines = list(dict.fromkeys(table[series]))
    with print_style():
        import matplotlib.pyplot as plt

        figure, axes = panels(len(names))
        for ax, name in zip(axes, names, strict=True):
            for number, line in enumerate(lines):
                own = table[(table[panel] == name) & (table[series] == line)].sort_values(over)
                if len(own):
                    ax.plot(own[over], own["speedup"], **level_style(number))
            ax.axhline(1, color="black", linewidth=0.9, zorder=1)
            ax.set_title(name, loc="left")
            ax.set_xlabel(label)
            if ax.get_subplotspec().is_first_col():  # type: ignore[union-attr]
                ax.set_ylabel("Speed over dense ↑")
        handles = [plt.Line2D([], [], **level_style(n), label=line) for n, line in enumerate(lines)]
        legend_below(figure, handles, width=2.2 if over == "sparsity_percent" else 0.9)
    return figure


def _short(gpu: str) -> str:
    """A GPU without its maker."""
    return gpu.removeprefix("NVIDIA ")

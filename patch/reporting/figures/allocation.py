"""Where the zeros are: by layer, by depth, and by kind of layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from patch.methods import METHODS
from patch.reporting.allocation import gathered, layers
from patch.reporting.figures.style import COLUMN, legend_below, level_style, panels, placeholder, print_style
from patch.reporting.summary import pattern_title, rows_of
from patch.reporting.targets import FIGURES
from patch.sparsity.patterns import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def sparsity_by_layer(runs: pd.DataFrame, sparsity: float | None = None) -> Figure:
    """Realised sparsity of every layer in percent: decoder blocks by kinds of layer, a panel per model and method.

    sparsity: target in percent; None for the one that most methods were run at, of equals the largest.
    Of a method's patterns the freest is shown (tiles, then unstructured), and its default variant and first seed before
    others. N:M, which is equal everywhere by construction, is shown only where there is nothing else.
    """
    table = layers(runs)
    if table.empty:
        return placeholder("no pruned layers in this run")
    panels = _layer_panels(table, sparsity)
    models = list(dict.fromkeys(model for model, _ in panels))
    methods = [name for name in METHODS if any(name == method for _, method in panels)]
    blocks, kinds = table["block"].max() + 1, table["kind"].nunique()
    with print_style():
        import matplotlib.pyplot as plt

        width = max(1.3 * len(models), COLUMN - 0.9, min(7.0 - 0.9, 0.085 * blocks * len(models)))
        size = (width + 0.9, 0.5 + len(methods) * (0.4 + 0.13 * kinds))
        figure, axes = plt.subplots(len(methods), len(models), figsize=size, squeeze=False, layout="constrained")
        largest = max(50.0, table["percent"].max())
        drawn: list[Axes] = []
        for row, method in enumerate(methods):
            for column, model in enumerate(models):
                ax = axes[row][column]
                heading = [model] if row == 0 and len(models) > 1 else []
                panel = panels.get((model, method))
                if panel is None:
                    ax.set_axis_off()
                else:
                    drawn.append(ax)
                    _draw_layers(ax, panel, largest, width / len(models), with_kinds=column == 0)
                    heading.append(_layer_heading(panel, short=len(models) > 1))
                    if len(models) == 1:
                        ax.set_title(_span(panel["percent"]), loc="right", color="0.35")
                ax.set_title("\n".join(heading), loc="left")
        figure.supxlabel("Decoder block", fontsize=plt.rcParams["axes.labelsize"])
        bar = figure.colorbar(drawn[0].collections[0], ax=axes, fraction=0.05, pad=0.02, aspect=30)
        bar.set_label("Realised sparsity, %")
    return figure


def sparsity_by_depth(runs: pd.DataFrame) -> Figure:
    """Realised sparsity of every decoder block in percent, a panel per model and method, a line per target sparsity.

    Bands are the standard deviation over seeds, where there are several.
    """
    return _gathered(runs, "block", "Decoder block")


def sparsity_by_module(runs: pd.DataFrame) -> Figure:
    """Realised sparsity of every kind of layer in percent, a panel per model and method, a series per target sparsity.

    Bars are the standard deviation over seeds, where there are several.
    """
    return _gathered(runs, "kind", "")


def _gathered(runs: pd.DataFrame, by: str, label: str) -> Figure:
    rows = gathered(layers(rows_of(runs, FIGURES[f"sparsity_by_{'depth' if by == 'block' else 'module'}"])), by)
    if rows.empty:
        return placeholder("no learned tiles in this run")
    targets = sorted(rows["sparsity"].unique(), reverse=True)
    keys = rows[["model", "title", "pattern"]].drop_duplicates()
    with print_style():
        import matplotlib.pyplot as plt

        figure, axes = panels(len(keys))
        for ax, (model, title, pattern) in zip(axes, keys.itertuples(index=False, name=None), strict=True):
            own = rows[(rows["model"] == model) & (rows["title"] == title) & (rows["pattern"] == pattern)]
            for number, target in enumerate(targets):
                series = own[own["sparsity"] == target]
                look, spread = level_style(number), series["spread"].fillna(0)
                if by == "block":
                    ax.plot(series[by], series["percent"], **look, markevery=max(1, len(series) // 8))
                    low, high = series["percent"] - spread, series["percent"] + spread
                    ax.fill_between(series[by], low, high, color=look["color"], alpha=0.2, linewidth=0)
                else:
                    look["linestyle"] = "none"
                    ax.errorbar(series[by], series["percent"], yerr=spread, **look)
                ax.axhline(target, color="0.6", linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
            ax.set_title(f"{model}, {title}" if keys["model"].nunique() > 1 else title, loc="left")
            ax.set_ylim(0, max(52.0, rows["percent"].max() * 1.04))
            ax.set_xlabel(label)
        axes[0].set_ylabel("Realised sparsity, %")
        handles = [plt.Line2D([], [], **level_style(n), label=f"target {t:g} %") for n, t in enumerate(targets)]
        if by == "kind":
            for handle in handles:
                handle.set_linestyle("none")
        legend_below(figure, handles, width=1.1)
    return figure


def _layer_panels(table: pd.DataFrame, sparsity: float | None) -> dict[tuple[str, str], pd.DataFrame]:
    """The one cell to show of every model and method."""
    freedom = {"tiles": 0, "unstructured": 1, "n:m": 2}
    table = table.assign(freedom=table["pattern"].map(lambda pattern: freedom[Pattern.parse(pattern).kind]))
    best = table.groupby(["model", "method"])["freedom"].transform("min")
    table = table[table["freedom"] == best]
    uneven = table["freedom"] < freedom["n:m"]
    table = table[uneven] if uneven.any() else table
    if sparsity is None:
        runs_of = table.drop_duplicates(["model", "method", "sparsity"])["sparsity"].value_counts()
        sparsity = runs_of[runs_of == runs_of.max()].index.max()
    panels = {}
    for (model, method), rows in table.groupby(["model", "method"], sort=False):
        nearest = (rows["sparsity"] - sparsity).abs()
        rows = rows[nearest == nearest.min()]
        rows = rows[rows["pattern"] == rows["pattern"].iloc[0]]
        variant = "default" if (rows["variant"] == "default").any() else rows["variant"].iloc[0]
        rows = rows[rows["variant"] == variant]
        panels[str(model), str(method)] = rows[rows["seed"] == rows["seed"].iloc[0]]
    return panels


def _draw_layers(ax: Axes, panel: pd.DataFrame, largest: float, inches: float, *, with_kinds: bool) -> None:
    import seaborn as sns

    grid = panel.pivot_table(index="kind", columns="block", values="percent", sort=False).sort_index(axis=1)
    line = 0.25 if inches / grid.shape[1] > 0.06 else 0
    sns.heatmap(grid, ax=ax, vmin=0, vmax=largest, cmap="Blues", cbar=False, linewidths=line)
    for spine in ax.spines.values():
        spine.set(visible=True, linewidth=0.5, color="0.5")
    ax.set(xlabel="", ylabel="")
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 1000) if grid.shape[1] / step <= inches / 0.25)
    ax.set_xticks([position + 0.5 for position in range(0, grid.shape[1], step)], list(grid.columns)[::step])
    ax.tick_params(length=0, labelrotation=0)
    if not with_kinds:
        ax.set_yticks([])


def _layer_heading(panel: pd.DataFrame, *, short: bool) -> str:
    row = panel.iloc[0]
    parts = [row["title"]] if short else [row["title"], pattern_title(row["pattern"])]
    parts += [row["variant"]] if row["variant"] != "default" else []
    return ", ".join([*parts, f"{row['sparsity']:g} %"])


def _span(values: pd.Series) -> str:
    """The range of the values, which tells flat panels from nearly flat ones."""
    low, high = f"{values.min():.1f}", f"{values.max():.1f}"
    return f"all {low} %" if low == high else f"{low}–{high} %"

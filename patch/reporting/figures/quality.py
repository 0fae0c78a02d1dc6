"""Quality over sparsity: perplexity, and mean accuracy, a panel per model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from patch.experiments import TASKS, UNCOMPRESSED
from patch.methods import METHODS
from patch.reporting.figures.style import COLUMN, look, placeholder, print_style, shade
from patch.reporting.summary import KEYS, pattern_title, power_of_ten, scores, settings, tasks_of, texts_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BROKEN = 1e4
"""Perplexities above say no more than that; they lie on the upper edge of a figure, with their number."""
CHANCE_OF_EIGHT = 31.25
"""Mean accuracy, percent, of guessing on the paper's eight tasks: six have four answers, two have two."""


def perplexity_vs_sparsity(runs: pd.DataFrame) -> Figure:
    """Perplexity over realised sparsity in percent, a panel per text (rows) and model (columns).

    The dense model is a horizontal line; bars are one standard error. The axis is logarithmic where the values of a
    panel range over more than a factor of 5, and ends at BROKEN.
    """
    found = scores(runs)
    found = found[found["metric"] == "perplexity"]
    if found.empty:
        return placeholder("no perplexities in this run")
    texts = texts_of(found)
    return _over_sparsity(runs, found, texts, [f"Perplexity on {text} ↓" for text in texts], logarithmic=True)


def accuracy_vs_sparsity(runs: pd.DataFrame) -> Figure:
    """Mean accuracy in percent over realised sparsity in percent, a panel per model; bars are one standard error.

    The dense model is a horizontal line, and so is chance where the mean is over all eight tasks.
    """
    found = scores(runs)
    count = len(tasks_of(found))
    found = found[(found["metric"] == "acc") & (found["subject"] == "mean")]
    if found.empty:
        return placeholder("no zero-shot tasks in this run")
    label = f"Mean accuracy of {count} tasks, % ↑" if count > 1 else "Accuracy, % ↑"
    chance = CHANCE_OF_EIGHT if count == len(TASKS) else None
    return _over_sparsity(runs, found, ["mean"], [label], chance=chance)


def _over_sparsity(
    runs: pd.DataFrame,
    found: pd.DataFrame,
    subjects: list[str],
    labels: list[str],
    *,
    logarithmic: bool = False,
    chance: float | None = None,
) -> Figure:
    table = _one_tile_size(settings(runs).merge(found, on=KEYS))
    models = list(dict.fromkeys(table["model"]))
    with print_style():
        import matplotlib.pyplot as plt

        width = COLUMN if len(models) == 1 else min(7.0, 0.4 + 2.3 * len(models))
        columns = min(len(models), 3)
        folds = -(-len(models) // columns)  # more than three models continue below
        rows = len(subjects) * folds
        legend_columns = int(width / 1.6)
        legend_rows = -(-(len(_legend_names(table)) + 2) // legend_columns)
        size = (width, 0.3 + rows * 2.1 + 0.2 * legend_rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for ax in axes.flat[: rows * columns]:
            ax.set_visible(False)
        for line, subject in enumerate(subjects):
            for number, model in enumerate(models):
                ax = axes[line * folds + number // columns][number % columns]
                ax.set_visible(True)
                panel = table[(table["model"] == model) & (table["subject"] == subject)]
                _draw_panel(ax, panel, logarithmic, chance)
                if len(models) > 1 and line * folds + number // columns < folds:
                    ax.set_title(model, loc="left")
                if number % columns == 0:
                    ax.set_ylabel(labels[line])
                if line == len(subjects) - 1 and number + columns >= len(models):
                    ax.set_xlabel("Realised sparsity, %")
        _legend(figure, table, legend_columns, chance)
    return figure


def _one_tile_size(table: pd.DataFrame) -> pd.DataFrame:
    """Of the sizes of tiles that a model's method was run with, the first; of compressed weights none."""
    table = table[table["compression"] == UNCOMPRESSED]
    tiles = table["pattern"].str.startswith("tiles").astype(bool)
    first = table[tiles].drop_duplicates(["model", "method"])[["model", "method", "pattern"]]
    return pd.concat([table[~tiles], table[tiles].merge(first)], ignore_index=True)


def _draw_panel(ax: Axes, panel: pd.DataFrame, logarithmic: bool, chance: float | None) -> None:
    if logarithmic:
        _name_broken(ax, panel[panel["value"] > BROKEN])
        panel = panel.assign(
            stderr=panel["stderr"].where(panel["value"] <= BROKEN), value=panel["value"].clip(upper=BROKEN)
        )
    pruned = panel[panel["method"] != "dense"]
    for key, series in pruned.groupby(["method", "pattern", "variant"], sort=False):
        method, pattern, variant = map(str, key)
        style = look(method, pattern, shade(pruned, method, variant))
        series = series.sort_values("realised_sparsity")
        ax.errorbar(
            series["realised_sparsity"],
            series["value"],
            yerr=series["stderr"].fillna(0),
            color=style.color,
            marker=style.marker,
            linestyle=style.line,
            markerfacecolor=style.color if style.filled else "white",
            markeredgecolor="black" if style.line == "none" else style.color,
            markeredgewidth=0.6 if style.line == "none" else 0.9,
            markersize=5 if style.line == "none" else 4.5,
            zorder=3,
        )
    for value in panel.loc[panel["method"] == "dense", "value"]:
        ax.axhline(value, color="black", linewidth=0.9, zorder=1)
    if chance is not None:
        ax.axhline(chance, color="0.5", linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    values = panel["value"]
    if logarithmic and values.max() > 5 * values.min():
        _logarithmic(ax, values)
    ax.margins(x=0.08)


def _name_broken(ax: Axes, broken: pd.DataFrame) -> None:
    """The numbers of values that are drawn on the edge."""
    for sparsity, value in zip(broken["realised_sparsity"], broken["value"], strict=True):
        text, beside = f"{power_of_ten(value, 0)} ↑", (-5, 0)
        ax.annotate(text, (sparsity, BROKEN), beside, textcoords="offset points", ha="right", va="center")


def _logarithmic(ax: Axes, values: pd.Series) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    wide = values.max() > 100 * values.min()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}".replace(",", "\u2009")))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, table: pd.DataFrame, columns: int, chance: float | None) -> None:
    """One entry per series; their look says method and pattern at once."""
    from matplotlib.lines import Line2D

    handles = []
    if (table["method"] == "dense").any():
        handles.append(Line2D([], [], color="black", linewidth=0.9, label="Dense"))
    if chance is not None:
        handles.append(Line2D([], [], color="0.5", linewidth=0.9, linestyle=(0, (1, 2)), label="Chance"))
    pruned = table[table["method"] != "dense"]
    for (method, pattern, variant), name in _legend_names(table).items():
        style = look(method, pattern, shade(pruned, method, variant))
        alone = style.line == "none"
        handles.append(
            Line2D(
                [],
                [],
                label=name,
                color=style.color,
                marker=style.marker,
                linestyle=style.line,
                markerfacecolor=style.color if style.filled else "white",
                markeredgecolor="black" if alone else style.color,
                markeredgewidth=0.6 if alone else 0.9,
                markersize=5 if alone else 4.5,
            )
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3.2, columnspacing=1.2)


def _legend_names(table: pd.DataFrame) -> dict[tuple[str, str, str], str]:
    pruned = table[table["method"] != "dense"]
    order = {name: rank for rank, name in enumerate(METHODS)}
    series = pruned.drop_duplicates(["method", "pattern", "variant"]).sort_values(
        ["pattern", "method"],
        key=lambda column: column.map(order) if column.name == "method" else column,
        kind="stable",
    )
    names = {}
    for title, *key in series[["title", "method", "pattern", "variant"]].itertuples(index=False):
        method, pattern, variant = map(str, key)
        named = "" if variant == "default" else f", {variant}"
        names[method, pattern, variant] = f"{title}, {pattern_title(pattern)}{named}"
    return names

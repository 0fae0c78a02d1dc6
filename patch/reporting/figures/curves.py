"""How masks were learned: the curves of the optimiser's steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from patch.methods import METHODS
from patch.reporting.figures.style import STYLES, placeholder, print_style
from patch.reporting.summary import pattern_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SERIES = ["title", "method", "pattern", "sparsity", "variant"]
_LINES = ("-", "--", ":", "-.")


def training_curves(curves: pd.DataFrame) -> Figure:
    """How masks were learned: cross-entropy and density over the steps, a row per model; below, the temperatures.

    Cross-entropy per token as a running mean over a fortieth of the steps, of up to four series on top of the values
    themselves; dotted lines are the targets of the density. Of several seeds the first is shown.
    """
    if curves.empty:
        return placeholder("no masks were learned in this run")
    table = curves[curves["seed"] == curves.groupby("model")["seed"].transform("first")]
    models = list(dict.fromkeys(table["model"]))
    styles = _curve_styles(table)
    with print_style():
        import matplotlib.pyplot as plt

        rows = len(models) + 1
        size = (7.0, 0.3 + 1.7 * rows + 0.2 * -(-len(styles) // 3))
        figure, axes = plt.subplots(rows, 2, figsize=size, layout="constrained")
        for (left, right), model in zip(axes, models, strict=False):
            own = table[table["model"] == model]
            _draw_cross_entropy(left, own, styles)
            _draw_curve(right, own, "density", "Sampled density", styles)
            for sparsity in own["sparsity"].unique():
                right.axhline(1 - sparsity / 100, color="0.5", linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
            if len(models) > 1:
                left.set_title(model, loc="left")
        once = table[table["model"] == table.groupby(_SERIES)["model"].transform("first")]
        _draw_curve(axes[-1][0], once, "tile_temperature", "Tile temperature", styles)
        _draw_curve(axes[-1][1], once, "pattern_temperature", "2:4 temperature", styles)
        for column in axes.T:
            [ax for ax in column if ax.get_visible()][-1].set_xlabel("Optimiser step")
        handles = [plt.Line2D([], [], **style) for style in styles.values()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=3.2, columnspacing=1.2)
    return figure


def _curve_styles(table: pd.DataFrame) -> dict[tuple[Any, ...], dict[str, Any]]:
    """How each series is drawn, label included, by the columns _SERIES.

    Colour and marker tell the method, as everywhere; here the line tells a method's settings apart.
    """
    import seaborn as sns

    keys = table[_SERIES].drop_duplicates().sort_values("sparsity", ascending=False, kind="stable")
    styles: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name in METHODS:
        for number, key in enumerate(keys[keys["method"] == name].itertuples(index=False, name=None)):
            title, method, pattern, sparsity, variant = key
            place, marker, _ = STYLES[method]
            parts = [title, pattern_title(pattern), f"{sparsity:g} %", *([variant] if variant != "default" else [])]
            styles[key] = {
                "label": ", ".join(parts),
                "color": sns.color_palette("colorblind")[place],
                "marker": marker,
                "markersize": 3.5,
                "linestyle": _LINES[number % len(_LINES)],
            }
    return styles


def _draw_curve(
    ax: Axes, table: pd.DataFrame, name: str, label: str, styles: dict[tuple[Any, ...], dict[str, Any]]
) -> None:
    """One column over the steps, a line per series; the panel stays away where no series has it."""
    known = table[table[name].notna()]
    for number, (key, series) in enumerate(known.groupby(_SERIES, sort=False)):
        every = max(1, len(series) // 6)
        ax.plot(series["step"], series[name], markevery=(number * every // 8 % every, every), **styles[key])
    ax.set_ylabel(label)
    ax.set_visible(not known.empty)


def _draw_cross_entropy(ax: Axes, table: pd.DataFrame, styles: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """Its running mean, over the faint values themselves; the steep first tenth may rise above the panel."""
    table = table.copy()
    series_of = table.groupby(_SERIES, sort=False)
    for key, series in series_of:
        if series_of.ngroups <= 4:  # of more they hide each other
            ax.plot(series["step"], series["cross_entropy"], color=styles[key]["color"], linewidth=0.5, alpha=0.25)
        mean = series["cross_entropy"].rolling(max(1, len(series) // 40), center=True, min_periods=1).mean()
        table.loc[series.index, "cross_entropy"] = mean
    _draw_curve(ax, table, "cross_entropy", "Cross-entropy, nats ↓", styles)
    later = table.loc[table["step"] >= table["step"].max() / 10, "cross_entropy"]
    ax.set_ylim(later.min() - 0.1 * (later.max() - later.min()), later.max() + 0.1 * (later.max() - later.min()))

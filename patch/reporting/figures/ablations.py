"""The paper's ablations: perplexity by tile size, density target, frozen mask and tile prior."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from patch.methods import METHODS
from patch.reporting.comparisons import Comparisons
from patch.reporting.figures.style import legend_below, level_style, panels, placeholder, print_style
from patch.reporting.published import Published, load_published
from patch.reporting.study import Study
from patch.reporting.summary import rows_of, scores, settings, texts_of
from patch.reporting.targets import FIGURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {
    "tile_size": "Edge of the tiles, weights",
    "density_target": "Density target",
    "frozen_mask": "Frozen 2:4 mask",
    "tile_prior": "Prior of the tiles",
}
_ONE_SHOT = ("maskllm", "sparsegpt", "wanda", "magnitude", "random", "none")


def ablation(study: Study, name: str) -> Figure:
    """Perplexity on the first text by what the ablation `name` varies, a panel per model, a series per sparsity.

    Hollow points are published values. Error bars: standard deviation over seeds; with one seed, the standard error of
    the paired difference to the leftmost choice.
    """
    nothing = "no model of this run was measured with more than one choice"
    runs = rows_of(study.runs, FIGURES[name])
    runs = runs[runs["method"] != "dense"]
    if runs.empty:
        return placeholder(nothing)
    rows = _rows(settings(runs), name)
    published = Published(load_published())
    rows["published"] = [_published(published, row) for row in rows.to_dict("records")]
    found, compared = scores(runs), Comparisons(study)
    text = next(iter(texts_of(found)), "")
    own = found[(found["metric"] == "perplexity") & (found["subject"] == text)]
    rows = rows.merge(own[["model", "sparsity", "method", "pattern", "variant", "value", "spread"]], how="left")
    rows = rows[rows["value"].notna() | rows["published"].notna()]
    choices = rows.groupby("model")["choice"].nunique()
    rows = rows[rows["model"].map(choices) > 1]
    if rows.empty:
        return placeholder(nothing)
    rows = rows.sort_values("rank", kind="stable")
    sparsities = sorted(rows["sparsity"].unique(), reverse=True)
    models = list(dict.fromkeys(rows["model"]))
    with print_style():
        import matplotlib.pyplot as plt

        figure, axes = panels(len(models))
        for ax, model in zip(axes, models, strict=True):
            of_model = rows[rows["model"] == model]
            names = list(dict.fromkeys(of_model["choice"]))
            for number, sparsity in enumerate(sparsities):
                series = of_model[of_model["sparsity"] == sparsity]
                at = series["choice"].map(names.index).astype(float)
                look = level_style(number)
                if (
                    name != "tile_size"
                ):  # choices without an order: points beside each other, no line from one to the next
                    at += 0.12 * (number - (len(sparsities) - 1) / 2)
                    look["linestyle"] = "none"
                ours = series["value"].notna()
                errors = _errors(series[ours], compared, text)
                ax.errorbar(at[ours], series.loc[ours, "value"], yerr=errors, **look, zorder=3)
                look |= {"linestyle": "none", "markerfacecolor": "white", "markersize": 5.5}
                ax.plot(at, series["published"], **look, zorder=2)
            ax.set_xticks(range(len(names)), names)
            ax.set_xlim(-0.5, len(names) - 0.5)
            ax.set_xlabel(AXES[name])
            if len(models) > 1:
                ax.set_title(model, loc="left")
        axes[0].set_ylabel(f"Perplexity on {text or 'wikitext2'} ↓")
        handles = [plt.Line2D([], [], **level_style(n), label=f"{s:g} %") for n, s in enumerate(sparsities)]
        if name != "tile_size":
            for handle in handles:
                handle.set_linestyle("none")
        if rows["published"].notna().any():
            hollow: dict[str, Any] = {"marker": "o", "linestyle": "none", "markerfacecolor": "white", "color": "0.3"}
            handles.append(plt.Line2D([], [], **hollow, label="published"))
        legend_below(figure, handles, width=0.8)
    return figure


def _rows(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The settings with `choice`, what is varied, as printed, and `rank`, its place from the left."""
    choices = [_choice(row, name) for row in table.to_dict("records")]
    return table.assign(choice=[text for text, _ in choices], rank=[rank for _, rank in choices])


def _choice(row: dict[Any, Any], name: str) -> tuple[str, int]:
    if name == "tile_size":
        size = row["pattern"].partition(":")[2]
        height, _, width = size.partition("x")
        return (height if height == width else size), -int(height)
    if name == "density_target":
        return ("per block", 1) if row["variant"] == "per-block" else ("global", 0)
    if name == "frozen_mask" and row["method"] == "patch_joint":
        return "joint", len(_ONE_SHOT)
    default = "maskllm" if name == "frozen_mask" else "sparsegpt"
    method = default if row["variant"] == "default" else row["variant"].partition("-")[2]
    title = METHODS[method].title if method in METHODS else method
    return title, _ONE_SHOT.index(method) if method in _ONE_SHOT else len(_ONE_SHOT)


def _published(published: Published, row: dict[Any, Any]) -> float:
    found = published.get(row, "perplexity", "wikitext2")
    return math.nan if found is None else found[0]


def _errors(series: pd.DataFrame, compared: Comparisons, text: str) -> list[float]:
    rows = series.to_dict("records")
    errors = []
    for row in rows:
        error = row["spread"]
        if pd.isna(error) and row is not rows[0]:
            difference = compared.between(row, rows[0], "perplexity", text)
            error = difference.stderr if difference and difference.paired else math.nan
        errors.append(0.0 if pd.isna(error) else error)
    return errors

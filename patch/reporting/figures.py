"""The figures: functions of the runs table and the table of curves, and one writer of PDF and PNG.

They carry no titles (captions are in the report), and can be told apart in grey and by colour-blind readers: every
method has its own marker and line style beside its colour, the same in all figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from patch.artefacts import atomic_path
from patch.experiments import TASKS
from patch.methods import METHODS
from patch.reporting.summary import KEYS, pattern_title, scores, settings, tasks_of, texts_of
from patch.sparsity.patterns import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHANCE_OF_EIGHT = 31.25
"""Mean accuracy, percent, of guessing on the paper's eight tasks: six have four answers, two have two."""

COLUMN = 3.3
"""Width of a paper's column, inches."""

# method: (place in seaborn's colour-blind palette, marker, line style); PATCH has the solid lines
_STYLES: dict[str, tuple[int, str, Any]] = {
    "random": (6, "X", (0, (1, 3))),
    "magnitude": (1, "s", "--"),
    "wanda": (2, "D", "-."),
    "sparsegpt": (3, "v", ":"),
    "thanos": (5, "^", (0, (5, 1))),
    "proxsparse": (7, "<", (0, (3, 1, 1, 1))),
    "maskllm": (4, ">", (0, (1, 1))),
    "patch_joint": (0, "o", "-"),
    "patch_tile": (9, "P", "-"),
    "fine_tune": (8, "h", (0, (3, 1))),
    "released": (0, "*", (0, (2, 1))),
}


def perplexity_vs_sparsity(runs: pd.DataFrame) -> Figure:
    """Perplexity over realised sparsity in percent, a panel per text (rows) and model (columns).

    The dense model is a horizontal line; bars are one standard error. The axis is logarithmic where the values of a
    panel range over more than a factor of 5.
    """
    found = scores(runs)
    found = found[found["metric"] == "perplexity"]
    if found.empty:
        return _placeholder("no perplexities in this run")
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
        return _placeholder("no zero-shot tasks in this run")
    label = f"Mean accuracy of {count} tasks, % ↑" if count > 1 else "Accuracy, % ↑"
    chance = CHANCE_OF_EIGHT if count == len(TASKS) else None
    return _over_sparsity(runs, found, ["mean"], [label], chance=chance)


def sparsity_by_layer(runs: pd.DataFrame, sparsity: float | None = None) -> Figure:
    """Realised sparsity of every layer in percent: decoder blocks by kinds of layer, a panel per model and method.

    sparsity: target in percent; None for the one that most methods were run at, of equals the largest.
    Of a method's patterns the freest is shown (tiles, then unstructured, then N:M, which is equal everywhere by
    construction), and its default variant and first seed before others.
    """
    table = _layers(runs)
    if table.empty:
        return _placeholder("no pruned layers in this run")
    panels = _layer_panels(table, sparsity)
    models = list(dict.fromkeys(model for model, _ in panels))
    methods = [name for name in METHODS if any(name == method for _, method in panels)]
    blocks, kinds = table["block"].max() + 1, table["kind"].nunique()
    with _style():
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


def training_curves(curves: pd.DataFrame) -> Figure:
    """How masks were learned: cross-entropy and density over the steps, a row per model; below, the temperatures.

    Cross-entropy per token as a running mean over a fortieth of the steps, on top of the values themselves; dotted
    lines are the targets of the density. Of several seeds the first is shown.
    """
    if curves.empty:
        return _placeholder("no masks were learned in this run")
    table = curves[curves["seed"] == curves.groupby("model")["seed"].transform("first")]
    models = list(dict.fromkeys(table["model"]))
    styles = _curve_styles(table)
    with _style():
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


def write_figures(runs: pd.DataFrame, curves: pd.DataFrame, directory: Path | str) -> list[Path]:
    """Draw every figure of the report into `directory` as NAME.pdf and NAME.png (300 dpi); return the paths."""
    drawn: dict[str, Callable[[], Figure]] = {
        "perplexity_vs_sparsity": lambda: perplexity_vs_sparsity(runs),
        "accuracy_vs_sparsity": lambda: accuracy_vs_sparsity(runs),
        "sparsity_by_layer": lambda: sparsity_by_layer(runs),
        "training_curves": lambda: training_curves(curves),
    }
    return [path for name, draw in drawn.items() for path in write_figure(draw(), name, directory)]


def write_figure(figure: Figure, name: str, directory: Path | str) -> list[Path]:
    """Write NAME.pdf, with TrueType fonts, and NAME.png (300 dpi), close the figure and return the paths.

    The same figure gives the same bytes: no dates, no versions inside.
    """
    import matplotlib.pyplot as plt

    paths = [Path(directory) / f"{name}.pdf", Path(directory) / f"{name}.png"]
    nothing: dict[str, Any] = {
        ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
        ".png": {"Software": None},
    }
    try:
        with _style():
            for path in paths:
                with atomic_path(path) as temporary:
                    figure.savefig(temporary, dpi=300, metadata=nothing[path.suffix])
    finally:
        plt.close(figure)
    return paths


@dataclass(frozen=True)
class _Look:
    """How a series is drawn."""

    color: Any
    marker: str
    line: Any
    filled: bool


def _over_sparsity(
    runs: pd.DataFrame,
    found: pd.DataFrame,
    subjects: list[str],
    labels: list[str],
    *,
    logarithmic: bool = False,
    chance: float | None = None,
) -> Figure:
    table = settings(runs).merge(found, on=KEYS)
    models = list(dict.fromkeys(table["model"]))
    with _style():
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


def _draw_panel(ax: Axes, panel: pd.DataFrame, logarithmic: bool, chance: float | None) -> None:
    pruned = panel[panel["method"] != "dense"]
    for key, series in pruned.groupby(["method", "pattern", "variant"], sort=False):
        method, pattern, variant = map(str, key)
        look = _look(method, pattern, _shade(pruned, method, variant))
        series = series.sort_values("realised_sparsity")
        ax.errorbar(
            series["realised_sparsity"],
            series["value"],
            yerr=series["stderr"].fillna(0),
            color=look.color,
            marker=look.marker,
            linestyle=look.line,
            markerfacecolor=look.color if look.filled else "white",
            markeredgecolor="black" if look.line == "none" else look.color,
            markeredgewidth=0.6 if look.line == "none" else 0.9,
            markersize=5 if look.line == "none" else 4.5,
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
        look = _look(method, pattern, _shade(pruned, method, variant))
        alone = look.line == "none"
        handles.append(
            Line2D(
                [],
                [],
                label=name,
                color=look.color,
                marker=look.marker,
                linestyle=look.line,
                markerfacecolor=look.color if look.filled else "white",
                markeredgecolor="black" if alone else look.color,
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


def _look(method: str, pattern: str, shade: float) -> _Look:
    """Colour and marker tell the method. N:M is a filled point without a line, tiles filled, unstructured hollow."""
    import seaborn as sns

    place, marker, line = _STYLES[method]
    color = tuple(part + (1 - part) * shade for part in sns.color_palette("colorblind")[place])
    kind = Pattern.parse(pattern).kind
    return _Look(color, marker, "none" if kind == "n:m" else line, kind != "unstructured")


def _shade(pruned: pd.DataFrame, method: str, variant: str) -> float:
    """How much lighter a variant is drawn than the method's default."""
    variants = sorted(pruned.loc[pruned["method"] == method, "variant"].unique(), key=lambda name: name != "default")
    return 0.6 * variants.index(variant) / len(variants)


_SERIES = ["title", "method", "pattern", "sparsity", "variant"]
_LINES = ("-", "--", ":", "-.")


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
            place, marker, _ = _STYLES[method]
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
    for key, series in table.groupby(_SERIES, sort=False):
        ax.plot(series["step"], series["cross_entropy"], color=styles[key]["color"], linewidth=0.5, alpha=0.25)
        mean = series["cross_entropy"].rolling(max(1, len(series) // 40), center=True, min_periods=1).mean()
        table.loc[series.index, "cross_entropy"] = mean
    _draw_curve(ax, table, "cross_entropy", "Cross-entropy, nats ↓", styles)
    later = table.loc[table["step"] >= table["step"].max() / 10, "cross_entropy"]
    ax.set_ylim(later.min() - 0.1 * (later.max() - later.min()), later.max() + 0.1 * (later.max() - later.min()))


def _layers(runs: pd.DataFrame) -> pd.DataFrame:
    """Sparsity of every layer: the settings' columns and seed, title, block, kind and percent."""
    rows = runs[(runs["metric"] == "sparsity") & (runs["subject"] != "model") & (runs["status"] == "done")].copy()
    parts = rows["subject"].str.extract(r"\.(?P<block>\d+)\.(?:.*\.)?(?P<kind>[^.]+)$")
    rows["block"] = pd.to_numeric(parts["block"])
    rows["kind"] = parts["kind"].str.replace(r"_proj$", "", regex=True)
    rows["percent"] = 100 * rows["value"].astype(float)
    rows["sparsity"] = rows["sparsity"].astype(float)
    return rows.dropna(subset=["block"]).astype({"block": int})[[*KEYS, "seed", "title", "block", "kind", "percent"]]


def _layer_panels(table: pd.DataFrame, sparsity: float | None) -> dict[tuple[str, str], pd.DataFrame]:
    """The one cell to show of every model and method."""
    freedom = {"tiles": 0, "unstructured": 1, "n:m": 2}
    table = table.assign(freedom=table["pattern"].map(lambda pattern: freedom[Pattern.parse(pattern).kind]))
    best = table.groupby(["model", "method"])["freedom"].transform("min")
    table = table[table["freedom"] == best]
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


def _placeholder(text: str) -> Figure:
    """A small figure that says why there is nothing to show, so that every run makes the same files."""
    with _style():
        import matplotlib.pyplot as plt

        figure, ax = plt.subplots(figsize=(COLUMN, 0.6))
        ax.set_axis_off()
        ax.text(0.5, 0.5, text[:1].upper() + text[1:] + ".", ha="center", va="center", color="0.3")
    return figure


@contextmanager
def _style() -> Iterator[None]:
    """Print quality at a paper's column width, with fonts that every machine has."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    ours: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 7.5,
        "axes.labelsize": 7.5,
        "axes.titlesize": 7.5,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "grid.linewidth": 0.4,
        "grid.color": "0.88",
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "lines.linewidth": 1.1,
        "errorbar.capsize": 2.5,
        "pdf.fonttype": 42,
        "ps.fonttype": 42,
        "figure.dpi": 100,
    }
    with sns.axes_style("ticks"), plt.rc_context(ours):
        yield

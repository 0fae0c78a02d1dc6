"""How figures look and how they are written.

They carry no titles (captions are in the report), and can be told apart in grey and by colour-blind readers: every
method has its own marker and line style beside its colour, the same in all figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from patch.artefacts import atomic_path
from patch.sparsity.patterns import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN = 3.3
"""Width of a paper's column, inches."""
# method: (place in seaborn's colour-blind palette, marker, line style); PATCH has the solid lines
STYLES: dict[str, tuple[int, str, Any]] = {
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


@dataclass(frozen=True)
class Look:
    """How a series is drawn."""

    color: Any
    marker: str
    line: Any
    filled: bool


def look(method: str, pattern: str, shade: float) -> Look:
    """Colour and marker tell the method. N:M is a filled point without a line, tiles filled, unstructured hollow."""
    import seaborn as sns

    place, marker, line = STYLES[method]
    color = tuple(part + (1 - part) * shade for part in sns.color_palette("colorblind")[place])
    kind = Pattern.parse(pattern).kind
    return Look(color, marker, "none" if kind == "n:m" else line, kind != "unstructured")


def shade(pruned: pd.DataFrame, method: str, variant: str) -> float:
    """How much lighter a variant is drawn than the method's default."""
    variants = sorted(pruned.loc[pruned["method"] == method, "variant"].unique(), key=lambda name: name != "default")
    return 0.6 * variants.index(variant) / len(variants)


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
        with print_style():
            for path in paths:
                with atomic_path(path) as temporary:
                    figure.savefig(temporary, dpi=300, metadata=nothing[path.suffix])
    finally:
        plt.close(figure)
    return paths


def placeholder(text: str) -> Figure:
    """A small figure that says why there is nothing to show, so that every run makes the same files."""
    with print_style():
        import matplotlib.pyplot as plt

        figure, ax = plt.subplots(figsize=(COLUMN, 0.6))
        ax.set_axis_off()
        ax.text(0.5, 0.5, text[:1].upper() + text[1:] + ".", ha="center", va="center", color="0.3")
    return figure


@contextmanager
def print_style() -> Iterator[None]:
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


LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_PLACES = (0, 1, 2, 3, 4, 5)


def level_style(number: int) -> dict[str, Any]:
    """How the number-th of some levels (sparsities, lengths) is drawn: colour, marker and line all differ."""
    import seaborn as sns

    color = sns.color_palette("colorblind")[_PLACES[number % len(_PLACES)]]
    return {
        "color": color,
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": LINES[number % len(LINES)],
        "markersize": 4,
    }


def panels(count: int, height: float = 1.9) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, three to a row at most, four in a square; inside `print_style`."""
    import matplotlib.pyplot as plt

    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    width = COLUMN if columns == 1 else min(7.0, 0.4 + 2.3 * columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, 0.5 + height * rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:count])


def legend_below(figure: Figure, handles: list[Any], width: float = 1.5) -> None:
    """One legend for all panels, below them."""
    columns = max(1, int(figure.get_figwidth() / width))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3.2, columnspacing=1.2)

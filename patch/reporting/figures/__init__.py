"""The figures: functions of a study, and one writer of PDF and PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from patch.artefacts import PatchError
from patch.reporting.figures.ablations import AXES, ablation
from patch.reporting.figures.allocation import sparsity_by_depth, sparsity_by_layer, sparsity_by_module
from patch.reporting.figures.curves import training_curves
from patch.reporting.figures.quality import accuracy_vs_sparsity, perplexity_vs_sparsity
from patch.reporting.figures.speed import layer_speed, throughput
from patch.reporting.figures.style import write_figure
from patch.reporting.study import Study
from patch.reporting.summary import rows_of
from patch.reporting.targets import FIGURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAW: dict[str, Callable[[Study], Figure]] = {
    "perplexity_vs_sparsity": lambda study: perplexity_vs_sparsity(
        rows_of(study.runs, FIGURES["perplexity_vs_sparsity"])
    ),
    "accuracy_vs_sparsity": lambda study: accuracy_vs_sparsity(rows_of(study.runs, FIGURES["accuracy_vs_sparsity"])),
    "sparsity_by_layer": lambda study: sparsity_by_layer(study.runs),
    "sparsity_by_depth": lambda study: sparsity_by_depth(study.runs),
    "sparsity_by_module": lambda study: sparsity_by_module(study.runs),
    "training_curves": lambda study: training_curves(study.curves),
    "throughput": lambda study: throughput(study.generation),
    "layer_speed": lambda study: layer_speed(study.layers),
}


def draw_figure(name: str, study: Study) -> Figure:
    """The figure of this name. Raises PatchError for an unknown one."""
    if name not in FIGURES:
        raise PatchError(f"figure {name!r}: unknown; choose of {', '.join(FIGURES)}.")
    return ablation(study, name) if name in AXES else _DRAW[name](study)


def write_figures(study: Study, directory: Path | str, names: Iterable[str] = tuple(FIGURES)) -> list[Path]:
    """Draw figures into `directory` as NAME.pdf and NAME.png (300 dpi); return the paths."""
    return [path for name in names for path in write_figure(draw_figure(name, study), name, directory)]


__all__ = ["draw_figure", "write_figure", "write_figures"]

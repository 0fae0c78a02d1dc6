"""The tables: functions of a study, and one writer of CSV (numbers), Markdown, LaTeX and HTML (readable)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from patch.artefacts import PatchError
from patch.reporting.study import Study
from patch.reporting.tables.allocation import sparsity_by_depth, sparsity_by_module
from patch.reporting.tables.cells import cells
from patch.reporting.tables.claims import claims
from patch.reporting.tables.comparisons import comparisons
from patch.reporting.tables.layout import Table, render_terminal, write_table
from patch.reporting.tables.quality import quality, tasks
from patch.reporting.tables.speed import layer_speed, memory, throughput, training_cost, weight_memory
from patch.reporting.targets import TABLES

_QUALITY = (
    "accuracy", "accuracy_small", "accuracy_large", "unstructured", "tile_size", "density_target", "frozen_mask",
    "tile_prior", "quantisation",
)  # fmt: skip
_MAKE: dict[str, Callable[[Study], Table]] = {
    **{name: partial(quality, name=name) for name in _QUALITY},
    "tasks": tasks,
    "comparisons": comparisons,
    "training_cost": training_cost,
    "sparsity_by_depth": sparsity_by_depth,
    "sparsity_by_module": sparsity_by_module,
    "throughput": throughput,
    "memory": memory,
    "weight_memory": weight_memory,
    "layer_speed": layer_speed,
    "claims": claims,
    "cells": cells,
}


def make_table(name: str, study: Study) -> Table:
    """The table of this name. Raises PatchError for an unknown one."""
    if name not in TABLES:
        raise PatchError(f"table {name!r}: unknown; choose of {', '.join(TABLES)}.")
    return _MAKE[name](study)


def write_tables(study: Study, directory: Path | str, names: Iterable[str] = tuple(TABLES)) -> list[Path]:
    """Write tables as NAME.csv, .md, .tex and .html in `directory`; return the paths."""
    return [
        path for name in names for path in write_table(make_table(name, study), name, directory, TABLES[name].title)
    ]


__all__ = ["Table", "make_table", "render_terminal", "write_table", "write_tables"]

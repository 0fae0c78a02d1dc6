"""All records of an experiment as one tidy table, the runs table. Everything downstream reads only that.

One row per metric. Cells without a finished record have one row that says so in `status` and `reason`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from patch.artefacts import PatchError, atomic_path
from patch.experiments import Cell, Experiment
from patch.methods import METHODS
from patch.records import Record

# column: (dtype, meaning)
COLUMNS: dict[str, tuple[str, str]] = {
    "run": ("string", "experiment"),
    "cell": ("string", "path of the cell below results/RUN"),
    "cell_hash": ("string", "identity of the cell over settings and code"),
    "model": ("string", "short name of the model"),
    "source": ("string", "hub id, directory or embedded name of the model"),
    "method": ("string", "method, as in configs"),
    "title": ("string", "method, as in tables"),
    "pattern": ("string", "dense, unstructured, N:M or tiles:HxW"),
    "sparsity": ("Float64", "target, percent"),
    "realised_sparsity": ("Float64", "pruned share of the prunable weights, percent"),
    "variant": ("string", "named hyper-parameter set"),
    "seed": ("Int64", "seed of the cell"),
    "status": ("string", "done, missing or excluded"),
    "reason": ("string", "why a cell is not done"),
    "stage": ("string", "prune or evaluate"),
    "subject": ("string", "data set, task, layer, or model"),
    "metric": ("string", "perplexity, acc, acc_norm, sparsity, wall_s, ..."),
    "value": ("Float64", "in the metric's unit; accuracies and sparsities are shares of 1"),
    "stderr": ("Float64", "standard error of value"),
    "samples": ("Int64", "items behind the value"),
    "protocol": ("string", "how the subject was measured, as JSON"),
    "date": ("string", "UTC, end of the stage"),
    "commit": ("string", "of the checkout that computed it"),
    "dirty": ("boolean", "whether that checkout had changes; missing outside a checkout"),
    "gpu": ("string", "GPU model, none on a CPU"),
    "cpu": ("string", "CPU model"),
    "torch": ("string", "version"),
    "transformers": ("string", "version"),
    "lm_eval": ("string", "version"),
}
log = logging.getLogger(__name__)


def collect(experiment: Experiment, results: Path | str) -> pd.DataFrame:
    """Read the records of all cells of `experiment` below `results`/NAME.

    Records of other settings or other code count as missing.
    """
    grid = experiment.expand()
    rows: list[dict[str, Any]] = []
    for cell in grid.cells:
        rows += _cell_rows(cell, Path(results) / experiment.name / cell.path)
    for cell, reason in grid.excluded:
        rows.append({**_identity(cell), "status": "excluded", "reason": reason})
    missing = [row for row in rows if row["status"] == "missing"]
    for row in missing:
        log.warning("%s: %s", row["cell"], row["reason"])
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({name: dtype for name, (dtype, _) in COLUMNS.items()})


def write_runs(table: pd.DataFrame, parquet: Path | str) -> None:
    """Write the runs table as Parquet and, beside it, as CSV."""
    parquet = Path(parquet)
    with atomic_path(parquet) as temporary:
        table.to_parquet(temporary, index=False)
    with atomic_path(parquet.with_suffix(".csv")) as temporary:
        table.to_csv(temporary, index=False)


def read_runs(path: Path | str) -> pd.DataFrame:
    """Read a runs table. Raises PatchError when it is missing or of another layout."""
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError:
        raise PatchError(f"{path}: no such file; run the stage `collect` first.") from None
    except (OSError, ValueError) as error:
        raise PatchError(f"{path}: not a Parquet file ({error}); collect again.") from None
    if list(table.columns) != list(COLUMNS):
        raise PatchError(f"{path}: its columns are not those of this version's runs table; collect again.")
    return table


def _cell_rows(cell: Cell, directory: Path) -> list[dict[str, Any]]:
    stages = ("evaluate",) if cell.method == "dense" else ("prune", "evaluate")
    records = []
    for stage in stages:
        try:
            record = Record.read(directory / stage)
        except PatchError as error:
            reason = str(error) if cell.runs else f"{METHODS[cell.method].title} cannot be run by this version"
            return [{**_identity(cell), "status": "missing", "reason": reason}]
        if record.key != cell.key(stage):  # type: ignore[arg-type]
            reason = f"{directory / stage}: made by other settings or code; run the stage again"
            return [{**_identity(cell), "status": "missing", "reason": reason}]
        records.append(record)
    return [row for record in records for row in _record_rows(cell, record, _realised(records))]


def _record_rows(cell: Cell, record: Record, realised: float) -> Iterator[dict[str, Any]]:
    source = record.provenance
    common = {
        **_identity(cell),
        "realised_sparsity": realised,
        "status": "done",
        "stage": record.stage,
        "date": record.date,
        **{key: source[key] for key in ("commit", "dirty", "gpu", "cpu")},
        "torch": source["versions"]["torch"],
        "transformers": source["versions"]["transformers"],
        "lm_eval": source["versions"]["lm-eval"],
    }
    for metric in record.metrics:
        row = {"subject": metric.subject, "metric": metric.name, "value": metric.value}
        protocol = json.dumps(record.protocol[metric.subject]) if metric.subject in record.protocol else None
        yield {**common, **row, "stderr": metric.stderr, "samples": metric.samples, "protocol": protocol}
    for name, value in record.cost.items():
        yield {**common, "subject": "model", "metric": name, "value": value}


def _identity(cell: Cell) -> dict[str, Any]:
    return {
        "run": cell.run,
        "cell": cell.path,
        "cell_hash": cell.hash,
        "model": cell.model,
        "source": cell.source.source,
        "method": cell.method,
        "title": METHODS[cell.method].title,
        "pattern": cell.pattern,
        "sparsity": cell.sparsity,
        "variant": cell.variant,
        "seed": cell.seed,
    }


def _realised(records: list[Record]) -> float:
    for record in records:
        for metric in record.metrics:
            if (metric.subject, metric.name) == ("model", "sparsity"):
                return 100 * metric.value
    return 0.0

"""All results of an experiment as three tidy tables. Everything downstream reads only these.

The runs table has one row per metric; cells without a finished record have one row that says so in `status` and
`reason`. The table of curves has one row per optimiser step of every learned cell. The paired table compares cells
that answered the same items, so that nothing downstream needs the items.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from patch import paired
from patch.artefacts import PatchError, atomic_path
from patch.experiments import Cell, Experiment, Stage
from patch.methods import METHODS
from patch.records import Record

# Columns: (dtype, meaning).
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
    "compression": ("string", "named way to quantise the weights, or none"),
    "seed": ("Int64", "seed of the cell"),
    "status": ("string", "done, missing or excluded"),
    "reason": ("string", "why a cell is not done, or that other settings or code made a record that was taken"),
    "stage": ("string", "prune, learn, compress or evaluate"),
    "subject": ("string", "data set, task, layer, or model"),
    "metric": ("string", "perplexity, acc, acc_norm, sparsity, train_cross_entropy, wall_s, ..."),
    "value": ("Float64", "in the metric's unit; accuracies and sparsities are shares of 1"),
    "stderr": ("Float64", "standard error of value"),
    "samples": ("Int64", "items behind the value"),
    "protocol": ("string", "how the subject was measured, as JSON"),
    "options": ("string", "hyper-parameters of the stage, as JSON; where the subject is the model and it has any"),
    "date": ("string", "UTC, end of the stage"),
    "commit": ("string", "of the checkout that computed it"),
    "dirty": ("boolean", "whether that checkout had changes; missing outside a checkout"),
    "gpu": ("string", "GPU model, none on a CPU"),
    "cpu": ("string", "CPU model"),
    "torch": ("string", "version"),
    "transformers": ("string", "version"),
    "lm_eval": ("string", "version"),
}
IDENTITY = (
    "run",
    "cell",
    "cell_hash",
    "model",
    "source",
    "method",
    "title",
    "pattern",
    "sparsity",
    "variant",
    "compression",
    "seed",
)
"""The columns that say which cell a row belongs to."""
LATER = ("options",)
"""Columns that older runs tables lack; they are read as missing."""
STEP_COLUMNS: dict[str, tuple[str, str]] = {
    "step": ("Int64", "optimiser step, from 1"),
    "loss": ("Float64", "cross_entropy + density_loss - the weighted norm_ratio, or + ProxSparse's weighted anchor"),
    "cross_entropy": ("Float64", "nats per predicted token"),
    "density": ("Float64", "share of the weights that the sampled masks keep, or of trained weights that are not 0"),
    "two_of_four": ("Float64", "share of the groups of 4 with at most two weights that are not 0; ProxSparse's"),
    "density_loss": (
        "Float64",
        "weighted distance of the density from its target; where weights train, missing to tile_scale",
    ),
    "norm_ratio": ("Float64", "norm of what the masks keep, in the form that the method's norm_form names"),
    "pattern_temperature": ("Float64", "of the 2:4 logits; missing, as the next, where none are learned"),
    "pattern_scale": ("Float64", "of the 2:4 logits"),
    "tile_temperature": ("Float64", "of the tile logits; missing, as the next, where none are learned"),
    "tile_scale": ("Float64", "of the tile logits"),
    "learning_rate": ("Float64", "of the step"),
    "gradient_norm": ("Float64", "of all that is trained together, before clipping"),
    "tokens_per_second": ("Float64", "over all GPUs"),
    "wall_s": ("Float64", "seconds that the step took"),
}
CURVE_COLUMNS = {name: COLUMNS[name] for name in IDENTITY} | STEP_COLUMNS
CURVES = "curves.parquet"
PAIRED_COLUMNS: dict[str, tuple[str, str]] = {
    "run": COLUMNS["run"],
    "model": COLUMNS["model"],
    "first": ("string", "path of a cell"),
    "second": ("string", "path of the cell that it is compared with"),
    "subject": ("string", "text, task, or mean of all tasks"),
    "metric": ("string", "perplexity or acc"),
    "difference": ("Float64", "first minus second; of acc as a share of 1"),
    "stderr": ("Float64", "standard error of the difference between paired items"),
    "p": ("Float64", "two-sided: McNemar's exact test, Student's t on losses, normal for the mean"),
    "items": ("Int64", "windows or questions"),
}
PAIRED = "paired.parquet"
_OTHER = "made by other settings or code"
log = logging.getLogger(__name__)


def collect(
    experiment: Experiment, results: Path | str, logs: Path | str = "logs", *, stale: bool = False
) -> pd.DataFrame:
    """Read the records of all cells of `experiment` below `results`/NAME.

    Records of other settings or other code count as missing; with `stale` they are taken, and `reason` says so. Where a
    stage has a log below `logs`/NAME but no record, the reason names the log.
    """
    grid = experiment.expand()
    records = _Records(Path(results) / experiment.name, stale)
    rows: list[dict[str, Any]] = []
    for cell in grid.cells:
        rows += _cell_rows(cell, records, Path(logs) / experiment.name)
    for cell, reason in grid.excluded:
        rows.append({**_identity(cell), "status": "excluded", "reason": reason})
    missing = [row for row in rows if row["status"] == "missing"]
    for row in missing:
        log.warning("%s: %s", row["cell"], row["reason"])
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({name: dtype for name, (dtype, _) in COLUMNS.items()})


def collect_curves(experiment: Experiment, results: Path | str, *, stale: bool = False) -> pd.DataFrame:
    """Read the curves of all cells of `experiment` whose mask was learned; `stale` as in `collect`.

    Compressed cells have those of the mask that they use.
    """
    records = _Records(Path(results) / experiment.name, stale)
    tables = []
    for cell in experiment.cells():
        if cell.mask_stage != "learn" or cell.compression_options:
            continue
        try:
            records.read(cell, "learn")
        except PatchError:  # `collect` says so
            continue
        tables.append(_cell_curves(cell, records.run / cell.folder("learn") / CURVES))
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(CURVE_COLUMNS))
    return table.astype({name: dtype for name, (dtype, _) in CURVE_COLUMNS.items()})


def collect_paired(experiment: Experiment, results: Path | str, *, stale: bool = False) -> pd.DataFrame:
    """Compare all evaluated cells of a model and seed, and the dense model, pair by pair on the items of `evaluate`.

    `stale` as in `collect`.
    """
    records = _Records(Path(results) / experiment.name, stale)
    tables = []
    cells = experiment.cells()
    for model, seed in dict.fromkeys((cell.model, cell.seed) for cell in cells):
        items: dict[str, pd.DataFrame] = {}
        subjects: set[str] = set()
        for cell in cells:
            if cell.model == model and (cell.seed == seed or cell.method == "dense"):
                with contextlib.suppress(PatchError):  # `collect` says so
                    subjects |= {metric.subject for metric in records.read(cell, "evaluate").metrics}
                    items[cell.path] = _items(records.run / cell.folder("evaluate") / "items.parquet")
        pairs = paired.compare(items, subjects)
        tables.append(pairs.assign(run=experiment.name, model=model))
    table = pd.concat(tables, ignore_index=True)[list(PAIRED_COLUMNS)]
    table = table.drop_duplicates(["model", "first", "second", "subject", "metric"], ignore_index=True)
    return table.astype({name: dtype for name, (dtype, _) in PAIRED_COLUMNS.items()})


def write_runs(table: pd.DataFrame, parquet: Path | str) -> None:
    """Write the runs table as Parquet and, beside it, as CSV."""
    with atomic_path(Path(parquet).with_suffix(".csv")) as temporary:
        table.to_csv(temporary, index=False)
    _write(table, parquet)


def write_curves(table: pd.DataFrame, runs: Path | str) -> None:
    """Write the curves as curves.parquet beside the runs table `runs`."""
    _write(table, Path(runs).with_name(CURVES))


def write_paired(table: pd.DataFrame, runs: Path | str) -> None:
    """Write the paired comparisons as paired.parquet beside the runs table `runs`."""
    _write(table, Path(runs).with_name(PAIRED))


def read_runs(path: Path | str) -> pd.DataFrame:
    """Read a runs table. Raises PatchError when it is missing or of another layout."""
    return _read(Path(path), COLUMNS, LATER)


def read_curves(runs: Path | str) -> pd.DataFrame:
    """Read the curves beside the runs table `runs`. Raises PatchError when they are missing or of another layout."""
    return _read(Path(runs).with_name(CURVES), CURVE_COLUMNS)


def read_paired(runs: Path | str) -> pd.DataFrame:
    """Read the paired table beside the runs table `runs`. Raises PatchError when it is missing or of another layout."""
    return _read(Path(runs).with_name(PAIRED), PAIRED_COLUMNS)


def _write(table: pd.DataFrame, parquet: Path | str) -> None:
    with atomic_path(parquet) as temporary:
        table.to_parquet(temporary, index=False)


def _read(path: Path, columns: Mapping[str, Any], later: tuple[str, ...] = ()) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError:
        raise PatchError(f"{path}: no such file; run the stage `collect` first.") from None
    except (OSError, ValueError) as error:
        raise PatchError(f"{path}: not a Parquet file ({error}); collect again.") from None
    absent = [name for name in later if name not in table]
    if list(table.columns) != [name for name in columns if name not in absent]:
        raise PatchError(f"{path}: its columns are not those of this version; collect again.")
    return table.reindex(columns=list(columns)).astype({name: columns[name][0] for name in absent})


def _items(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path, columns=["subject", "item", "metric", "value"])
    except (OSError, ValueError) as error:
        log.warning("%s: cannot be read (%s), so its cell is compared with none", path, error)
        raise PatchError(f"{path}: cannot be read; evaluate the cell again.") from None


@dataclass(frozen=True)
class _Records:
    """The records of a run."""

    run: Path
    stale: bool
    """Whether records of other settings or code are taken, too."""

    def read(self, cell: Cell, stage: Stage) -> Record:
        """Raises PatchError when it is missing or, unless `stale`, not of the cell's settings and code."""
        directory = self.run / cell.folder(stage)
        record = Record.read(directory)
        if record.key != cell.key(stage) and not self.stale:
            raise PatchError(f"{directory}: {_OTHER}; run the stage again")
        return record


def _cell_rows(cell: Cell, records: _Records, logs: Path) -> list[dict[str, Any]]:
    found = []
    for stage in cell.stages:
        try:
            found.append(records.read(cell, stage))
        except PatchError as error:
            reason = _reason(records.run / cell.folder(stage), logs / f"{cell.folder(stage)}.log", error)
            return [{**_identity(cell), "status": "missing", "reason": reason}]
    rows = [row for record in found for row in _record_rows(cell, record, _realised(found))]
    other = [stage for stage, record in zip(cell.stages, found, strict=True) if record.key != cell.key(stage)]
    return [{**row, "reason": f"{', '.join(other)}: {_OTHER}" if other else None} for row in rows]


def _reason(directory: Path, log_file: Path, error: PatchError) -> str:
    """Why a stage has no result: not run, failed or unfinished (then its log), or made by other settings."""
    if (directory / "record.json").exists():
        return str(error)
    if log_file.exists():
        return f"failed or not finished; the log of `{directory.name}` is {log_file}"
    return "not run"


def _cell_curves(cell: Cell, path: Path) -> pd.DataFrame:
    table = pd.read_parquet(path).reindex(columns=list(STEP_COLUMNS))
    # Schedules of logits that the method does not have say nothing.
    schedules = [name for name in STEP_COLUMNS if name.startswith(("pattern_", "tile_"))]
    table[[name for name in schedules if name not in cell.options]] = float("nan")
    return table.assign(**_identity(cell))[list(CURVE_COLUMNS)]


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
    options = record.arguments.get("options")
    of_model = {"subject": "model", "options": json.dumps(options) if options else None}
    for metric in record.metrics:
        row = {"subject": metric.subject, "metric": metric.name, "value": metric.value}
        protocol = json.dumps(record.protocol[metric.subject]) if metric.subject in record.protocol else None
        row |= {"stderr": metric.stderr, "samples": metric.samples, "protocol": protocol}
        yield {**common, **row, **(of_model if metric.subject == "model" else {})}
    for name, value in record.cost.items():
        yield {**common, **of_model, "metric": name, "value": value}


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
        "compression": cell.compression,
        "seed": cell.seed,
    }


def _realised(records: list[Record]) -> float:
    for record in records:
        for metric in record.metrics:
            if (metric.subject, metric.name) == ("model", "sparsity"):
                return 100 * metric.value
    return 0.0

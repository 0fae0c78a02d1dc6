"""Runs table and curves in MLflow: experiment per run, a parent run per model, below it a child run per cell.

One process writes, after `collect`; jobs never open the store. Writing again changes nothing where nothing changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from patch.artefacts import PatchError, checksum_json
from patch.collect import STEP_COLUMNS
from patch.reporting.summary import scores

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARAMETERS = ["model", "source", "method", "pattern", "sparsity", "variant", "compression", "seed"]
TAGS = ["cell", "commit", "dirty", "gpu", "cpu", "torch", "transformers", "lm_eval"]
_OF_STAGE = ["wall_s", "gpu_s", "peak_memory_gib", "peak_gpu_memory_gib"]
# Without it MLflow 3's UI takes the experiment for one of traces and prompts, and hides metrics and comparisons.
_TRAINING_VIEW = {"mlflow.experimentKind": "custom_model_development"}
MASK = "mask.safetensors"
_BATCH = 1000  # metrics that MLflow takes at a time
log = logging.getLogger(__name__)


def track(
    runs: pd.DataFrame, curves: pd.DataFrame, uri: str, artifacts: Sequence[Path] = (), masks: Path | None = None
) -> dict[str, int]:
    """Write the finished cells of a runs table, with their curves, to the MLflow store at `uri`.

    Returns how many cells were new, changed and unchanged.
    Parameters: PARAMETERS, and the hyper-parameters: option.NAME of the method, compression.NAME of the compression.
    Cells are found again by the tags cell_hash and cell, and rewritten only if the tag result_hash differs.
    Metrics in the units of the runs table: perplexity.TEXT, acc.TASK and acc_norm.TASK (without the subjects of MMLU),
    acc.mean, each with .stderr where known; sparsity of the whole model; STAGE.wall_s and other costs by stage.
    Of learned cells also learn.loss and the other curves, with a value per optimiser step.
    artifacts: files, or folders of files, attached to the run "report" of the experiment.
    masks: directory that holds the experiments' folders; the MaskSet of each cell is attached to it, where it is there.
    For sqlite:///PATH the folder is made, and artifacts go to mlflow-artifacts beside the file.
    Raises PatchError when an artifact is missing.
    """
    files = _files(artifacts)
    client = _client(uri)
    counts = {"new": 0, "changed": 0, "unchanged": 0}
    for name, table in runs.groupby("run", sort=False):
        experiment = _experiment(client, str(name), uri)
        store = _Store(client, experiment)
        for model, rows in table[table["status"] == "done"].groupby("model", sort=False):
            tags = {"kind": "model", "model": str(model), "source": str(rows["source"].iloc[0])}
            parent, _ = store.put(f"model {model}", _Content(str(model), tags=tags))
            for content in _cells(rows, curves, masks):
                content.tags["mlflow.parentRunId"] = parent
                _, outcome = store.put(f"cell {content.tags['cell_hash']} {content.tags['cell']}", content)
                counts[outcome] += 1
        if files:
            hashes = {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in files.items()}
            content = _Content("report", tags={"kind": "report", "files": checksum_json(hashes)}, files=files)
            store.put("report", content)
    log.debug("MLflow %s: %s", uri, ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return counts


@dataclass
class _Content:
    """What one MLflow run holds."""

    name: str
    parameters: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    histories: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per step, a column per metric; `step` and `moment` (milliseconds since 1970) beside them."""
    tags: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    """By path inside the run."""
    start: int | None = None
    end: int | None = None
    """Milliseconds since 1970."""

    def hash(self) -> str:
        metrics = {name: repr(value) for name, value in self.metrics.items()}
        files = sorted(self.files)  # of a cell: what is in them is known by its cell_hash
        return checksum_json([self.name, self.parameters, metrics, self.histories.to_csv(), self.tags, files])


class _Store:
    """The runs of one experiment, by key."""

    def __init__(self, client: MlflowClient, experiment: str):
        self.client, self.experiment = client, experiment
        self.existing: dict[str, Run] = {}
        token = None
        while True:
            page = client.search_runs([experiment], max_results=1000, page_token=token)
            for run in page:
                self.existing.setdefault(run.data.tags.get("key", ""), run)
            token = page.token
            if not token:
                return

    def put(self, key: str, content: _Content) -> tuple[str, str]:
        """Make the run `key` hold `content`; return its id, and "new", "changed" or "unchanged".

        The result_hash is written last, so that a run that was cut off is written again.
        """
        from mlflow.entities import Metric, Param, RunTag

        old, result_hash = self.existing.get(key), content.hash()
        if old and old.info.status == "FINISHED" and old.data.tags.get("result_hash") == result_hash:
            return old.info.run_id, "unchanged"
        if old:
            self.client.delete_run(old.info.run_id)
        tags = {**content.tags, "key": key}
        run = self.client.create_run(self.experiment, content.start, tags, content.name)
        run_id = run.info.run_id
        moment = content.end or int(time.time() * 1000)
        metrics = [Metric(name, value, moment, 0) for name, value in content.metrics.items()]
        self.client.log_batch(run_id, metrics, [Param(*pair) for pair in content.parameters.items()])
        history = [
            Metric(str(name), value, int(row["moment"]), int(row["step"]))
            for row in content.histories.to_dict("records")
            for name, value in row.items()
            if name not in ("step", "moment") and not pd.isna(value)
        ]
        for first in range(0, len(history), _BATCH):
            self.client.log_batch(run_id, history[first : first + _BATCH])
        for path, file in content.files.items():
            self.client.log_artifact(run_id, str(file), path.rpartition("/")[0] or None)
        self.client.log_batch(run_id, tags=[RunTag("result_hash", result_hash)])
        self.client.set_terminated(run_id, end_time=content.end)
        return run_id, "changed" if old else "new"


def _cells(rows: pd.DataFrame, curves: pd.DataFrame, masks: Path | None) -> list[_Content]:
    """The content of every cell of a model, without its parent."""
    contents = []
    for cell, own in rows.groupby("cell", sort=False):
        first = own.iloc[0]
        parameters = {name: f"{first[name]:g}" if name == "sparsity" else str(first[name]) for name in PARAMETERS}
        parameters |= _options(own)
        known = own[["cell_hash", *TAGS]].bfill().iloc[0].dropna()
        tags = {"kind": "cell", **{str(name): str(value) for name, value in known.items()}}
        finished = own["date"].dropna()
        end = int(datetime.fromisoformat(finished.max()).timestamp() * 1000) if len(finished) else None
        metrics = _metrics(own)
        seconds = sum(value for name, value in metrics.items() if name.endswith(".wall_s"))
        start = None if end is None else end - int(1000 * seconds)
        histories = _histories(curves[(curves["run"] == first["run"]) & (curves["cell"] == cell)], start or 0)
        folders = [] if masks is None else [masks / first["run"] / cell / stage for stage in ("prune", "learn")]
        mask = [folder / MASK for folder in folders if (folder / MASK).exists()]
        files = {MASK: mask[0]} if mask else {}
        contents.append(_Content(str(cell), parameters, metrics, histories, tags, files, start, end))
    return contents


def _options(own: pd.DataFrame) -> dict[str, str]:
    """The hyper-parameters of a cell's stages by their names in MLflow; texts as they are, others as JSON."""
    found = {}
    for stage, options in own.dropna(subset="options").groupby("stage", sort=False)["options"].first().items():
        kind = "compression" if stage == "compress" else "option"
        for name, value in json.loads(options).items():
            found[f"{kind}.{name}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def _histories(curves: pd.DataFrame, start: int) -> pd.DataFrame:
    """The curves of one cell under the names they get in MLflow; learning is a cell's first stage."""
    measured = [name for name in STEP_COLUMNS if name not in ("step", "wall_s")]
    table = curves[measured].rename(columns="learn.{}".format)
    return table.assign(step=curves["step"], moment=start + (1000 * curves["wall_s"].cumsum()).astype("Int64"))


def _metrics(own: pd.DataFrame) -> dict[str, float]:
    metrics: dict[str, float] = {}
    row: Any
    for row in own[own["value"].notna()].itertuples():
        if row.subject == "model":
            name = f"{row.stage}.{row.metric}" if row.metric in _OF_STAGE else row.metric
        elif row.metric == "sparsity" or row.subject.startswith("mmlu_"):
            continue
        else:
            name = f"{row.metric}.{row.subject}"
        name = re.sub(r"[^\w./ -]", "_", name)
        metrics[name] = float(row.value)
        if not pd.isna(row.stderr):
            metrics[f"{name}.stderr"] = float(row.stderr)
    means = scores(own)
    for row in means[means["subject"] == "mean"].itertuples():
        metrics["acc.mean"] = row.value / 100
        if not pd.isna(row.stderr):
            metrics["acc.mean.stderr"] = row.stderr / 100
    return metrics


def _client(uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they announce every table of a new store
    database = _database(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    """The id of the experiment, made or brought back where needed. Never by set_experiment, which races."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = _database(uri)
        folder = None if database is None else (database.parent / "mlflow-artifacts" / name).resolve().as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=folder, tags=_TRAINING_VIEW))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another writer was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _database(uri: str) -> Path | None:
    """The file of an SQLite store; None for other stores."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def _files(artifacts: Sequence[Path]) -> dict[str, Path]:
    """Files by their path inside the run: FOLDER/NAME."""
    files: dict[str, Path] = {}
    for artifact in artifacts:
        if not artifact.exists():
            raise PatchError(f"{artifact}: no such file to attach in MLflow; make the tables and figures first.")
        folder = artifact.resolve() if artifact.is_dir() else artifact.resolve().parent
        inside = sorted(folder.rglob("*")) if artifact.is_dir() else [artifact.resolve()]
        for file in inside:
            if file.is_file():
                files[(Path(folder.name) / file.relative_to(folder)).as_posix()] = file
    return files

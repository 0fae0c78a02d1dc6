"""From records to tables, figures and MLflow; and how far a grid is."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from patch.artefacts import write_json
from patch.cli.options import Configs, Output, Override, Runs

Only = Annotated[list[str] | None, typer.Option(help="Make only this one; repeat for more.")]
Benchmarks = Annotated[
    Path | None,
    typer.Option(help="Folder with the CSV files of `benchmark`, such as layers.csv; results/reference if not given."),
]
log = logging.getLogger("patch")


def collect(
    config: Configs,
    output: Annotated[Path, typer.Option(help="Runs table to write, .parquet; the others come beside it.")],
    override: Override = "{}",
    results: Annotated[Path, typer.Option(help="Directory that holds the experiment's folder.")] = Path("results"),
    stale: Annotated[
        bool, typer.Option("--stale", help="Take records made by other settings or code, too; rows say so.")
    ] = False,
) -> None:
    """Gather the records of an experiment into one tidy table, and into two more curves and paired comparisons.

    Cells that are not finished are listed as missing.
    """
    from patch import collect as collecting
    from patch.experiments import load_experiment

    experiment = load_experiment(config, json.loads(override))
    table = collecting.collect(experiment, results, stale=stale)
    collecting.write_runs(table, output)
    collecting.write_curves(collecting.collect_curves(experiment, results, stale=stale), output)
    collecting.write_paired(collecting.collect_paired(experiment, results, stale=stale), output)
    write_json(output.with_name("experiment.json"), experiment.model_dump(mode="json"))
    counts = table.drop_duplicates("cell")["status"].value_counts()
    log.info("%s: %s", output, ", ".join(f"{number} cells {status}" for status, number in counts.items()))


def tables(runs: Runs, output: Output, only: Only = None, benchmarks: Benchmarks = None) -> None:
    """Write tables, the claims among them, as CSV, Markdown, LaTeX and HTML."""
    from patch.reporting.study import BENCHMARKS, Study
    from patch.reporting.tables import write_tables
    from patch.reporting.targets import TABLES

    for path in write_tables(Study.read(runs, benchmarks or BENCHMARKS), output, only or TABLES):
        log.info("%s", path)


def figures(runs: Runs, output: Output, only: Only = None, benchmarks: Benchmarks = None) -> None:
    """Draw figures as PDF and PNG."""
    from patch.reporting.figures import write_figures
    from patch.reporting.study import BENCHMARKS, Study
    from patch.reporting.targets import FIGURES

    for path in write_figures(Study.read(runs, benchmarks or BENCHMARKS), output, only or FIGURES):
        log.info("%s", path)


def mlflow(
    runs: Runs,
    uri: Annotated[str, typer.Option(help="MLflow tracking store.")] = "sqlite:///results/mlflow.db",
    artifact: Annotated[list[Path] | None, typer.Option(help="File to attach; repeat for more.")] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Directory that holds the experiment's folder: attach the cells' masks.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write: what was done.")] = None,
) -> None:
    """Write the runs table to MLflow. Doing it again changes nothing; changed results replace old ones."""
    from patch.reporting.study import Study
    from patch.reporting.tracking import track

    study = Study.read(runs)
    counts = track(study.runs, study.curves, uri, artifact or [], masks)
    log.info("%s: %s", uri, ", ".join(f"{number} runs {what}" for what, number in counts.items()))
    if output:
        write_json(output, {"uri": uri, **counts})


def show(
    runs: Runs, table: Annotated[str, typer.Option(help="Its name, e.g. tile_size or claims.")] = "accuracy"
) -> None:
    """Print a table in the terminal."""
    from rich.console import Console

    from patch.reporting.study import Study
    from patch.reporting.tables import make_table, render_terminal

    Console().print(render_terminal(make_table(table, Study.read(runs))))


def status(
    config: Configs,
    override: Override = "{}",
    results: Annotated[Path, typer.Option(help="Directory that holds the experiment's folder.")] = Path("results"),
    verbose: Annotated[bool, typer.Option("--all", help="List also what is done and what waits.")] = False,
) -> None:
    """Print how far a grid is: what is done, what Slurm runs (with its id), what failed (with its log), what waits.

    Reads only; the grid may run meanwhile.
    """
    from rich.console import Console
    from rich.table import Table

    from patch.benchmark_jobs import skipped
    from patch.cluster.queue import Queue
    from patch.cluster.site import load_site, runs_on_gpu
    from patch.cluster.status import grid_status
    from patch.experiments import load_experiment

    experiment = load_experiment(config, json.loads(override))
    on_gpu = bool(experiment.benchmarks.sections) and runs_on_gpu(experiment.device, load_site())
    slurm = Queue() if shutil.which("squeue") else None
    stages = grid_status(experiment, results, slurm=slurm, on_gpu=on_gpu)
    counts = {word: [stage.word for stage in stages].count(word) for word in dict.fromkeys(s.word for s in stages)}
    console = Console(width=None if sys.stdout.isatty() else 200)  # so that a captured log names files in full
    console.print(f"{experiment.name}: {', '.join(f'{number} {word}' for word, number in counts.items())}")
    if left_out := skipped(experiment, on_gpu):
        console.print(left_out)
    table = Table(box=None)
    for name in ("stage", "cell", "state", "Slurm job", "", "log"):
        table.add_column(name, overflow="fold")
    for stage in stages:
        if verbose or stage.word not in ("done", "waiting"):
            table.add_row(stage.stage, stage.cell, stage.word, stage.job, stage.detail, stage.log)
    if table.rows:
        console.print(table)

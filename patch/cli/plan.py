"""Know the cost of a grid before it runs."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patch.artefacts import PatchError, write_text
from patch.cli.options import Configs, Override

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from patch.experiments import Cell, Experiment
    from patch.planning.plan import Planned

log = logging.getLogger("patch")
_BASES = {
    "measured": "measured with the method near the model's size",
    "scaled": "scaled, from other sizes or a related method",
    "extrapolated": "extrapolated beyond the measured sizes",
    "assumed": "assumed, not measured yet",
}


def plan(
    config: Configs,
    override: Override = "{}",
    results: Annotated[Path, typer.Option(help="Directory that holds the experiment's folder.")] = Path("results"),
    rates: Annotated[Path | None, typer.Option(help="CSV file of rates; default: results/reference/rates.csv.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; auto for a GPU unless the config says cpu.")] = "auto",
    target: Annotated[str | None, typer.Option(help="Only what this table or figure shows, e.g. tile_size.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Keep the cells that together take so many hours of GPUs, cheapest first, each with its benchmarks."
        ),
    ] = None,
    layer: Annotated[
        Path | None, typer.Option(help="Config layer to write: leaves out what is over the budget.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--all", help="List every stage of every cell.")] = False,
) -> None:
    """Print what a grid will cost and why each of its stages would run; nothing is run, and no network is needed.

    Hours come from measured rates; what they rest on is said. Stages that are done cost nothing.
    """
    from rich.console import Console

    from patch.benchmark_jobs import skipped
    from patch.cluster.site import Gpu, load_site
    from patch.experiments import load_experiment
    from patch.planning.plan import check_budget
    from patch.planning.plan import plan as planned
    from patch.planning.rates import CPU, FILE, gpu_of, load_rates
    from patch.reporting.targets import cells_of

    if device not in ("auto", "cuda", "cpu"):
        raise PatchError(f"--device {device}: choose one of auto, cuda, cpu.")
    if budget is not None:
        check_budget(budget)
    elif layer is not None:
        raise PatchError(f"--layer {layer}: needs --budget, which says what it leaves out.")
    experiment = load_experiment(config, json.loads(override))
    on_gpu = device == "cuda" or (device == "auto" and experiment.device != "cpu")
    known = load_rates(rates or FILE)
    stages = planned(experiment, results, known, (load_site().gpu or Gpu()) if on_gpu else None, target)
    cells = cells_of(target, experiment.cells()) if target else experiment.cells()
    console = Console(width=None if sys.stdout.isatty() else 200)
    unit = "GPU-hours" if on_gpu else "CPU-hours"
    to_run = [part for part in stages if part.reason]
    console.print(
        f"{experiment.name}: {len(cells)} cells, {len(to_run)} of {len(stages)} stages to run, {_hours(to_run)} {unit}"
    )
    if left_out := skipped(experiment, on_gpu):
        console.print(left_out)
    console.print(_costs("stage", stages, lambda part: part.stage, unit))
    console.print(_costs("model", stages, lambda part: part.model, unit))
    console.print(_reasons(to_run))
    if verbose:
        console.print(_listing(stages, unit))
    _basis(console, to_run, gpu_of(known) if on_gpu else CPU, unit)
    if budget is not None:
        _fit(console, experiment, cells, stages, budget, unit, config, json.loads(override), layer, target)


def _hours(stages: Sequence[Planned]) -> str:
    total = sum(part.hours for part in stages)
    return f"{total:,.0f}" if total >= 100 else f"{total:.3g}"


def _largest(values: Sequence[float]) -> str:
    return f"{max(values):.0f}" if values else ""


def _costs(title: str, stages: Sequence[Planned], key: Callable[[Planned], str], unit: str) -> Table:
    """Sums over the stages that run; memory of the largest."""
    from rich.table import Table

    table = Table(title, box=None)
    for name in ("done", "to run", unit, "longest job, h", "host memory, GiB", "GPU memory, GiB", "disk, GiB"):
        table.add_column(name, justify="right")
    for group in dict.fromkeys(key(part) for part in stages):
        parts = [part for part in stages if key(part) == group]
        runs = [part for part in parts if part.reason]
        longest = max((part.hours / max(1, part.gpus) for part in runs), default=0.0)
        table.add_row(
            group,
            str(len(parts) - len(runs)),
            str(len(runs)),
            _hours(runs),
            f"{longest:.3g}",
            _largest([part.memory_gib for part in runs]),
            _largest([part.gpu_memory_gib for part in runs if part.gpu_memory_gib]),
            f"{sum(part.disk_gib for part in runs):.1f}",
        )
    return table


def _reasons(stages: Sequence[Planned]) -> Table:
    from rich.table import Table

    table = Table("why", box=None)
    table.add_column("stages", justify="right")
    table.add_column("of these", overflow="fold")
    for (why, stage), count in Counter((part.reason, part.stage) for part in stages).most_common():
        cells = [part.cell for part in stages if (part.reason, part.stage) == (why, stage)]
        shown = ", ".join(cells[:3]) + (f" and {count - 3} more" if count > 3 else "")
        table.add_row(why, f"{count} {stage}", shown)
    return table


def _listing(stages: Sequence[Planned], unit: str) -> Table:
    from rich.table import Table

    table = Table("stage", "cell", "why", box=None)
    table.add_column(unit, justify="right")
    table.add_column("basis")
    for part in stages:
        cost = (f"{part.hours:.3g}", part.estimate.basis) if part.reason else ("", "")
        table.add_row(part.stage, part.cell, part.reason or "done", *cost)
    return table


def _basis(console: Console, stages: Sequence[Planned], device: str, unit: str) -> None:
    """What the hours rest on."""
    shared = "; several GPUs are taken to share a job without loss" if unit == "GPU-hours" else ""
    console.print(f"Hours are those of one {device}{shared}. Of them:")
    for basis, meaning in _BASES.items():
        hours = sum(part.hours for part in stages if part.estimate.basis == basis)
        if hours:
            console.print(f"  {hours:10,.2f} {unit} {meaning}")


def _fit(
    console: Console, experiment: Experiment, cells: Sequence[Cell], stages: Sequence[Planned], budget: float,
    unit: str, configs: Sequence[Path], overrides: dict[str, object], layer: Path | None, target: str | None,
) -> None:  # fmt: skip
    import yaml

    from patch.planning.plan import fitting, shared_hours, without

    if not cells:
        raise PatchError(f"--budget {budget:g}: {target} shows benchmarks only, there are no cells to leave out.")
    kept, left = fitting(cells, stages, budget)
    shared = shared_hours(cells, stages)
    if shared:
        console.print(f"{shared:.3g} {unit} come first: random tiles and generated text, which belong to no cell.")
    console.print(f"{len(kept)} of {len(cells)} cells fit {budget:g} {unit}; left out, cheapest first:")
    for cell in left:
        console.print(f"  {cell.path}")
    if not kept:
        others = f" beside {shared:.3g} {unit} that belong to none" if shared else ""
        raise PatchError(f"--budget {budget:g}: no cell is that cheap{others}.")
    if layer is None:
        console.print("Write them to a config layer with --layer FILE, to run the rest.")
        return
    shown = {cell.path for cell in cells}
    reasons = {
        f"not in {target}": [cell for cell in experiment.cells() if cell.path not in shown],
        f"over a budget of {budget:g} {unit}": left,
    }
    write_text(layer, yaml.safe_dump(without(experiment, reasons, target), sort_keys=False))
    files = shlex.join(str(file) for file in [*configs, layer])
    settings = f" --config {shlex.join(f'{name}={json.dumps(value)}' for name, value in overrides.items())}"
    gpu = " --resources gpu=1" if unit == "GPU-hours" else ""
    console.print(f"snakemake --cores all{gpu} --configfile {files}{settings if overrides else ''}", soft_wrap=True)

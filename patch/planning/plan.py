"""The stages and benchmarks of a grid with what each costs and why it would run, and the part that fits a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch.artefacts import PatchError
from patch.benchmark_jobs import BenchmarkJob, benchmark_jobs
from patch.benchmarking.options import RANDOM
from patch.cluster import needs
from patch.cluster.site import Gpu
from patch.experiments import Cell, Experiment, Grid, Selection, Stage
from patch.methods import METHODS, Trained
from patch.planning.rates import CPU, Estimate, Rate, estimate, gpu_of
from patch.planning.reasons import benchmark_reason, reason
from patch.reporting.targets import benchmark_of, cells_of
from patch.sparsity.patterns import Pattern


@dataclass(frozen=True)
class Planned:
    """A stage of a cell, a benchmark of its mask, or what belongs to no single cell: stages that prepare a model for
    all its cells, and benchmarks of random tiles."""

    stage: str
    model: str
    cell: str
    """Path below results/NAME; of stages that prepare, the file that they make, of random tiles the folder."""
    reason: str | None
    """Why it runs; None where it is done."""
    estimate: Estimate
    """On one device; of more of them, the sum over them is the same."""
    gpus: int = 0
    """That the job takes, over all nodes, by the size of the site's GPUs."""
    memory_gib: float = 0.0
    """Host memory that it would ask of a scheduler."""
    gpu_memory_gib: float | None = None
    """Of all its GPUs together, where that is known."""
    disk_gib: float = 0.0
    """That its files take in the end, and a saved state meanwhile."""

    @property
    def hours(self) -> float:
        """Of devices; 0 where it is done."""
        return self.estimate.seconds / 3600 if self.reason else 0.0


def plan(
    experiment: Experiment, results: Path, rates: Sequence[Rate], gpu: Gpu | None, target: str | None = None
) -> list[Planned]:
    """All stages and benchmarks of a grid, those that are done included, in an order in which they can run.

    results: the folder that holds that of the experiment. gpu: the site's kind, for the number of GPUs of a job; None
    for a run on a CPU. target: count only what this table or figure shows and needs.
    Raises PatchError where a stage has no rate, and for a target that shows nothing of this grid.
    """
    run, grid = results / experiment.name, experiment.expand()
    jobs = benchmark_jobs(experiment, grid.cells, on_gpu=gpu is not None)
    stages = list(grid.stages())
    if target is not None:
        shown = cells_of(target, grid.cells)
        jobs = [job for job in jobs if _shows(target, job.benchmark)]
        if not shown and not jobs:
            raise PatchError(f"--target {target}: shows nothing of {experiment.name}, which has none of its kind.")
        stages = _stages_of(grid, shown, jobs)
    cells = list({cell.path: cell for cell, _ in stages}.values())
    sizes = {
        model: needs.parameter_count(experiment.models[model], run / model / "model.json")
        for model in experiment.models
        if any(cell.model == model for cell in cells)
    }
    planner = _Planner(experiment, run, rates, gpu, sizes)
    found = [part for model in sizes for part in planner.preparation(model, [c for c in cells if c.model == model])]
    return [
        *found,
        *(planner.stage(cell, stage) for cell, stage in stages),
        *(planner.benchmark(job) for job in jobs),
    ]


def _stages_of(grid: Grid, cells: Sequence[Cell], jobs: Sequence[BenchmarkJob]) -> list[tuple[Cell, Stage]]:
    """Those of some cells of a grid with the masks that they start from, and with the masks of benchmarks."""
    measured = {cell.path for cell in cells}
    sources = [*cells, *(job.cell for job in jobs if job.cell)]
    masks = {part.path for cell in sources for part in cell.with_prerequisites()}
    return [
        (cell, stage) for cell, stage in grid.stages() if cell.path in (masks if stage == cell.mask_stage else measured)
    ]


def fitting(cells: Sequence[Cell], stages: Sequence[Planned], hours: float) -> tuple[list[Cell], list[Cell]]:
    """The cells that together take no more than `hours`, cheapest first, and those left out.

    A cell pays for its benchmarks, and for the masks that it starts from unless one before it has. What belongs to no
    single cell runs in any case and is paid first, see `shared_hours`.
    """
    cost: dict[str, float] = {}
    for part in stages:
        cost[part.cell] = cost.get(part.cell, 0.0) + part.hours
    mask = {part.cell: part.hours for part in stages if part.stage in ("prune", "learn")}
    left, kept, paid, spent = list(cells), [], set[str](), shared_hours(cells, stages)

    def price(cell: Cell) -> float:
        before = {part.path for part in cell.with_prerequisites()} - {cell.path} - paid
        own = cost[cell.path] - (mask.get(cell.path, 0.0) if cell.path in paid else 0.0)
        return own + sum(mask.get(path, 0.0) for path in before)

    while left:
        cheapest = min(left, key=price)
        if spent + price(cheapest) > hours:
            break
        spent += price(cheapest)
        paid |= {part.path for part in cheapest.with_prerequisites()}
        kept.append(cheapest)
        left.remove(cheapest)
    return kept, left


def shared_hours(cells: Sequence[Cell], stages: Sequence[Planned]) -> float:
    """Of what belongs to no single cell: text that models write, benchmarks of random tiles."""
    own = {part.path for cell in cells for part in cell.with_prerequisites()}
    return sum(part.hours for part in stages if part.cell not in own)


def without(experiment: Experiment, cells: Mapping[str, Sequence[Cell]], target: str | None = None) -> dict[str, Any]:
    """A config layer that leaves out these cells too, by reason, and benchmarks that a target does not show."""
    rules = [rule.model_dump(exclude_none=True, mode="json") for rule in experiment.exclude]
    for why, group in cells.items():
        for cell in group:
            axes = {axis: [getattr(cell, _singular(axis))] for axis in Selection.model_fields}
            rules.append({**axes, "reason": why})
    if target is None:
        return {"exclude": rules}
    others = [name for name in experiment.benchmarks.sections if not _shows(target, name)]
    return {"exclude": rules, "benchmarks": dict.fromkeys(others)}


def _shows(target: str, benchmark: str) -> bool:
    return f"{benchmark}.csv" == benchmark_of(target)


def _singular(axis: str) -> str:
    return axis.removesuffix("ies") + "y" if axis.endswith("ies") else axis.removesuffix("s")


@dataclass(frozen=True)
class _Planner:
    experiment: Experiment
    run: Path
    rates: Sequence[Rate]
    gpu: Gpu | None
    sizes: dict[str, float]
    """Parameters of the models."""

    def preparation(self, model: str, cells: Sequence[Cell]) -> Iterator[Planned]:
        """Of the model's files, and of the texts that are large or computed."""
        size, source = self.sizes[model], self.experiment.models[model]
        memory = needs.preparation(size).memory_mb / 1024
        nothing = Estimate(0.0, "measured")
        yield Planned(
            "prepare", model, f"{model}/model.json", self._absent(f"{model}/model.json"), nothing,
            memory_gib=memory, disk_gib=needs.weights_gib(source, size),
        )  # fmt: skip
        text = self.experiment.training
        if any(cell.training == text for cell in cells):
            file, tokens = f"{model}/tokens/training.safetensors", text.samples * text.length
            time = self._estimate("generate", "any", size, tokens) if text.generated else nothing
            stage, gpus = ("generate", int(self.gpu is not None)) if text.generated else ("prepare", 0)
            yield Planned(stage, model, file, self._absent(file), time, gpus, memory, None, 4 * tokens / 2**30)

    def stage(self, cell: Cell, stage: Stage) -> Planned:
        size = self.sizes[cell.model]
        time = self._estimate(stage, cell.method, size, needs.tokens_of(cell, stage))
        asked = needs.stage(cell, stage, size, self.gpu, self.experiment.threads, 10**9)
        return Planned(
            stage, cell.model, cell.path, reason(cell, stage, self.run), time, asked.gpus * asked.nodes,
            asked.memory_mb / 1024, self._gpu_memory(cell, stage, size), _disk_gib(cell, stage, size),
        )  # fmt: skip

    def benchmark(self, job: BenchmarkJob) -> Planned:
        cell = job.cell
        size = self.sizes[cell.model] if cell else needs.parameters_in_name(job.shape)
        asked = needs.benchmark(size, self.gpu)
        whole = self.gpu and job.benchmark in ("generation", "memory")
        return Planned(
            job.stage, cell.model if cell else f"{job.shape} ({RANDOM})", cell.path if cell else job.folder,
            benchmark_reason(job, self.run), self._estimate("benchmark", job.benchmark, size, 0),
            asked.gpus * asked.nodes, asked.memory_mb / 1024, 2 * size / 2**30 if whole else None,  # bfloat16
        )  # fmt: skip

    def _estimate(self, stage: str, method: str, size: float, tokens: float) -> Estimate:
        device = gpu_of(self.rates) if self.gpu else CPU
        found = estimate(self.rates, device, stage, method, size, tokens)
        return found if self.gpu else Estimate(found.seconds / self.experiment.threads, found.basis)

    def _absent(self, file: str) -> str | None:
        return None if (self.run / file).is_file() else "new"

    def _gpu_memory(self, cell: Cell, stage: Stage, size: float) -> float | None:
        weights = needs.weights_gib(cell.source, size)
        method = METHODS[cell.method](**cell.options)
        if not self.gpu or stage in ("prune", "compress"):  # a block at a time
            return None
        if stage == "learn" and isinstance(method, Trained) and cell.training:
            return needs.learning_gib(size, weights, method, cell.training.length)
        return weights


def _disk_gib(cell: Cell, stage: Stage, size: float) -> float:
    """Of a MaskSet (its module says what it stores), at most: all weights counted as prunable."""
    if stage == "evaluate":
        return 0.0
    if stage == "compress":
        options = cell.compression_options
        assert options
        adapters = 2 * options.adapter_rank * options.adapter_bits  # of a square matrix
        return size * (4.25 + adapters) / 8 / 2**30  # 4 bits, and a scale per group
    pattern = Pattern.parse(cell.pattern)
    bits = 0.75 if (pattern.n, pattern.m) == (2, 4) else 1.0
    updated = cell.method in ("sparsegpt", "thanos", "fine_tune")
    weights = needs.weights_gib(cell.source, size)
    values = weights * (1 - cell.sparsity / 100) if updated else 0.0
    method = METHODS[cell.method](**cell.options)
    state = needs.saved_gib(size, weights, method) if isinstance(method, Trained) else 0.0
    return size * bits / 8 / 2**30 + values + state


def check_budget(hours: float) -> None:
    """Raise PatchError for a budget that nothing fits."""
    if hours <= 0:
        raise PatchError(f"--budget {hours:g}: must be above 0 hours.")

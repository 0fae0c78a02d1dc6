"""The jobs that a grid's section `benchmarks` asks for: what the workflow runs, `plan` counts and `status` shows.

Beside `patch.benchmarking` and not in it, so that changes of the grid are none of the code that times. Light on purpose
(no torch): the workflow reads it at every start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patch.artefacts import checksum_json
from patch.benchmarking.options import RANDOM, Benchmark
from patch.experiments import Cell, Experiment
from patch.provenance import code_hash


@dataclass(frozen=True)
class BenchmarkJob:
    """One benchmark of random tiles and weights at one shape, or of the mask of one cell."""

    benchmark: str
    """layers, generation and so on."""
    section: Benchmark
    shape: str = ""
    """Of random tiles: a model's, or OUTxIN."""
    cell: Cell | None = None
    """Whose mask is measured; None for random tiles."""

    @property
    def folder(self) -> str:
        """Where rows.csv and record.json lie below results/RUN."""
        part = f"masks/{self.cell.path}" if self.cell else f"{RANDOM}/{self.shape}"
        return f"benchmarks/{self.benchmark}/{part}"

    @property
    def stage(self) -> str:
        return f"benchmark {self.benchmark}"

    @property
    def options(self) -> list[str]:
        """Of the command, but for what is measured and the device."""
        return [*self.section.options(), *([] if self.cell else self.section.random_options())]

    @property
    def key(self) -> str:
        """Hash of everything that determines the rows: settings, code, and the mask."""
        content: dict[str, Any] = {"code": code_hash("benchmark"), "benchmark": self.benchmark, "options": self.options}
        if self.cell:
            assert self.cell.mask_stage
            content["mask"] = self.cell.key(self.cell.mask_stage)
        else:
            content["shape"] = self.shape
        return checksum_json(content)[:16]


def benchmark_jobs(experiment: Experiment, cells: Sequence[Cell], on_gpu: bool) -> list[BenchmarkJob]:
    """All jobs, by benchmark: those of random tiles, then those of masks.

    cells: of the expanded grid. on_gpu: whether jobs compute on GPUs; without, there are none unless the config asks.
    """
    settings = experiment.benchmarks
    if skipped(experiment, on_gpu):
        return []
    measured = [cell for cell in cells if settings.measures(cell)] if settings.masks is not None else []
    found = []
    for name, section in settings.sections.items():
        found += [BenchmarkJob(name, section, shape=shape) for shape in section.shapes]
        found += [BenchmarkJob(name, section, cell=cell) for cell in measured if section.takes_masks]
    return found


def skipped(experiment: Experiment, on_gpu: bool) -> str:
    """Which benchmarks are left out for want of a GPU, as a line; empty where none are."""
    names = ", ".join(experiment.benchmarks.sections)
    if on_gpu or not names or experiment.benchmarks.without_gpu == "run":
        return ""
    return f"skipped: benchmarks of {names} (no GPU; `without_gpu: run` under `benchmarks` runs them on the CPU)"

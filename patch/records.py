"""The record that every stage writes: what was measured, under which protocol, by what, from what.

`record.json` is written on the worker, atomically and last, so a stage whose record exists is done.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from patch.artefacts import PatchError, read_json, write_json
from patch.provenance import provenance

SCHEMA = "patch.record/1"


@dataclass(frozen=True)
class Metric:
    """One number: `name` of `subject`, e.g. perplexity of wikitext2, acc of piqa, sparsity of a layer."""

    subject: str
    """Data set, task, layer, or "model"."""
    name: str
    value: float
    """In the metric's own unit: perplexity, accuracy and sparsity as shares of 1, seconds, GiB."""
    stderr: float | None = None
    samples: int | None = None
    """Number of items behind the value: windows, questions, weights."""


@dataclass
class Record:
    """Everything one stage says about one cell."""

    stage: str
    key: str
    """Hash of everything that determines the numbers (`Cell.key`); empty for runs by hand."""
    arguments: dict[str, Any]
    """What the stage was asked for, every default resolved."""
    metrics: list[Metric] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)
    """Of each metric's subject: data revision, length, dtype, batch size, task version."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Checksums of what was read."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Checksums of what was written."""
    provenance: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    """wall_s, gpu_s (of all GPUs together), peak_memory_gib (host), peak_gpu_memory_gib; masks where several were made
    together, of which the others are then the cost."""
    date: str = ""
    """End of the stage, UTC, ISO 8601."""

    def write(self, directory: Path | str) -> None:
        """Write `directory`/record.json. Raises PatchError for a metric that is NaN or infinite."""
        for metric in self.metrics:
            if not math.isfinite(metric.value):
                raise PatchError(
                    f"{directory}: {metric.name} of {metric.subject} is {metric.value}; the model's outputs are "
                    "damaged or overflow, evaluate it in bfloat16 or float32."
                )
        write_json(Path(directory) / "record.json", {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, directory: Path | str) -> Record:
        """Read `directory`/record.json. Raises PatchError when missing, truncated or of another schema."""
        path = Path(directory) / "record.json"
        content = read_json(path, SCHEMA)
        content.pop("schema")
        try:
            metrics = [Metric(**metric) for metric in content.pop("metrics")]
            return cls(metrics=metrics, **content)
        except (KeyError, TypeError) as error:
            raise PatchError(f"{path}: not a complete record ({error}); run its stage again.") from None


class Clock:
    """Time and memory from when it is made; masks: how many are made meanwhile."""

    def __init__(self, masks: int = 1):
        import torch

        self.masks = masks
        self.started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def cost(self) -> dict[str, float]:
        """Of everything until now, as in `Record.cost`."""
        import torch

        wall = round(time.perf_counter() - self.started, 3)
        cost = {"wall_s": wall, "peak_memory_gib": round(_peak_memory_gib(), 3)}
        if torch.cuda.is_available():
            cost["gpu_s"] = wall
            cost["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        return cost | ({"masks": self.masks} if self.masks > 1 else {})


@contextlib.contextmanager
def recording(
    stage: str, key: str, arguments: dict[str, Any], directory: Path | str, clock: Clock | None = None
) -> Iterator[Record]:
    """Time the block, then write the record that it filled in. Nothing is written if the block fails.

    clock: one that started earlier, where the block is only the end of the work.
    """
    clock = clock or Clock()
    record = Record(stage=stage, key=key, arguments=arguments)
    yield record
    record.cost = clock.cost()
    if "gpu_s" in record.cost:
        record.cost["gpu_s"] *= arguments.get("processes", 1)
    record.provenance = provenance()
    record.date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record.write(directory)


def _peak_memory_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # Linux counts KiB, macOS bytes

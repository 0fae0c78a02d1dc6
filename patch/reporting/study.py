"""Everything a report is made of: the tables that `collect` wrote, and measured speed and memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from patch.artefacts import PatchError
from patch.collect import CURVE_COLUMNS, CURVES, PAIRED, PAIRED_COLUMNS, read_curves, read_paired, read_runs

BENCHMARKS = Path(__file__).parents[2] / "results" / "reference"
"""Where our committed measurements of speed and memory are."""
LAYER_COLUMNS = ("out_features", "in_features", "tokens", "sparsity_percent", "kernel", "us", "dense_us", "speedup")
GENERATION_COLUMNS = (
    "model", "batch", "prefill_tokens", "generated_tokens", "sparsity_percent", "dense_tok_s", "hybrid_tok_s",
    "speedup", "dense_gib", "hybrid_gib",
)  # fmt: skip
MEMORY_COLUMNS = (
    "model", "sparsity_percent", "dense_gib", "hybrid_gib", "ratio", "whole_model_dense_gib", "whole_model_hybrid_gib",
)  # fmt: skip
log = logging.getLogger(__name__)


def _empty(columns: tuple[str, ...]) -> pd.DataFrame:
    return pd.DataFrame(columns=list(columns))


@dataclass(frozen=True)
class Study:
    """What tables, figures and claims are functions of."""

    runs: pd.DataFrame
    """`patch.collect.COLUMNS`."""
    curves: pd.DataFrame = field(default_factory=lambda: _empty(tuple(CURVE_COLUMNS)))
    """`patch.collect.CURVE_COLUMNS`; empty where no mask was learned."""
    paired: pd.DataFrame = field(default_factory=lambda: _empty(tuple(PAIRED_COLUMNS)))
    """`patch.collect.PAIRED_COLUMNS`: pairs of cells compared item by item; empty where items were not kept."""
    layers: pd.DataFrame = field(default_factory=lambda: _empty(LAYER_COLUMNS))
    """What `patch-llm benchmark layers` measured; at least LAYER_COLUMNS."""
    generation: pd.DataFrame = field(default_factory=lambda: _empty(GENERATION_COLUMNS))
    """What `patch-llm benchmark generation` measured; at least GENERATION_COLUMNS."""
    memory: pd.DataFrame = field(default_factory=lambda: _empty(MEMORY_COLUMNS))
    """What `patch-llm benchmark memory` measured; at least MEMORY_COLUMNS."""

    @classmethod
    def read(cls, runs: Path | str, benchmarks: Path | str = BENCHMARKS) -> Study:
        """The runs table `runs`, what `collect` wrote beside it, and the CSV files of speed and memory in `benchmarks`.

        Only the runs table must be there. Raises PatchError for a file that is damaged or of another layout.
        """
        runs, benchmarks = Path(runs), Path(benchmarks)
        parts = {"runs": read_runs(runs)}
        for name, file, read in (("curves", CURVES, read_curves), ("paired", PAIRED, read_paired)):
            if runs.with_name(file).exists():
                parts[name] = read(runs)
            else:
                log.info("%s: not there, so what needs it stays empty", runs.with_name(file))
        measured = {"layers": LAYER_COLUMNS, "generation": GENERATION_COLUMNS, "memory": MEMORY_COLUMNS}
        for name, columns in measured.items():
            if (benchmarks / f"{name}.csv").exists():
                parts[name] = _measured(benchmarks / f"{name}.csv", columns)
        return cls(**parts)


def _measured(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise PatchError(f"{path}: not a CSV file ({error}); measure again with `patch-llm benchmark`.") from None
    lacking = [name for name in columns if name not in table]
    if lacking:
        raise PatchError(f"{path}: lacks the columns {', '.join(lacking)}; measure again with `patch-llm benchmark`.")
    return table

"""What a report is made of: what must be there, what may be missing, and damaged files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from patch.artefacts import PatchError
from patch.collect import write_curves, write_runs
from patch.reporting.study import GENERATION_COLUMNS, LAYER_COLUMNS, MEMORY_COLUMNS, Study


def test_only_the_runs_table_must_be_there(learned: tuple[pd.DataFrame, pd.DataFrame], tmp_path: Path) -> None:
    runs = tmp_path / "runs.parquet"
    with pytest.raises(PatchError, match=r"runs\.parquet: no such file"):
        Study.read(runs, tmp_path)
    write_runs(learned[0], runs)
    study = Study.read(runs, tmp_path)
    pd.testing.assert_frame_equal(study.runs, learned[0])
    assert study.curves.empty
    assert study.paired.empty
    assert study.layers.empty
    assert study.memory.empty
    write_curves(learned[1], runs)
    pd.DataFrame([dict.fromkeys(LAYER_COLUMNS, 1)]).to_csv(tmp_path / "layers.csv", index=False)
    pd.DataFrame([dict.fromkeys(MEMORY_COLUMNS, 1)] * 2).to_csv(tmp_path / "memory.csv", index=False)
    study = Study.read(runs, tmp_path)
    assert len(study.memory) == 2
    assert len(study.curves) == len(learned[1])
    assert len(study.layers) == 1


def test_damaged_measurements_are_told_by_name(runs: pd.DataFrame, tmp_path: Path) -> None:
    write_runs(runs, tmp_path / "runs.parquet")
    pd.DataFrame([dict.fromkeys(GENERATION_COLUMNS[1:], 1)]).to_csv(tmp_path / "generation.csv", index=False)
    with pytest.raises(PatchError, match=r"generation\.csv: lacks the columns model;"):
        Study.read(tmp_path / "runs.parquet", tmp_path)
    (tmp_path / "generation.csv").write_text("")
    with pytest.raises(PatchError, match=r"generation\.csv: not a CSV file"):
        Study.read(tmp_path / "runs.parquet", tmp_path)

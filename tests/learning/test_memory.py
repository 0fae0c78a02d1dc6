"""The estimate of a learning job's memory beside what was measured on a GPU."""

import csv
from pathlib import Path

import pytest

from patch.benchmarking.learning import SETTINGS
from patch.benchmarking.shapes import random_model
from patch.learning.memory import memory_estimate
from patch.methods import Learned, make_method
from patch.sparsity.patterns import Pattern

MEASURED = Path(__file__).parents[2] / "results" / "reference" / "mask_learning.csv"
with MEASURED.open() as stream:
    ROWS = [row for row in csv.DictReader(stream) if row["ours_peak_gib"]]


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['model']} {row['setting']}" for row in ROWS])
def test_the_estimate_is_near_the_measured_peak(row: dict[str, str]) -> None:
    method = make_method(row["mode"], SETTINGS[row["setting"]])
    assert isinstance(method, Learned)
    model = random_model(row["model"], "meta")
    estimate = memory_estimate(model, method, Pattern.parse("tiles:128x128"), int(row["tokens"]))
    assert estimate["sum"] == pytest.approx(float(row["ours_peak_gib"]), rel=0.1)


def test_there_are_measured_peaks_with_activations_kept_and_recomputed() -> None:
    assert {row["setting"] for row in ROWS} >= {"fast", "lean"}

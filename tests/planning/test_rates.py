"""Rates: what the committed ones rest on, and what is made of them."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest

from patch.artefacts import PatchError
from patch.planning.rates import CPU, FILE, Rate, estimate, gpu_of, load_rates

REFERENCE = Path(FILE).parent
GPU = "a GPU"


def rate(method: str, parameters: float, seconds: float, tokens: float = 100, basis="measured") -> Rate:
    return Rate("learn", method, GPU, parameters, tokens, seconds, basis, "here")


def test_committed_rates_of_learning_are_those_of_the_benchmark():
    with (REFERENCE / "mask_learning.csv").open() as stream:
        rows = {(row["model"], row["setting"], row["gpu"]): row for row in csv.DictReader(stream)}
    found = [rate for rate in load_rates() if rate.source.startswith("mask_learning.csv")]
    assert len(found) == 3
    for one in found:
        _, model, setting = one.source.split(", ")
        row = rows[model, setting, one.device]
        assert one.seconds == pytest.approx(float(row["ours_ms"]) / 1000)
        assert (one.tokens, one.method) == (float(row["tokens"]), row["mode"])


def test_committed_rates_of_a_cpu_are_those_of_the_demo():
    runs = pd.read_parquet(REFERENCE / "demo" / "runs.parquet")
    seconds = runs[runs["metric"] == "wall_s"]
    found = [rate for rate in load_rates() if rate.device == CPU and rate.source.startswith("demo/runs.parquet")]
    assert len(found) == 7
    for one in found:
        rows = seconds[seconds["stage"] == one.stage]
        rows = rows if one.method == "any" else rows[rows["method"] == one.method]
        assert one.seconds == pytest.approx(rows["value"].median(), rel=0.05)


@pytest.mark.parametrize(
    ("parameters", "hours", "factor"),
    # GPU-hours of 2.1 B tokens as the paper has them, read as node hours of four H100 (its stated ones exceed the
    # chip's peak). The smallest: our code takes an eighth of the official one's time there.
    [(7e9, 84, 2), (8e9, 96, 2), (1.236e9, 24, 2), (0.494e9, 18, 2.5)],
)
def test_learning_as_in_the_paper_costs_about_what_the_paper_says(parameters, hours, factor):
    method = "patch_tile" if parameters > 2e9 else "patch_joint"
    rates = load_rates()
    ours = estimate(rates, gpu_of(rates), "learn", method, parameters, 2000 * 256 * 4096).seconds / 3600
    assert hours / factor < ours < hours * factor


def test_at_a_measured_size_it_is_what_was_measured():
    found = estimate([rate("maskllm", 1e9, 5.0)], GPU, "learn", "maskllm", 1e9, 300)
    assert found.seconds == pytest.approx(15.0)
    assert found.basis == "measured"
    assert estimate([rate("maskllm", 1e9, 5.0)], GPU, "learn", "maskllm", 1.2e9, 100).basis == "measured"


def test_between_sizes_the_rate_is_interpolated_and_beyond_it_stays():
    rates = [rate("maskllm", 1e9, 4.0), rate("maskllm", 4e9, 4.0)]  # four times as fast per parameter
    between = estimate(rates, GPU, "learn", "maskllm", 2e9, 100)
    assert between.seconds == pytest.approx(4.0)
    assert between.basis == "scaled"
    for parameters, seconds in ((0.5e9, 2.0), (8e9, 8.0)):
        beyond = estimate(rates, GPU, "learn", "maskllm", parameters, 100)
        assert beyond.seconds == pytest.approx(seconds)
        assert beyond.basis == "extrapolated"


def test_a_related_method_stands_in_only_where_the_own_is_not_measured():
    rates = [rate("maskllm", 1e9, 1.0), rate("patch_joint", 1e9, 7.0), rate("patch_joint", 9e9, 18.0)]
    own = estimate(rates, GPU, "learn", "maskllm", 1e9, 100)
    assert (own.seconds, own.basis) == (pytest.approx(1.0), "measured")
    related = estimate(rates, GPU, "learn", "maskllm", 9e9, 100)
    assert (related.seconds, related.basis) == (pytest.approx(18.0), "scaled")


def test_what_nobody_measured_is_said_to_be_assumed():
    assert estimate([rate("any", 1e9, 1.0, basis="assumed")], GPU, "learn", "maskllm", 1e9, 1).basis == "assumed"


def test_a_method_that_reads_no_tokens_scales_with_parameters():
    found = estimate([rate("maskllm", 1e9, 3.0, tokens=0)], GPU, "learn", "maskllm", 2e9, 0)
    assert found.seconds == pytest.approx(6.0)


def test_what_is_not_known_is_an_error():
    with pytest.raises(PatchError, match="no rate for the stage evaluate of wanda on a GPU"):
        estimate([rate("maskllm", 1e9, 1.0)], GPU, "evaluate", "wanda", 1e9, 1)
    with pytest.raises(PatchError, match="needs those of one kind of GPU"):
        gpu_of([Rate("learn", "wanda", kind, 1, 1, 1, "measured", "") for kind in ("one", "another")])


@pytest.mark.parametrize(
    "content",
    [
        "stage,method\nlearn,wanda\n",
        FILE.read_text().replace("0.055864", "fast"),
        FILE.read_text() + "learn,x,y,1,1,0,,\n",
    ],
)
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "rates.csv").write_text(content)
    with pytest.raises(PatchError, match=r"rates\.csv: not a file of rates"):
        load_rates(tmp_path / "rates.csv")
    with pytest.raises(PatchError, match="no such file of rates"):
        load_rates(tmp_path / "none.csv")

"""Differences between settings: paired where items were kept, over seeds, and the table of them."""

from __future__ import annotations

import pandas as pd
import pytest

from patch.collect import PAIRED_COLUMNS
from patch.reporting.comparisons import Comparisons
from patch.reporting.study import Study
from patch.reporting.summary import settings
from patch.reporting.tables.comparisons import comparisons
from patch.reporting.tables.layout import to_markdown


def pairs(*rows: tuple[str, str, str, str, float, float, float]) -> pd.DataFrame:
    names = ("first", "second", "subject", "metric", "difference", "stderr", "p")
    content = [{"run": "synthetic", "model": "qwen", "items": 9, **dict(zip(names, row, strict=True))} for row in rows]
    return pd.DataFrame(content, columns=list(PAIRED_COLUMNS))


def setting(runs: pd.DataFrame, method: str, sparsity: float) -> dict[str, object]:
    table = settings(runs)
    own = table[(table["model"] == "qwen") & (table["method"] == method) & (table["sparsity"] == sparsity)]
    return {str(name): value for name, value in own.iloc[0].items()}


DENSE = "qwen/dense/0-dense"
WANDA, OTHER, SPARSEGPT = "qwen/wanda/50-2of4", "qwen/wanda/50-2of4/seed-1", "qwen/sparsegpt/50-2of4"


def test_without_items_errors_are_those_of_independent_samples(runs: pd.DataFrame) -> None:
    one, other = setting(runs, "sparsegpt", 50), setting(runs, "magnitude", 50)
    found = Comparisons(Study(runs)).between(one, other, "acc", "mean")
    assert found is not None
    assert found.value == pytest.approx(5.0)
    assert found.stderr == pytest.approx(2**0.5 * 8**0.5 / 8)
    assert not found.paired
    assert found.interval == pytest.approx((5 - 1.96 * 0.5, 5 + 1.96 * 0.5))


def test_pairs_are_found_in_either_order_and_equal_seeds_are_averaged(runs: pd.DataFrame) -> None:
    table = pairs(
        (SPARSEGPT, WANDA, "mean", "acc", 0.02, 0.002, 0.01),
        (SPARSEGPT, OTHER, "mean", "acc", 0.02, 0.9, 0.9),  # of another seed
    )
    compared = Comparisons(Study(runs, paired=table))
    one, other = setting(runs, "wanda", 50), setting(runs, "sparsegpt", 50)
    found = compared.between(one, other, "acc", "mean")
    assert found is not None
    assert (found.paired, found.p) == (True, 0.01)
    assert found.stderr == pytest.approx(0.2)  # points
    assert found.value == pytest.approx(34.0 - 35.0)  # means over seeds
    dense = setting(runs, "dense", 0)
    both = pairs(
        (WANDA, DENSE, "mean", "acc", -0.13, 0.002, 0.01),
        (OTHER, DENSE, "mean", "acc", -0.11, 0.004, 0.02),
    )
    found = Comparisons(Study(runs, paired=both)).between(one, dense, "acc", "mean")
    assert found is not None
    assert (found.stderr, found.p) == (pytest.approx(0.3), 0.02)


def test_what_has_no_value_has_no_difference(runs: pd.DataFrame) -> None:
    compared = Comparisons(Study(runs))
    assert compared.between(setting(runs, "maskllm", 50), setting(runs, "dense", 0), "acc", "mean") is None
    assert compared.between(setting(runs, "wanda", 50), setting(runs, "dense", 0), "acc", "boolq") is None


def test_without_maskllm_the_best_mask_is_the_one_to_beat(runs: pd.DataFrame) -> None:
    data = comparisons(Study(runs)).data
    qwen = data[data["model"] == "qwen"]
    assert list(qwen["against"].unique()) == ["Dense", "SparseGPT"]
    assert not ((qwen["against"] == "SparseGPT") & (qwen["method"] == "sparsegpt") & (qwen["sparsity"] == 50)).any()
    row = qwen[(qwen["against"] == "SparseGPT") & (qwen["method"] == "wanda") & (qwen["sparsity"] == 50)].iloc[0]
    assert row["perplexity.wikitext2"] == pytest.approx(73.0 - 36.0)
    assert row["acc.mean.low"] < row["acc.mean"] < row["acc.mean.high"]


def test_maskllm_is_the_one_to_beat(learned: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    joint = "qwen/patch_joint/45-tiles128x128"
    table = pairs(("qwen/maskllm/50-2of4", joint, "mean", "acc", -0.007, 0.001, 0.0004))
    text = to_markdown(comparisons(Study(*learned, table)))
    assert "| MaskLLM" in text
    assert "+0.70 ± 0.10" in text
    assert "<0.001" in text
    assert "<sup>a</sup> Items were not kept" in text
    paired_row = next(line for line in text.splitlines() if "+0.70 ± 0.10" in line)
    assert "+0.70 ± 0.10 |" in paired_row  # without the footnote that the unpaired have

"""Where the zeros are: weighted by the layers' sizes, over seeds; its tables; and the table of cells."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from patch.artefacts import write_text
from patch.reporting.allocation import gathered, layers
from patch.reporting.study import Study
from patch.reporting.tables.allocation import sparsity_by_depth, sparsity_by_module
from patch.reporting.tables.cells import cells
from patch.reporting.tables.layout import to_html, to_markdown, write_table

SHARES = {"q_proj": (0.1, 100), "o_proj": (0.2, 100), "up_proj": (0.5, 700), "down_proj": (0.4, 100)}


@pytest.fixture
def uneven(learned: tuple[pd.DataFrame, pd.DataFrame]) -> pd.DataFrame:
    """PATCH-Joint at 45 % with sparsities and sizes of SHARES in each of its four blocks."""
    runs = learned[0][(learned[0]["method"] == "patch_joint") & (learned[0]["sparsity"] == 45)].copy()
    for module, (share, weights) in SHARES.items():
        runs.loc[runs["subject"].str.endswith(module), ["value", "samples"]] = [share, weights]
    return runs


def test_layers_are_weighted_by_their_size(uneven: pd.DataFrame) -> None:
    table = gathered(layers(uneven), "kind").set_index("kind")
    assert list(table.index) == ["q", "o", "up", "down"]
    assert table["percent"].tolist() == pytest.approx([10, 20, 50, 40])
    assert table["weights"].tolist() == pytest.approx([10, 10, 70, 10])
    zeros = [10, 20, 350, 40]
    assert table["zeros"].tolist() == pytest.approx([100 * value / sum(zeros) for value in zeros])
    depth = gathered(layers(uneven), "block")
    assert depth["percent"].tolist() == pytest.approx([42.0] * 4)
    assert depth["weights"].tolist() == pytest.approx([25.0] * 4)


def test_seeds_give_means_and_spreads(uneven: pd.DataFrame) -> None:
    other = uneven.assign(seed=1, cell=uneven["cell"] + "/seed-1", value=uneven["value"] + 0.1)
    table = gathered(layers(pd.concat([uneven, other], ignore_index=True)), "kind").set_index("kind")
    assert table.loc["q", "percent"] == pytest.approx(15.0)
    assert table.loc["q", "spread"] == pytest.approx(10 / 2**0.5)


def test_layers_of_unknown_size_count_alike(learned: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table = sparsity_by_depth(Study(learned[0])).data
    joint = table[table["title"] == "PATCH-Joint"]
    assert joint["block"].tolist() == [0, 1, 2, 3]
    assert joint["percent.45"].tolist() == pytest.approx([40.5, 43.5, 46.5, 49.5])
    assert joint["percent.25"].tolist() == pytest.approx([20.5, 23.5, 26.5, 29.5])


def test_kinds_have_a_column_per_target(uneven: pd.DataFrame) -> None:
    text = to_markdown(sparsity_by_module(Study(uneven)))
    assert "Share of weights %" in text
    assert "| At 45 % |" in text
    row = next(line for line in text.splitlines() if "| up " in line)
    assert [cell.strip() for cell in row.split("|")][3:-1] == ["up", "70.0", "50.0"]


def test_runs_without_tiles_say_so(runs: pd.DataFrame) -> None:
    assert "No cell of this run has learned tiles" in to_markdown(sparsity_by_depth(Study(runs)))


def test_every_cell_has_its_origin_and_its_logs(
    runs: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("logs/synthetic/qwen/wanda/50-2of4").mkdir(parents=True)
    write_text(Path("results/synthetic/qwen/wanda/50-2of4/evaluate/record.json"), "{}")
    runs.loc[runs["method"] == "wanda", "dirty"] = True
    table = cells(Study(runs))
    assert len(table.data) == runs["cell"].nunique()
    row = table.data[table.data["cell"] == "qwen/wanda/50-2of4"].iloc[0]
    assert (row["status"], row["commit"], row["device"]) == ("done", "0123456789+", "a CPU")
    assert row["wall_s"] == pytest.approx(12.5 + 3.25)
    missing = table.data[table.data["cell"] == "qwen/thanos/50-2of4"].iloc[0]
    assert (missing["status"], missing["reason"]) == ("excluded", "too slow & 100% not needed")
    page = to_html(table, "Cells", "results/synthetic/tables")
    assert '<a href="../../../logs/synthetic/qwen/wanda/50-2of4">' in page
    assert '<a href="../qwen/wanda/50-2of4/evaluate/record.json">' in page
    assert page.count("<a ") == 2  # what is not on this machine is not linked


def test_a_failed_cell_links_to_its_logs_and_shows_the_end_of_the_one_that_says_why(
    runs: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = Path("logs/synthetic/qwen/maskllm/50-2of4/learn.log")
    write_text(log, "".join(f"step {n}\n" for n in range(30)) + "\x1b[31merror\x1b[0m: loss <nan> & gone\n")
    failed = runs["method"] == "maskllm"
    reason = f"failed or not finished; the log of `learn` is {log}"
    table = cells(Study(runs.assign(reason=runs["reason"].mask(failed, reason))))
    rows = table.data.set_index("cell")
    assert rows.loc["qwen/maskllm/50-2of4", "logs"] == str(log.parent)
    assert pd.isna(rows.loc["qwen/thanos/50-2of4", "logs"])  # never started
    page = to_html(table, "Cells", "results/synthetic/tables")
    assert '<a href="../../../logs/synthetic/qwen/maskllm/50-2of4">' in page
    (shown,) = re.findall(r"<details><summary>log</summary><pre>(.*?)</pre></details>", page, re.DOTALL)
    assert shown.splitlines() == [*(f"step {n}" for n in range(11, 30)), "error: loss &lt;nan&gt; &amp; gone"]
    write_table(table, "cells", tmp_path)
    assert "step 29" not in (tmp_path / "cells.csv").read_text() + (tmp_path / "cells.md").read_text()
    log.unlink()
    assert "<details>" not in to_html(cells(Study(runs.assign(reason=runs["reason"].mask(failed, reason)))), "Cells")

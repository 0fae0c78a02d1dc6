"""Tables of perplexity and accuracy: the numbers in them, what is published beside them, and what is missing."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from conftest import cell_rows, runs_table

from patch.reporting.study import Study
from patch.reporting.tables import make_table
from patch.reporting.tables.layout import to_html, to_latex, to_markdown
from patch.reporting.tables.quality import quality, tasks


def accuracy(runs: pd.DataFrame, name: str = "accuracy") -> pd.DataFrame:
    return quality(Study(runs), name).data


def pick(table: pd.DataFrame, model: str, method: str, sparsity: float) -> pd.Series:
    found = table[(table["model"] == model) & (table["method"] == method) & (table["sparsity"] == sparsity)]
    assert len(found) == 1
    return found.iloc[0]


def test_rows_are_in_the_papers_order(runs: pd.DataFrame) -> None:
    table = accuracy(runs)
    qwen = table[table["model"] == "qwen"]
    assert list(zip(qwen["method"], qwen["sparsity"], strict=True)) == [
        ("dense", 0), ("magnitude", 50), ("wanda", 50), ("sparsegpt", 50), ("thanos", 50), ("maskllm", 50),
        ("magnitude", 45), ("wanda", 45), ("sparsegpt", 45), ("magnitude", 25), ("wanda", 25), ("sparsegpt", 25),
    ]  # fmt: skip
    assert list(table["model"].unique()) == ["qwen", "tiny_1"]


def test_mean_accuracy_and_its_standard_error(runs: pd.DataFrame) -> None:
    row = pick(accuracy(runs), "qwen", "sparsegpt", 50)
    assert row["acc.mean"] == pytest.approx(35.0)
    assert row["acc.mean.stderr"] == pytest.approx(8**0.5 / 8)  # eight tasks of 1 point each
    assert row["perplexity.c4"] == pytest.approx(54.0)
    assert row["realised_sparsity"] == pytest.approx(49.99)


def test_seeds_give_mean_and_spread(runs: pd.DataFrame) -> None:
    table = accuracy(runs)
    row = pick(table, "qwen", "wanda", 50)
    assert (row["seeds"], row["done"]) == (2, 2)
    assert row["perplexity.wikitext2"] == pytest.approx(73.0)  # 72 and 74
    assert row["perplexity.wikitext2.spread"] == pytest.approx(2**0.5)
    assert row["acc.mean"] == pytest.approx(34.0)
    assert row["acc.mean.stderr"] == pytest.approx(8**0.5 / 8)
    assert pd.isna(pick(table, "qwen", "sparsegpt", 50)["acc.mean.spread"])
    assert not [name for name in accuracy(runs[runs["seed"] == 0]) if name.endswith(".spread")]


def test_published_values_and_deltas(runs: pd.DataFrame) -> None:
    table = accuracy(runs)
    row = pick(table, "qwen", "wanda", 50)
    assert row["perplexity.wikitext2.published"] == 72.48
    assert row["perplexity.wikitext2.delta"] == pytest.approx(0.52)
    assert row["acc.mean.published"] == pytest.approx(32.97375)
    assert row["acc.mean.delta"] == pytest.approx(34 - 32.97375)
    assert "perplexity.c4.published" not in table
    assert table.loc[table["model"] == "tiny_1", "acc.mean.delta"].isna().all()


def test_values_of_doubtful_length_are_shown_with_a_footnote_and_without_a_delta(runs: pd.DataFrame) -> None:
    table = quality(Study(runs), "unstructured")
    row = pick(table.data, "qwen", "wanda", 45)
    assert row["acc.mean.published"] == 41.45
    assert not pd.isna(row["acc.mean.delta"])
    assert row["perplexity.wikitext2.published"] == 18.81
    assert pd.isna(row["perplexity.wikitext2.delta"])
    assert row["perplexity.wikitext2.published.notes"] == "lengths-unstructured"
    for text in (to_markdown(table), to_html(table, "t")):
        assert "18.81<sup>a</sup>" in text
        assert "<sup>a</sup> The published perplexities of unstructured rows look like windows of 2048" in text
    assert "18.81\\textsuperscript{a}" in to_latex(table)


def test_the_slip_in_the_published_average_is_a_footnote_of_its_row(runs: pd.DataFrame) -> None:
    table = quality(Study(runs), "accuracy_small")
    row = pick(table.data, "qwen", "thanos", 50)  # excluded, and published all the same
    assert row["acc.mean.published"] == pytest.approx(34.85, abs=0.005)
    assert row["acc.mean.published.notes"] == "thanos-average"
    assert "31.31" in table.notes["thanos-average"]
    assert "thanos-average" not in quality(Study(runs[runs["method"] != "thanos"]), "accuracy_small").notes


def test_dense_that_misses_its_published_value_is_said_first(runs: pd.DataFrame) -> None:
    table = quality(Study(runs))  # 12.30, 12.08 published, tolerance 0.12; accuracy is exact
    assert len(table.warnings) == 1
    assert "perplexity of the dense qwen is 12.30, +0.22 from the published 12.08" in table.warnings[0]
    assert to_markdown(table).startswith("> **Dense first: ")
    assert to_html(table, "t").index("class=warning") < to_html(table, "t").index("<table")
    close = runs.copy()
    close.loc[(close["method"] == "dense") & (close["subject"] == "wikitext2"), "value"] = 12.1
    assert not quality(Study(close)).warnings


def test_other_protocols_and_models_have_no_published_columns(runs: pd.DataFrame) -> None:
    small = accuracy(runs[runs["model"] == "tiny_1"])
    assert not [name for name in small if name.endswith((".published", ".delta"))]
    limited = runs[runs["status"] == "done"].copy()
    of_race, of_wikitext = limited["subject"] == "race", limited["subject"] == "wikitext2"
    limited.loc[of_race, "protocol"] = limited.loc[of_race, "protocol"].str.replace("null", "100")
    limited.loc[of_wikitext, "protocol"] = limited.loc[of_wikitext, "protocol"].str.replace("4096", "2048")
    assert not [name for name in accuracy(limited) if name.endswith((".published", ".delta"))]
    assert not [name for name in accuracy(runs.assign(variant="other")) if name.endswith(".delta")]
    assert not [name for name in accuracy(runs.assign(compression="int4")) if name.endswith(".delta")]


def test_a_cell_that_lacks_a_task_has_no_mean(runs: pd.DataFrame) -> None:
    lacking = runs[~((runs["subject"] == "piqa") & (runs["method"] == "magnitude"))]
    table = accuracy(lacking)
    assert pd.isna(pick(table, "qwen", "magnitude", 50)["acc.mean"])
    assert pick(table, "qwen", "sparsegpt", 50)["acc.mean"] == pytest.approx(35.0)


def test_compressed_weights_are_rows_of_their_own(runs: pd.DataFrame) -> None:
    own = runs[(runs["method"] == "wanda") & (runs["sparsity"] == 50) & (runs["seed"] == 0)]
    more = pd.concat([runs, own.assign(compression="int4", cell=own["cell"] + "/int4")], ignore_index=True)
    table = quality(Study(more))
    rows = table.data[
        (table.data["model"] == "qwen") & (table.data["method"] == "wanda") & (table.data["sparsity"] == 50)
    ]
    assert rows["compression"].tolist() == ["none", "int4"]
    assert rows["perplexity.wikitext2"].tolist() == pytest.approx([73.0, 72.0])
    assert "Weights" in [column.header for column in table.columns]
    assert accuracy(more, "quantisation")["compression"].tolist() == ["none", "int4"] * 2  # dense beside it


def test_a_control_that_misses_its_level_is_never_the_best(runs: pd.DataFrame) -> None:
    of_qwen = (runs["model"] == "qwen") & (runs["sparsity"] == 50)
    half = runs["method"] == "sparsegpt"
    changed = runs.assign(
        realised_sparsity=runs["realised_sparsity"].mask(of_qwen & half, 37.5),
        value=runs["value"].mask(of_qwen & half & (runs["metric"] == "perplexity"), 13.0),
    )
    lines = [line for line in to_markdown(quality(Study(changed))).splitlines() if "2:4" in line and "50 |" in line]
    assert any("SparseGPT" in line and " 13.00 " in line for line in lines)
    assert any("Wanda" in line and "**73.00**" in line for line in lines)


def test_learned_rows_stand_among_the_others(learned: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table = quality(Study(*learned))
    assert list(zip(table.data["method"], table.data["sparsity"], strict=True)) == [
        ("dense", 0), ("maskllm", 50), ("patch_joint", 45), ("patch_tile", 45), ("patch_joint", 35), ("patch_tile", 35),
        ("patch_joint", 25), ("patch_tile", 25),
    ]  # fmt: skip
    row = pick(table.data, "qwen", "patch_joint", 45)
    assert row["pattern"] == "tiles:128x128"
    assert row["perplexity.wikitext2.published"] == 14.57
    text = to_markdown(table)
    assert "| PATCH-Joint | tiles 128x128 |" in text
    assert "tiles:" not in text
    assert "tiles 128x128" in to_latex(table)


def ablated() -> pd.DataFrame:
    """PATCH-Joint with two sizes of tiles, and with one density target per block."""
    rows = cell_rows("qwen", "dense", "dense", 0.0)
    for pattern in ("tiles:128x128", "tiles:64x64"):
        rows += cell_rows("qwen", "patch_joint", pattern, 45.0)
    for row in cell_rows("qwen", "patch_joint", "tiles:128x128", 45.0, shift=1.0):
        rows.append({**row, "variant": "per-block", "cell": f"{row['cell']}/per-block"})
    return runs_table(rows)


def test_ablations_show_their_cells_with_what_is_published_of_each() -> None:
    sizes = accuracy(ablated(), "tile_size")
    assert sizes[["pattern", "perplexity.wikitext2.published"]].values.tolist() == [
        ["dense", 12.08], ["tiles:128x128", 14.57], ["tiles:64x64", 14.66],
    ]  # fmt: skip
    targets = accuracy(ablated(), "density_target")
    assert targets["variant"].tolist() == ["default", "default", "per-block"]
    assert targets["perplexity.wikitext2.published"].tolist() == [12.08, 14.57, 15.17]
    assert targets["perplexity.wikitext2.delta"].notna().all()


@pytest.mark.parametrize("name", ["tile_size", "density_target", "frozen_mask", "tile_prior"])
def test_ablations_start_from_the_dense_model(name: str) -> None:
    runs = ablated()
    other = pd.concat([runs, runs[runs["variant"] == "per-block"].assign(variant="prior-wanda", cell="prior-wanda")])
    frozen = runs[runs["variant"] == "per-block"].assign(method="patch_tile", variant="on-wanda", cell="on-wanda")
    own = runs["subject"].eq("wikitext2") & runs["method"].eq("dense")
    off = pd.concat([runs.assign(value=runs["value"].mask(own, 1.05 * 12.08)), other[len(runs) :], frozen])
    (warning,) = quality(Study(off.reset_index(drop=True)), name).warnings
    assert "perplexity of the dense qwen is 12.68, +0.60 from the published 12.08" in warning


def test_an_ablation_that_a_run_lacks_says_so(runs: pd.DataFrame) -> None:
    text = to_markdown(quality(Study(runs), "frozen_mask"))
    assert text == "_This run has no cell that belongs here; workflow/config/paper.yaml has all of them._\n"


def test_cells_that_did_not_run_stand_beside_what_is_published() -> None:
    done = ablated()
    identity = ["run", "cell", "cell_hash", "model", "source", "method", "title", "pattern", "sparsity", "variant"]
    cells = done.drop_duplicates("cell")[[*identity, "compression", "seed"]]
    waiting = runs_table(cells.assign(status="missing", reason="not run").to_dict("records"))
    table = quality(Study(waiting), "tile_size")
    assert table.data["perplexity.wikitext2.published"].tolist() == [12.08, 14.57, 14.66]
    assert table.data["perplexity.wikitext2"].isna().all()
    assert table.missing == ["qwen, Dense; PATCH-Joint tiles 128x128 45 %; PATCH-Joint tiles 64x64 45 %: not run"]
    assert not table.warnings
    by_task = tasks(Study(waiting))
    assert by_task.data["metric"].tolist() == ["acc"] * 3 + ["published acc"] * 2  # none of tiles of 64
    assert by_task.data["piqa"].tolist() == pytest.approx([math.nan] * 3 + [70.24, 68.44], nan_ok=True)
    lines = to_markdown(by_task).splitlines()
    assert "PIQA ↑" in lines[0]
    assert any("Dense" in line and "70.2" in line and "47.7" in line for line in lines)
    assert not any("Δ acc" in line for line in lines)
    assert not by_task.warnings


def test_missing_cells_are_dashes_with_their_reason_below(runs: pd.DataFrame) -> None:
    text = to_markdown(quality(Study(runs[runs["model"] == "qwen"].assign(source="another"))))
    row = next(line for line in text.splitlines() if line.startswith("|") and "MaskLLM" in line)
    values = [cell.strip() for cell in row.split("|")][-4:-1]
    assert values == ["–", "–", "–"]
    assert "- qwen, MaskLLM 2:4: not run" in text
    assert "- qwen, Thanos 2:4: too slow & 100% not needed" in text


def test_tasks_table(runs: pd.DataFrame) -> None:
    table = tasks(Study(runs)).data
    assert list(table["metric"].unique()) == ["acc", "published acc", "Δ acc", "acc_norm"]
    row = table[(table["method"] == "sparsegpt") & (table["sparsity"] == 50) & (table["model"] == "qwen")]
    assert row["piqa"].tolist() == pytest.approx([32.5, 60.77, 32.5 - 60.77, 33.5])  # 35 + 1 - 3.5; acc_norm 1 higher
    assert row["piqa.stderr"].tolist() == pytest.approx([1.0, float("nan"), 1.0, 1.0], nan_ok=True)
    assert row["mmlu"].isna().tolist() == [False, False, False, True]
    assert set(table.loc[table["model"] == "tiny_1", "metric"]) == {"acc", "acc_norm"}
    assert not [name for name in table if "anatomy" in name]
    text = to_markdown(tasks(Study(runs)))
    assert "−28.3 ± 1.0" in text
    assert not [line for line in text.splitlines() if "−28.3" in line and "**" in line]  # a difference is never best


def test_tasks_say_too_that_the_dense_model_misses_its_published_value(runs: pd.DataFrame) -> None:
    assert not tasks(Study(runs)).warnings  # 46.0, as published
    own = (runs["method"] == "dense") & (runs["metric"] == "acc")
    off = runs.assign(value=runs["value"].mask(own, runs["value"] - 0.02))
    (warning,) = tasks(Study(off)).warnings
    assert "mean accuracy of the dense qwen is 44.00, −2.00 from the published" in warning


def test_runs_with_little_in_them(runs: pd.DataFrame) -> None:
    lonely = runs[(runs["model"] == "tiny_1") & (runs["method"] == "dense") & (runs["metric"] == "perplexity")]
    assert "acc.mean" not in accuracy(lonely)
    nothing = runs[runs["status"] != "done"]
    for name in ("accuracy", "tasks"):
        assert "tiny\\_1" in to_latex(make_table(name, Study(lonely)))
        assert "MaskLLM" in to_markdown(make_table(name, Study(nothing)))

"""Tables: the numbers in them, and the three ways in which they are written."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from patch.reporting.published import load_accuracy
from patch.reporting.tables import (
    accuracy,
    escape_latex,
    render_terminal,
    tasks,
    to_html,
    to_latex,
    to_markdown,
    write_table,
    write_tables,
)


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
    table = accuracy(runs, load_accuracy())
    row = pick(table, "qwen", "wanda", 50)
    assert row["perplexity.wikitext2.published"] == 72.48
    assert row["perplexity.wikitext2.delta"] == pytest.approx(0.52)
    assert row["acc.mean.published"] == pytest.approx(32.97375)
    assert row["acc.mean.delta"] == pytest.approx(34 - 32.97375)
    unstructured = pick(table, "qwen", "wanda", 45)
    assert unstructured["acc.mean.published"] == 41.45
    assert pd.isna(unstructured["perplexity.wikitext2.published"])  # taken at another length
    assert "perplexity.c4.published" not in table
    assert table.loc[table["model"] == "tiny_1", "acc.mean.delta"].isna().all()


def test_other_protocols_and_models_have_no_published_columns(runs: pd.DataFrame) -> None:
    published = load_accuracy()
    small = accuracy(runs[runs["model"] == "tiny_1"], published)
    assert not [name for name in small if name.endswith((".published", ".delta"))]
    limited = runs.copy()
    of_race, of_wikitext = limited["subject"] == "race", limited["subject"] == "wikitext2"
    limited.loc[of_race, "protocol"] = limited.loc[of_race, "protocol"].str.replace("null", "100")
    limited.loc[of_wikitext, "protocol"] = limited.loc[of_wikitext, "protocol"].str.replace("4096", "2048")
    assert not [name for name in accuracy(limited, published) if name.endswith((".published", ".delta"))]
    variant = runs.assign(variant="other")
    assert not [name for name in accuracy(variant, published) if name.endswith(".delta")]


def test_a_cell_that_lacks_a_task_has_no_mean(runs: pd.DataFrame) -> None:
    lacking = runs[~((runs["subject"] == "piqa") & (runs["method"] == "magnitude"))]
    table = accuracy(lacking)
    assert pd.isna(pick(table, "qwen", "magnitude", 50)["acc.mean"])
    assert pick(table, "qwen", "sparsegpt", 50)["acc.mean"] == pytest.approx(35.0)


def test_tasks_table(runs: pd.DataFrame) -> None:
    table = tasks(runs)
    assert list(table["metric"].unique()) == ["acc", "acc_norm"]
    row = table[(table["method"] == "sparsegpt") & (table["sparsity"] == 50) & (table["model"] == "qwen")]
    assert row["piqa"].tolist() == pytest.approx([32.5, 33.5])  # 35 + 1 - 3.5, and one more for acc_norm
    assert row["piqa.stderr"].tolist() == pytest.approx([1.0, 1.0])
    assert row["mmlu"].isna().tolist() == [False, True]
    assert not [name for name in table if "anatomy" in name]


def test_markdown_is_a_rectangular_pipe_table(runs: pd.DataFrame) -> None:
    text = to_markdown(accuracy(runs, load_accuracy()))
    lines = text.split("\n\n")[0].splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1
    assert lines[1].replace("|", "").replace(":", "").replace("-", "").strip() == ""
    assert "PPL ↓ wikitext2" in lines[0]
    assert "Mean acc % ↑" in lines[0]
    sparsegpt = next(line for line in lines if "SparseGPT" in line)
    assert "**36.00** ± 0.36" in sparsegpt  # best of the 50 % rows
    assert "−0.59" in sparsegpt
    assert not any("**" in line for line in lines if "Dense" in line)


def test_missing_cells_are_dashes_with_their_reason_below(runs: pd.DataFrame) -> None:
    text = to_markdown(accuracy(runs))
    row = next(line for line in text.splitlines() if line.startswith("|") and "MaskLLM" in line)
    values = [cell.strip() for cell in row.split("|")][-4:-1]
    assert values == ["–", "–", "–"]
    assert "- qwen MaskLLM 2:4 50 %: not run" in text


def test_learned_rows_stand_among_the_others(learned: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table = accuracy(learned[0], load_accuracy())
    assert list(zip(table["method"], table["sparsity"], strict=True)) == [
        ("dense", 0), ("maskllm", 50), ("patch_joint", 45), ("patch_tile", 45), ("patch_joint", 35), ("patch_tile", 35),
        ("patch_joint", 25), ("patch_tile", 25),
    ]  # fmt: skip
    row = pick(table, "qwen", "patch_joint", 45)
    assert row["pattern"] == "tiles:128x128"
    assert row["perplexity.wikitext2.published"] == 14.57
    text = to_markdown(table)
    assert "| PATCH-Joint | tiles 128x128 |" in text
    assert "tiles:" not in text
    assert "tiles 128x128" in to_latex(table)


def test_latex(runs: pd.DataFrame) -> None:
    text = to_latex(accuracy(runs, load_accuracy()))
    body = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert len({line.count("&") for line in body}) == 1
    columns = body[0].count("&") + 1
    declared = next(line for line in text.splitlines() if line.startswith("\\begin{tabular}"))
    assert declared == "\\begin{tabular}{@{}lrllrr" + "r" * (columns - 6) + "@{}}"
    assert "PPL $\\downarrow$ wikitext2" in body[0]
    assert "tiny\\_1" in text
    assert "\\textbf{36.00}\\,{\\scriptsize $\\pm$ 0.36}" in text
    assert "$-$0.59" in text
    assert text.count("\\toprule") == text.count("\\bottomrule") == 1
    assert "& -- &" in text
    assert text.isascii()


def test_ties_are_both_best_and_a_lone_row_is_not(runs: pd.DataFrame) -> None:
    table = accuracy(runs[runs["method"] != "magnitude"])
    level = (table["model"] == "tiny_1") & (table["sparsity"] == 50)
    table.loc[level, "perplexity.wikitext2"] = 44.001
    text = to_markdown(table[level])
    assert text.count("**44.00**") == 2
    assert "**" not in to_markdown(table[level & (table["method"] == "wanda")])


@pytest.mark.parametrize(
    ("plain", "latex"),
    [
        ("a_b & 5 % $x$ #1", r"a\_b \& 5 \% \$x\$ \#1"),
        (r"\{}~^", r"\textbackslash{}\{\}\textasciitilde{}\textasciicircum{}"),
        ("Δ ↑ −1", r"$\Delta$ $\uparrow$ $-$1"),
    ],
)
def test_escape_latex(plain: str, latex: str) -> None:
    assert escape_latex(plain) == latex


def test_special_characters_stay_in_their_cell(runs: pd.DataFrame) -> None:
    table = accuracy(runs).assign(model="a|b*c_d")
    header, _, row = to_markdown(table).splitlines()[:3]
    assert row.replace("\\|", "").count("|") == header.count("|")
    assert "a\\|b\\*c_d" in row
    assert "a|b*c\\_d" in to_latex(table)


def test_files_are_written_whole_and_the_same_twice(runs: pd.DataFrame, tmp_path: Path) -> None:
    paths = write_tables(runs, tmp_path / "tables")
    assert sorted(path.name for path in paths) == [
        f"{name}.{form}" for name in ("accuracy", "tasks") for form in ("csv", "html", "md", "tex")
    ]
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == sorted(path.name for path in paths)
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_tables(runs, tmp_path / "tables")] == before
    numbers = pd.read_csv(paths[0])
    assert numbers.loc[0, "acc.mean"] == pytest.approx(46.0)


def test_no_tasks_and_one_model(runs: pd.DataFrame, tmp_path: Path) -> None:
    lonely = runs[(runs["model"] == "tiny_1") & (runs["method"] == "dense") & (runs["metric"] == "perplexity")]
    assert "acc.mean" not in accuracy(lonely)
    for name, make in (("accuracy", accuracy), ("tasks", tasks)):
        assert all(path.stat().st_size for path in write_table(make(lonely), name, tmp_path))
    nothing = runs[runs["status"] != "done"]
    assert "MaskLLM" in to_markdown(accuracy(nothing, load_accuracy()))
    assert "MaskLLM" in to_markdown(tasks(nothing))


def terminal(table: pd.DataFrame, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render_terminal(table))
    return console.export_text()


def test_the_terminal_gets_a_part_per_model(runs: pd.DataFrame) -> None:
    lines = [line.strip() for line in terminal(accuracy(runs, load_accuracy()), 160).splitlines()]
    assert [lines.count(model) for model in ("qwen", "tiny_1")] == [1, 1]
    assert any("not run" in line for line in lines)


def test_a_part_with_one_text_and_nothing_published_fits_80_columns(runs: pd.DataFrame) -> None:
    text = terminal(accuracy(runs[runs["subject"] != "c4"], load_accuracy()), 80)
    assert "44.00 ± 0.44" in text[text.index("tiny_1") :]
    assert "unstructured" in text


def test_html_is_a_page_with_the_numbers_escaped_and_the_best_marked(runs: pd.DataFrame) -> None:
    page = to_html(accuracy(runs), "Quality <of> all")
    assert page.startswith("<!doctype html>")
    assert "<title>Quality &lt;of&gt; all</title>" in page
    assert page.count("<tr") == 1 + len(accuracy(runs))
    assert "<b>36.00</b>" in page
    assert "nan" not in page.lower()

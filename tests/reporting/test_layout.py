"""The written forms of a table: Markdown, LaTeX, HTML, CSV and the terminal."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from patch.artefacts import PatchError
from patch.reporting.study import Study
from patch.reporting.tables import make_table, render_terminal, write_tables
from patch.reporting.tables.layout import (
    PAGE,
    Column,
    Table,
    escape_latex,
    p_value,
    plain,
    signed,
    to_html,
    to_latex,
    to_markdown,
    two_digits,
)
from patch.reporting.tables.quality import quality
from patch.reporting.targets import TABLES


def make(**changes: object) -> Table:
    data = pd.DataFrame(
        {
            "model": ["m", "m", "m", "n"],
            "method": ["dense", "wanda", "maskllm", "wanda"],
            "sparsity": [0.0, 50.0, 50.0, 50.0],
            "value": [1.0, 3.004, 2.996, float("nan")],
            "value.stderr": [0.1, 0.2, float("nan"), float("nan")],
            "value.notes": ["", "x", "y x", ""],
        }
    )
    columns = [Column("model", "Model", numeric=False), Column("value", "Value", plain(2), best=min)]
    notes = {"y": "why", "x": "because", "z": "of the table"}
    return Table(**{"data": data, "columns": columns, "level": "sparsity", "notes": notes} | changes)


def test_markdown_is_a_rectangular_pipe_table(runs: pd.DataFrame) -> None:
    text = to_markdown(quality(Study(runs)))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1
    assert lines[1].replace("|", "").replace(":", "").replace("-", "").strip() == ""
    assert "PPL ↓ wikitext2" in lines[0]
    assert "Mean acc % ↑" in lines[0]
    sparsegpt = next(line for line in lines if "SparseGPT" in line)
    assert "**36.00** ± 0.36" in sparsegpt  # best of the 50 % rows
    assert "−0.59" in sparsegpt
    assert not any("**" in line for line in lines if "Dense" in line)


def test_footnotes_get_letters_as_they_come() -> None:
    text = to_markdown(make())
    assert "**3.00** ± 0.20<sup>a</sup>" in text
    assert "**3.00**<sup>a,b</sup>" in text
    assert text.endswith("- <sup>a</sup> because\n- <sup>b</sup> why\n- of the table\n")
    assert "3.00}\\,{\\scriptsize $\\pm$ 0.20}\\textsuperscript{a}" in to_latex(make())
    assert "<b>3.00</b><small> ± 0.20</small><sup>a</sup>" in to_html(make(), "t")


def test_ties_are_both_best_and_a_lone_row_is_not() -> None:
    assert to_markdown(make()).count("**") == 4
    lone = make()
    assert "**" not in to_markdown(make(data=lone.data.iloc[[0, 1]]))
    unranked = make(ranked=lambda data: data["method"] == "none")
    assert "**" not in to_markdown(unranked)


def test_warnings_come_first_and_reasons_after() -> None:
    table = make(warnings=["Look out."], missing=["n: not run"])
    assert to_markdown(table).startswith("> **Look out.**\n\n| Model")
    assert "– without a value:\n\n- n: not run\n" in to_markdown(table)
    assert to_latex(table).startswith("{\\footnotesize\\textbf{Look out.}")
    assert "\\end{tabular}\n\\par\\smallskip\\noindent{\\footnotesize -- without a value: n: not run}" in to_latex(
        table
    )
    assert (
        to_html(table, "t").index("Look out.")
        < to_html(table, "t").index("<table")
        < to_html(table, "t").index("not run")
    )


def test_latex(runs: pd.DataFrame) -> None:
    text = to_latex(quality(Study(runs)))
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


def test_latex_tables_longer_than_a_page_break_and_repeat_their_header(tmp_path: Path) -> None:
    data = pd.concat([make().data.iloc[:1]] * 3 * PAGE)
    assert "\\begin{tabular}" in to_latex(make(data=data.iloc[:PAGE]))
    text = to_latex(make(data=data))
    assert "tabular" not in text
    assert text.index("\\endhead") < text.index("\\endfoot") < text.index("\\end{longtable}")
    latex = shutil.which("pdflatex")
    if latex is None:
        pytest.skip("pdflatex is not installed: the table is not typeset")
    packages = "".join(f"\\usepackage{{{name}}}" for name in ("amsmath", "booktabs", "longtable"))
    document = f"\\documentclass{{article}}{packages}\\begin{{document}}{text}\\end{{document}}"
    (tmp_path / "page.tex").write_text(document)
    command = [latex, "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert "Overfull \\vbox" not in done.stdout
    assert int(re.search(r"Output written on page.pdf \((\d+) pages", done.stdout)[1]) > 1  # type: ignore[index]


def test_long_texts_wrap_and_lists_have_an_item_to_a_line() -> None:
    data = make().data.assign(model=["a; b", "c" * 61, "d", "e"])
    table = make(data=data, columns=[Column("model", "Model", numeric=False, listed=True), *make().columns[1:]])
    assert "\\begin{tabular}{@{}p{0.45\\linewidth}r@{}}" in to_latex(table)
    page = to_html(table, "t")
    assert "<table class=prose>" in page
    assert '<td data-head="Model">a<br>b</td>' in page
    assert f'<td class=long data-head="Model">{"c" * 61}</td>' in page
    assert "class=prose" not in to_html(make(), "t")
    console = Console(width=40, record=True, file=io.StringIO())
    console.print(render_terminal(table))
    assert console.export_text().count("c") >= 61  # nothing is cut off


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_ascii_in_latex(name: str, learned: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    assert to_latex(make_table(name, Study(*learned))).isascii()


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("a_b & 5 % $x$ #1", r"a\_b \& 5 \% \$x\$ \#1"),
        (r"\{}~^", r"\textbackslash{}\{\}\textasciitilde{}\textasciicircum{}"),
        ("Δ ↑ −1 ≤ 2×", r"$\Delta$ $\uparrow$ $-$1 $\leq$ 2$\times$"),
    ],
)
def test_escape_latex(text: str, latex: str) -> None:
    assert escape_latex(text) == latex


def test_special_characters_stay_in_their_cell() -> None:
    table = make()
    table = make(data=table.data.assign(model="a|b*c_d"))
    header, _, row = to_markdown(table).splitlines()[:3]
    assert row.replace("\\|", "").count("|") == header.count("|")
    assert "a\\|b\\*c_d" in row
    assert "a|b*c\\_d" in to_latex(table)


def test_numbers() -> None:
    assert [plain(2)(value) for value in (0.004, 99999.0, 4.17e9, 1e12)] == ["0.00", "99999.00", "4.2e9", "1.0e12"]
    errors = [two_digits(value) for value in (248.99, 12.88, 2.73, 0.996, 0.0312, 0.0, 1.8e10)]
    assert errors == ["249", "13", "2.7", "1.00", "0.031", "0.0", "1.8e10"]
    assert [signed(value) for value in (-0.001, 1.239, -2.0, -2.07e8)] == ["+0.00", "+1.24", "−2.00", "−2.1e8"]
    assert (p_value(0.0004), p_value(0.0354)) == ("<0.001", "0.035")


def test_a_table_without_rows_says_why() -> None:
    table = make(data=make().data.iloc[:0], empty="no cell of this kind")
    for text in (to_markdown(table), to_latex(table), to_html(table, "t")):
        assert "No cell of this kind." in text
    console = Console(record=True, file=io.StringIO())
    console.print(render_terminal(table))
    assert console.export_text().strip() == "No cell of this kind."


def test_files_are_written_whole_and_the_same_twice(runs: pd.DataFrame, tmp_path: Path) -> None:
    names = ("accuracy", "tasks", "claims")
    paths = write_tables(Study(runs), tmp_path / "tables", names)
    assert sorted(path.name for path in paths) == [
        f"{name}.{form}" for name in sorted(names) for form in ("csv", "html", "md", "tex")
    ]
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == sorted(path.name for path in paths)
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_tables(Study(runs), tmp_path / "tables", names)] == before
    numbers = pd.read_csv(paths[0])
    assert numbers.loc[0, "acc.mean"] == pytest.approx(46.0)


def test_unknown_tables_are_told_with_the_known_ones(runs: pd.DataFrame) -> None:
    with pytest.raises(PatchError, match=r"table 'tile_sizes': unknown; choose of accuracy, .*tile_size"):
        make_table("tile_sizes", Study(runs))


def terminal(table: Table, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render_terminal(table))
    return console.export_text()


def test_the_terminal_gets_a_part_per_model(runs: pd.DataFrame) -> None:
    lines = [line.strip() for line in terminal(quality(Study(runs)), 170).splitlines()]
    assert [lines.count(model) for model in ("qwen", "tiny_1")] == [1, 1]
    assert lines[0].startswith("Dense first")
    assert any("MaskLLM 2:4: not run" in line for line in lines)


def test_a_part_with_one_text_and_nothing_published_fits_80_columns(runs: pd.DataFrame) -> None:
    text = terminal(quality(Study(runs[runs["subject"] != "c4"])), 80)
    part = text[text.index("tiny_1 ") :]
    assert "44.00 ± 0.44" in part
    assert "unstructured" in text


def test_html_is_a_page_with_the_numbers_escaped_and_the_best_marked(runs: pd.DataFrame) -> None:
    table = quality(Study(runs))
    page = to_html(table, "Quality <of> all")
    assert page.startswith("<!doctype html>")
    assert "<title>Quality &lt;of&gt; all</title>" in page
    assert page.count("<tr") == 1 + len(table.data)
    assert "<b>36.00</b>" in page
    assert "nan" not in page.lower()

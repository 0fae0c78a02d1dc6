"""A table and its four written forms: CSV (all numbers, full precision), Markdown, LaTeX and HTML; and the terminal.

The data is a DataFrame; a value's companions stand in columns named after it: VALUE.stderr is printed beside it,
VALUE.notes (ids of footnotes) as raised letters, and VALUE.excerpt, some lines of a file, unfolds below it in HTML.
"""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import rich.box
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from patch.artefacts import atomic_path, write_text
from patch.reporting.summary import power_of_ten

DASH = "–"
LONG = 60
"""Characters from which a text wraps in LaTeX and HTML."""
PAGE = 40
"""Rows that surely fit a printed page."""


@dataclass(frozen=True)
class Column:
    """How one column of a table is printed."""

    name: str
    header: str
    show: Callable[[Any], str] = str
    numeric: bool = True
    best: Callable[[pd.Series], float] | None = None
    """min or max, for columns in which the best value of a level is marked."""
    error: Callable[[Any], str] | None = None
    """How its standard errors are printed; None for as the values."""
    link: bool = False
    """Whether its texts are files or folders, linked in HTML where they exist."""
    listed: bool = False
    """Whether its texts are lists with semicolons, in HTML an item to a line."""


@dataclass(frozen=True)
class Table:
    """What one table says."""

    data: pd.DataFrame
    columns: Sequence[Column]
    """The printed ones, in order."""
    blocks: Sequence[str] = ("model",)
    """Columns whose repeated values are printed once; a rule stands where one changes."""
    level: str | None = None
    """Column whose equal values within a block form a level; of its ranked rows the best is marked."""
    ranked: Callable[[pd.DataFrame], pd.Series] = lambda data: data["method"] != "dense"
    """Which rows compete for the best value."""
    warnings: Sequence[str] = ()
    """What has to be known before the numbers are read."""
    missing: Sequence[str] = ()
    """Rows without values, and why."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Footnotes by id; those that values refer to in VALUE.notes get letters."""
    empty: str = "nothing to show"
    """Why there are no rows, if there are none."""


def write_table(table: Table, name: str, directory: Path | str, title: str = "") -> list[Path]:
    """Write NAME.csv with all columns in full precision, and readable as NAME.md, .tex and .html; return the paths.

    NAME.tex is one booktabs `tabular` with its notes, to be \\input inside a table environment; more than PAGE rows
    are a `longtable`, to be \\input by itself.
    """
    base = Path(directory) / name
    with atomic_path(base.with_suffix(".csv")) as temporary:
        numbers = table.data.drop(columns=[name for name in table.data if str(name).endswith(".excerpt")])
        numbers.to_csv(temporary, index=False, float_format="%.10g")
    write_text(base.with_suffix(".md"), to_markdown(table))
    write_text(base.with_suffix(".tex"), to_latex(table))
    write_text(base.with_suffix(".html"), to_html(table, title or name, directory))
    return [base.with_suffix(suffix) for suffix in (".csv", ".md", ".tex", ".html")]


def to_markdown(table: Table) -> str:
    """A pipe table, columns padded so that the source reads well too; above it warnings, below it notes."""
    layout = _layout(table)

    def show(cell: _Cell) -> str:
        text = re.sub(r"([\\|*`])", r"\\\1", cell.text)
        raised = f"<sup>{cell.mark}</sup>" if cell.mark else ""
        return (f"**{text}**" if cell.best else text) + cell.error + raised

    lines = [line for warning in table.warnings for line in (f"> **{warning}**", "")]
    if layout.rows:
        rows = [[column.header for column in table.columns], *([show(cell) for cell in row] for row in layout.rows)]
        widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(table.columns))]
        rule = ["-" * (w - 1) + ":" if c.numeric else "-" * w for c, w in zip(table.columns, widths, strict=True)]
        lines += [
            "| "
            + " | ".join(_pad(text, w, c.numeric) for text, w, c in zip(row, widths, table.columns, strict=True))
            + " |"
            for row in [rows[0], rule, *rows[1:]]
        ]
    else:
        lines.append(f"_{_sentence(table.empty)}_")
    if table.missing:
        lines += ["", f"{DASH} without a value:", "", *(f"- {note}" for note in table.missing)]
    if layout.notes:
        lines += ["", *(f"- {f'<sup>{mark}</sup> ' if mark else ''}{note}" for mark, note in layout.notes)]
    return "\n".join(lines) + "\n"


def to_latex(table: Table) -> str:
    """For the packages booktabs, longtable and amsmath; numbers right-aligned with equal decimals, so they line up."""
    layout = _layout(table)

    def show(cell: _Cell) -> str:
        text = escape_latex(cell.text)
        text = f"\\textbf{{{text}}}" if cell.best else text
        text += f"\\,{{\\scriptsize {escape_latex(cell.error.strip())}}}" if cell.error else ""
        return text + (f"\\textsuperscript{{{cell.mark}}}" if cell.mark else "")

    long = _long(layout, table)
    wrapped = f"p{{{0.45 / max(1, sum(long)):.2f}\\linewidth}}"
    alignment = "".join(
        "r" if column.numeric else wrapped if wraps else "l" for column, wraps in zip(table.columns, long, strict=True)
    )
    lines = [f"{{\\footnotesize\\textbf{{{escape_latex(warning)}}}\\par\\smallskip}}" for warning in table.warnings]
    environment = "longtable" if len(layout.rows) > PAGE else "tabular"
    lines += [f"\\begin{{{environment}}}{{@{{}}{alignment}@{{}}}}", "\\toprule"]
    lines += [" & ".join(escape_latex(column.header) for column in table.columns) + " \\\\", "\\midrule"]
    lines += ["\\endhead", "\\bottomrule", "\\endfoot"] if environment == "longtable" else []
    for row, gap in zip(layout.rows, layout.gaps, strict=True):
        lines += {"": [], "block": ["\\midrule"], "level": ["\\addlinespace"]}[gap]
        lines.append(" & ".join(show(cell) for cell in row) + " \\\\")
    if not layout.rows:
        lines.append(
            f"\\multicolumn{{{len(table.columns)}}}{{@{{}}l@{{}}}}{{{escape_latex(_sentence(table.empty))}}} \\\\"
        )
    lines += [f"\\end{{{environment}}}"] if environment == "longtable" else ["\\bottomrule", "\\end{tabular}"]
    for mark, note in [("", f"{DASH} without a value: {note}") for note in table.missing] + layout.notes:
        raised = f"\\textsuperscript{{{mark}}}" if mark else ""
        lines.append(f"\\par\\smallskip\\noindent{{\\footnotesize {raised}{escape_latex(note)}}}")
    return "\n".join(lines) + "\n"


def to_html(table: Table, title: str, directory: Path | str = ".") -> str:
    """A page of its own, for the HTML report: readable on a narrow window too, where the table scrolls.

    directory: where it will be, from which its links lead.
    """
    layout = _layout(table)

    def show(cell: _Cell, column: Column) -> str:
        text = html.escape(cell.text).replace(" ± ", "&nbsp;±&nbsp;")
        text = text.replace("; ", "<br>") if column.listed else text
        if column.link and cell.text not in ("", DASH) and Path(cell.text).exists():
            text = f'<a href="{html.escape(os.path.relpath(cell.text, directory), quote=True)}">{text}</a>'
        error = f"<small>{html.escape(cell.error)}</small>" if cell.error else ""
        raised = f"<sup>{cell.mark}</sup>" if cell.mark else ""
        raised += f"<details><summary>log</summary><pre>{html.escape(cell.excerpt)}</pre></details>" * bool(
            cell.excerpt
        )
        kind = " class=number" if column.numeric else " class=long" if len(cell.text) > LONG else ""
        head = f' data-head="{html.escape(column.header, quote=True)}"'
        return f"<td{kind}{head}>{f'<b>{text}</b>' if cell.best else text}{error}{raised}</td>"

    heads = (f"<th{' class=number' if c.numeric else ''}>{html.escape(c.header)}</th>" for c in table.columns)
    lines = ["<!doctype html><html lang=en><meta charset=utf-8>", f"<title>{html.escape(title)}</title>", _HTML_STYLE]
    lines += [f"<h1>{html.escape(title)}</h1>", *(f"<p class=warning>{html.escape(w)}</p>" for w in table.warnings)]
    if layout.rows:
        prose = " class=prose" if any(_long(layout, table)) else ""
        lines += [f"<div><table{prose}><thead><tr>{''.join(heads)}</tr></thead><tbody>"]
        for row, gap in zip(layout.rows, layout.gaps, strict=True):
            cells = "".join(show(cell, column) for cell, column in zip(row, table.columns, strict=True))
            lines.append(f"<tr{f' class={gap}' if gap else ''}>{cells}</tr>")
        lines.append("</tbody></table></div>")
    else:
        lines.append(f"<p>{html.escape(_sentence(table.empty))}</p>")
    if table.missing:
        reasons = (f"<li>{html.escape(note)}</li>" for note in table.missing)
        lines += [f"<p>{DASH} without a value:</p><ul>", *reasons, "</ul>"]
    lines += [f"<p>{f'<sup>{mark}</sup> ' if mark else ''}{html.escape(note)}</p>" for mark, note in layout.notes]
    return "\n".join([*lines, "</html>"]) + "\n"


def render_terminal(table: Table) -> Group:
    """The table for the terminal, in the layout of the files; a part per model (or first block), so that it fits 80."""
    warnings = [Text(warning, "bold") for warning in table.warnings]
    if not len(table.data):
        return Group(*warnings, Text(_sentence(table.empty)))
    parts = [_part(str(value), rows, table) for value, rows in table.data.groupby(table.blocks[0], sort=False)]
    notes = [f"{DASH} {note}" for note in table.missing]
    notes += [f"{mark or '*'} {note}" for mark, note in _layout(table).notes]
    return Group(*warnings, *parts, Text("\n".join(notes)))


def escape_latex(text: str) -> str:
    """Plain text as LaTeX: special characters, and the signs that these tables use."""
    return re.sub("[" + re.escape("".join(_LATEX)) + "]", lambda found: _LATEX[found[0]], text)


def plain(decimals: int) -> Callable[[Any], str]:
    """Numbers with so many decimals; from 100,000 on, as perplexities of a broken model, two digits and a power."""
    return lambda value: f"{value:.{decimals}f}" if abs(value) < 1e5 else power_of_ten(value, 1)


def two_digits(error: float) -> str:
    """A standard error, to two significant digits."""
    if error >= 1e5 or error <= 0:
        return plain(1)(error)
    return f"{error:.{max(0, 1 - math.floor(math.log10(error)))}f}"


def signed(value: float) -> str:
    """A difference, with its sign, else as `plain` with two decimals."""
    return ("−" if round(value, 2) < 0 else "+") + plain(2)(abs(value))


def p_value(value: float) -> str:
    """A p-value in three decimals."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _part(title: str, data: pd.DataFrame, table: Table) -> RichTable:
    shown = [
        c for c in table.columns if c.name != table.blocks[0] and not ("." in c.name and data[c.name].isna().all())
    ]
    part = replace(table, data=data, columns=shown)
    layout = _layout(part)
    between = 1 if len(shown) < 7 else 0  # seven columns just fit 80 characters
    result = RichTable(
        title=title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD, show_edge=False,
        pad_edge=False, padding=(0, between, 0, 0),
    )  # fmt: skip
    long = _long(layout, part)
    result.show_lines = any(long)
    for column in shown:
        header = "\n".join(column.header.rsplit(" ", 1))  # two short lines, so that numbers need not wrap
        justify: Literal["left", "right"] = "right" if column.numeric else "left"
        wraps = column.numeric or any(long)
        result.add_column(header, justify=justify, no_wrap=not wraps, vertical="top" if any(long) else "bottom")
    for row, after in zip(layout.rows, [*layout.gaps[1:], ""], strict=True):
        texts = [
            Text(cell.text, "bold" if cell.best else "")
            + Text(cell.error + (f" {cell.mark}" if cell.mark else ""), "dim")
            for cell in row
        ]
        result.add_row(*texts, end_section=bool(after))
    return result


@dataclass(frozen=True)
class _Cell:
    text: str
    error: str = ""
    best: bool = False
    mark: str = ""
    excerpt: str = ""


@dataclass(frozen=True)
class _Layout:
    rows: list[list[_Cell]]
    gaps: list[str]
    """Before each row: "block" where a new block starts, "level" where a new level does, else ""."""
    notes: list[tuple[str, str]]
    """Mark and text of every footnote."""


def _long(layout: _Layout, table: Table) -> list[bool]:
    """Which columns have texts that wrap."""
    return [
        not column.numeric and any(len(row[number].text) > LONG for row in layout.rows)
        for number, column in enumerate(table.columns)
    ]


def _layout(table: Table) -> _Layout:
    best = {column.name: _best(table, column) for column in table.columns if column.best}
    marks = _marks(table)
    rows: list[list[_Cell]] = []
    gaps: list[str] = []
    above: dict[str, Any] = {}
    for position, row in enumerate(table.data.to_dict("records")):
        same_block = bool(above) and all(row[name] == above[name] for name in table.blocks)
        same_level = same_block and (table.level is None or row[table.level] == above[table.level])
        gaps.append("" if not above or same_level else "level" if same_block else "block")
        cells = []
        for column in table.columns:
            repeats = column.name in table.blocks and same_block
            error = row.get(f"{column.name}.stderr", math.nan)
            notes, excerpt = row.get(f"{column.name}.notes", ""), row.get(f"{column.name}.excerpt", "")
            cells.append(
                _Cell(
                    "" if repeats else DASH if pd.isna(row[column.name]) else column.show(row[column.name]),
                    "" if pd.isna(error) else f" ± {(column.error or column.show)(error)}",
                    bool(column.name in best and best[column.name].iloc[position]),
                    ",".join(sorted(marks[note] for note in notes.split())) if isinstance(notes, str) else "",
                    excerpt if isinstance(excerpt, str) else "",
                )
            )
        rows.append(cells)
        above = {str(name): value for name, value in row.items()}
    notes_of_all = [("", text) for note, text in table.notes.items() if note not in marks]
    return _Layout(rows, gaps, [(mark, table.notes[note]) for note, mark in marks.items()] + notes_of_all)


def _marks(table: Table) -> dict[str, str]:
    """Letters for the footnotes that values refer to, as they come when the table is read line by line."""
    columns = [f"{column.name}.notes" for column in table.columns if f"{column.name}.notes" in table.data]
    noted = (notes for row in table.data[columns].to_numpy() for notes in row if isinstance(notes, str))
    used = dict.fromkeys(note for notes in noted for note in notes.split())
    return {note: chr(ord("a") + number) for number, note in enumerate(used)}


def _best(table: Table, column: Column) -> pd.Series:
    """Which rows hold the best value among ranked rows of a level, as printed; alone, none is best."""
    assert column.best is not None
    marked = pd.Series(False, index=table.data.index)
    ranked = table.data[table.ranked(table.data) & table.data[column.name].notna()]
    for _, group in ranked.groupby([*table.blocks, *([table.level] if table.level else [])]):
        if len(group) > 1:
            printed = group[column.name].map(column.show)
            marked[group.index] = printed == column.show(column.best(group[column.name]))
    return marked


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _pad(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "×": r"$\times$",
    "µ": r"$\mu$",
    "→": r"$\to$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "Δ": r"$\Delta$",
    "±": r"$\pm$",
    "−": r"$-$",
    "+": r"$+$",
    "–": "--",
}

_HTML_STYLE = """<meta name=viewport content="width=device-width"><style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1b1b; margin: 1.5rem; max-width: 120rem; }
h1 { font-size: 1.15rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; border-bottom: 1.5px solid #1b1b1b; white-space: nowrap; }
thead th { border-block: 1.5px solid #1b1b1b; vertical-align: bottom; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; font-variant-numeric: tabular-nums; }
.number { text-align: right; }
.long { white-space: normal; min-width: 18rem; max-width: 42rem; }
tr.level td { border-top: 1px solid #c8c8c8; }
tr.block td { border-top: 1.5px solid #1b1b1b; }
small { color: #666; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; margin: .3rem 0 0; }
summary { cursor: pointer; color: #666; }
sup { line-height: 0; }
p, ul { max-width: 60rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { margin: .8rem; }
  th, td { padding: .3rem .4rem; }
  .prose { white-space: normal; }
  .prose thead, .prose td:empty { display: none; }
  .prose tr, .prose td { display: block; min-width: 0; padding: .1rem 0; text-align: left; overflow-wrap: anywhere; }
  .prose tr { border-top: 1px solid #c8c8c8; padding: .4rem 0; }
  .prose tr.block td { border: 0; }
  .prose td::before { content: attr(data-head) ": "; color: #666; }
}
.warning { border-left: 4px solid #b35900; padding-left: .7rem; font-weight: 600; }
</style>"""

"""The tables: functions of the runs table, and one writer of CSV (numbers), Markdown and LaTeX (readable).

A table is a DataFrame with plain names: the settings' columns (`patch.reporting.summary.KEYS` and others), then
METRIC.SUBJECT for a value, followed by .stderr, .spread, .published and .delta where there are any. `_layout` knows how
each of them is printed.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import rich.box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from patch.artefacts import atomic_path, write_text
from patch.reporting.published import load_accuracy, same_perplexity_protocol, same_tasks_protocol
from patch.reporting.summary import KEYS, SETTINGS, pattern_title, scores, settings, tasks_of, texts_of

TASK_TITLES = {
    "mmlu": "MMLU",
    "piqa": "PIQA",
    "arc_easy": "ARC-E",
    "arc_challenge": "ARC-C",
    "winogrande": "WinoG",
    "openbookqa": "OBQA",
    "race": "RACE",
    "hellaswag": "HellaS",
    "mmlu_stem": "MMLU stem",
    "mmlu_social_sciences": "MMLU soc.",
    "mmlu_humanities": "MMLU hum.",
    "mmlu_other": "MMLU other",
}
_DASH = "–"


def accuracy(runs: pd.DataFrame, published: pd.DataFrame | None = None) -> pd.DataFrame:
    """Perplexity and mean accuracy of every setting, the paper's main table.

    published: from `load_accuracy`; None for no comparison.
    Columns: the settings' (see `summary.settings`); perplexity.TEXT; acc.mean (percent, over all tasks); each
    followed by .stderr, by .spread (standard deviation over seeds) where a setting has several seeds, and by .published
    and .delta (ours minus published) where a published value of the same model and protocol exists.
    Settings without results have empty cells and say why in `note`.
    """
    table, found = settings(runs), scores(runs)
    wanted = [("perplexity", text) for text in texts_of(found)]
    wanted += [("acc", "mean")] if tasks_of(found) else []
    comparison = None if published is None else _published(table, found, published)
    for metric, subject in wanted:
        table = _add(table, found, metric, subject)
        name = f"{metric}.{subject}"
        if comparison is not None and name in comparison and comparison[name].notna().any():
            table[f"{name}.published"] = comparison[name]
            table[f"{name}.delta"] = table[name] - comparison[name]
    return table


def tasks(runs: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of every setting on each task.

    Columns: the settings' (see `summary.settings`); metric (acc, or acc_norm, normalised by the answers' lengths, for
    the tasks that have it); TASK and TASK.stderr in percent. Per model first all rows of acc, then all of acc_norm.
    """
    table, found = settings(runs), scores(runs)
    parts = []
    for metric in ("acc", "acc_norm"):
        part = table.assign(metric=metric)
        for task in tasks_of(found, metric):
            names = {f"{metric}.{task}": task, f"{metric}.{task}.stderr": f"{task}.stderr"}
            part = _add(part, found, metric, task).rename(columns=names)
        if tasks_of(found, metric):
            parts.append(part)
    if not parts:
        return table.assign(metric="acc")
    joined = pd.concat(parts, ignore_index=True)
    order = {model: rank for rank, model in enumerate(table["model"].unique())}
    joined = joined.sort_values("model", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    numbers = [name for task in tasks_of(found) for name in (task, f"{task}.stderr") if name in joined]
    return joined[[*table.columns, "metric", *numbers]]


def write_tables(runs: pd.DataFrame, directory: Path | str) -> list[Path]:
    """Write every table of the report as NAME.csv, .md, .tex and .html in `directory`; return the paths."""
    made: dict[str, Callable[[], pd.DataFrame]] = {
        "accuracy": lambda: accuracy(runs, load_accuracy()),
        "tasks": lambda: tasks(runs),
    }
    return [path for name, make in made.items() for path in write_table(make(), name, directory)]


def write_table(table: pd.DataFrame, name: str, directory: Path | str) -> list[Path]:
    """Write `table` as NAME.csv with all its columns in full precision, and readable as NAME.md, .tex and .html.

    NAME.tex is one booktabs `tabular`, to be \\input inside a table environment.
    """
    base = Path(directory) / name
    with atomic_path(base.with_suffix(".csv")) as temporary:
        table.to_csv(temporary, index=False, float_format="%.10g")
    write_text(base.with_suffix(".md"), to_markdown(table))
    write_text(base.with_suffix(".tex"), to_latex(table))
    write_text(base.with_suffix(".html"), to_html(table, name))
    return [base.with_suffix(suffix) for suffix in (".csv", ".md", ".tex", ".html")]


def to_markdown(table: pd.DataFrame) -> str:
    """A pipe table, columns padded so that the source reads well too; below it, what is missing and why."""
    layout = _layout(table)

    def show(cell: _Cell) -> str:
        text = re.sub(r"([\\|*`])", r"\\\1", cell.text)
        return (f"**{text}**" if cell.best else text) + cell.error

    rows = [[column.header for column in layout.columns], *([show(cell) for cell in row] for row in layout.rows)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(layout.columns))]
    rule = ["-" * (w - 1) + ":" if c.numeric else "-" * w for c, w in zip(layout.columns, widths, strict=True)]
    lines = [
        "| "
        + " | ".join(_pad(text, w, c.numeric) for text, w, c in zip(row, widths, layout.columns, strict=True))
        + " |"
        for row in [rows[0], rule, *rows[1:]]
    ]
    if layout.notes:
        lines += ["", f"{_DASH} without a value:", "", *(f"- {note}" for note in layout.notes)]
    return "\n".join(lines) + "\n"


def to_latex(table: pd.DataFrame) -> str:
    """A `tabular` for the packages booktabs and amsmath; numbers right-aligned with equal decimals, so they line up."""
    layout = _layout(table)

    def show(cell: _Cell) -> str:
        text = escape_latex(cell.text)
        text = f"\\textbf{{{text}}}" if cell.best else text
        return text + (f"\\,{{\\scriptsize {escape_latex(cell.error.strip())}}}" if cell.error else "")

    alignment = "".join("r" if column.numeric else "l" for column in layout.columns)
    lines = [f"% {note}" for note in layout.notes]
    lines += [f"\\begin{{tabular}}{{@{{}}{alignment}@{{}}}}", "\\toprule"]
    lines += [" & ".join(escape_latex(column.header) for column in layout.columns) + " \\\\", "\\midrule"]
    for row, gap in zip(layout.rows, layout.gaps, strict=True):
        lines += {"": [], "block": ["\\midrule"], "level": ["\\addlinespace"]}[gap]
        lines.append(" & ".join(show(cell) for cell in row) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def to_html(table: pd.DataFrame, title: str) -> str:
    """A page of its own, for the HTML report: readable on a narrow window too, where the table scrolls."""
    layout = _layout(table)

    def show(cell: _Cell, column: _Column) -> str:
        text = html.escape(cell.text)
        error = f"<small>{html.escape(cell.error)}</small>" if cell.error else ""
        return f"<td{' class=number' if column.numeric else ''}>{f'<b>{text}</b>' if cell.best else text}{error}</td>"

    heads = (f"<th{' class=number' if c.numeric else ''}>{html.escape(c.header)}</th>" for c in layout.columns)
    lines = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>", _HTML_STYLE]
    lines += [f"<div><table><thead><tr>{''.join(heads)}</tr></thead><tbody>"]
    for row, gap in zip(layout.rows, layout.gaps, strict=True):
        cells = "".join(show(cell, column) for cell, column in zip(row, layout.columns, strict=True))
        lines.append(f"<tr{f' class={gap}' if gap else ''}>{cells}</tr>")
    lines.append("</tbody></table></div>")
    if layout.notes:
        lines += [
            f"<p>{_DASH} without a value:</p><ul>",
            *(f"<li>{html.escape(n)}</li>" for n in layout.notes),
            "</ul>",
        ]
    return "\n".join([*lines, "</html>"]) + "\n"


def escape_latex(text: str) -> str:
    """Plain text as LaTeX: special characters, and the signs that these tables use."""
    return re.sub("[" + re.escape("".join(_LATEX)) + "]", lambda found: _LATEX[found[0]], text)


def render_terminal(table: pd.DataFrame) -> Group:
    """The table for the terminal, in the layout of the files; a part per model under its name, so that it fits 80."""
    notes = Text("\n".join(f"{_DASH} {note}" for note in _notes(table)))
    return Group(*(_part(str(model), rows) for model, rows in table.groupby("model", sort=False)), notes)


def _part(model: str, table: pd.DataFrame) -> Table:
    empty = [name for name in table.columns if "." in name and table[name].isna().all()]  # what only other models have
    layout = _layout(table.drop(columns=empty))
    result = Table(
        title=model, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD, show_edge=False,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for column in layout.columns[1:]:
        header = "\n".join(column.header.rsplit(" ", 1))  # two short lines, so that numbers need not wrap
        justify: Literal["left", "right"] = "right" if column.numeric else "left"
        result.add_column(header, justify=justify, no_wrap=not column.numeric, vertical="bottom")
    for row, after in zip(layout.rows, [*layout.gaps[1:], ""], strict=True):
        texts = [Text(cell.text, "bold" if cell.best else "") + Text(cell.error, "dim") for cell in row[1:]]
        result.add_row(*texts, end_section=bool(after))
    return result


@dataclass(frozen=True)
class _Column:
    """How one column of a table is printed."""

    name: str
    header: str
    show: Callable[[Any], str] = str
    numeric: bool = True
    best: Callable[[pd.Series], float] | None = None
    """min or max, for columns in which the best value is marked."""


@dataclass(frozen=True)
class _Cell:
    text: str
    error: str = ""
    best: bool = False


@dataclass(frozen=True)
class _Layout:
    columns: list[_Column]
    rows: list[list[_Cell]]
    gaps: list[str]
    """Before each row: "block" where a new model or metric starts, "level" where a new sparsity does, else ""."""
    notes: list[str]


def _layout(table: pd.DataFrame) -> _Layout:
    columns = list(_columns(table))
    blocks = [name for name in ("model", "metric") if name in table]
    best = {column.name: _best(table, column, blocks) for column in columns if column.best}
    rows: list[list[_Cell]] = []
    gaps: list[str] = []
    above: dict[str, Any] = {}
    for position, row in enumerate(_records(table)):
        same_block = bool(above) and all(row[name] == above[name] for name in blocks)
        same_level = same_block and row["sparsity"] == above["sparsity"]
        gaps.append("" if not above or same_level else "level" if same_block else "block")
        cells = []
        for column in columns:
            repeats = column.name in blocks and same_block
            error = row.get(f"{column.name}.stderr", math.nan)
            cells.append(
                _Cell(
                    "" if repeats else _DASH if _empty(row[column.name]) else column.show(row[column.name]),
                    "" if _empty(error) else f" ± {column.show(error)}",
                    bool(column.name in best and best[column.name].iloc[position]),
                )
            )
        rows.append(cells)
        above = row
    return _Layout(columns, rows, gaps, _notes(table))


def _columns(table: pd.DataFrame) -> Iterator[_Column]:
    """The columns that are printed, in order. Variant and seeds appear only where they distinguish anything."""
    yield _Column("model", "Model", numeric=False)
    if "metric" in table:
        yield _Column("metric", "Accuracy, %", numeric=False)
    yield _Column("sparsity", "Sparsity %", "{:g}".format)
    yield _Column("title", "Method", numeric=False)
    yield _Column("pattern", "Pattern", pattern_title, numeric=False)
    if (table["variant"] != "default").any():
        yield _Column("variant", "Variant", numeric=False)
    if "metric" not in table:
        yield _Column("realised_sparsity", "Realised %", "{:.2f}".format)
    if (table["seeds"] > 1).any():
        yield _Column("done", "Seeds", "{:d}".format)
    for name in table.columns:
        if "metric" in table and name not in (*SETTINGS, "metric") and not name.endswith(".stderr"):
            yield _Column(name, f"{TASK_TITLES.get(name, name)} ↑", "{:.1f}".format, best=max)
        elif column := _score_column(name):
            yield column


def _score_column(name: str) -> _Column | None:
    value, aspect = name, ""
    for suffix in (".stderr", ".spread", ".published", ".delta"):
        if name.endswith(suffix):
            value, aspect = name.removesuffix(suffix), suffix
    metric, _, subject = value.partition(".")
    if aspect == ".stderr" or metric not in ("perplexity", "acc") or not subject:
        return None
    short = "PPL" if metric == "perplexity" else "Acc %"
    plain = "{:.2f}".format
    return {
        "": _Column(name, f"PPL ↓ {subject}", plain, best=min)
        if metric == "perplexity"
        else _Column(name, "Mean acc % ↑", plain, best=max),
        ".spread": _Column(name, f"{short} seed SD", plain),
        ".published": _Column(name, f"{short} published", plain),
        ".delta": _Column(name, f"Δ {short}", _signed),
    }[aspect]


def _best(table: pd.DataFrame, column: _Column, blocks: list[str]) -> pd.Series:
    """Which rows hold the best value among pruned rows of equal sparsity, as printed; alone, none is best."""
    assert column.best is not None
    marked = pd.Series(False, index=table.index)
    pruned = table[(table["method"] != "dense") & table[column.name].notna()]
    for _, group in pruned.groupby([*blocks, "sparsity"]):
        if len(group) > 1:
            printed = group[column.name].map(column.show)
            marked[group.index] = printed == column.show(column.best(group[column.name]))
    return marked


def _notes(table: pd.DataFrame) -> list[str]:
    """Settings without full results, gathered by reason."""
    reasons: dict[str, list[str]] = {}
    rows = table.drop_duplicates(KEYS)
    for row in _records(rows[rows["note"] != ""]):
        parts = [row["model"], row["title"], pattern_title(row["pattern"]), f"{row['sparsity']:g} %"]
        parts += [row["variant"]] if row["variant"] != "default" else []
        reasons.setdefault(row["note"], []).append(" ".join(dict.fromkeys(parts)))
    return [f"{'; '.join(names)}: {reason}" for reason, names in reasons.items()]


def _add(table: pd.DataFrame, found: pd.DataFrame, metric: str, subject: str) -> pd.DataFrame:
    """Append one score as METRIC.SUBJECT with the aspects that any setting has."""
    chosen = found[(found["metric"] == metric) & (found["subject"] == subject)]
    name = f"{metric}.{subject}"
    names = {"value": name, "stderr": f"{name}.stderr", "spread": f"{name}.spread"}
    kept = [aspect for aspect in names if aspect == "value" or (aspect == "stderr" and chosen[aspect].notna().any())]
    if subject in ("mean", *texts_of(found)) and chosen["spread"].notna().any():
        kept.append("spread")
    return table.merge(chosen[[*KEYS, *kept]].rename(columns=names), on=KEYS, how="left")


def _published(table: pd.DataFrame, found: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """The published counterpart of every setting measured under the published protocol; columns as in `accuracy`.

    Other variants than the default depart from the paper's protocol and have no counterpart.
    """
    known = {(row.source, row.method, row.sparsity, row.pattern): row for row in published.itertuples()}
    protocols = {
        key: dict(zip(group["subject"], group["protocol"], strict=True))
        for key, group in found[found["subject"] != "mean"].groupby([*KEYS, "metric"])
    }
    rows: list[dict[str, float]] = []
    for setting in table.itertuples():
        row: dict[str, float] = {}
        theirs: Any = known.get((setting.source, setting.method, setting.sparsity, setting.pattern))
        if theirs is not None and setting.variant == "default":
            key = tuple(getattr(setting, name) for name in KEYS)
            for text, protocol in protocols.get((*key, "perplexity"), {}).items():
                if same_perplexity_protocol(protocol) and theirs.perplexity_length == protocol["length"]:
                    row[f"perplexity.{text}"] = theirs.perplexity
            if same_tasks_protocol(protocols.get((*key, "acc"), {})):
                row["acc.mean"] = theirs.mean_accuracy
        rows.append(row)
    return pd.DataFrame(rows, index=table.index, dtype=float)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _empty(value: Any) -> bool:
    return bool(pd.isna(value))


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")  # + 0.0 turns a negative zero into zero


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
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "Δ": r"$\Delta$",
    "±": r"$\pm$",
    "−": r"$-$",
    "+": r"$+$",
    "–": "--",
}

_HTML_STYLE = """<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1b1b; margin: 1.5rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; border-bottom: 1.5px solid #1b1b1b; white-space: nowrap; }
thead th { border-block: 1.5px solid #1b1b1b; }
th, td { padding: .3rem .7rem; text-align: left; font-variant-numeric: tabular-nums; }
.number { text-align: right; }
tr.level td { border-top: 1px solid #c8c8c8; }
tr.block td { border-top: 1.5px solid #1b1b1b; }
small { color: #666; }
</style>"""

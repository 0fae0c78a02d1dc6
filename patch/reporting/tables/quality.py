"""Perplexity and accuracy of settings, beside the published values: most tables of the paper are these, of other cells.

A setting's values stand in columns METRIC.SUBJECT, followed by .stderr, .spread, .published and .delta where there are
any; `columns` knows how each of them is printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd

from patch.experiments import TASKS, UNCOMPRESSED
from patch.reporting.published import (
    DENSE_TOLERANCE,
    Note,
    Published,
    load_notes,
    load_published,
    same_perplexity_protocol,
    same_task_protocol,
    same_tasks_protocol,
)
from patch.reporting.study import Study
from patch.reporting.summary import (
    KEYS,
    SETTINGS,
    pattern_title,
    rows_of,
    scores,
    settings,
    tasks_of,
    texts_of,
)
from patch.reporting.tables.layout import Column, Table, plain, signed, two_digits
from patch.reporting.targets import TABLES
from patch.sparsity.patterns import Pattern

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
OFF_TARGET = 2.0
"""Points of sparsity by which a row may miss its target and still compete for the best value."""
NO_CELLS = "this run has no cell that belongs here; workflow/config/paper.yaml has all of them"


def quality(study: Study, name: str = "accuracy") -> Table:
    """Perplexity and mean accuracy of every setting that the target `name` shows.

    Columns of the data: the settings' (see `summary.settings`); perplexity.TEXT; acc.mean (percent, over all tasks);
    each followed by .stderr, by .spread (standard deviation over seeds) where a setting has several seeds, and by
    .published and .delta (ours minus published) where there is a published value of the same setting. A delta is taken
    only under the published protocol. Settings without results have empty cells and say why in `note`.
    """
    runs = rows_of(study.runs, TABLES[name])
    table, found = settings(runs), scores(runs)
    wanted = [("perplexity", text) for text in texts_of(found)] + ([("acc", "mean")] if tasks_of(found) else [])
    theirs = _Comparison(table, found, load_notes(name))
    if found.empty and theirs.any:  # nothing ran: what is published shows what to expect
        wanted = [("perplexity", "wikitext2"), ("acc", "mean")]
    for metric, subject in wanted:
        table = theirs.beside(_add(table, found, metric, subject), metric, subject)
    return Table(
        table,
        list(columns(table)),
        blocks=("model",),
        level="sparsity",
        ranked=_at_their_level,
        warnings=_dense_warnings(table, wanted),
        missing=reasons(table),
        notes=_footnotes(load_notes(name), theirs.used, bool(theirs.any)),
        empty=NO_CELLS,
    )


def tasks(study: Study) -> Table:
    """Accuracy of every setting on each task.

    Columns of the data: the settings' (see `summary.settings`); metric; TASK and TASK.stderr in percent. Per model
    first all rows of acc, then of what is published and the difference to it, where the protocol is the published one,
    then of acc_norm (normalised by the answers' lengths), for the tasks that have it.
    """
    runs = rows_of(study.runs, TABLES["tasks"])
    table, found, notes = settings(runs), scores(runs), load_notes("tasks")
    comparison = _Comparison(table, found, notes)
    measured = {metric: tasks_of(found, metric) for metric in ("acc", "acc_norm")}
    if found.empty and comparison.any:  # nothing ran: what is published shows what to expect
        measured["acc"] = list(TASKS)
    names = measured["acc"]
    parts = []
    for metric, own in measured.items():
        part = table.assign(metric=metric)
        for task in own:
            renamed = {f"{metric}.{task}": task, f"{metric}.{task}.stderr": f"{task}.stderr"}
            part = _add(part, found, metric, task).rename(columns=renamed)
        if own:
            parts.append(part)
    theirs = _published_tasks(parts[0], found, names) if parts else []
    parts[1:1] = theirs
    joined = pd.concat(parts, ignore_index=True) if parts else table.assign(metric="acc")
    order = {model: rank for rank, model in enumerate(table["model"].unique())}
    joined = joined.sort_values("model", key=lambda models: models.map(order), kind="stable", ignore_index=True)
    numbers = [column for task in names for column in (task, f"{task}.stderr") if column in joined]
    data, mean = joined[[*table.columns, "metric", *numbers]], ("acc", "mean")
    return Table(
        data,
        [*setting_columns(data), *(Column(t, f"{TASK_TITLES.get(t, t)} ↑", _task_value, best=max) for t in names)],
        blocks=("model", "metric"),
        level="sparsity",
        ranked=lambda rows: _at_their_level(rows) & (rows["metric"] != "Δ acc"),
        warnings=_dense_warnings(comparison.beside(_add(table, found, *mean), *mean), [mean]),
        missing=reasons(data),
        notes=_footnotes(notes, {note.id for note in notes}, bool(theirs)),
        empty=NO_CELLS,
    )


def _at_their_level(rows: pd.DataFrame) -> pd.Series:
    """Of pruned rows those that reach their sparsity; a control that leaves whole layers dense competes with none."""
    missed = (rows["sparsity"] - rows["realised_sparsity"]).abs() > OFF_TARGET
    return (rows["method"] != "dense") & ~missed


def reasons(table: pd.DataFrame) -> list[str]:
    """Settings without full results, gathered by model and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in table.drop_duplicates(KEYS).to_dict("records"):
        if row["note"]:
            found.setdefault((row["model"], row["note"]), []).append(_title(row))
    return [f"{model}, {'; '.join(names)}: {reason}" for (model, reason), names in found.items()]


def _title(row: Any) -> str:
    """A setting in words: method, pattern, sparsity where the pattern does not fix it, and what else differs."""
    parts = [row["title"]]
    if row["method"] != "dense":
        parts.append(pattern_title(row["pattern"]))
        parts += [f"{row['sparsity']:g} %"] if Pattern.parse(row["pattern"]).fixed_sparsity is None else []
    parts += [row["variant"]] if row["variant"] != "default" else []
    parts += [row["compression"]] if row["compression"] != UNCOMPRESSED else []
    return " ".join(parts)


def setting_columns(table: pd.DataFrame) -> Iterator[Column]:
    """The columns that say which setting a row is. Variant, weights and seeds appear only where they distinguish."""
    yield Column("model", "Model", numeric=False)
    if "metric" in table:
        yield Column("metric", "Accuracy, %", numeric=False)
    yield Column("sparsity", "Sparsity %", "{:g}".format)
    yield Column("title", "Method", numeric=False)
    yield Column("pattern", "Pattern", pattern_title, numeric=False)
    if (table["variant"] != "default").any():
        yield Column("variant", "Variant", lambda name: "" if name == "default" else name, numeric=False)
    if (table["compression"] != UNCOMPRESSED).any():
        yield Column("compression", "Weights", lambda name: "full" if name == UNCOMPRESSED else name, numeric=False)
    if "realised_sparsity" in table and "metric" not in table:
        yield Column("realised_sparsity", "Realised %", plain(2))
    if "seeds" in table and (table["seeds"] > 1).any():
        yield Column("done", "Seeds", "{:d}".format)


def columns(table: pd.DataFrame) -> Iterator[Column]:
    """The columns of a table of settings, in order."""
    yield from setting_columns(table)
    for name in table.columns:
        if name not in SETTINGS and (column := _score_column(name)):
            yield column


def _score_column(name: str) -> Column | None:
    value, aspect = name, ""
    for suffix in (".stderr", ".spread", ".published", ".delta", ".notes"):
        if name.endswith(suffix):
            value, aspect = name.removesuffix(suffix), suffix
    metric, _, subject = value.partition(".")
    if aspect in (".stderr", ".notes") or metric not in ("perplexity", "acc") or not subject:
        return None
    short = "PPL" if metric == "perplexity" else "Acc %"
    return {
        "": Column(name, f"PPL ↓ {subject}", plain(2), best=min, error=two_digits)
        if metric == "perplexity"
        else Column(name, "Mean acc % ↑", plain(2), best=max, error=two_digits),
        ".spread": Column(name, f"{short} seed SD", plain(2)),
        ".published": Column(name, f"{short} published", plain(2)),
        ".delta": Column(name, f"Δ {short}", signed),
    }[aspect]


def _add(table: pd.DataFrame, found: pd.DataFrame, metric: str, subject: str) -> pd.DataFrame:
    """Append one score as METRIC.SUBJECT with the aspects that any setting has."""
    chosen = found[(found["metric"] == metric) & (found["subject"] == subject)]
    name = f"{metric}.{subject}"
    names = {"value": name, "stderr": f"{name}.stderr", "spread": f"{name}.spread"}
    kept = [aspect for aspect in names if aspect == "value" or (aspect == "stderr" and chosen[aspect].notna().any())]
    if subject in ("mean", *texts_of(found)) and chosen["spread"].notna().any():
        kept.append("spread")
    return table.merge(chosen[[*KEYS, *kept]].rename(columns=names), on=KEYS, how="left")


class _Comparison:
    """The published values beside the settings of a table."""

    def __init__(self, table: pd.DataFrame, found: pd.DataFrame, notes: list[Note]):
        self.published, self.notes = Published(load_published()), notes
        self.used: set[str] = set()
        """Ids of the notes whose values are in the table."""
        self.protocols: dict[tuple[Any, ...], dict[str, Any]] = {
            key: dict(zip(group["subject"], group["protocol"], strict=True))
            for key, group in found[found["subject"] != "mean"].groupby([*KEYS, "metric"])
        }
        kinds = (("perplexity", "wikitext2"), ("acc", "mean"))
        self.any = any(self.published.get(row, *kind) for row in table.to_dict("records") for kind in kinds)

    def beside(self, table: pd.DataFrame, metric: str, subject: str) -> pd.DataFrame:
        """The table with what is published of one score and the difference to it, where any row has it."""
        name = f"{metric}.{subject}"
        rows = [self._row(row, metric, subject, row[name]) for row in table.to_dict("records")]
        if all(value is None for value, _, _ in rows):
            return table
        published = pd.DataFrame(rows, columns=[".published", ".delta", ".published.notes"], index=table.index)
        published = published.astype({".published": float, ".delta": float})
        aspects = [
            aspect for aspect in published if not (aspect == ".published.notes" and (published[aspect] == "").all())
        ]
        return table.assign(**{f"{name}{aspect}": published[aspect] for aspect in aspects})

    def _row(self, row: dict[Any, Any], metric: str, subject: str, ours: float) -> tuple[Any, Any, str]:
        """Published value, difference, and ids of footnotes. Nothing where ours is another quantity."""
        protocols = self.protocols.get((*(row[name] for name in KEYS), metric), {})
        measured = not pd.isna(ours)
        if metric == "perplexity":
            protocol = protocols.get(subject, {})
            if (measured and not same_perplexity_protocol(protocol)) or (not measured and subject != "wikitext2"):
                return None, None, ""
        elif measured and not same_tasks_protocol(protocols):
            return None, None, ""
        theirs = self.published.get(row, metric, "wikitext2" if metric == "perplexity" else subject)
        if theirs is None:
            return None, None, ""
        value, length = theirs
        notes = [note.id for note in self.notes if note.concerns(row, metric)]
        self.used.update(notes)
        comparable = measured and (metric != "perplexity" or length == protocols[subject]["length"])
        return value, ours - value if comparable else None, " ".join(notes)


def _published_tasks(acc: pd.DataFrame, found: pd.DataFrame, names: list[str]) -> list[pd.DataFrame]:
    """The rows `published` and `difference` to the rows of acc that have published counterparts."""
    published = Published(load_published())
    of_acc = found[(found["metric"] == "acc") & (found["subject"] != "mean")]
    protocols = {(*row[KEYS], row["subject"]): row["protocol"] for _, row in of_acc.iterrows()}
    theirs: list[dict[str, Any]] = []
    deltas: list[dict[str, Any]] = []
    for row in acc.to_dict("records"):
        values = {}
        for task in names:
            known = published.get(row, "acc", task)
            protocol = protocols.get((*(row[name] for name in KEYS), task))
            if known and (protocol is None or same_task_protocol(protocol)):
                values[task] = known[0]
        if values:
            identity = {name: row[name] for name in acc.columns if name in SETTINGS}
            theirs.append({**identity, "metric": "published acc", **values})
            gaps = {task: row[task] - value for task, value in values.items()}
            errors = {f"{task}.stderr": row.get(f"{task}.stderr") for task in values}
            if not all(pd.isna(gap) for gap in gaps.values()):
                deltas.append({**identity, "metric": "Δ acc", **gaps, **errors})
    return [pd.DataFrame(rows) for rows in (theirs, deltas) if rows]


def _dense_warnings(table: pd.DataFrame, wanted: list[tuple[str, str]]) -> list[str]:
    """A line for every dense model that misses its published value: everything below it starts from elsewhere."""
    lines = []
    for row in table[table["method"] == "dense"].to_dict("records"):
        for metric, subject in wanted:
            name = f"{metric}.{subject}"
            delta, published = row.get(f"{name}.delta"), row.get(f"{name}.published")
            if delta is None or published is None or pd.isna(delta):
                continue
            allowed = DENSE_TOLERANCE[metric] * (published if metric == "perplexity" else 1)
            if abs(delta) > allowed:
                what = "perplexity" if metric == "perplexity" else "mean accuracy"
                lines.append(
                    f"Dense first: the {what} of the dense {row['model']} is {row[name]:.2f}, {signed(delta)} from the "
                    f"published {published:.2f}, which is more than the tolerance of {allowed:.2f}. Differences of the "
                    "rows below start from there."
                )
    return lines


def _footnotes(notes: Iterable[Note], used: set[str], compared: bool) -> dict[str, str]:
    """The notes whose values are printed, and those on the whole table where anything published is."""
    return {note.id: note.text for note in notes if compared and (note.id in used or not note.rows)}


def _task_value(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")

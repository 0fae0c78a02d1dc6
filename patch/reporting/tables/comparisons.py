"""How sure the differences are: every setting against the dense model and against the best 2:4 mask, item by item."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from patch.experiments import UNCOMPRESSED
from patch.reporting.comparisons import Comparisons
from patch.reporting.study import Study
from patch.reporting.summary import KEYS, settings, tasks_of, texts_of
from patch.reporting.tables.layout import Column, Table, p_value, plain, signed
from patch.reporting.tables.quality import NO_CELLS, reasons, setting_columns

UNPAIRED = "unpaired"


def comparisons(study: Study) -> Table:
    """Every pruned setting beside the dense model and beside MaskLLM (without it, the best 2:4 mask there is).

    Columns of the data: the settings'; against (title of the other one); METRIC.SUBJECT: the difference, this setting
    minus the other; .stderr; .low and .high: its 95 % interval; .p; .paired.
    """
    table, compared = settings(study.runs), Comparisons(study)
    measures = [("perplexity", text) for text in texts_of(compared.scores)]
    measures += [("acc", "mean")] if tasks_of(compared.scores) else []
    rows: list[dict[Any, Any]] = []
    unpaired = False
    for _, own in table.groupby("model", sort=False):
        cells: list[dict[Any, Any]] = own.to_dict("records")
        for other in _others(own, compared, measures):
            for cell in cells:
                if cell["method"] != "dense" and cell["done"] and not all(cell[key] == other[key] for key in KEYS):
                    row = {**cell, "against": other["title"]}
                    for metric, subject in measures:
                        found = compared.between(cell, other, metric, subject)
                        if found is None:
                            continue
                        name = f"{metric}.{subject}"
                        low, high = found.interval
                        row |= {name: found.value, f"{name}.stderr": found.stderr, f"{name}.low": low}
                        row |= {f"{name}.high": high, f"{name}.p": found.p, f"{name}.paired": found.paired}
                        if not found.paired:
                            unpaired = True
                            row[f"{name}.notes"] = UNPAIRED
                    rows.append(row)
    data = pd.DataFrame(rows) if rows else table.iloc[:0].assign(against="")
    return Table(
        data,
        [*_columns(data, measures)],
        blocks=("model", "against"),
        level="sparsity",
        missing=reasons(table),
        notes={UNPAIRED: "Items were not kept: the error is that of independent samples, wider than the true one."}
        if unpaired
        else {},
        empty=NO_CELLS,
    )


def _columns(data: pd.DataFrame, measures: list[tuple[str, str]]) -> list[Column]:
    first, *others = setting_columns(data)
    columns = [first, Column("against", "Against", numeric=False)]
    columns += [column for column in others if column.name != "realised_sparsity"]
    for metric, subject in measures:
        name = f"{metric}.{subject}"
        if name in data:
            header = f"Δ PPL {subject}" if metric == "perplexity" else "Δ mean acc %"
            columns.append(Column(name, header, signed, error=plain(2)))
            columns.append(Column(f"{name}.p", "p", p_value))
    return columns


def _others(own: pd.DataFrame, compared: Comparisons, measures: list[tuple[str, str]]) -> list[dict[Any, Any]]:
    """The dense model, and the 2:4 mask to beat."""
    done = own[(own["done"] > 0) & (own["compression"] == UNCOMPRESSED) & (own["variant"] == "default")]
    dense = done[done["method"] == "dense"].to_dict("records")
    masks = done[done["pattern"] == "2:4"]
    maskllm = masks[masks["method"] == "maskllm"].to_dict("records")
    if maskllm or masks.empty or not measures:
        return [*dense[:1], *maskllm[:1]]
    sign = 1 if measures[0][0] == "perplexity" else -1

    def loss(row: dict[Any, Any]) -> float:
        value = compared.value(row, *measures[0])
        return math.inf if value is None else sign * value

    return [*dense[:1], min(masks.to_dict("records"), key=loss)]

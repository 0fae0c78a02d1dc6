"""Sparsity by depth and by kind of layer. The paper shows both as figures only, so nothing is published beside them."""

from __future__ import annotations

import pandas as pd

from patch.reporting.allocation import gathered, layers
from patch.reporting.study import Study
from patch.reporting.summary import rows_of
from patch.reporting.tables.layout import Column, Table, plain
from patch.reporting.targets import TABLES

EMPTY = "no cell of this run has learned tiles, or their records do not say where the zeros are"


def sparsity_by_depth(study: Study) -> Table:
    """Realised sparsity of every decoder block, percent of its prunable weights, a column per target sparsity."""
    return _table(study, "sparsity_by_depth", "block", "Block")


def sparsity_by_module(study: Study) -> Table:
    """Realised sparsity of every kind of layer, percent of its weights, and its share of the model's weights."""
    return _table(study, "sparsity_by_module", "kind", "Kind of layer")


def _table(study: Study, name: str, by: str, header: str) -> Table:
    """Columns of the data: model, title, pattern, `by`, weights (percent), then for each target percent.TARGET, the
    mean over seeds, with .stderr, its standard deviation over seeds, where there are several."""
    rows = gathered(layers(rows_of(study.runs, TABLES[name])), by)
    keys = ["model", "title", "pattern", by]
    if rows.empty:
        return Table(pd.DataFrame(columns=keys), [Column("model", "Model", numeric=False)], empty=EMPTY)
    targets = sorted(rows["sparsity"].unique(), reverse=True)
    data = rows.drop_duplicates(keys)[[*keys, "weights"]]
    columns = [Column("model", "Model", numeric=False), Column("title", "Method", numeric=False)]
    columns += [Column(by, header, numeric=by == "block"), Column("weights", "Share of weights %", plain(1))]
    for target in targets:
        own = rows[rows["sparsity"] == target][[*keys, "percent", "spread"]]
        value = f"percent.{target:g}"
        own = own.rename(columns={"percent": value, "spread": f"{value}.stderr"})
        data = data.merge(own if own[f"{value}.stderr"].notna().any() else own[[*keys, value]], on=keys, how="left")
        columns.append(Column(value, f"At {target:g} %", plain(1)))
    data["order"] = data.groupby(["model", "title", "pattern"], sort=False).ngroup()
    data = data.sort_values("order", kind="stable", ignore_index=True).drop(columns="order")
    return Table(data, columns, blocks=("model", "title"), ranked=lambda rows: pd.Series(False, index=rows.index))

"""The runs table condensed to what tables and figures show: settings in their order, and scores over seeds.

A setting is a point of the grid without its seed: (model, sparsity, method, pattern, variant, compression).
"""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from patch.experiments import TASKS, UNCOMPRESSED
from patch.methods import METHODS
from patch.reporting.targets import Target

KEYS = ["model", "sparsity", "method", "pattern", "variant", "compression"]
SETTINGS = [*KEYS, "source", "title", "realised_sparsity", "seeds", "done", "note"]
"""Columns of `settings`."""


def rows_of(runs: pd.DataFrame, target: Target) -> pd.DataFrame:
    """The rows of the runs table whose cells the target shows."""
    names = ["source", "method", "pattern", "sparsity", "variant", "compression"]
    cells = runs[names].drop_duplicates()
    shown = cells[target.chosen(cells.to_dict("records"))]
    return runs.merge(shown, on=names, how="inner") if len(shown) else runs.iloc[:0]


def settings(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per setting, in the order of the paper's tables, also for settings without results.

    Per model (as they come): dense first, then by sparsity, largest first, then methods in the order of METHODS.
    Columns: KEYS, source, title, realised_sparsity (percent, mean over seeds), seeds (in the grid), done (of these,
    with results), note (why results are missing, else empty).
    """
    cells = runs.drop_duplicates(["run", "cell", "compression"]).copy()
    cells["realised_sparsity"] = _floats(cells["realised_sparsity"])
    cells["sparsity"] = _floats(cells["sparsity"])
    cells["is_done"] = cells["status"] == "done"
    cells["reason"] = cells["reason"].mask(cells["is_done"])
    table = (
        cells.groupby(KEYS, sort=False)
        .agg(
            source=("source", "first"),
            title=("title", "first"),
            realised_sparsity=("realised_sparsity", "mean"),
            seeds=("cell", "size"),
            done=("is_done", "sum"),
            note=("reason", lambda reasons: "; ".join(reasons.dropna().unique())),
        )
        .reset_index()
    )
    order = pd.DataFrame(
        {
            "model": _rank(table["model"]),
            "pruned": table["method"] != "dense",
            "sparsity": -table["sparsity"],
            "method": table["method"].map(list(METHODS).index),
            "pattern": _rank(table["pattern"]),
            "variant": _rank(table["variant"]).where(table["variant"] != "default", -1),
            "compression": _rank(table["compression"]).where(table["compression"] != UNCOMPRESSED, -1),
        }
    )
    return table.loc[order.sort_values(order.columns.tolist(), kind="stable").index].reset_index(drop=True)


def scores(runs: pd.DataFrame) -> pd.DataFrame:
    """Perplexities and accuracies of every setting, over its seeds.

    Columns: KEYS, metric, subject, value, stderr, spread, protocol. Metrics: perplexity (subject: text), acc and
    acc_norm in percent (subject: task), and acc of the subject "mean". The mean is over the
    tasks that the model was measured on, with standard error sqrt(sum of squares) / tasks; a cell that
    lacks one of them has no mean.
    value: mean over seeds; stderr: mean of the seeds' standard errors, not smaller for having more seeds, because all
    answer the same questions; spread: standard deviation over seeds, missing with one seed; protocol: how the subject
    was measured (a dict; empty where it was not recorded).
    """
    done = runs[runs["status"] == "done"]
    table = done[done["metric"].isin(["acc", "acc_norm", "perplexity"])].copy()
    for name in ("sparsity", "value", "stderr"):
        table[name] = _floats(table[name])
    accuracies = table["metric"] != "perplexity"
    table.loc[accuracies, ["value", "stderr"]] *= 100
    cell = ["run", "cell", "seed", *KEYS]
    table = pd.concat([table, _means(table[table["metric"] == "acc"], cell)], ignore_index=True)
    return (
        table.groupby([*KEYS, "metric", "subject"], sort=False)
        .agg(
            value=("value", "mean"),
            stderr=("stderr", "mean"),
            spread=("value", lambda values: values.std(ddof=1)),
            protocol=("protocol", _protocol),
        )
        .reset_index()
    )


def pattern_title(pattern: str) -> str:
    """A pattern as printed: "tiles 128x128", the others as in configs."""
    return pattern.replace("tiles:", "tiles ")


def tasks_of(found: pd.DataFrame, metric: str = "acc") -> list[str]:
    """The tasks among the subjects of `scores(...)`: the paper's in its order, then others as they come."""
    present = [task for task in found.loc[found["metric"] == metric, "subject"].unique() if task != "mean"]
    return [task for task in TASKS if task in present] + [task for task in present if task not in TASKS]


def texts_of(found: pd.DataFrame) -> list[str]:
    """The texts on which perplexity was measured, as they come."""
    return list(found.loc[found["metric"] == "perplexity", "subject"].unique())


def _means(acc: pd.DataFrame, cell: list[str]) -> pd.DataFrame:
    rows = []
    tasks = acc.groupby("model")["subject"].nunique()
    for identity, group in acc.groupby(cell, sort=False, dropna=False):
        count = len(group)
        if count == tasks[group["model"].iloc[0]]:
            stderr = (group["stderr"] ** 2).sum(skipna=False) ** 0.5 / count
            row = dict(zip(cell, identity, strict=True))
            rows.append({**row, "metric": "acc", "subject": "mean", "value": group["value"].mean(), "stderr": stderr})
    return pd.DataFrame(rows, columns=[*cell, "metric", "subject", "value", "stderr"])


def _protocol(column: pd.Series) -> dict[str, Any]:
    known = column.dropna()
    return json.loads(known.iloc[0]) if len(known) else {}


def _rank(column: pd.Series) -> pd.Series:
    """Position of each value among the distinct values, as they come."""
    return pd.Series(pd.factorize(column)[0], index=column.index)


def _floats(column: pd.Series) -> pd.Series:
    return pd.Series(column.to_numpy(dtype=float, na_value=float("nan")), index=column.index)


def power_of_ten(value: float, decimals: int) -> str:
    """A number as 4.2e9."""
    return f"{value:.{decimals}e}".replace("e+0", "e").replace("e+", "e")

"""Where a mask's zeros are: the sparsity of every layer, gathered by depth or by kind of layer."""

from __future__ import annotations

import pandas as pd

from patch.reporting.summary import KEYS

ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
"""Kinds of layer as they come in a block; others follow."""


def layers(runs: pd.DataFrame) -> pd.DataFrame:
    """Sparsity of every layer: KEYS, seed, title, block, kind, percent, and weights (how many it has)."""
    rows = runs[(runs["metric"] == "sparsity") & (runs["subject"] != "model") & (runs["status"] == "done")].copy()
    parts = rows["subject"].str.extract(r"\.(?P<block>\d+)\.(?:.*\.)?(?P<kind>[^.]+)$")
    rows["block"] = pd.to_numeric(parts["block"])
    rows["kind"] = parts["kind"].str.replace(r"_proj$", "", regex=True)
    rows["percent"] = 100 * rows["value"].astype(float)
    rows["sparsity"] = rows["sparsity"].astype(float)
    rows["weights"] = rows["samples"].astype(float)
    columns = [*KEYS, "seed", "title", "block", "kind", "percent", "weights"]
    return rows.dropna(subset=["block"]).astype({"block": int})[columns]


def gathered(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Sparsity by "block" or "kind" of every setting, each layer counting by its weights.

    table: from `layers`. Columns: KEYS, title, `by`, percent, spread (standard deviation over seeds), weights (share of
    the model's, percent) and zeros (share of the model's zeros, percent).
    """
    # Tables by hand lack the weights; then all layers count alike.
    table = table.assign(weights=table["weights"].fillna(1.0))
    table["zeros"] = table["percent"] * table["weights"]
    keys = [*KEYS, "title", "seed"]
    sums = table.groupby([*keys, by], sort=False, dropna=False)[["zeros", "weights"]].sum()
    of_model = sums.groupby(level=keys, sort=False, dropna=False).transform("sum")
    shares = 100 * sums / of_model.where(of_model > 0)
    per_seed = shares.assign(percent=sums["zeros"] / sums["weights"]).reset_index()
    result = (
        per_seed.groupby([*KEYS, "title", by], sort=False, dropna=False)
        .agg(
            percent=("percent", "mean"),
            spread=("percent", lambda values: values.std(ddof=1)),
            weights=("weights", "mean"),
            zeros=("zeros", "mean"),
        )
        .reset_index()
    )
    rank = (
        result[by] if by == "block" else result[by].map(lambda kind: ORDER.index(kind) if kind in ORDER else len(ORDER))
    )
    return result.assign(rank=rank).sort_values("rank", kind="stable").drop(columns="rank").reset_index(drop=True)

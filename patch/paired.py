"""Paired comparisons: cells that answered the same items differ by less noise than their standard errors say.

Of n items with values x and y, the difference of the means has the variance var(x - y) / n, for all pairs of cells at
once from one covariance matrix. Accuracy of a task: exact McNemar test on the items that only one of two gets right.
Perplexity: t test on the windows' losses. Mean accuracy: the tasks' differences, which are independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pandas as pd

COLUMNS = ("first", "second", "subject", "metric", "difference", "stderr", "p", "items")


def compare(items: Mapping[str, pd.DataFrame], subjects: Iterable[str]) -> pd.DataFrame:
    """Compare all pairs of cells.

    items: by cell, its rows (subject, item, metric, value) of `evaluate`; metric acc (0 or 1) or loss (nats).
    subjects: the texts and tasks. The items of a group's members, e.g. mmlu_anatomy, count for the group.
    Returns COLUMNS: first and second (cells, in the order given), difference (first minus second: of acc as a share of
    1, of perplexity), its standard error, the two-sided p-value, and the number of items. Subject "mean" is the mean
    accuracy over all tasks. Pairs that did not answer the same items of a subject are left out.
    """
    names = list(items)
    known = sorted(subjects, key=len, reverse=True)
    table = pd.concat([own.assign(cell=cell) for cell, own in items.items()]) if items else pd.DataFrame()
    if table.empty:
        return pd.DataFrame(columns=list(COLUMNS))
    group = {member: _group(member, known) for member in table["subject"].unique()}
    table = table[table["metric"].isin(["acc", "loss"])].assign(group=lambda rows: rows["subject"].map(group))
    rows = []
    tasks = table.loc[table["metric"] == "acc", "group"].unique()
    for (subject, metric), own in table.groupby(["group", "metric"], sort=False):
        values = own.pivot_table(index=["subject", "item"], columns="cell", values="value", aggfunc="first", sort=False)
        # Cells with the same gaps answered the same items.
        for _, columns in values.isna().T.groupby(values.isna().T.apply(tuple, axis=1), sort=False):
            cells = [name for name in names if name in columns.index]
            matrix = values[cells].dropna().to_numpy(dtype=float).T
            pairs = _of_perplexity(matrix) if metric == "loss" else _of_accuracy(matrix)
            for first, second, difference, stderr, p in pairs:
                name = "perplexity" if metric == "loss" else "acc"
                rows.append((cells[first], cells[second], subject, name, difference, stderr, p, matrix.shape[1]))
    result = pd.DataFrame(rows, columns=list(COLUMNS))
    return pd.concat([result, _means(result, len(tasks))], ignore_index=True) if len(tasks) else result


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value: were items that only one of two answers right as likely to be either's?"""
    total, fewer = only_first + only_second, min(only_first, only_second)
    if total == 0:
        return 1.0
    k = np.arange(fewer + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])
    logs = log_factorial[total] - log_factorial[k] - log_factorial[total - k] - total * math.log(2)
    return min(1.0, 2.0 * float(np.exp(logs).sum()))


def student_p(t: float, freedom: int) -> float:
    """Two-sided p-value of Student's t for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    if math.isinf(t):
        return 0.0
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1.0 - inside)


def normal_p(z: float) -> float:
    """Two-sided p-value of a standard normal variable."""
    return math.erfc(abs(z) / math.sqrt(2))


def _of_accuracy(values: np.ndarray) -> Iterator[tuple[int, int, float, float, float]]:
    """values [cells, items], 0 or 1. Yields first, second, difference, standard error, p."""
    means, items = values.mean(axis=1), values.shape[1]
    only = values @ (1 - values).T  # [i, j]: items that i gets right and j does not
    for i, j in zip(*np.triu_indices(len(values), 1), strict=True):
        difference = means[i] - means[j]
        spread = (only[i, j] + only[j, i]) / items - difference**2
        stderr = math.sqrt(max(0.0, spread) / (items - 1)) if items > 1 else math.nan
        yield int(i), int(j), float(difference), stderr, mcnemar(round(only[i, j]), round(only[j, i]))


def _of_perplexity(losses: np.ndarray) -> Iterator[tuple[int, int, float, float, float]]:
    """losses [cells, windows], nats. As above, for the perplexities exp(mean); standard errors by the delta method."""
    with np.errstate(over="ignore"):
        perplexity = np.exp(np.minimum(losses.mean(axis=1), 700.0))
    windows = losses.shape[1]
    for i, j in zip(*np.triu_indices(len(losses), 1), strict=True):
        difference = float(perplexity[i] - perplexity[j])
        if windows < 2:
            yield int(i), int(j), difference, math.nan, math.nan
            continue
        stderr = float(np.std(perplexity[i] * losses[i] - perplexity[j] * losses[j], ddof=1)) / math.sqrt(windows)
        gaps = losses[i] - losses[j]
        error = float(np.std(gaps, ddof=1)) / math.sqrt(windows)
        mean = float(gaps.mean())
        p = student_p(mean / error, windows - 1) if error > 0 else float(mean == 0)
        yield int(i), int(j), difference, stderr, p


def _means(pairs: pd.DataFrame, tasks: int) -> pd.DataFrame:
    """The pairs' mean accuracies, where they share all tasks."""
    rows = []
    for (first, second), own in pairs[pairs["metric"] == "acc"].groupby(["first", "second"], sort=False):
        if len(own) == tasks:
            difference = own["difference"].mean()
            stderr = math.sqrt((own["stderr"] ** 2).sum(skipna=False)) / tasks
            p = normal_p(difference / stderr) if stderr > 0 else (math.nan if math.isnan(stderr) else 1.0)
            rows.append((first, second, "mean", "acc", difference, stderr, p, int(own["items"].sum())))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _group(member: str, known: list[str]) -> str:
    """The text or task that an item's subject belongs to; the longest name that fits."""
    return next((name for name in known if member == name or member.startswith(f"{name}_")), member)

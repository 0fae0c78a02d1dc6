"""Differences between settings on the same items, over seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from patch.paired import normal_p
from patch.reporting.study import Study
from patch.reporting.summary import KEYS, scores


@dataclass(frozen=True)
class Difference:
    """One setting minus another: perplexity, or accuracy in points."""

    value: float
    stderr: float
    """Missing (NaN) where neither items nor errors are known."""
    p: float
    """Two-sided; that of the least certain seed where there are several."""
    paired: bool
    """False where items were not kept: the standard error is then that of independent samples, which is too wide."""

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        return self.value - 1.96 * self.stderr, self.value + 1.96 * self.stderr


class Comparisons:
    """All differences of a study."""

    def __init__(self, study: Study):
        runs = study.runs
        self.scores = scores(runs)
        cells = runs.drop_duplicates(["cell", *KEYS])
        self.cells: dict[tuple[Any, ...], list[str]] = {}
        self.seeds: dict[tuple[Any, str], Any] = {}
        for row in cells.to_dict("records"):
            self.cells.setdefault(tuple(row[name] for name in KEYS), []).append(row["cell"])
            self.seeds[row["model"], row["cell"]] = None if row["method"] == "dense" else row["seed"]
        columns = ("model", "first", "second", "metric", "subject")
        self.pairs = {
            tuple(row[name] for name in columns): (float(row["difference"]), float(row["stderr"]), float(row["p"]))
            for row in study.paired.fillna({"stderr": math.nan, "p": math.nan}).to_dict("records")
        }

    def between(self, first: Any, second: Any, metric: str, subject: str) -> Difference | None:
        """first minus second, two settings given by KEYS; None where one has no value.

        metric and subject: perplexity of a text, or acc of a task or "mean".
        """
        one, other = (self._score(setting, metric, subject) for setting in (first, second))
        if one is None or other is None:
            return None
        value = one[0] - other[0]
        found = [
            pair
            for a in self._cells(first)
            for b in self._cells(second)
            if self._same_seed(first["model"], a, b) and (pair := self._pair(first["model"], a, b, metric, subject))
        ]
        if found:
            stderr = sum(stderr for stderr, _ in found) / len(found) * (100 if metric == "acc" else 1)
            return Difference(value, stderr, max(p for _, p in found), paired=True)
        stderr = math.hypot(one[1], other[1])
        p = normal_p(value / stderr) if stderr > 0 else math.nan
        return Difference(value, stderr, p, paired=False)

    def value(self, setting: Any, metric: str, subject: str) -> float | None:
        """The value of one setting; None where it has none."""
        score = self._score(setting, metric, subject)
        return None if score is None else score[0]

    def _score(self, setting: Any, metric: str, subject: str) -> tuple[float, float] | None:
        rows = self.scores[(self.scores["metric"] == metric) & (self.scores["subject"] == subject)]
        for name in KEYS:
            rows = rows[rows[name] == setting[name]]
        if rows.empty or pd.isna(rows["value"].iloc[0]):
            return None
        return float(rows["value"].iloc[0]), float(rows["stderr"].iloc[0])

    def _cells(self, setting: Any) -> list[str]:
        return self.cells.get(tuple(setting[name] for name in KEYS), [])

    def _same_seed(self, model: str, first: str, second: str) -> bool:
        one, other = self.seeds[model, first], self.seeds[model, second]
        return one is None or other is None or one == other

    def _pair(self, model: str, first: str, second: str, metric: str, subject: str) -> tuple[float, float] | None:
        """Standard error and p-value, which do not depend on the order."""
        for a, b in ((first, second), (second, first)):
            if (pair := self.pairs.get((model, a, b, metric, subject))) is not None:
                return pair[1:]
        return None

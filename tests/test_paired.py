"""Paired comparisons, against direct computation and textbook values."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from patch.paired import compare, mcnemar, normal_p, student_p


def items(subject: str, metric: str, values: list[float]) -> pd.DataFrame:
    rows = {"subject": subject, "item": range(len(values)), "metric": metric, "value": values}
    return pd.DataFrame(rows)


def pair(table: pd.DataFrame, subject: str) -> pd.Series:
    found = table[table["subject"] == subject]
    assert len(found) == 1
    return found.iloc[0]


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1.0), (3, 9, 0.14599609375), (9, 3, 0.14599609375), (10, 10, 1.0), (0, 5, 0.0625), (500, 600, 0.0028195)],
)
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar(only_first, only_second) == pytest.approx(p, rel=1e-4)


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05), (2.042, 30, 0.05), (2.744, 31, 0.01)],
)
def test_student_has_the_tabulated_quantiles(t: float, freedom: int, p: float) -> None:
    assert student_p(t, freedom) == pytest.approx(p, abs=3e-5)
    assert student_p(-t, freedom) == student_p(t, freedom)


def test_student_of_nothing_and_of_infinity() -> None:
    assert student_p(0.0, 5) == 1.0
    assert student_p(math.inf, 5) == 0.0
    assert normal_p(1.959964) == pytest.approx(0.05, abs=1e-6)


def test_accuracy_is_compared_question_by_question() -> None:
    x, y = [1, 1, 1, 0, 1, 0, 0, 1], [1, 0, 0, 0, 1, 1, 0, 0]
    table = compare({"a": items("piqa", "acc", x), "b": items("piqa", "acc", y)}, ["piqa"])
    row = pair(table, "piqa")
    assert (row["first"], row["second"], row["metric"], row["items"]) == ("a", "b", "acc", 8)
    assert row["difference"] == pytest.approx(0.25)
    assert row["stderr"] == pytest.approx(np.std(np.subtract(x, y), ddof=1) / 8**0.5)
    assert row["p"] == pytest.approx(2 * (1 + 4) / 16)  # 3 against 1
    independent = math.hypot(np.std(x, ddof=1), np.std(y, ddof=1)) / 8**0.5
    assert row["stderr"] < independent


def test_perplexity_is_compared_window_by_window() -> None:
    x, y = np.array([3.0, 3.5, 2.5, 4.0]), np.array([2.9, 3.3, 2.4, 3.8])
    row = pair(compare({"a": items("c4", "loss", list(x)), "b": items("c4", "loss", list(y))}, ["c4"]), "c4")
    assert row["metric"] == "perplexity"
    assert row["difference"] == pytest.approx(math.exp(x.mean()) - math.exp(y.mean()))
    # the delta method, by its gradient
    gradient = np.array([math.exp(x.mean()), -math.exp(y.mean())])
    assert row["stderr"] == pytest.approx((gradient @ np.cov(x, y) @ gradient / 4) ** 0.5)
    t = (x - y).mean() / (np.std(x - y, ddof=1) / 2)
    assert row["p"] == pytest.approx(student_p(t, 3))


def test_the_mean_adds_the_tasks_errors_as_independent() -> None:
    generator = np.random.default_rng(0)
    cells = {
        cell: pd.concat([items(task, "acc", list(generator.integers(0, 2, 50))) for task in ("piqa", "race")])
        for cell in "ab"
    }
    table = compare(cells, ["piqa", "race"])
    tasks, mean = table[table["subject"] != "mean"], pair(table, "mean")
    assert mean["difference"] == pytest.approx(tasks["difference"].mean())
    assert mean["stderr"] == pytest.approx((tasks["stderr"] ** 2).sum() ** 0.5 / 2)
    assert mean["p"] == pytest.approx(normal_p(mean["difference"] / mean["stderr"]))
    assert mean["items"] == 100


def test_members_count_for_their_group() -> None:
    one = pd.concat([items("mmlu_anatomy", "acc", [1, 0]), items("mmlu_virology", "acc", [1, 1])])
    other = pd.concat([items("mmlu_anatomy", "acc", [0, 0]), items("mmlu_virology", "acc", [1, 0])])
    row = pair(compare({"a": one, "b": other}, ["mmlu"]), "mmlu")
    assert (row["items"], row["difference"]) == (4, 0.5)


def test_cells_with_other_items_are_not_compared() -> None:
    long, short = items("piqa", "acc", [1, 0, 1, 1]), items("piqa", "acc", [1, 0])
    table = compare({"a": long, "b": short, "c": long}, ["piqa"])
    assert set(zip(table["first"], table["second"], strict=True)) == {("a", "c")}


def test_equal_cells_differ_by_nothing_for_certain() -> None:
    own = pd.concat([items("piqa", "acc", [1, 0, 1]), items("c4", "loss", [2.0, 3.0, 4.0])])
    table = compare({"a": own, "b": own}, ["piqa", "c4"])
    assert (table["difference"] == 0).all()
    assert (table["p"] == 1).all()


def test_one_window_has_no_error_and_no_cells_no_pairs() -> None:
    row = pair(compare({"a": items("c4", "loss", [2.0]), "b": items("c4", "loss", [3.0])}, ["c4"]), "c4")
    assert math.isnan(row["stderr"])
    assert math.isnan(row["p"])
    assert compare({}, []).empty

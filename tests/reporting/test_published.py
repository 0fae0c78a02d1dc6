"""The published numbers, and the rules by which ours may stand beside them."""

from __future__ import annotations

import pandas as pd
import pytest

from patch.artefacts import PatchError
from patch.experiments import TASKS
from patch.methods import METHODS
from patch.reporting.published import load_accuracy, same_perplexity_protocol, same_tasks_protocol
from patch.sparsity.patterns import Pattern


def row(table: pd.DataFrame, source: str, method: str, sparsity: float, pattern: str) -> pd.Series:
    keys = {"source": source, "method": method, "sparsity": sparsity, "pattern": pattern}
    found = table[(table[list(keys)] == pd.Series(keys)).all(axis=1)]
    assert len(found) == 1
    return found.iloc[0]


def test_accuracy_has_all_rows_once_in_this_projects_names() -> None:
    table = load_accuracy()
    assert len(table) == 59 + 30  # main table, and Wanda and SparseGPT unstructured: 5 models x 3 sparsities
    assert not table.duplicated(["source", "method", "sparsity", "pattern"]).any()
    assert set(table["method"]) == set(METHODS) - {
        "random",
        "fine_tune",
        "released",
    }  # controls of our own, and masks without training
    assert {str(Pattern.parse(pattern)) for pattern in table["pattern"]} == set(table["pattern"])


def test_mean_accuracy_is_computed_and_not_the_misprint() -> None:
    thanos = row(load_accuracy(), "Qwen/Qwen2.5-0.5B", "thanos", 50, "2:4")
    assert thanos["mean_accuracy"] == pytest.approx(34.85, abs=0.005)
    assert thanos["hellaswag"] == 31.31


def test_doubtful_perplexities_are_marked() -> None:
    table = load_accuracy()
    doubtful = table[table["perplexity_length"].isna()]
    assert set(doubtful["source"][doubtful["pattern"] != "unstructured"]) == {"meta-llama/Llama-2-13b-hf"}
    assert (doubtful["pattern"] == "unstructured").sum() == 30
    dense = row(table, "Qwen/Qwen2.5-0.5B", "dense", 0, "dense")
    assert (dense["perplexity"], dense["perplexity_length"]) == (12.08, 4096)


def test_missing_file_is_named(tmp_path: object) -> None:
    with pytest.raises(PatchError, match=r"accuracy\.csv: no such file"):
        load_accuracy(str(tmp_path))


WIKITEXT = {"source": "wikitext2", "sampling": "joined", "length": 4096, "complete": True}
HUB = {"source": "hub", "limit": None, "fewshot": 0}


@pytest.mark.parametrize(
    ("change", "same"),
    [({}, True), ({"length": 2048}, False), ({"complete": False}, False), ({"source": "c4"}, False)],
)
def test_perplexity_protocol(change: dict, same: bool) -> None:
    assert same_perplexity_protocol({**WIKITEXT, **change}) is same


def test_unrecorded_protocol_is_never_compared() -> None:
    assert not same_perplexity_protocol({})
    assert not same_tasks_protocol({})
    assert not same_tasks_protocol({task: {} for task in TASKS})


def test_tasks_protocol_needs_all_tasks_and_questions() -> None:
    assert same_tasks_protocol(dict.fromkeys(TASKS, HUB))
    assert not same_tasks_protocol(dict.fromkeys(TASKS[1:], HUB))
    assert not same_tasks_protocol({**dict.fromkeys(TASKS, HUB), "race": {**HUB, "limit": 100}})
    assert not same_tasks_protocol({task: {**HUB, "source": "embedded"} for task in TASKS})

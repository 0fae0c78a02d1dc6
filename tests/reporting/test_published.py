"""The published numbers, and the rules by which ours may stand beside them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from patch.artefacts import PatchError
from patch.experiments import TASKS, load_experiment
from patch.methods import METHODS
from patch.reporting.published import (
    KEYS,
    Published,
    load_memory,
    load_notes,
    load_published,
    load_throughput,
    load_training_cost,
    same_perplexity_protocol,
    same_tasks_protocol,
)
from patch.reporting.targets import TABLES
from patch.sparsity.patterns import Pattern

QWEN, THIRTEEN = "Qwen/Qwen2.5-0.5B", "meta-llama/Llama-2-13b-hf"
CONFIGS = Path(__file__).parents[2] / "workflow" / "config"


def cell(source: str, method: str, sparsity: float, pattern: str, variant: str = "default", compression: str = "none"):
    return dict(zip(KEYS, (source, method, sparsity, pattern, variant, compression), strict=True))


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return load_published()


@pytest.fixture(scope="module")
def published(table: pd.DataFrame) -> Published:
    return Published(table)


def test_values_are_in_this_projects_names_and_agree_where_they_are_printed_twice(table: pd.DataFrame) -> None:
    assert set(table["method"]) <= set(METHODS)
    assert {str(Pattern.parse(pattern)) for pattern in table["pattern"]} == set(table["pattern"])
    assert table["value"].notna().all()
    spread = table.groupby([*KEYS, "metric", "subject"])["value"].agg(lambda values: values.max() - values.min())
    assert (spread == 0).all()
    assert table["table"].value_counts().to_dict() == {
        "accuracy": 59 * 10, "unstructured_comparison": 60, "quantisation": 28, "tile_size": 18, "frozen_mask": 15,
        "tile_prior": 15, "density_target": 6,
    }  # fmt: skip


def test_every_published_cell_is_in_the_papers_grid(table: pd.DataFrame) -> None:
    grid = load_experiment([CONFIGS / "paper.yaml"]).expand()
    cells = [*grid.cells, *(excluded for excluded, _ in grid.excluded)]
    there = {(c.source.source, c.method, c.sparsity, c.pattern, c.variant, c.compression) for c in cells}
    assert set(table[KEYS].itertuples(index=False, name=None)) <= there


def test_mean_accuracy_is_computed_and_not_the_misprint(published: Published) -> None:
    thanos = cell(QWEN, "thanos", 50, "2:4")
    assert published.get(thanos, "acc", "mean") == (pytest.approx(34.85, abs=0.005), None)
    assert published.get(thanos, "acc", "hellaswag") == (31.31, None)


def test_ablations_and_compressed_weights(published: Published) -> None:
    tiles = "tiles:128x128"
    for setting, value in (
        (cell(QWEN, "patch_joint", 45, "tiles:4x4"), 14.55),
        (cell(QWEN, "patch_joint", 35, tiles, "per-block"), 14.48),
        (cell(QWEN, "patch_tile", 45, tiles), 15.06),
        (cell(QWEN, "patch_tile", 25, tiles, "on-magnitude"), 16.05),
        (cell(QWEN, "patch_joint", 25, tiles, "prior-random"), 13.33),
        (cell("meta-llama/Llama-2-7b-hf", "maskllm", 50, "2:4", compression="int4"), 7.64),
        (cell("meta-llama/Llama-3.1-8B", "patch_tile", 45, tiles, compression="int4-lora"), 9.12),
    ):
        assert published.get(setting, "perplexity", "wikitext2") == (value, 4096)
    assert published.get(cell("other", "dense", 0, "dense"), "perplexity", "wikitext2") is None


def test_released_masks_stand_beside_the_method_that_made_them(published: Published) -> None:
    cell = {
        "method": "released",
        "pattern": "tiles:128x128",
        "sparsity": 45.0,
        "variant": "default",
        "compression": "none",
    }
    small, large = {**cell, "source": "Qwen/Qwen2.5-0.5B"}, {**cell, "source": "meta-llama/Llama-2-7b-hf"}
    assert published.get(small, "perplexity", "wikitext2") == (14.57, 4096)
    assert published.get(large, "perplexity", "wikitext2") == (6.55, 4096)
    quantised = published.get({**large, "compression": "int4-lora"}, "perplexity", "wikitext2")
    assert quantised == (6.83, 4096)
    maskllm = {**cell, "source": "google/gemma-3-1b-pt", "pattern": "2:4", "sparsity": 50.0, "variant": "maskllm"}
    assert published.get(maskllm, "perplexity", "wikitext2") == (12.82, 4096)
    (note,) = [note for note in load_notes("accuracy") if note.id == "release-13b"]
    assert note.concerns({**cell, "source": "meta-llama/Llama-2-13b-hf"}, "acc")


def test_doubtful_lengths_are_missing(table: pd.DataFrame, published: Published) -> None:
    doubtful = table[(table["metric"] == "perplexity") & table["length"].isna()]
    assert set(doubtful["source"][doubtful["pattern"] != "unstructured"]) == {THIRTEEN}
    assert (doubtful["pattern"] == "unstructured").sum() == 30
    assert published.get(cell(THIRTEEN, "dense", 0, "dense"), "perplexity", "wikitext2") == (4.89, None)


def test_speed_memory_and_cost() -> None:
    speed = load_throughput()
    assert len(speed) == 12
    headline = speed[(speed["gpu"] == "A6000") & (speed["generated_tokens"] == 128)]
    assert headline["speedup"].round(2).tolist() == [1.18, 1.27, 1.38]
    assert load_memory() == {25: 0.76, 35: 0.68, 45: 0.59}
    cost = load_training_cost()
    assert (cost["gpu_hours"] == 4 * cost["stated_hours"]).all()


def test_notes_concern_existing_tables_and_the_rows_that_they_name() -> None:
    known = {note.id: note for name in TABLES for note in load_notes(name)}
    assert {name for note in known.values() for name in note.tables} <= set(TABLES)
    assert {"thanos-average", "lengths-13b", "lengths-unstructured", "hours-are-nodes", "batch-128"} <= set(known)
    thanos = {"source": QWEN, "method": "thanos"}
    assert known["thanos-average"].concerns(thanos, "acc")
    assert not known["thanos-average"].concerns(thanos, "perplexity")
    assert not known["thanos-average"].concerns({"source": QWEN, "method": "wanda"}, "acc")
    assert not known["hours-are-nodes"].concerns(thanos, "acc")  # of the whole table


def test_missing_and_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"accuracy\.csv: no such file"):
        load_published(tmp_path)
    with pytest.raises(PatchError, match=r"notes\.yaml: no such file"):
        load_notes("accuracy", tmp_path)
    (tmp_path / "notes.yaml").write_text("[{id: a, text: b, tables: [accuracy], metrics: acc}]")
    with pytest.raises(PatchError, match=r"notes\.yaml: metrics: extra inputs"):
        load_notes("accuracy", tmp_path)


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

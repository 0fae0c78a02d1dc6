"""Tables of speed, memory and cost: ours beside the published values, where they compare."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from conftest import cell_rows, curves_of, runs_table

from patch.reporting.published import PAPER_TOKENS
from patch.reporting.study import Study
from patch.reporting.tables.layout import to_markdown
from patch.reporting.tables.speed import layer_speed, memory, throughput, training_cost, weight_memory

NOTHING = runs_table([])


def generation(**columns: object) -> pd.DataFrame:
    row = {"model": "llama-2-7b", "batch": 16, "prefill_tokens": 128, "generated_tokens": 128}
    row |= {"sparsity_percent": 45.02, "dense_tok_s": 1000.0, "hybrid_tok_s": 1400.0, "speedup": 1.4}
    return pd.DataFrame([{**row, "dense_gib": 10.0, "hybrid_gib": 6.2, "gpu": "NVIDIA RTX A6000", **columns}])


def test_throughput_takes_a_difference_only_from_the_same_gpu_model_and_lengths() -> None:
    table = throughput(Study(NOTHING, generation=generation()))
    ours = table.data.iloc[0]
    assert ours["origin"] == "measured"
    assert ours["speedup.published"] == pytest.approx(1410.20 / 1023.80)
    assert ours["speedup.delta"] == pytest.approx(1.4 - 1410.20 / 1023.80)
    assert (table.data["origin"] == "published").sum() == 12
    for other in ({"gpu": "NVIDIA H200"}, {"model": "llama-3.1-8b"}, {"batch": 1}, {"generated_tokens": 64}):
        data = throughput(Study(NOTHING, generation=generation(**other))).data
        assert "speedup.published" not in data
    assert "tokens of the prompt and the generated ones together" in to_markdown(table)


def test_rows_say_their_stack_and_whether_tiles_are_random() -> None:
    both = pd.concat([generation(stack="compiled", mask=mask, batch=1) for mask in ("random", "cell/mask.safetensors")])
    table = throughput(Study(NOTHING, generation=both))
    assert table.data["tiles"].tolist()[:2] == ["random", "of a mask"]
    assert table.data["tiles"][2:].isna().all()
    assert {"Stack", "Tiles"} <= {column.header for column in table.columns}
    assert len(memory(Study(NOTHING, generation=both)).data) == 3  # one size, and two that are only published


def test_unmeasured_speed_shows_what_is_published_and_says_so() -> None:
    table = throughput(Study(NOTHING))
    assert len(table.data) == 12
    assert to_markdown(table).startswith("> **Ours is not measured")
    kept = memory(Study(NOTHING))
    assert kept.data["ratio.published"].tolist() == [0.76, 0.68, 0.59]
    assert to_markdown(kept).startswith("> **Ours is not measured")


def test_memory_is_a_ratio_beside_the_published_one() -> None:
    row = memory(Study(NOTHING, generation=generation())).data.iloc[0]
    assert (row["ratio"], row["ratio.published"]) == (pytest.approx(0.62), 0.59)
    assert row["ratio.delta"] == pytest.approx(0.03)
    table = memory(Study(NOTHING, generation=generation()))
    assert table.data["ratio.published"].tolist()[1:] == [0.76, 0.68]
    assert table.data["ratio"].isna().tolist() == [False, True, True]
    assert table.missing == ["llama-2-7b at 25 %, 35 %: not measured"]
    other = memory(Study(NOTHING, generation=generation(model="llama-3.1-8b"))).data.iloc[0]
    assert math.isnan(other["ratio.delta"])


def test_weights_have_a_ratio_for_the_linear_layers_and_one_for_the_whole_model() -> None:
    row = {"model": "llama-2-7b", "sparsity_percent": 45.0, "dense_gib": 12.0, "hybrid_gib": 7.2, "ratio": 0.6}
    row |= {"whole_model_dense_gib": 12.5, "whole_model_hybrid_gib": 7.7}
    measured = pd.DataFrame([{**row, "pack_s": 4.25, "mask": "random"}, {**row, "model": "qwen", "mask": "a/b"}])
    table = weight_memory(Study(NOTHING, memory=measured))
    assert table.data["whole_model_ratio"].tolist() == [pytest.approx(0.616)] * 2
    lines = to_markdown(table).splitlines()
    assert "| Ratio" in lines[0]
    (ours,) = [line for line in lines if "llama-2-7b" in line]
    for shown in ("random", "0.600", "0.616", "4.2"):
        assert shown in ours
    assert "of a mask" in to_markdown(table)
    assert "has no memory.csv" in to_markdown(weight_memory(Study(NOTHING)))


def test_layers() -> None:
    row = {"out_features": 64, "in_features": 32, "tokens": 1, "sparsity_percent": 45.0, "kernel": "decode"}
    layers = pd.DataFrame([{**row, "us": 2.0, "dense_us": 3.0, "speedup": 1.5}])
    assert "| 64 × 32" in to_markdown(layer_speed(Study(NOTHING, layers=layers)))
    assert "Not measured: the benchmark folder has no layers.csv" in to_markdown(layer_speed(Study(NOTHING)))


def learned_cell() -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = cell_rows("qwen", "patch_joint", "tiles:128x128", 45.0)
    learn = next(row for row in rows if row["metric"] == "wall_s")
    more = [{**learn, "metric": "gpu_s", "value": 4 * 3600.0}, {**learn, "metric": "wall_s", "value": 3600.0}]
    return runs_table([*(row for row in rows if row is not learn), *more]), curves_of(rows)


def test_training_cost_compares_hours_only_for_as_many_tokens() -> None:
    runs, curves = learned_cell()
    table = training_cost(Study(runs, curves))
    row = table.data.iloc[0]
    assert (row["wall_h"], row["gpu_h"], row["gpu_h.published"]) == (1.0, 4.0, 18.0)
    assert row["tokens"] == pytest.approx(1000 * 12.5 / 1e6)
    assert math.isnan(row["gpu_h.delta"])
    full = curves.assign(tokens_per_second=PAPER_TOKENS / curves["wall_s"].sum())
    assert training_cost(Study(runs, full)).data.iloc[0]["gpu_h.delta"] == pytest.approx(-14.0)
    text = to_markdown(table)
    assert "calls its hours GPU hours" in text
    assert "batch of 128 sequences" in text


def test_published_hours_are_those_of_the_papers_tiles_and_defaults() -> None:
    runs, curves = learned_cell()
    sizes = runs.assign(pattern="tiles:64x64", cell=runs["cell"].str.replace("128x128", "64x64"))
    blocks = runs.assign(variant="per-block", cell=runs["cell"] + "/per-block")
    data = training_cost(Study(pd.concat([runs, sizes, blocks], ignore_index=True), curves)).data
    found = {(row["pattern"], row["variant"]): row["gpu_h.published"] for row in data.to_dict("records")}
    assert found.pop(("tiles:128x128", "default")) == 18.0
    assert set(found) == {("tiles:64x64", "default"), ("tiles:128x128", "per-block")}
    assert all(math.isnan(hours) for hours in found.values())


def test_training_cost_without_learned_cells(runs: pd.DataFrame) -> None:
    one_shot = runs[runs["method"] == "wanda"]
    assert "This run has no cell that belongs here" in to_markdown(training_cost(Study(one_shot)))

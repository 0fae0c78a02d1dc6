"""From records to the runs table and the table of curves; what is missing, and what is stale."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pandas as pd
import pytest

from patch.artefacts import PatchError
from patch.collect import (
    COLUMNS,
    CURVE_COLUMNS,
    PAIRED_COLUMNS,
    STEP_COLUMNS,
    collect,
    collect_curves,
    collect_paired,
    read_curves,
    read_paired,
    read_runs,
    write_curves,
    write_paired,
    write_runs,
)
from patch.experiments import Cell, Experiment, Stage, load_experiment
from patch.records import Metric, Record

MASKLLM, TILE, WANDA = "tiny/maskllm/50-2of4", "tiny/patch_tile/45-tiles8x8", "tiny/wanda/50-2of4"
ORIGIN = {
    "commit": "0123", "dirty": False, "gpu": None, "cpu": "a CPU",
    "versions": {"torch": "2", "transformers": "5", "lm-eval": "0.4"},
}  # fmt: skip


@pytest.fixture
def experiment() -> Experiment:
    config = {
        "name": "test",
        "models": {"tiny": {"source": "./tiny"}},
        "grid": [
            {"methods": ["dense", "wanda", "maskllm"]},
            {"methods": ["patch_tile"], "patterns": ["tiles:8x8"], "sparsities": [45]},
        ],
    }
    return load_experiment([], config)


@pytest.fixture
def results(experiment: Experiment, tmp_path: Path) -> Path:
    """All cells finished."""
    for cell in experiment.cells():
        if cell.mask_stage:
            layer = Metric("model.layers.0.mlp.up_proj", "sparsity", cell.sparsity / 100, samples=50)
            metrics = [Metric("model", "sparsity", cell.sparsity / 100 - 0.01, samples=100), layer]
            metrics += [Metric("model", "train_cross_entropy", 2.5, samples=3)] if cell.mask_stage == "learn" else []
            arguments = {"method": cell.method, "options": cell.options}
            finish(tmp_path, cell, cell.mask_stage, metrics, arguments=arguments)
        finish(tmp_path, cell, "evaluate", [Metric("wikitext2", "perplexity", 12.0, 0.5, 6)])
    return tmp_path


@pytest.fixture
def compressed(experiment: Experiment, results: Path) -> Experiment:
    """The grid with everything in 4 bits, too, finished like the rest."""
    config = experiment.model_dump(exclude_defaults=True) | {"compressions": {"int4": {}}}
    config["grid"] = [block | {"compressions": ["none", "int4"]} for block in config["grid"]]
    wider = load_experiment([], config)
    for cell in wider.cells():
        if cell.compression_options:
            finish(results, cell, "compress", [Metric("model", "bits_per_weight", 2.9, samples=100)])
            finish(results, cell, "evaluate", [Metric("wikitext2", "perplexity", 13.0, 0.5, 6)])
    return wider


def finish(results: Path, cell: Cell, stage: Stage, metrics: list[Metric], **changes: object) -> None:
    directory = results / "test" / cell.path / stage
    record = Record(stage, **({"key": cell.key(stage), "arguments": {}} | changes))  # type: ignore[arg-type]
    record.metrics, record.provenance, record.cost, record.date = metrics, ORIGIN, {"wall_s": 2.0}, "2026-01-02"
    if stage == "learn":
        directory.mkdir(parents=True)
        curves = pd.DataFrame({name: [1.0, 2.0, 3.0] for name in STEP_COLUMNS})
        curves.to_parquet(directory / "curves.parquet", index=False)
    record.write(directory)


def test_learned_cells_have_the_rows_of_pruned_ones(experiment: Experiment, results: Path) -> None:
    runs = collect(experiment, results)
    assert set(runs["status"]) == {"done"}
    stages = {cell: list(rows["stage"].unique()) for cell, rows in runs.groupby("cell")}
    assert stages == {
        "tiny/dense": ["evaluate"], WANDA: ["prune", "evaluate"],
        MASKLLM: ["learn", "evaluate"], TILE: ["learn", "evaluate"],
    }  # fmt: skip
    tile = runs[runs["cell"] == TILE]
    assert set(tile["realised_sparsity"].round(6)) == {44.0}
    values = {(row.stage, row.subject, row.metric): row.value for row in tile.itertuples()}
    assert values == {
        ("learn", "model", "sparsity"): 0.44,
        ("learn", "model.layers.0.mlp.up_proj", "sparsity"): 0.45,
        ("learn", "model", "train_cross_entropy"): 2.5,
        ("learn", "model", "wall_s"): 2.0,
        ("evaluate", "wikitext2", "perplexity"): 12.0,
        ("evaluate", "model", "wall_s"): 2.0,
    }


def test_hyper_parameters_stand_beside_what_is_said_of_the_model(experiment: Experiment, results: Path) -> None:
    runs = collect(experiment, results)
    told = runs[runs["options"].notna()]
    assert set(told["subject"]) == {"model"}
    assert set(zip(told["cell"], told["stage"], strict=True)) == {(MASKLLM, "learn"), (TILE, "learn"), (WANDA, "prune")}
    of_tile = set(told.loc[told["cell"] == TILE, "options"])
    assert [json.loads(options)["density_weight"] for options in of_tile] == [3.0]


def test_an_older_runs_table_is_read_without_its_hyper_parameters(
    experiment: Experiment, results: Path, tmp_path: Path
) -> None:
    write_runs(collect(experiment, results).drop(columns="options"), tmp_path / "runs.parquet")
    older = read_runs(tmp_path / "runs.parquet")
    assert list(older) == list(COLUMNS)
    assert older["options"].isna().all()
    assert older.dtypes.equals(collect(experiment, results).dtypes)
    committed = Path(__file__).parents[1] / "results" / "reference" / "smollm2" / "runs.parquet"
    assert len(read_runs(committed)) > 50


def test_compressed_cells_have_the_rows_of_their_mask_too(compressed: Experiment, results: Path) -> None:
    runs = collect(compressed, results)
    assert set(runs["status"]) == {"done"}
    assert set(runs["compression"]) == {"none", "int4"}
    rows = runs[runs["cell"] == f"{TILE}/int4"]
    assert list(rows["stage"].unique()) == ["learn", "compress", "evaluate"]
    assert set(rows["realised_sparsity"].round(6)) == {44.0}
    values = {(row.stage, row.subject, row.metric): row.value for row in rows.itertuples()}
    assert values["compress", "model", "bits_per_weight"] == 2.9
    assert values["learn", "model", "sparsity"] == 0.44
    assert values["evaluate", "wikitext2", "perplexity"] == 13.0
    assert set(collect_curves(compressed, results)["cell"]) == {MASKLLM, TILE}


def test_a_missing_mask_makes_its_compressed_cells_missing(compressed: Experiment, results: Path) -> None:
    (results / "test" / TILE / "learn" / "record.json").unlink()
    runs = collect(compressed, results)
    missing = runs[runs["status"] == "missing"]
    assert set(missing["cell"]) == {TILE, f"{TILE}/int4"}
    assert set(missing["reason"]) == {"not run"}


def test_prerequisites_are_in_no_table(experiment: Experiment, results: Path) -> None:
    finish(results, experiment.expand().prerequisites[0], "prune", [])
    assert not collect(experiment, results)["method"].eq("sparsegpt").any()


def test_curves_are_those_of_learned_cells(experiment: Experiment, results: Path) -> None:
    curves = collect_curves(experiment, results)
    assert list(curves) == list(CURVE_COLUMNS)
    assert curves.groupby("cell")["step"].apply(list).to_dict() == {MASKLLM: [1, 2, 3], TILE: [1, 2, 3]}
    first = curves.iloc[0]
    assert (first["method"], first["title"], first["sparsity"], first["loss"]) == ("maskllm", "MaskLLM", 50, 1.0)


def test_schedules_that_a_method_does_not_have_are_missing(experiment: Experiment, results: Path) -> None:
    curves = collect_curves(experiment, results)
    known = curves.groupby("cell")[["pattern_scale", "pattern_temperature", "tile_scale", "tile_temperature"]].count()
    assert known.loc[MASKLLM].tolist() == [3, 3, 0, 0]
    assert known.loc[TILE].tolist() == [0, 0, 3, 3]


def test_masks_of_other_settings_or_code_count_as_missing(experiment: Experiment, results: Path) -> None:
    cell = next(cell for cell in experiment.cells() if cell.path == MASKLLM)
    (results / "test" / MASKLLM / "learn" / "curves.parquet").unlink()
    (results / "test" / MASKLLM / "learn").rename(results / "old")
    finish(results, cell, "learn", [], key="other")
    runs = collect(experiment, results)
    row = runs[runs["cell"] == MASKLLM].iloc[0]
    assert row["status"] == "missing"
    assert row["reason"].endswith("learn: made by other settings or code; run the stage again")
    assert set(collect_curves(experiment, results)["cell"]) == {TILE}


def test_stale_records_are_taken_when_asked_for_and_say_so(experiment: Experiment, results: Path) -> None:
    record = Record.read(results / "test" / MASKLLM / "learn")
    dataclasses.replace(record, key="other").write(results / "test" / MASKLLM / "learn")
    runs = collect(experiment, results, stale=True)
    rows = runs[runs["cell"] == MASKLLM]
    assert set(rows["status"]) == {"done"}
    assert set(rows["reason"]) == {"learn: made by other settings or code"}
    assert runs.loc[runs["cell"] == TILE, "reason"].isna().all()
    assert set(collect_curves(experiment, results, stale=True)["cell"]) == {MASKLLM, TILE}


def test_a_learned_cell_that_is_not_yet_evaluated_has_its_curves(experiment: Experiment, results: Path) -> None:
    (results / "test" / TILE / "evaluate" / "record.json").unlink()
    runs = collect(experiment, results)
    assert list(runs.loc[runs["cell"] == TILE, "status"]) == ["missing"]
    assert TILE in set(collect_curves(experiment, results)["cell"])


def test_tables_survive_a_round_trip(experiment: Experiment, results: Path, tmp_path: Path) -> None:
    runs, curves = collect(experiment, results), collect_curves(experiment, results)
    write_runs(runs, tmp_path / "runs.parquet")
    write_curves(curves, tmp_path / "runs.parquet")
    pd.testing.assert_frame_equal(read_runs(tmp_path / "runs.parquet"), runs)
    pd.testing.assert_frame_equal(read_curves(tmp_path / "runs.parquet"), curves)
    assert list(pd.read_csv(tmp_path / "runs.csv")) == list(COLUMNS)


def test_without_learned_cells_the_table_of_curves_is_empty(experiment: Experiment, results: Path) -> None:
    one_shot = load_experiment([], experiment.model_dump() | {"only": {"methods": ["dense", "wanda"]}})
    curves = collect_curves(one_shot, results)
    assert curves.empty
    assert list(curves) == list(CURVE_COLUMNS)


@pytest.mark.parametrize(
    ("read", "name"), [(read_runs, "runs.parquet"), (read_curves, "curves.parquet"), (read_paired, "paired.parquet")]
)
def test_tables_that_cannot_be_read_are_told_by_name(read, name, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=f"{name}: no such file; run the stage `collect` first"):
        read(tmp_path / "runs.parquet")
    (tmp_path / name).write_text("not Parquet")
    with pytest.raises(PatchError, match=f"{name}: not a Parquet file"):
        read(tmp_path / "runs.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / name)
    with pytest.raises(PatchError, match=f"{name}: its columns are not those of this version"):
        read(tmp_path / "runs.parquet")


def test_compressed_cells_are_rows_of_their_own(tmp_path: Path) -> None:
    config = {
        "name": "test",
        "models": {"tiny": {"source": "./tiny"}},
        "grid": [{"methods": ["wanda"], "compressions": ["none", "int4"], "variants": ["default", "shifted"]}],
        "variants": {"shifted": {"wanda": {"shift_zero_metrics": True}}},
        "compressions": {"int4": {}},
    }
    table = collect(load_experiment([], config), tmp_path)
    assert set(zip(table["variant"], table["compression"], strict=True)) == {
        ("default", "none"), ("default", "int4"), ("shifted", "none"), ("shifted", "int4"),
    }  # fmt: skip


def answer(results: Path, cell: Cell, losses: list[float]) -> None:
    rows = {"subject": "wikitext2", "item": range(len(losses)), "metric": "loss", "value": losses}
    pd.DataFrame(rows).to_parquet(results / "test" / cell.path / "evaluate" / "items.parquet", index=False)


def test_cells_are_compared_in_pairs_on_their_items(experiment: Experiment, results: Path) -> None:
    for number, cell in enumerate(experiment.cells()):
        answer(results, cell, [2.0 + number, 3.0 + number, 2.5 + number])
    table = collect_paired(experiment, results)
    assert list(table) == list(PAIRED_COLUMNS)
    assert len(table) == 6  # of four cells
    assert set(table["subject"]) == {"wikitext2"}
    first = table.iloc[0]
    assert (first["run"], first["model"], first["first"], first["second"]) == ("test", "tiny", "tiny/dense", WANDA)
    assert first["difference"] == pytest.approx(math.exp(2.5) - math.exp(3.5))
    write_paired(table, results / "runs.parquet")
    pd.testing.assert_frame_equal(read_paired(results / "runs.parquet"), table)


def test_only_equal_seeds_and_the_dense_model_are_compared(tmp_path: Path) -> None:
    grid = [{"methods": ["dense", "wanda", "magnitude"]}]
    config = {"name": "test", "models": {"tiny": {"source": "./tiny"}}, "grid": grid, "seeds": [0, 1]}
    seeds = load_experiment([], config)
    for number, cell in enumerate(seeds.cells()):
        finish(tmp_path, cell, "evaluate", [Metric("wikitext2", "perplexity", 12.0, 0.5, 6)])
        answer(tmp_path, cell, [2.0 + number, 3.0])
    table = collect_paired(seeds, tmp_path)
    crossed = table["first"].str.endswith("seed-1") != table["second"].str.endswith("seed-1")
    assert len(table) == 6  # dense with four, and the two of each seed
    assert set(table.loc[crossed, "first"]) == {"tiny/dense"}


def test_cells_whose_items_cannot_be_read_are_compared_with_none(
    experiment: Experiment, results: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cells = experiment.cells()
    for cell in cells[:2]:
        answer(results, cell, [2.0, 3.0])
    (results / "test" / cells[2].path / "evaluate" / "items.parquet").write_text("damaged")
    assert len(collect_paired(experiment, results)) == 1
    assert "cannot be read" in caplog.text


def test_missing_cells_say_whether_they_failed_and_where_the_log_is(experiment: Experiment, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "test" / MASKLLM / "learn.log"
    log.parent.mkdir(parents=True)
    log.write_text("CUDA error")
    runs = collect(experiment, tmp_path, tmp_path / "logs").set_index("cell")
    assert runs.loc[MASKLLM, "reason"] == f"failed or not finished; the log of `learn` is {log}"
    assert runs.loc[WANDA, "reason"] == "not run"

"""What a grid costs, why its stages would run, and what of it fits a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from patch.artefacts import PatchError
from patch.benchmark_jobs import BenchmarkJob, benchmark_jobs
from patch.cluster.site import Gpu
from patch.experiments import Cell, Experiment, load_experiment
from patch.planning.plan import Planned, check_budget, fitting, plan, shared_hours, without
from patch.planning.rates import Rate, load_rates
from patch.planning.reasons import benchmark_reason, reason
from patch.records import Record

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "models": {"a": {"source": "some/model-1b"}, "b": {"source": "some/model-2b"}},
    "grid": [
        {"methods": ["dense", "magnitude", "wanda", "maskllm"]},
        {"methods": ["patch_joint"], "patterns": ["tiles:16x16"], "sparsities": [45, 35]},
    ],
    "methods": {"maskllm": {"prior": "magnitude"}, "patch_joint": {"reference": "wanda", "prior": "magnitude"}},
    "exclude": [{"models": ["b"], "methods": ["wanda"], "reason": "as I say"}],
    "calibration": {"source": "c4", "samples": 10, "length": 100},
    "evaluation": {"perplexity": {"own": {"source": "text.txt", "length": 16, "windows": 4}}, "tasks": None},
}
RATES = [
    Rate("prune", "magnitude", "GPU", 1e9, 0, 36, "measured", ""),
    Rate("prune", "wanda", "GPU", 1e9, 1000, 360, "measured", ""),
    Rate("learn", "patch_joint", "GPU", 1e9, 2000 * 256 * 4096, 36000, "measured", ""),
    Rate("evaluate", "any", "GPU", 1e9, 64, 720, "measured", ""),
]


def experiment(**changes: Any) -> Experiment:
    return Experiment.model_validate(CONFIG | changes)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "tiny"


def planned(of: Experiment, run: Path) -> dict[tuple[str, str], Planned]:
    return {(part.cell, part.stage): part for part in plan(of, run.parent, RATES, Gpu(memory_gib=80))}


def test_every_stage_has_its_cost_by_rate_parameters_and_tokens(run):
    stages = planned(experiment(), run)
    assert stages["a/magnitude/50-2of4", "prune"].hours == pytest.approx(0.01)
    assert stages["b/magnitude/50-2of4", "prune"].hours == pytest.approx(0.02)
    assert stages["a/wanda/50-2of4", "prune"].hours == pytest.approx(0.1)
    assert stages["a/patch_joint/45-tiles16x16", "learn"].hours == pytest.approx(10)
    assert stages["b/patch_joint/45-tiles16x16", "learn"].hours == pytest.approx(20)
    assert stages["a/dense", "evaluate"].hours == pytest.approx(0.2)
    # what others only learn from is made, not measured
    assert ("a/wanda/45-unstructured", "prune") in stages
    assert ("a/wanda/45-unstructured", "evaluate") not in stages
    assert all(part.reason == "new" for part in stages.values())


def test_memory_and_disk_grow_with_the_model(run):
    stages = planned(experiment(), run)
    small, large = (stages[f"{model}/patch_joint/45-tiles16x16", "learn"] for model in "ab")
    # 1.5 logits per weight of 4 bytes, with gradient and two moments: 24 bytes per weight, and what else
    assert 24e9 / 2**30 < small.gpu_memory_gib < 24e9 / 2**30 + 12
    assert large.gpu_memory_gib > 1.6 * small.gpu_memory_gib
    assert stages["a/magnitude/50-2of4", "prune"].disk_gib == pytest.approx(1e9 * 0.75 / 8 / 2**30)
    assert stages["a/model.json", "prepare"].disk_gib == pytest.approx(2e9 / 2**30)
    training = stages["a/tokens/training.safetensors", "prepare"]
    assert training.disk_gib == pytest.approx(512_000 * 4096 * 4 / 2**30)


def finish(cell: Cell, stage: Any, run: Path, **changes: Any) -> None:
    """A record of the stage as it would be now, except for `changes`."""
    arguments: dict[str, Any] = {"pattern": cell.pattern, "sparsity": cell.sparsity, "seed": cell.seed, "tasks": None}
    arguments["options"] = dict(cell.options)
    protocol: dict[str, Any] = {"own": {"source": "text.txt", "length": 16}}
    for role, text in (("calibration", cell.calibration), ("training", cell.training)):
        protocol |= {role: text.model_dump()} if text else {}
    record = Record(stage, changes.get("key", cell.key(stage)), arguments, protocol=protocol)
    for place, values in changes.items():
        if place != "key":
            getattr(record, place).update(values)
    record.outputs = {} if stage == "evaluate" else {"mask.safetensors": "x"}
    folder = run / cell.folder(stage)
    record.write(folder)
    if stage != "evaluate":
        (folder / "mask.safetensors").touch()


def cell_of(path: str, **changes: Any) -> Cell:
    grid = experiment(**changes).expand()
    return next(cell for cell in grid.cells + grid.prerequisites if cell.path == path)


def test_a_done_stage_costs_nothing(run):
    cell = cell_of("a/wanda/50-2of4")
    finish(cell, "prune", run)
    stages = planned(experiment(), run)
    assert stages["a/wanda/50-2of4", "prune"].reason is None
    assert stages["a/wanda/50-2of4", "prune"].hours == 0
    assert stages["a/wanda/50-2of4", "evaluate"].hours > 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"key": "old"}, "code changed"),
        ({"key": "old", "arguments": {"seed": 3}}, "settings changed: seed 3 -> 0"),
        ({"key": "old", "arguments": {"options": {}}}, "settings changed: layers null"),
        ({"key": "old", "protocol": {"calibration": {"source": "c4", "length": 64, "samples": 10}}},
         "settings changed: calibration.length 64 -> 100"),
    ],
)  # fmt: skip
def test_why_a_mask_is_made_again(changes, why, run):
    cell = cell_of("a/wanda/50-2of4")
    finish(cell, "prune", run, **changes)
    assert (reason(cell, "prune", run) or "").startswith(why)


def test_options_that_are_pairs_do_not_look_changed(run):
    cell = cell_of("a/patch_joint/45-tiles16x16")
    for part in cell.prerequisites.values():
        finish(part, "prune", run)
    finish(cell, "learn", run, key="old")  # written as JSON, which has lists for them
    assert reason(cell, "learn", run) == "code changed"


def test_why_an_evaluation_is_done_again(run):
    cell = cell_of("a/magnitude/50-2of4")
    finish(cell, "evaluate", run, key="old")
    assert reason(cell, "evaluate", run) == "a/magnitude/50-2of4/prune runs again"
    finish(cell, "prune", run)
    assert reason(cell, "evaluate", run) == "code changed"
    finish(cell, "evaluate", run, key="old", protocol={"own": {"source": "text.txt", "length": 32}})
    assert reason(cell, "evaluate", run) == "settings changed: own.length 32 -> 16"
    finish(cell, "evaluate", run, key="old", arguments={"tasks": {"names": ["piqa"]}})
    assert reason(cell, "evaluate", run) == "settings changed: tasks removed"
    cell = cell_of("a/magnitude/50-2of4", evaluation=CONFIG["evaluation"] | {"tasks": {"names": ["piqa"], "limit": 5}})
    finish(cell, "evaluate", run, key="old", arguments={"tasks": cell.evaluation.tasks.model_dump() | {"limit": 4}})
    # names are pairs here and lists in records
    assert reason(cell, "evaluate", run) == "settings changed: tasks.limit 4 -> 5"


def test_what_starts_from_another_mask_says_so(run):
    cell = cell_of("a/patch_joint/45-tiles16x16")
    finish(cell.prerequisites["pattern"], "prune", run)
    finish(cell, "learn", run, key="old")
    assert reason(cell, "learn", run) == "a/wanda/45-unstructured/prune runs again"


COMPRESSED: dict[str, Any] = {
    "grid": [{"methods": ["magnitude"], "compressions": ["int4"]}],
    "compressions": {"int4": {}},
    "models": {"a": {"source": "some/model-1b"}},
    "exclude": [],
}


def test_a_compressed_cell_has_a_stage_of_its_own_and_shares_the_mask(run):
    rates = [*RATES, Rate("compress", "any", "GPU", 1e9, 0, 72, "measured", "")]
    stages = plan(experiment(**COMPRESSED), run.parent, rates, Gpu())
    costs = {(part.cell, part.stage): part.hours for part in stages if part.stage != "prepare"}
    assert costs == {
        ("a/magnitude/50-2of4", "prune"): pytest.approx(0.01),
        ("a/magnitude/50-2of4/int4", "compress"): pytest.approx(0.02),
        ("a/magnitude/50-2of4/int4", "evaluate"): pytest.approx(0.2),
    }
    kept, _ = fitting(experiment(**COMPRESSED).cells(), stages, 0.231)
    assert kept
    assert not fitting(experiment(**COMPRESSED).cells(), stages, 0.229)[0]


def test_why_a_model_is_compressed_again(run):
    cell = cell_of("a/magnitude/50-2of4/int4", **COMPRESSED)
    options = cell.compression_options.model_dump(exclude={"inputs"})
    finish(cell.uncompressed, "prune", run)
    finish(cell, "compress", run, key="old", arguments={"options": options | {"group_size": 64}})
    assert reason(cell, "compress", run) == "settings changed: group_size 64 -> 128"
    finish(cell, "evaluate", run, key="old")
    assert reason(cell, "evaluate", run) == "a/magnitude/50-2of4/int4/compress runs again"


def test_missing_and_damaged_files_are_reasons(run):
    cell = cell_of("a/magnitude/50-2of4")
    assert reason(cell, "prune", run) == "new"
    finish(cell, "prune", run)
    (run / cell.path / "prune" / "mask.safetensors").unlink()
    assert reason(cell, "prune", run) == "missing mask.safetensors"
    (run / cell.path / "prune" / "record.json").write_text("{")
    assert reason(cell, "prune", run) == "its record cannot be read"


def test_a_changed_model_is_a_reason(run):
    cell = cell_of("a/magnitude/50-2of4")
    finish(cell, "prune", run, key="old")
    (run / "a" / "model.json").write_text('{"source": "some/other", "dtype": "float32"}')
    assert reason(cell, "prune", run) == "settings changed: model some/other -> some/model-1b"


def test_a_budget_keeps_the_cheapest_cells_and_pays_for_shared_masks_once(run):
    of = experiment(models={"a": {"source": "some/model-1b"}})
    stages = plan(of, run.parent, RATES, Gpu())
    # dense 0.2, magnitude 0.21, wanda 0.3; then maskllm and the first patch_joint 10.2 each
    kept, left = fitting(of.cells(), stages, 0.72)
    assert [cell.path for cell in kept] == ["a/dense", "a/magnitude/50-2of4", "a/wanda/50-2of4"]
    kept, _ = fitting(of.cells(), stages, 0.70)
    assert len(kept) == 2
    # magnitude's mask is paid for already; a reference of wanda is not: 0.1
    kept, left = fitting(of.cells(), stages, 0.71 + 10.2 + 10.31)
    assert [cell.path for cell in kept[3:]] == ["a/maskllm/50-2of4", "a/patch_joint/45-tiles16x16"]
    assert [cell.path for cell in left] == ["a/patch_joint/35-tiles16x16"]


def test_the_layer_of_a_budget_leaves_out_exactly_the_rest(run, tmp_path):
    of = experiment()
    kept, left = fitting(of.cells(), plan(of, run.parent, RATES, Gpu()), 12)
    assert kept
    assert left
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "layer.yaml").write_text(yaml.safe_dump(without(of, {"over budget": left})))
    again = load_experiment([tmp_path / "config.yaml", tmp_path / "layer.yaml"]).expand()
    assert {cell.path for cell in again.cells} == {cell.path for cell in kept}
    assert {reason for _, reason in again.excluded} == {"as I say", "over budget"}


def test_a_budget_of_nothing_is_an_error():
    with pytest.raises(PatchError, match="--budget 0: must be above 0"):
        check_budget(0)


# benchmarks

TIMED: dict[str, Any] = {
    "models": {"a": {"source": "some/model-2b"}},
    "exclude": [],
    "benchmarks": {
        "layers": {"shapes": ["128x64"], "tokens": [1, 16], "kernels": ["auto", "unpack"]},
        "generation": {"shapes": ["llama-2-7b"]},
        "learning": {},
        "masks": {"methods": ["magnitude", "patch_joint"], "sparsities": [50, 45]},
    },
}
TIMED_RATES = [
    *RATES,
    Rate("benchmark", "any", "GPU", 1e9, 0, 360, "assumed", ""),
    Rate("benchmark", "any", "GPU", 8e9, 0, 360, "assumed", ""),
]
RANDOM_TILES = "benchmarks/layers/random/128x64"
MASK = "a/magnitude/50-2of4"


def timed_plan(run: Path, target: str | None = None, **changes: Any) -> list[Planned]:
    return plan(experiment(**TIMED | changes), run.parent, TIMED_RATES, Gpu(), target)


def test_benchmarks_of_random_tiles_and_of_masks_are_planned(run):
    found = {(part.stage, part.cell): part for part in timed_plan(run) if part.stage.startswith("benchmark")}
    masks = (MASK, "a/patch_joint/45-tiles16x16")
    assert list(found) == [
        ("benchmark layers", RANDOM_TILES),
        *(("benchmark layers", cell) for cell in masks),
        ("benchmark generation", "benchmarks/generation/random/llama-2-7b"),
        *(("benchmark generation", cell) for cell in masks),
        ("benchmark learning", "benchmarks/learning/random/qwen2.5-0.5b"),
        ("benchmark learning", "benchmarks/learning/random/llama-3.2-1b"),
    ]
    part = found["benchmark generation", "benchmarks/generation/random/llama-2-7b"]
    assert part.hours == pytest.approx(0.1)
    assert (part.reason, part.estimate.basis, part.gpus) == ("new", "assumed", 1)
    assert part.gpu_memory_gib == pytest.approx(14e9 / 2**30)  # of bfloat16 weights
    assert (part.model, found["benchmark layers", MASK].model) == ("llama-2-7b (random)", "a")
    # a mask's is that of its model's size, which has no other benchmark
    assert found["benchmark generation", MASK].gpu_memory_gib == pytest.approx(4e9 / 2**30)
    assert found["benchmark layers", MASK].memory_gib < part.memory_gib


def test_without_a_gpu_benchmarks_are_planned_only_where_the_config_runs_them(run):
    rates = [Rate(*(part.stage, part.method, "CPU thread"), *(1e9, 1, 1), "measured", "") for part in TIMED_RATES]
    for without_gpu, count in (("skip", 0), ("run", 8)):
        of = experiment(**TIMED | {"benchmarks": TIMED["benchmarks"] | {"without_gpu": without_gpu}})
        stages = plan(of, run.parent, rates, None)
        assert sum(part.stage.startswith("benchmark") for part in stages) == count


def time_job(folder: str, run: Path, key: str = "", **options: Any) -> BenchmarkJob:
    """A benchmark that ran; its options as of now, except for `options`."""
    of = experiment(**TIMED)
    (job,) = [job for job in benchmark_jobs(of, of.cells(), on_gpu=True) if job.folder == folder]
    given = {"tokens": "1,16", "kernel": ["auto", "unpack"], "compile": True, "device": "cuda", "mask": None}
    given |= {} if job.cell else {"sparsity": "25,35,45"}
    arguments = {"benchmark": job.benchmark, "options": given | options}
    Record("benchmark", key or job.key, arguments, outputs={"rows.csv": "x"}).write(run / folder)
    (run / folder / "rows.csv").touch()
    return job


def test_a_benchmark_that_is_done_costs_nothing_and_one_whose_table_is_gone_runs_again(run):
    job = time_job(RANDOM_TILES, run)
    (part,) = [part for part in timed_plan(run) if part.cell == RANDOM_TILES]
    assert (part.reason, part.hours) == (None, 0)
    (run / RANDOM_TILES / "rows.csv").unlink()
    assert benchmark_reason(job, run) == "missing rows.csv"
    (run / RANDOM_TILES / "record.json").write_text("{")
    assert benchmark_reason(job, run) == "its record cannot be read"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "code changed"),
        ({"tokens": "1,8"}, "settings changed: tokens 1,8 -> 1,16"),
        ({"kernel": ["auto"]}, "settings changed: kernel auto -> auto unpack"),
        ({"compile": False, "sparsity": "25"}, "settings changed: compile off -> on, sparsity 25 -> 25,35,45"),
        ({"official": True}, "settings changed: official on -> off"),
    ],
)
def test_why_a_benchmark_runs_again(options, why, run):
    assert benchmark_reason(time_job(RANDOM_TILES, run, key="old", **options), run) == why


def test_a_benchmark_of_a_mask_runs_again_with_it(run):
    job = time_job(f"benchmarks/layers/masks/{MASK}", run, key="old")
    assert benchmark_reason(job, run) == f"{MASK}/prune runs again"
    finish(job.cell, "prune", run)
    assert benchmark_reason(job, run) == "code changed"


def test_a_budget_pays_for_random_tiles_first_and_for_masks_with_their_cells(run):
    cells, stages = experiment(**TIMED).cells(), timed_plan(run)
    hours = {part.cell: 0.0 for part in stages}
    for part in stages:
        hours[part.cell] += part.hours
    # one shape of layers and generation, two of learning, the smallest at half a billion parameters
    first = shared_hours(cells, stages)
    assert first == pytest.approx(3 * 0.1 + 0.1 * 0.5)
    # dense 0.4, magnitude 0.42 and two benchmarks of its mask, wanda 0.6
    assert hours[MASK] == pytest.approx(0.62)
    enough = first + 0.4 + 0.6 + 0.62
    assert [cell.method for cell in fitting(cells, stages, enough + 0.001)[0]] == ["dense", "wanda", "magnitude"]
    assert [cell.method for cell in fitting(cells, stages, enough - 0.001)[0]] == ["dense", "wanda"]
    assert fitting(cells, stages, first + 0.39)[0] == []


def test_the_layer_of_a_budget_leaves_out_the_benchmarks_of_left_out_masks(run, tmp_path):
    of = experiment(**TIMED)
    kept, left = fitting(of.cells(), timed_plan(run), 3)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG | TIMED))

    def jobs(target: str | None) -> list[str]:
        (tmp_path / "layer.yaml").write_text(yaml.safe_dump(without(of, {"over budget": left}, target)))
        again = load_experiment([tmp_path / "config.yaml", tmp_path / "layer.yaml"])
        assert [cell.path for cell in again.cells()] == [cell.path for cell in of.cells() if cell in kept]
        return [job.folder for job in benchmark_jobs(again, again.cells(), on_gpu=True)]

    assert len(jobs(None)) == 8 - 2
    assert not [folder for folder in jobs(None) if "patch_joint" in folder]
    assert {folder.split("/")[1] for folder in jobs("claims")} == {"generation"}
    assert jobs("accuracy") == []


def test_a_target_counts_the_benchmark_that_it_shows_and_the_masks_of_that(run):
    stages = timed_plan(run, "throughput")
    assert {part.stage for part in stages} == {"prepare", "prune", "learn", "benchmark generation"}
    assert {part.cell for part in stages if part.stage in ("prune", "learn")} == {
        MASK, "a/patch_joint/45-tiles16x16", "a/wanda/45-unstructured",
    }  # fmt: skip
    assert {part.stage for part in timed_plan(run, "claims") if "benchmark" in part.stage} == {"benchmark generation"}
    assert not [part for part in timed_plan(run, "accuracy") if "benchmark" in part.stage]
    with pytest.raises(PatchError, match="--target throughput: shows nothing of tiny"):
        timed_plan(run, "throughput", benchmarks={"layers": {}})


@pytest.mark.parametrize("config", sorted((ROOT / "workflow" / "config").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("gpu", [Gpu(), None], ids=["gpu", "cpu"])
def test_every_config_can_be_planned_with_the_committed_rates(config, gpu, tmp_path):
    stages = plan(load_experiment([config]), tmp_path, load_rates(), gpu)
    assert sum(part.hours for part in stages) > 0
    assert all((part.gpus > 0) == (gpu is not None) for part in stages if part.stage != "prepare")

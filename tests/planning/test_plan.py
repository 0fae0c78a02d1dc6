"""What a grid costs, why its stages would run, and what of it fits a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from patch.artefacts import PatchError
from patch.cluster.site import Gpu
from patch.experiments import Cell, Experiment, load_experiment
from patch.planning.plan import Planned, check_budget, fitting, plan, without
from patch.planning.rates import Rate, load_rates
from patch.planning.reasons import reason
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
    kept, _ = fitting(experiment(**COMPRESSED), stages, 0.231)
    assert kept
    assert not fitting(experiment(**COMPRESSED), stages, 0.229)[0]


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
    kept, left = fitting(of, stages, 0.72)
    assert [cell.path for cell in kept] == ["a/dense", "a/magnitude/50-2of4", "a/wanda/50-2of4"]
    kept, _ = fitting(of, stages, 0.70)
    assert len(kept) == 2
    # magnitude's mask is paid for already; a reference of wanda is not: 0.1
    kept, left = fitting(of, stages, 0.71 + 10.2 + 10.31)
    assert [cell.path for cell in kept[3:]] == ["a/maskllm/50-2of4", "a/patch_joint/45-tiles16x16"]
    assert [cell.path for cell in left] == ["a/patch_joint/35-tiles16x16"]


def test_the_layer_of_a_budget_leaves_out_exactly_the_rest(run, tmp_path):
    of = experiment()
    kept, left = fitting(of, plan(of, run.parent, RATES, Gpu()), 12)
    assert kept
    assert left
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "layer.yaml").write_text(yaml.safe_dump(without(of, left, "over budget")))
    again = load_experiment([tmp_path / "config.yaml", tmp_path / "layer.yaml"]).expand()
    assert {cell.path for cell in again.cells} == {cell.path for cell in kept}
    assert {reason for _, reason in again.excluded} == {"as I say", "over budget"}


def test_a_budget_of_nothing_is_an_error():
    with pytest.raises(PatchError, match="--budget 0: must be above 0"):
        check_budget(0)


@pytest.mark.parametrize("config", sorted((ROOT / "workflow" / "config").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("gpu", [Gpu(), None], ids=["gpu", "cpu"])
def test_every_config_can_be_planned_with_the_committed_rates(config, gpu, tmp_path):
    stages = plan(load_experiment([config]), tmp_path, load_rates(), gpu)
    assert sum(part.hours for part in stages) > 0
    assert all((part.gpus > 0) == (gpu is not None) for part in stages if part.stage != "prepare")

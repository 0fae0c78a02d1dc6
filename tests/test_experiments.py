"""Configs: layers, messages for what is wrong in them, and the grid they expand to."""

from __future__ import annotations

import pytest
import yaml

from patch import experiments
from patch.artefacts import PatchError
from patch.config_docs import options_markdown, schema
from patch.experiments import Experiment, load_experiment
from patch.methods import METHODS

CALIBRATED = {"layers": "all", "calibration_inputs": "pruned"}
"""Options that methods with calibration share, at their defaults."""
BASE = {
    "name": "test",
    "models": {"tiny": {"source": "./tiny"}},
    "grid": [{"methods": ["dense", "wanda"]}],
}


@pytest.fixture
def write(tmp_path):
    """`write("a.yaml", {...})` or text; returns the path."""

    def to_file(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return to_file


def experiment(**changes) -> Experiment:
    return load_experiment([], BASE | changes)


def paths(**changes) -> list[str]:
    return [cell.path for cell in experiment(**changes).cells()]


def cell(path="tiny/wanda/50-2of4", **changes):
    return next(cell for cell in experiment(**changes).cells() if cell.path == path)


def message(*files, **overrides) -> str:
    with pytest.raises(PatchError) as error:
        load_experiment(list(files), overrides).expand()
    assert "\n" not in str(error.value)
    return str(error.value)


# layers


def test_later_layers_win_key_by_key_and_replace_lists(write):
    low = write("low.yaml", BASE | {"calibration": {"samples": 8, "length": 32}, "seeds": [0, 1, 2]})
    high = write("high.yaml", {"calibration": {"samples": 4}, "seeds": [7]})
    merged = load_experiment([low, high])
    assert (merged.calibration.samples, merged.calibration.length) == (4, 32)
    assert merged.seeds == (7,)
    assert list(merged.models) == ["tiny"]


def test_a_file_starts_from_those_it_extends(write):
    write("one.yaml", BASE | {"threads": 2, "seeds": [1], "description": "one"})
    write("two.yaml", {"seeds": [2], "description": "two"})
    top = write("top.yaml", {"extends": ["one.yaml", "two.yaml"], "description": "top"})
    merged = load_experiment([top])
    assert (merged.threads, merged.seeds, merged.description) == (2, (2,), "top")


def test_extends_is_relative_to_the_file_that_says_so(write, tmp_path):
    (tmp_path / "deep").mkdir()
    write("base.yaml", BASE)
    write("deep/middle.yaml", {"extends": "../base.yaml", "threads": 3})
    top = write("top.yaml", {"extends": "deep/middle.yaml"})
    assert load_experiment([top]).threads == 3


def test_the_command_line_wins_over_all_files(write):
    file = write("a.yaml", BASE | {"calibration": {"samples": 8}, "threads": 2})
    merged = load_experiment([file], {"calibration": {"samples": 3}})
    assert (merged.calibration.samples, merged.threads) == (3, 2)


def test_null_takes_away_what_a_lower_layer_or_default_gives():
    assert experiment(evaluation={"tasks": None}).evaluation.tasks is None


def test_files_that_extend_each_other_are_refused(write):
    write("a.yaml", {"extends": "b.yaml"} | BASE)
    b = write("b.yaml", {"extends": "a.yaml"})
    assert "b.yaml: extends itself through b.yaml -> a.yaml" in message(b)


def test_the_same_base_twice_is_not_a_circle(write):
    write("base.yaml", BASE)
    write("one.yaml", {"extends": "base.yaml"})
    write("two.yaml", {"extends": "base.yaml"})
    assert load_experiment([write("top.yaml", {"extends": ["one.yaml", "two.yaml"]})]).name == "test"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("name: [", "a.yaml: not valid YAML"),
        ("- a\n- b\n", "a.yaml: a config is a mapping of keys, found list"),
        ("", "a.yaml: the key 'name' is missing"),
        ("extends: nowhere.yaml\n", "nowhere.yaml: no such config file"),
    ],
)
def test_files_that_are_no_config_are_refused_by_name(write, content, expected):
    assert expected in message(write("a.yaml", content))


def test_a_missing_file_is_told(tmp_path):
    assert "nowhere.yaml: no such config file" in message(tmp_path / "nowhere.yaml")


# what is wrong, where, and what was meant


@pytest.mark.parametrize(
    ("where", "wrong", "expected"),
    [
        ("top", {"calibratoin": {}}, "unknown key 'calibratoin'; did you mean 'calibration'?"),
        ("nested", {"calibration": {"sample": 3}}, "unknown key 'calibration.sample'; did you mean 'samples'?"),
        (
            "deeper",
            {"evaluation": {"tasks": {"nmes": []}}},
            "unknown key 'evaluation.tasks.nmes'; did you mean 'names'?",
        ),
        (
            "in a dictionary",
            {"evaluation": {"perplexity": {"wiki": {"source": "c4", "lenght": 9}}}},
            "unknown key 'evaluation.perplexity.wiki.lenght'; did you mean 'length'?",
        ),
        ("model", {"models": {"tiny": {"sorce": "x"}}}, "unknown key 'models.tiny.sorce'; did you mean 'source'?"),
        (
            "grid",
            {"grid": [{"methods": ["wanda"], "patern": []}]},
            "unknown key 'grid.0.patern'; did you mean 'patterns'?",
        ),
        (
            "grid value",
            {"grid": [{"methods": ["wnada"]}]},
            "grid.0.methods.0: 'wnada' is not possible; did you mean 'wanda'?",
        ),
        ("methods", {"methods": {"wnada": {}}}, "'wnada' is not possible; did you mean 'wanda'?"),
        (
            "method option",
            {"methods": {"sparsegpt": {"blok_size": 8}}},
            "methods.sparsegpt.blok_size: extra inputs are not permitted; did you mean 'block_size'?",
        ),
        ("method value", {"methods": {"sparsegpt": {"block_size": 7}}}, "methods.sparsegpt.block_size: "),
        (
            "variant option",
            {"variants": {"shifted": {"wanda": {"shift_zeros": True}}}},
            "variants.shifted.wanda.shift_zeros: extra inputs are not permitted; did you mean 'shift_zero_metrics'?",
        ),
        (
            "option of one model",
            {"models": {"tiny": {"source": "./tiny", "methods": {"patch_tile": {"step": 8}}}}},
            "models.tiny.methods.patch_tile.step: extra inputs are not permitted; did you mean 'steps'?",
        ),
        ("value", {"calibration": {"samples": 0}}, "calibration.samples: Input should be greater than 0 (found 0)"),
        ("choice", {"device": "cuba"}, "device: 'cuba' is not possible; did you mean 'cuda'?"),
        (
            "model that is not defined",
            {"grid": [{"methods": ["wanda"], "models": ["tinny"]}]},
            "grid.0.models: 'tinny' is not defined; did you mean 'tiny'?",
        ),
        (
            "variant that is not defined",
            {"grid": [{"methods": ["wanda"], "variants": ["defualt"]}]},
            "grid.0.variants: 'defualt' is not defined; did you mean 'default'?",
        ),
        (
            "excluded model that is not defined",
            {"exclude": [{"models": ["tinny"], "reason": "why"}]},
            "exclude.0.models: 'tinny' is not defined; did you mean 'tiny'?",
        ),
        ("selected model", {"only": {"models": ["tinny"]}}, "only.models: 'tinny' is not defined"),
        ("exclusion without reason", {"exclude": [{"methods": ["wanda"]}]}, "the key 'exclude.0.reason' is missing"),
        ("name", {"name": "a/b"}, "name: String should match pattern"),
    ],
)
@pytest.mark.parametrize("place", ["first", "second", "command line"])
def test_a_mistake_is_told_with_its_key_its_file_and_the_nearest_valid_key(write, where, wrong, expected, place):
    del where  # names the case
    layers = {"first": BASE | wrong, "second": {"threads": 2}}
    overrides = {}
    if place == "second":
        layers = {"first": BASE, "second": wrong}
    elif place == "command line":
        layers, overrides = {"first": BASE, "second": {"threads": 2}}, wrong
    files = [write(f"{name}.yaml", content) for name, content in layers.items()]
    found = message(*files, **overrides)
    assert expected in found
    assert found.startswith(
        "the command line: " if place == "command line" else str(files[0 if place == "first" else 1])
    )


def test_a_missing_key_is_told(write):
    assert "the key 'models' is missing" in message(write("a.yaml", {"name": "x", "grid": []}))


def test_several_mistakes_are_counted(write):
    assert "(1 more problems after this one.)" in message(write("a.yaml", BASE | {"thread": 1, "seed": 1}))


def test_without_anything_near_the_valid_keys_are_listed(write):
    assert "valid: name, description, models, grid" in message(write("a.yaml", BASE | {"zzzz": 1}))


@pytest.mark.parametrize("place", ["grid", "exclude", "only"])
def test_an_unknown_pattern_is_told(place):
    wrong = {
        "grid": {"grid": [{"methods": ["wanda"], "patterns": ["2:5:1"]}]},
        "exclude": {"exclude": [{"patterns": ["2:5:1"], "reason": "why"}]},
        "only": {"only": {"patterns": ["2:5:1"]}},
    }[place]
    assert "pattern '2:5:1': not one of dense, unstructured" in message(**(BASE | wrong))


def test_a_pattern_that_yaml_reads_as_a_number_is_told_to_be_quoted(write):
    """YAML 1.1 reads 2:4 without quotes as 2 * 60 + 4."""
    text = yaml.safe_dump({key: value for key, value in BASE.items() if key != "grid"})
    file = write("a.yaml", text + "grid:\n- {methods: [wanda], patterns: [2:4]}\n")
    assert "quote" in message(file)


@pytest.mark.parametrize(
    ("method", "pattern"),
    [("wanda", "tiles:8x8"), ("wanda", "dense"), ("proxsparse", "unstructured"), ("patch_tile", "2:4")],
)
def test_a_pattern_that_a_method_cannot_make_is_told(method, pattern):
    grid = [{"methods": [method], "patterns": [pattern], "sparsities": [50]}]
    assert f"method {method} cannot make the pattern {pattern!r}" in message(**(BASE | {"grid": grid}))


def test_patterns_without_a_fixed_sparsity_need_one():
    grid = [{"methods": ["wanda"], "patterns": ["unstructured"]}]
    assert "pattern 'unstructured' needs `sparsities` beside it" in message(**(BASE | {"grid": grid}))


@pytest.mark.parametrize("sparsity", [-1, 100, 150])
def test_targets_outside_0_to_100_percent_are_refused(sparsity):
    grid = [{"methods": ["wanda"], "patterns": ["unstructured"], "sparsities": [sparsity]}]
    assert "sparsities" in message(**(BASE | {"grid": grid}))


def test_tiles_that_would_have_to_prune_more_than_half_are_refused():
    grid = [{"methods": ["patch_joint"], "patterns": ["tiles:8x8"], "sparsities": [45, 55]}]
    assert "pattern tiles:8x8: its tiles are dense or 2:4, so at most 50 %" in message(**(BASE | {"grid": grid}))


def test_a_run_that_reads_more_than_there_is_is_refused():
    """2000 steps of 256 sequences is exactly what the paper's text gives, read once."""
    grid = [{"methods": ["maskllm"]}]
    experiment(grid=grid)
    found = message(**(BASE | {"grid": grid, "training": {"samples": 300_000}}))
    assert "maskllm reads 512000 sequences (steps x batch_size), the training text has 300000" in found
    experiment(grid=grid, training={"samples": 300_000, "epochs": 2})


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": []},
        {"models": {}},
        {"only": {"methods": ["magnitude"]}},
        {"exclude": [{"reason": "all of it"}]},
    ],
)
def test_a_grid_with_nothing_left_is_refused(changes):
    assert "no cell is left to run; check `grid`, `exclude` and `only`" in message(**(BASE | changes))


# the grid


def test_the_grid_is_a_product_in_order():
    found = paths(
        models={"a": {"source": "./a"}, "b": {"source": "./b"}},
        grid=[
            {"methods": ["dense", "wanda"], "patterns": ["2:4"]},
            {"methods": ["magnitude"], "patterns": ["unstructured"], "sparsities": [45, 25.5], "models": ["b"]},
        ],
    )
    assert found == [
        "a/dense",
        "a/wanda/50-2of4",
        "b/dense",
        "b/wanda/50-2of4",
        "b/magnitude/45-unstructured",
        "b/magnitude/25.5-unstructured",
    ]


def test_patterns_that_fix_the_sparsity_ignore_targets():
    grid = [{"methods": ["wanda"], "patterns": ["2:4", "1:4", "unstructured"], "sparsities": [30]}]
    assert paths(grid=grid) == ["tiny/wanda/50-2of4", "tiny/wanda/75-1of4", "tiny/wanda/30-unstructured"]


def test_tiles_have_their_size_in_the_path():
    grid = [{"methods": ["patch_joint"], "patterns": ["tiles:128x128", "tiles:64x64"], "sparsities": [45]}]
    assert paths(grid=grid) == ["tiny/patch_joint/45-tiles128x128", "tiny/patch_joint/45-tiles64x64"]


def test_cells_that_two_blocks_ask_for_come_once():
    assert paths(grid=[{"methods": ["dense", "wanda"]}, {"methods": ["wanda", "dense"]}]) == [
        "tiny/dense",
        "tiny/wanda/50-2of4",
    ]


def test_seeds_are_an_axis_of_all_but_dense():
    assert paths(seeds=[0, 3]) == ["tiny/dense", "tiny/wanda/50-2of4", "tiny/wanda/50-2of4/seed-3"]


def test_variants_apply_to_the_methods_they_name():
    changes = {
        "grid": [{"methods": ["wanda", "magnitude"], "variants": ["default", "shifted"]}],
        "variants": {"shifted": {"wanda": {"shift_zero_metrics": True}}},
        "seeds": [2],
    }
    assert paths(**changes) == [
        "tiny/wanda/50-2of4/seed-2",
        "tiny/magnitude/50-2of4/seed-2",
        "tiny/wanda/50-2of4/shifted/seed-2",
    ]
    assert cell("tiny/wanda/50-2of4/shifted/seed-2", **changes).options == CALIBRATED | {"shift_zero_metrics": True}
    assert cell("tiny/wanda/50-2of4/seed-2", **changes).options == CALIBRATED | {"shift_zero_metrics": False}


def test_a_variant_adds_to_the_options_of_all_cells():
    changes = {
        "grid": [{"methods": ["sparsegpt"], "variants": ["coarse"]}],
        "methods": {"sparsegpt": {"damping": 0.1, "block_size": 64}},
        "variants": {"coarse": {"sparsegpt": {"block_size": 256}}},
    }
    assert cell("tiny/sparsegpt/50-2of4/coarse", **changes).options == {
        **CALIBRATED,
        "block_size": 256,
        "damping": 0.1,
    }


def test_two_different_cells_never_share_a_path():
    """A variant that is called like the folder of a seed."""
    changes = {
        "grid": [{"methods": ["wanda"], "variants": ["default", "seed-1"]}],
        "variants": {"seed-1": {"wanda": {"shift_zero_metrics": True}}},
        "seeds": [0, 1],
    }
    assert "seed-1" in message(**(BASE | changes))


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".", "with space"])
@pytest.mark.parametrize("what", ["models", "variants"])
def test_names_that_are_no_folder_names_are_refused(what, name):
    changes = {
        "models": {"models": {name: {"source": "./tiny"}}},
        "variants": {"variants": {name: {"wanda": {}}}, "grid": [{"methods": ["wanda"], "variants": [name]}]},
    }[what]
    assert what in message(**(BASE | changes))


def test_exclusions_are_left_out_with_their_reason():
    grid = experiment(
        grid=[{"methods": ["dense", "wanda", "magnitude"]}],
        exclude=[{"methods": ["wanda"], "models": ["tiny"], "patterns": ["2:4"], "reason": "too slow"}],
    ).expand()
    assert [cell.path for cell in grid.cells] == ["tiny/dense", "tiny/magnitude/50-2of4"]
    assert [(cell.path, reason) for cell, reason in grid.excluded] == [("tiny/wanda/50-2of4", "too slow")]
    assert "excluded: tiny/wanda/50-2of4 (too slow)" in grid.summary()


def test_a_cell_that_two_blocks_ask_for_is_excluded_once():
    blocks = [{"methods": ["dense", "wanda"]}, {"methods": ["wanda"]}]
    excluded = experiment(grid=blocks, exclude=[{"methods": ["wanda"], "reason": "why"}]).expand().excluded
    assert [cell.path for cell, _ in excluded] == ["tiny/wanda/50-2of4"]


def test_only_selects_a_part_without_a_word_about_the_rest():
    grid = experiment(
        grid=[{"methods": ["dense", "wanda"], "patterns": ["2:4", "unstructured"], "sparsities": [25, 45]}],
        only={"methods": ["wanda"], "sparsities": [45, 50]},
    ).expand()
    assert [cell.path for cell in grid.cells] == ["tiny/wanda/50-2of4", "tiny/wanda/45-unstructured"]
    assert grid.excluded == []


def test_the_controls_are_cells_like_others():
    cells = experiment(
        grid=[
            {"methods": ["random", "wanda", "thanos"], "patterns": ["2:4", "3:4"]},
            {"methods": ["wanda"], "patterns": ["2:4"], "variants": ["mlp-only"]},
        ],
        variants={"mlp-only": {"wanda": {"layers": "mlp"}}},
    ).cells()
    folders = [f"tiny/{method}/{level}" for method in ("random", "wanda", "thanos") for level in ("50-2of4", "25-3of4")]
    assert [cell.path for cell in cells] == [*folders, "tiny/wanda/50-2of4/mlp-only"]
    assert [cell.options["layers"] for cell in cells] == ["all"] * 6 + ["mlp"]
    assert cells[0].calibration is None


def test_the_summary_counts_cells_and_methods():
    grid = [{"methods": ["dense", "wanda", "maskllm", "proxsparse"]}]
    summary = experiment(grid=grid).expand().summary()
    assert summary.startswith("4 cells of 1 model and 4 methods")


def test_options_that_contradict_each_other_are_told_and_those_that_other_parts_complete_are_not():
    changes = {
        "grid": [{"methods": ["maskllm"], "variants": ["short"]}],
        "variants": {"short": {"maskllm": {"logits_dtype": "bfloat16"}}},
    }
    found = message(**(BASE | changes))
    assert "experiment test: maskllm, variant short, model tiny: " in found
    assert "needs optimizer adamw_fused" in found
    experiment(methods={"maskllm": {"optimizer": "adamw_fused"}}, **changes).expand()


# hyper-parameters of one model


def test_a_models_own_hyper_parameters_go_over_the_experiments_and_under_the_variants():
    changes = {
        "models": {
            "a": {"source": "./a", "methods": {"sparsegpt": {"block_size": 64, "damping": 0.2}}},
            "b": {"source": "./b"},
        },
        "methods": {"sparsegpt": {"block_size": 32, "damping": 0.1}},
        "variants": {"mild": {"sparsegpt": {"damping": 0.3}}},
        "grid": [{"methods": ["sparsegpt"], "variants": ["default", "mild"]}],
    }
    assert {cell.path: cell.options for cell in experiment(**changes).cells()} == {
        "a/sparsegpt/50-2of4": CALIBRATED | {"block_size": 64, "damping": 0.2},
        "a/sparsegpt/50-2of4/mild": CALIBRATED | {"block_size": 64, "damping": 0.3},
        "b/sparsegpt/50-2of4": CALIBRATED | {"block_size": 32, "damping": 0.1},
        "b/sparsegpt/50-2of4/mild": CALIBRATED | {"block_size": 32, "damping": 0.3},
    }


def test_hyper_parameters_of_one_method_change_no_other_cell_of_the_model():
    other = {"models": {"tiny": {"source": "./tiny", "methods": {"sparsegpt": {"block_size": 64}}}}}
    assert cell().hash == cell(**other).hash


# learned cells and what they start from

LEARNED = {
    "grid": [
        {"methods": ["maskllm"]},
        {"methods": ["patch_joint", "patch_tile"], "patterns": ["tiles:8x8"], "sparsities": [45]},
    ]
}
MASKLLM, JOINT, TILE = "tiny/maskllm/50-2of4", "tiny/patch_joint/45-tiles8x8", "tiny/patch_tile/45-tiles8x8"


def roles(path, **changes) -> dict[str, str]:
    return {role: other.path for role, other in cell(path, **(LEARNED | changes)).prerequisites.items()}


def test_learned_cells_start_from_one_shot_masks():
    assert roles(MASKLLM) == {"pattern": "tiny/sparsegpt/50-2of4"}
    assert roles(JOINT) == {"pattern": "tiny/sparsegpt/50-2of4", "reference": "tiny/sparsegpt/45-unstructured"}


def test_patch_tile_starts_from_the_mask_that_it_freezes():
    assert roles(TILE) == {"pattern": "tiny/maskllm/50-2of4", "reference": "tiny/sparsegpt/45-unstructured"}
    frozen = {"methods": {"patch_tile": {"frozen": "wanda", "reference": "magnitude"}}}
    assert roles(TILE, **frozen) == {"pattern": "tiny/wanda/50-2of4", "reference": "tiny/magnitude/45-unstructured"}
    every = [part.path for part in cell(TILE, **LEARNED).with_prerequisites()]
    assert every == ["tiny/sparsegpt/50-2of4", MASKLLM, "tiny/sparsegpt/45-unstructured", TILE]


def test_fine_tuning_starts_from_a_cell_of_its_own_pattern_and_sparsity():
    grid = [
        {"methods": ["fine_tune"]},
        {"methods": ["fine_tune"], "patterns": ["unstructured"], "sparsities": [45]},
        {"methods": ["fine_tune"], "patterns": ["tiles:8x8"], "sparsities": [35], "variants": ["joint"]},
    ]
    changes = {"grid": grid, "variants": {"joint": {"fine_tune": {"start": "patch_joint"}}}}
    starts = {cell.path: cell.prerequisites["start"].path for cell in experiment(**changes).cells()}
    assert starts == {
        "tiny/fine_tune/50-2of4": "tiny/sparsegpt/50-2of4",
        "tiny/fine_tune/45-unstructured": "tiny/sparsegpt/45-unstructured",
        "tiny/fine_tune/35-tiles8x8/joint": "tiny/patch_joint/35-tiles8x8",
    }
    tiles = {"grid": [{"methods": ["fine_tune"], "patterns": ["tiles:8x8"], "sparsities": [35]}]}
    assert "method sparsegpt cannot make the pattern 'tiles:8x8'" in message(**(BASE | tiles))


def test_proxsparse_trains_on_documents_and_the_others_on_the_training_text():
    changes = {"grid": [{"methods": ["proxsparse", "maskllm", "fine_tune"]}], "documents": {"length": 77}}
    texts = {cell.method: cell.training for cell in experiment(**changes).cells()}
    assert texts["proxsparse"].length == 77
    assert texts["maskllm"] == texts["fine_tune"] == experiment(**changes).training
    few = {"grid": [{"methods": ["proxsparse"]}], "documents": {"samples": 399}}
    assert "proxsparse reads 400 sequences (steps x batch_size), the training text has 399" in message(**(BASE | few))
    assert "raise `documents.samples` or `documents.epochs`" in message(**(BASE | few))


@pytest.mark.parametrize(
    ("method", "path", "left"),
    [("maskllm", MASKLLM, []), ("patch_joint", JOINT, []), ("patch_tile", TILE, ["pattern"])],
)
def test_priors_of_no_strength_need_no_mask_but_a_frozen_mask_stays(method, path, left):
    strengths = {"pattern_prior_strength", "tile_prior_strength"} & set(METHODS[method].model_fields)
    assert list(roles(path, methods={method: dict.fromkeys(strengths, 0)})) == left


def test_prerequisites_are_the_cells_that_a_grid_would_hold():
    """Same seed, the experiment's options, the default variant: computed once, whoever asks."""
    changes = {
        "grid": [*LEARNED["grid"], {"methods": ["sparsegpt"]}],
        "methods": {"sparsegpt": {"block_size": 64}},
        "variants": {"own": {"maskllm": {"steps": 10}, "sparsegpt": {"block_size": 32}}},
        "seeds": [0, 3],
    }
    changes["grid"][0] = {"methods": ["maskllm"], "variants": ["own"]}
    for seed in ("", "/seed-3"):
        learned = cell(f"tiny/maskllm/50-2of4/own{seed}", **changes)
        assert learned.prerequisites["pattern"] == cell(f"tiny/sparsegpt/50-2of4{seed}", **changes)
        assert learned.prerequisites["pattern"].options["block_size"] == 64


def test_prerequisites_outside_the_grid_are_listed_once_and_are_no_cells():
    grid = experiment(**LEARNED).expand()
    assert [cell.path for cell in grid.cells] == [MASKLLM, JOINT, TILE]
    assert [cell.path for cell in grid.prerequisites] == ["tiny/sparsegpt/50-2of4", "tiny/sparsegpt/45-unstructured"]
    assert "only for their masks: tiny/sparsegpt/50-2of4, tiny/sparsegpt/45-unstructured" in grid.summary()
    assert "only for their masks" not in experiment().expand().summary()


def test_an_excluded_cell_may_still_be_learned_from():
    excluded = {"exclude": [{"methods": ["maskllm"], "reason": "not in the tables"}]}
    grid = experiment(**LEARNED, **excluded).expand()
    assert MASKLLM not in [cell.path for cell in grid.cells]
    assert MASKLLM in [cell.path for cell in grid.prerequisites]


def test_a_prerequisite_never_shares_the_folder_of_another_cell():
    changes = {
        "grid": [{"methods": ["maskllm"]}, {"methods": ["sparsegpt"], "variants": ["seed-1"]}],
        "variants": {"seed-1": {"sparsegpt": {"block_size": 64}}},
        "seeds": [1, 0],
    }
    assert "would share the folder tiny/sparsegpt/50-2of4/seed-1" in message(**(BASE | changes))


def test_every_cell_knows_the_stage_of_its_mask_and_its_text():
    changes = {"grid": [{"methods": ["dense", "magnitude", "wanda", "maskllm"]}]}
    stages = {cell.method: cell.mask_stage for cell in experiment(**changes).cells()}
    assert stages == {"dense": None, "magnitude": "prune", "wanda": "prune", "maskllm": "learn"}
    texts = {
        cell.method: (cell.calibration is not None, cell.training is not None) for cell in experiment(**changes).cells()
    }
    assert texts == {
        "dense": (False, False), "magnitude": (False, False), "wanda": (True, False), "maskllm": (False, True)
    }  # fmt: skip


# benchmarks


def test_only_masks_with_2_4_groups_of_the_chosen_cells_are_benchmarked():
    timed = experiment(
        grid=[
            {"methods": ["dense"]},
            {"methods": ["wanda"], "patterns": ["2:4", "4:8", "unstructured"], "sparsities": [50]},
            {"methods": ["patch_joint"], "patterns": ["tiles:128x128"], "sparsities": [45]},
            {"methods": ["magnitude"], "patterns": ["2:4"], "compressions": ["none", "int4"]},
        ],
        compressions={"int4": {}},
        benchmarks={"memory": {}, "masks": {}},
    )
    measured = [cell.path for cell in timed.cells() if timed.benchmarks.measures(cell)]
    assert measured == ["tiny/wanda/50-2of4", "tiny/patch_joint/45-tiles128x128", "tiny/magnitude/50-2of4"]
    assert list(timed.benchmarks.sections) == ["memory"]
    without = experiment(benchmarks={"memory": {}})
    assert not any(without.benchmarks.measures(cell) for cell in without.cells())


@pytest.mark.parametrize(
    ("benchmarks", "expected"),
    [
        ({"layer": {}}, "unknown key 'benchmarks.layer'; did you mean 'layers'?"),
        ({"layers": {"shapes": ["llama-1-7b"]}}, "benchmarks.layers.shapes.0: String should match pattern"),
        ({"generation": {"shapes": ["64x64"]}}, "benchmarks.generation.shapes.0: String should match pattern"),
        ({"generation": {"lengths": ["128+1"]}}, "benchmarks.generation.lengths.0: String should match pattern"),
        ({"memory": {"sparsities": [60]}}, "benchmarks.memory.sparsities.0: Input should be less than or equal to 50"),
        ({"layers": {"tokens": [0]}}, "benchmarks.layers.tokens.0: Input should be greater than 0"),
        ({"masks": {"models": ["tinny"]}}, "benchmarks.masks.models: 'tinny' is not defined; did you mean 'tiny'?"),
    ],
)
def test_mistakes_in_benchmarks_are_named(benchmarks, expected):
    assert expected in message(**BASE, benchmarks=benchmarks)


def test_names_of_shapes_are_those_that_can_be_made():
    from patch.benchmarking.options import SHAPE_NAMES
    from patch.benchmarking.shapes import SHAPES

    assert tuple(SHAPES) == SHAPE_NAMES


# the key of a cell


@pytest.fixture(autouse=True)
def fixed_code(monkeypatch):
    """Keys without reading the whole package."""
    versions = {"prune": "1", "learn": "1", "compress": "1", "evaluate": "1"}
    monkeypatch.setattr(experiments, "code_hash", lambda stage: versions[stage])
    return versions


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": {"samples": 127}},
        {"calibration": {"source": "embedded:c4"}},
        {"calibration": {"sampling": "packed"}},
        {"methods": {"wanda": {"shift_zero_metrics": True}}},
        {"models": {"tiny": {"source": "./other"}}},
        {"models": {"tiny": {"source": "./tiny", "dtype": "bfloat16"}}},
        {"models": {"tiny": {"source": "./tiny", "revision": "abc"}}},
    ],
)
def test_what_changes_the_masks_changes_both_keys(changes):
    for stage in ("prune", "evaluate"):
        assert cell().key(stage) != cell(**changes).key(stage)


def test_method_pattern_sparsity_and_seed_are_in_the_key():
    grid = [{"methods": ["wanda", "magnitude"], "patterns": ["2:4", "unstructured"], "sparsities": [25, 50]}]
    cells = experiment(grid=grid, seeds=[0, 1]).cells()
    assert len({cell.key("prune") for cell in cells}) == len({cell.path for cell in cells}) == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"description": "new words"},
        {"name": "renamed"},
        {"threads": 4},
        {"device": "cpu"},
        {"mlflow_uri": "sqlite:///elsewhere.db"},
        {"methods": {"sparsegpt": {"block_size": 64}}},
        {"methods": {"wanda": {"shift_zero_metrics": False}}},  # the default, spelled out
        {"grid": [{"methods": ["wanda", "magnitude"]}]},
    ],
)
def test_what_does_not_change_the_numbers_changes_no_key(changes):
    for stage in ("prune", "evaluate"):
        assert cell().key(stage) == cell(**changes).key(stage)


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluation": {"tasks": None}},
        {"evaluation": {"tasks": {"limit": 10}}},
        {"evaluation": {"perplexity": {"wikitext2": {"source": "wikitext2", "length": 2048}}}},
    ],
)
def test_the_evaluation_changes_only_its_own_key(changes):
    assert cell().key("prune") == cell(**changes).key("prune")
    assert cell().key("evaluate") != cell(**changes).key("evaluate")
    assert cell(**changes).hash == cell(**changes).key("evaluate")


def test_code_changes_the_keys_of_its_stage_and_those_after_it(fixed_code):
    before = {stage: cell().key(stage) for stage in ("prune", "evaluate")}
    fixed_code["evaluate"] = "2"
    assert cell().key("prune") == before["prune"]
    assert cell().key("evaluate") != before["evaluate"]
    fixed_code["evaluate"] = "1"
    fixed_code["prune"] = "2"
    assert cell().key("prune") != before["prune"]
    assert cell().key("evaluate") != before["evaluate"]


def test_the_dense_model_depends_on_no_pruning_code(fixed_code):
    before = cell("tiny/dense").hash
    fixed_code["prune"] = fixed_code["learn"] = "2"
    assert cell("tiny/dense").hash == before


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"source": "c4"}},
        {"training": {"source": "self", "seed": 1}},
        {"training": {"length": 2048}},
        {"methods": {"maskllm": {"steps": 1999}}},
        {"methods": {"sparsegpt": {"block_size": 64}}},  # of its prior
        {"calibration": {"samples": 64}},  # of its prior
    ],
)
def test_what_changes_a_learned_mask_changes_its_keys(changes):
    for stage in ("learn", "evaluate"):
        assert cell(MASKLLM, **LEARNED).key(stage) != cell(MASKLLM, **(LEARNED | changes)).key(stage)


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": {"wanda": {"shift_zero_metrics": True}}},
        {"methods": {"patch_joint": {"steps": 1999}}},
        {"evaluation": {"tasks": None}},
    ],
)
def test_what_does_not_change_a_learned_mask_does_not_change_its_key(changes):
    assert cell(MASKLLM, **LEARNED).key("learn") == cell(MASKLLM, **(LEARNED | changes)).key("learn")


def test_code_of_pruning_and_of_learning_changes_learned_cells(fixed_code):
    seen = {cell(TILE, **LEARNED).hash}
    for stage in ("prune", "learn"):
        fixed_code[stage] = "2"
        seen.add(cell(TILE, **LEARNED).hash)
    assert len(seen) == 3


def test_the_training_text_is_nothing_to_one_shot_cells():
    assert cell().hash == cell(training={"source": "c4", "samples": 7}).hash


def test_methods_that_look_at_no_text_do_not_depend_on_it():
    grid = [{"methods": ["magnitude"]}]
    path = "tiny/magnitude/50-2of4"
    assert cell(path, grid=grid).calibration is None
    assert cell(path, grid=grid).key("prune") == cell(path, grid=grid, calibration={"samples": 3}).key("prune")


# compressed cells

COMPRESSED = {
    "grid": [{"methods": ["dense", "wanda"], "compressions": ["none", "int4", "int4-lora"]}],
    "compressions": {"int4": {}, "int4-lora": {"adapter_rank": 0.1}},
}
LORA = "tiny/wanda/50-2of4/int4-lora"


def test_compressions_are_an_axis_of_the_grid():
    masks = ("tiny/dense", "tiny/wanda/50-2of4")
    assert paths(**COMPRESSED) == [f"{mask}{part}" for mask in masks for part in ("", "/int4", "/int4-lora")]
    assert paths(**COMPRESSED, seeds=[0, 1])[-1] == f"{LORA}/seed-1"
    assert paths(**COMPRESSED, only={"compressions": ["int4"]}) == [f"{mask}/int4" for mask in masks]


def test_compressed_cells_use_the_mask_of_the_uncompressed_one():
    found = cell(LORA, **COMPRESSED)
    assert found.stages == ["prune", "compress", "evaluate"]
    assert cell("tiny/dense/int4", **COMPRESSED).stages == ["compress", "evaluate"]
    assert cell(**COMPRESSED).stages == ["prune", "evaluate"]
    assert found.folder("prune") == cell(**COMPRESSED).folder("prune") == "tiny/wanda/50-2of4/prune"
    assert found.folder("compress") == f"{LORA}/compress"
    assert found.uncompressed == cell(**COMPRESSED)
    assert found.key("prune") == cell().key("prune")


def test_masks_that_only_compressed_cells_use_are_made_but_not_measured():
    changes = COMPRESSED | {"grid": [{"methods": ["dense", "maskllm"], "compressions": ["int4"]}]}
    grid = experiment(**changes).expand()
    assert [found.path for found in grid.cells] == ["tiny/dense/int4", "tiny/maskllm/50-2of4/int4"]
    assert [found.path for found in grid.prerequisites] == ["tiny/sparsegpt/50-2of4", "tiny/maskllm/50-2of4"]


def test_only_adapters_that_weigh_inputs_look_at_calibration_text():
    settings = {"plain": {"adapter_rank": 0.1, "adapter_norm": "none"}}
    changes = {"grid": [{"methods": ["dense"], "compressions": ["plain", "int4-lora"]}]}
    changes["compressions"] = COMPRESSED["compressions"] | settings
    texts = {found.compression: found.compression_calibration for found in experiment(**changes).cells()}
    assert texts["plain"] is None
    assert texts["int4-lora"] == experiment().calibration


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"compressions": {"int4-lora": {"adapter_rank": 0.2}}}, ("compress", "evaluate")),
        ({"compressions": {"int4-lora": {"adapter_rank": 0.1, "inputs": "int8"}}}, ("evaluate",)),
        ({"calibration": {"samples": 64}}, ("prune", "compress", "evaluate")),
        ({"methods": {"wanda": {"shift_zero_metrics": True}}}, ("prune", "compress", "evaluate")),
        ({"evaluation": {"tasks": None}}, ("evaluate",)),
        ({"compressions": {"int4-lora": {"adapter_rank": 0.1, "adapter_norm": "l2"}}}, ()),  # the default
    ],
)
def test_what_changes_a_compressed_cell_changes_its_keys(changes, changed):
    one = {"grid": [{"methods": ["wanda"], "compressions": ["int4-lora"]}]}
    before = cell(LORA, **(COMPRESSED | one))
    after = cell(LORA, **(COMPRESSED | one | changes))
    assert tuple(stage for stage in before.stages if before.key(stage) != after.key(stage)) == changed


def test_code_of_compression_changes_compressed_cells_only(fixed_code):
    before = [cell(**COMPRESSED).hash, cell(LORA, **COMPRESSED).hash]
    fixed_code["compress"] = "2"
    assert cell(**COMPRESSED).hash == before[0]
    assert cell(LORA, **COMPRESSED).hash != before[1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"grid": [{"methods": ["wanda"], "compressions": ["int8"]}]},
            "grid.0.compressions: 'int8' is not defined; did you mean 'int4'?",
        ),
        (
            {"compressions": {"int4": {"adapter_rnk": 0.1}, "int4-lora": {}}},
            "unknown key 'compressions.int4.adapter_rnk'; did you mean 'adapter_rank'?",
        ),
        ({"compressions": {"a/b": {}, "int4": {}, "int4-lora": {}}}, "compressions.a/b"),
    ],
)
def test_mistakes_in_compressions_are_told(changes, expected):
    assert expected in message(**(BASE | COMPRESSED | changes))


def test_a_compression_never_shares_the_folder_of_a_variant():
    changes = COMPRESSED | {"variants": {"int4": {"wanda": {"shift_zero_metrics": True}}}}
    changes["grid"] = [*COMPRESSED["grid"], {"methods": ["wanda"], "variants": ["int4"]}]
    assert "two different cells would share the folder tiny/wanda/50-2of4/int4" in message(**(BASE | changes))


# what is generated from the models


def test_the_schema_knows_every_key_and_allows_no_other():
    content = schema()
    assert {"extends", *Experiment.model_fields} == set(content["properties"])
    assert content["additionalProperties"] is False


def test_every_key_and_every_option_has_a_row_with_its_default():
    sections = {part.partition("\n")[0].strip("`"): part for part in options_markdown().split("\n## ")}
    for model in (
        Experiment, experiments.ModelSource, experiments.GridBlock, experiments.Calibration, experiments.Training,
        experiments.Tasks, experiments.Compression,
    ):  # fmt: skip
        for name, field in model.model_fields.items():
            rows = [line for line in sections[model.__name__].splitlines() if line.startswith(f"| `{name}` |")]
            assert len(rows) == 1
            assert ("| required |" in rows[0]) == field.is_required()
    for name, method in METHODS.items():
        assert all(f"| `{option}` |" in sections[name] for option in method.model_fields)
    assert "| `block_size` | `128` | Columns whose updates" in sections["sparsegpt"]

"""Figures: both files for every shape of run, the same bytes twice, and the right things drawn."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from patch.artefacts import PatchError
from patch.methods import METHODS
from patch.reporting.figures import draw_figure, write_figure, write_figures
from patch.reporting.figures.allocation import sparsity_by_depth, sparsity_by_layer, sparsity_by_module
from patch.reporting.figures.curves import training_curves
from patch.reporting.figures.quality import accuracy_vs_sparsity, perplexity_vs_sparsity
from patch.reporting.figures.style import STYLES
from patch.reporting.study import Study
from patch.reporting.targets import FIGURES

Tables = tuple[pd.DataFrame, pd.DataFrame]


@pytest.fixture(autouse=True)
def close_figures() -> object:
    yield
    plt.close("all")


def lines_at(figure: plt.Figure, value: float) -> int:
    return sum(
        bool(np.allclose(line.get_ydata(), value)) for ax in figure.axes for line in ax.lines if len(line.get_ydata())
    )


def test_all_files_are_written_and_figures_closed(learned: Tables, tmp_path: Path) -> None:
    names = ["perplexity_vs_sparsity", "sparsity_by_depth", "training_curves"]
    paths = write_figures(Study(*learned), tmp_path, names)
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in names for kind in ("pdf", "png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"%PDF" if path.suffix == ".pdf" else b"\x89PNG")
        assert len(content) > 5000
        assert b"/Type3" not in content  # fonts are TrueType
    assert not plt.get_fignums()


def test_runs_with_little_in_them(runs: pd.DataFrame, no_curves: pd.DataFrame, tmp_path: Path) -> None:
    dense = runs[(runs["model"] == "tiny_1") & (runs["method"] == "dense") & (runs["metric"] == "perplexity")]
    nothing = runs[runs["status"] != "done"]
    for name, table in (("dense", dense), ("nothing", nothing)):
        study = Study(table, no_curves)
        for figure in FIGURES:
            draw_figure(figure, study)
        assert all(path.stat().st_size > 1000 for path in write_figures(study, tmp_path / name, ["sparsity_by_depth"]))


def test_same_bytes_twice(runs: pd.DataFrame, tmp_path: Path) -> None:
    one = runs[(runs["model"] == "tiny_1") & (runs["subject"] == "c4") & runs["method"].isin(["dense", "wanda"])]
    first, second = (
        [path.read_bytes() for path in write_figure(perplexity_vs_sparsity(one), "p", tmp_path / folder)]
        for folder in "ab"
    )
    assert first == second


def test_perplexity_panels(runs: pd.DataFrame) -> None:
    figure = perplexity_vs_sparsity(runs)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["qwen", "tiny_1", "", ""]
    assert [ax.get_yscale() for ax in figure.axes] == ["log", "linear", "log", "linear"]
    assert figure.axes[0].get_ylabel() == "Perplexity on wikitext2 ↓"
    assert lines_at(figure, 12.30) == 1  # dense
    assert len(figure.axes[0].containers) == 6  # three methods, 2:4 and unstructured


def test_a_broken_model_stays_on_the_edge_with_its_number(runs: pd.DataFrame) -> None:
    broken = (runs["model"] == "qwen") & (runs["method"] == "magnitude") & (runs["metric"] == "perplexity")
    ax = perplexity_vs_sparsity(runs.assign(value=runs["value"].mask(broken, 4.17e9))).axes[0]
    assert ax.get_ylim()[1] < 1e5
    assert {text.get_text() for text in ax.texts} == {"4e9 ↑"}


def test_chance_only_with_all_eight_tasks(runs: pd.DataFrame) -> None:
    assert lines_at(accuracy_vs_sparsity(runs), 31.25) == 2
    seven = accuracy_vs_sparsity(runs[runs["subject"] != "race"])
    assert lines_at(seven, 31.25) == 0
    assert seven.axes[0].get_ylabel() == "Mean accuracy of 7 tasks, % ↑"


def test_layers_show_the_freest_pattern_at_one_sparsity(runs: pd.DataFrame) -> None:
    one = runs[runs["model"] == "qwen"].copy()
    odd = one["subject"].eq("model.layers.2.mlp.up_proj") & one["sparsity"].eq(45) & one["method"].eq("wanda")
    one.loc[odd, "value"] = 0.125
    figure = sparsity_by_layer(one)
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert [ax.get_title(loc="left") for ax in panels] == [
        "Magnitude, unstructured, 45 %", "Wanda, unstructured, 45 %", "SparseGPT, unstructured, 45 %",
    ]  # fmt: skip
    assert [ax.get_title(loc="right") for ax in panels] == ["all 45.0 %", "12.5–45.0 %", "all 45.0 %"]
    assert [label.get_text() for label in panels[1].get_yticklabels()] == ["q", "o", "up", "down"]
    values = np.asarray(panels[1].collections[0].get_array()).reshape(4, 4)
    assert values[2, 2] == pytest.approx(12.5)
    assert (values != 45).sum() == 1
    asked = sparsity_by_layer(one, sparsity=25)
    assert asked.axes[0].get_title(loc="left") == "Magnitude, unstructured, 25 %"


def test_layers_of_learned_masks_are_shown(learned: Tables) -> None:
    panels = [ax for ax in sparsity_by_layer(learned[0]).axes if ax.get_title(loc="left")]
    assert [(ax.get_title(loc="left"), ax.get_title(loc="right")) for ax in panels] == [
        ("PATCH-Joint, tiles 128x128, 45 %", "40.5–49.5 %"),
        ("PATCH-Tile, tiles 128x128, 45 %", "40.5–49.5 %"),
    ]
    runs = learned[0]
    alone = sparsity_by_layer(runs[runs["method"] == "maskllm"]).axes[0]
    assert (alone.get_title(loc="left"), alone.get_title(loc="right")) == ("MaskLLM, 2:4, 50 %", "all 50.0 %")


def drawn(ax: plt.Axes) -> list[plt.Line2D]:
    """The lines of series: those with a marker."""
    return [line for line in ax.lines if line.get_marker() not in ("None", None)]


def test_training_curves_have_a_row_per_model_and_the_schedules_once(learned: Tables) -> None:
    curves = learned[1]
    two = pd.concat([curves, curves[curves["method"] == "maskllm"].assign(model="other")], ignore_index=True)
    figure = training_curves(two)
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "Cross-entropy, nats ↓", "Sampled density", "Cross-entropy, nats ↓", "Sampled density",
        "Tile temperature", "2:4 temperature",
    ]  # fmt: skip
    assert [len(drawn(ax)) for ax in figure.axes] == [7, 7, 1, 1, 6, 4]
    assert figure.axes[2].get_title(loc="left") == "other"
    for target in (0.5, 0.55, 0.65, 0.75):
        assert sum(
            np.allclose(line.get_ydata(), target) and len(line.get_ydata()) == 2 for line in figure.axes[1].lines
        )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "MaskLLM, 2:4, 50 %",
        *(f"{title}, tiles 128x128, {s} %" for title in ("PATCH-Joint", "PATCH-Tile") for s in (45, 35, 25)),
    ]
    looks = {(line.get_color(), line.get_linestyle()) for line in drawn(figure.axes[0])}
    assert len(looks) == 7


def test_schedules_that_no_method_has_have_no_panel(learned: Tables) -> None:
    curves = learned[1]
    assert [ax.get_visible() for ax in training_curves(curves[curves["method"] == "maskllm"]).axes][2:] == [False, True]
    assert [ax.get_visible() for ax in training_curves(curves[curves["method"] == "patch_tile"]).axes][2:] == [
        True, False
    ]  # fmt: skip


def test_of_several_seeds_the_first_is_drawn(learned: Tables) -> None:
    curves = learned[1]
    seeds = pd.concat([curves, curves.assign(seed=3)], ignore_index=True)
    assert len(drawn(training_curves(seeds).axes[0])) == 7


def test_without_learned_masks_the_figure_says_so(no_curves: pd.DataFrame) -> None:
    assert [text.get_text() for text in training_curves(no_curves).axes[0].texts] == [
        "No masks were learned in this run."
    ]


def test_every_method_has_its_own_look() -> None:
    assert set(STYLES) == set(METHODS) - {"dense"}
    assert len({marker for _, marker, _ in STYLES.values()}) == len(STYLES)
    assert len({(place, line) for place, _, line in STYLES.values()}) == len(STYLES)  # the palette has ten colours


def test_depth_has_a_line_per_target_with_the_blocks_sparsities(learned: Tables) -> None:
    figure = sparsity_by_depth(learned[0])
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["PATCH-Joint", "PATCH-Tile"]
    lines = drawn(figure.axes[0])
    assert [list(line.get_ydata()) for line in lines] == [
        pytest.approx([target + 3 * (block - 1.5) for block in range(4)]) for target in (45, 35, 25)
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["target 45 %", "target 35 %", "target 25 %"]


def test_kinds_are_in_the_order_of_a_block_and_seeds_give_bars(learned: Tables) -> None:
    runs = learned[0][learned[0]["method"] == "patch_joint"]
    other = runs.assign(seed=1, cell=runs["cell"] + "/seed-1", value=runs["value"] + 0.02)
    figure = sparsity_by_module(pd.concat([runs, other], ignore_index=True))
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["q", "o", "up", "down"]
    line, _, (bars,) = ax.containers[0]
    assert list(line.get_ydata()) == pytest.approx([46.0] * 4)
    low, high = bars.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 2**0.5)  # a standard deviation of 2 / sqrt(2) points, both ways


def test_without_tiles_depth_says_so(runs: pd.DataFrame) -> None:
    assert [text.get_text() for text in sparsity_by_depth(runs).axes[0].texts] == ["No learned tiles in this run."]


def test_an_ablation_has_ours_and_hollow_published_points(learned: Tables) -> None:
    runs = learned[0]
    own = runs[(runs["method"] == "patch_joint") & (runs["sparsity"] == 45)]
    small = own.assign(pattern="tiles:64x64", cell=own["cell"] + "-64")
    figure = draw_figure("tile_size", Study(pd.concat([runs, small], ignore_index=True)))
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["128", "64"]
    assert ax.get_xlabel() == "Edge of the tiles, weights"
    ours, published = (line for line in drawn(ax) if line.get_marker() == "o")
    assert list(ours.get_ydata()) == pytest.approx([14.73, 14.73])
    assert list(published.get_ydata()) == pytest.approx([14.57, 14.66])
    assert published.get_markerfacecolor() == "white"
    assert published.get_linestyle() == "None"


def test_an_ablation_with_one_choice_says_so(learned: Tables) -> None:
    texts = draw_figure("density_target", Study(*learned)).axes[0].texts
    assert [text.get_text() for text in texts] == ["No model of this run was measured with more than one choice."]


def test_speed_of_layers_and_generation(learned: Tables) -> None:
    layer = {"out_features": 64, "in_features": 32, "kernel": "decode", "sparsity_percent": 44.98}
    layer |= {"us": 1.0, "dense_us": 2.0}
    layers = pd.DataFrame([{**layer, "tokens": tokens, "speedup": speed} for tokens, speed in ((1, 2.0), (16, 1.5))])
    figure = draw_figure("layer_speed", Study(learned[0], layers=layers))
    assert figure.axes[0].get_title(loc="left") == "64 × 32"
    assert [list(line.get_ydata()) for line in drawn(figure.axes[0])] == [[2.0, 1.5]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["45 %"]
    figure = draw_figure("throughput", Study(learned[0]))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["published: LLaMA-2-7B"]
    a6000 = drawn(figure.axes[0])[0]
    assert list(a6000.get_xdata()) == [25, 35, 45]
    assert [round(value, 2) for value in a6000.get_ydata()] == [1.18, 1.27, 1.38]


def test_variants_of_ablations_stay_out_of_the_overview(learned: Tables) -> None:
    runs = learned[0]
    more = runs[runs["method"] == "patch_joint"].assign(variant="per-block")
    both = Study(pd.concat([runs, more.assign(cell=more["cell"] + "/per-block")], ignore_index=True))
    names = [text.get_text() for text in draw_figure("perplexity_vs_sparsity", both).legends[0].get_texts()]
    assert not [name for name in names if "per-block" in name]


def test_unknown_figures_are_told_with_the_known_ones(learned: Tables) -> None:
    with pytest.raises(PatchError, match=r"figure 'tiles': unknown; choose of perplexity_vs_sparsity, .*tile_size"):
        draw_figure("tiles", Study(*learned))

"""Figures: both files for every shape of run, the same bytes twice, and the right things drawn."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from patch.methods import METHODS
from patch.reporting.figures import (
    _STYLES,
    accuracy_vs_sparsity,
    perplexity_vs_sparsity,
    sparsity_by_layer,
    training_curves,
    write_figure,
    write_figures,
)

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
    paths = write_figures(*learned, tmp_path)
    names = ["accuracy_vs_sparsity", "perplexity_vs_sparsity", "sparsity_by_layer", "training_curves"]
    assert sorted(path.name for path in paths) == sorted(f"{n}.{kind}" for n in names for kind in ("pdf", "png"))
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
        assert all(path.stat().st_size > 1000 for path in write_figures(table, no_curves, tmp_path / name))


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
        ("MaskLLM, 2:4, 50 %", "all 50.0 %"),
        ("PATCH-Joint, tiles 128x128, 45 %", "40.5–49.5 %"),
        ("PATCH-Tile, tiles 128x128, 45 %", "40.5–49.5 %"),
    ]


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
    assert set(_STYLES) == set(METHODS) - {"dense"}
    assert len({marker for _, marker, _ in _STYLES.values()}) == len(_STYLES)
    assert len({(place, line) for place, _, line in _STYLES.values()}) == len(_STYLES)  # the palette has ten colours

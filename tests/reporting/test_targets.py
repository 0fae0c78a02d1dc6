"""Targets: which cells each of them shows, and that every one has its maker and its caption."""

from __future__ import annotations

from pathlib import Path

import pytest

from patch.experiments import load_experiment
from patch.reporting.targets import FIGURES, TABLES, setting_of

ROOT = Path(__file__).parents[2]


def shown(name: str, config: str) -> list[str]:
    """The cells of a config that a target shows."""
    cells = load_experiment([ROOT / "workflow" / "config" / config]).cells()
    target = TABLES.get(name) or FIGURES[name]
    chosen = target.chosen([setting_of(cell) for cell in cells])
    return [cell.path for cell, asked in zip(cells, chosen, strict=True) if asked]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("accuracy_small", 3 * 10),  # dense, six 2:4, three of PATCH; and PATCH-Tile on Qwen
        ("tile_size", 6 * 3 + 1),  # and the dense model
        ("density_target", 2 * 3 + 1),
        ("frozen_mask", 5 * 3 + 1),
        ("tile_prior", 5 * 3 + 1),
        ("throughput", 0),
    ],
)
def test_targets_of_the_paper_want_their_cells_only(name: str, count: int) -> None:
    cells = shown(name, "paper.yaml")
    assert len(cells) == count + (3 if name == "accuracy_small" else 0)
    if name not in ("accuracy_small", "throughput"):
        assert {cell.split("/")[0] for cell in cells} == {"qwen2.5-0.5b"}


def test_large_models_are_in_the_large_table() -> None:
    models = {cell.split("/")[0] for cell in shown("accuracy_large", "paper.yaml")}
    assert models == {"llama-2-7b", "llama-3.1-8b", "llama-2-13b"}


def test_quantisation_is_of_the_models_with_compressed_cells() -> None:
    cells = shown("quantisation", "paper.yaml")
    assert "llama-2-7b/patch_tile/45-tiles128x128/int4-lora" in cells
    assert "llama-2-7b/dense" in cells
    assert {cell.split("/")[0] for cell in cells} == {"llama-2-7b", "llama-3.1-8b"}
    assert "llama-3.1-8b/released/25-tiles128x128/int4" in shown("quantisation", "released_masks.yaml")


def test_what_a_grid_lacks_has_no_cells() -> None:
    assert not shown("tile_size", "demo.yaml")
    assert not shown("accuracy_small", "demo.yaml")
    assert shown("unstructured", "demo.yaml")


def test_every_target_has_a_caption() -> None:
    captions = {path.stem for path in (ROOT / "workflow" / "report").glob("*.rst")}
    assert captions == {*TABLES, *FIGURES, "workflow"}

"""The targets: every table and figure by its name, with the cells of the grid that it shows.

Light on purpose (no pandas): the workflow reads it at every start, and asks for a target's cells only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patch.artefacts import PatchError
from patch.experiments import UNCOMPRESSED, Cell
from patch.methods import METHODS

LARGE = ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-13b-hf")
"""The models of the paper's second accuracy table (PATCH-Tile), the last from the official repository."""
SMALL = ("Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B", "google/gemma-3-1b-pt")
"""The models of its first one (PATCH-Joint)."""
PAPER_TILES = "tiles:128x128"
LEARNED = tuple(name for name, method in METHODS.items() if method.learned)

Setting = Mapping[Any, Any]
"""method, source, pattern, sparsity, variant and compression of a cell."""


@dataclass(frozen=True)
class Target:
    """A table or a figure."""

    name: str
    title: str
    """As the report lists it."""
    cells: Callable[[Setting], bool] = lambda setting: True
    """The cells of the grid that it shows."""
    special: Callable[[Setting], bool] | None = None
    """Those of them without which it says nothing of a model that others do not; None where any cell will do."""
    benchmark: str | None = None
    """The benchmark file that it shows instead of cells."""

    def __post_init__(self) -> None:
        if self.benchmark:
            object.__setattr__(self, "cells", lambda setting: False)

    def chosen(self, settings: Sequence[Setting]) -> list[bool]:
        """Which of a grid's settings it shows: of every model that has a special one, all that belong here."""
        belongs = [self.cells(setting) for setting in settings]
        if self.special is None:
            return belongs
        pairs = list(zip(settings, belongs, strict=True))
        models = {setting["source"] for setting, here in pairs if here and self.special(setting)}
        return [here and setting["source"] in models for setting, here in pairs]


def _tiles(setting: Setting) -> bool:
    return setting["pattern"].startswith("tiles")


def _plain(setting: Setting) -> bool:
    """Only pruned, by the method's default settings; variants of released masks are the methods that made them."""
    usual = setting["variant"] == "default" or setting["method"] == "released"
    return usual and setting["compression"] == UNCOMPRESSED


def _main(setting: Setting) -> bool:
    """Of the paper's main tables: dense, 2:4, and PATCH on its tiles."""
    return _plain(setting) and setting["pattern"] in ("dense", "2:4", PAPER_TILES)


def _joint(setting: Setting) -> bool:
    return setting["method"] == "patch_joint" and setting["compression"] == UNCOMPRESSED


def _unstructured(setting: Setting) -> bool:
    return _plain(setting) and setting["pattern"] in ("dense", "unstructured", PAPER_TILES)


def _frozen(setting: Setting) -> bool:
    if setting["pattern"] != PAPER_TILES or setting["compression"] != UNCOMPRESSED:
        return False
    return setting["variant"] == "default" or setting["variant"].startswith("on-")


def _prior(setting: Setting) -> bool:
    return _joint(setting) and (setting["variant"] == "default" or setting["variant"].startswith("prior-"))


def _ablation(setting: Setting) -> bool:
    """Of the paper's ablations, which have figures of their own."""
    return setting["variant"] == "per-block" or setting["variant"].startswith(("prior-", "on-"))


def _compressed(setting: Setting) -> bool:
    return setting["compression"] != UNCOMPRESSED


def _and_dense(cells: Callable[[Setting], bool]) -> Callable[[Setting], bool]:
    """The dense model too: what all of these cells start from, compared with its own published value first."""
    return lambda setting: cells(setting) or (setting["method"] == "dense" and not _compressed(setting))


def setting_of(cell: Cell) -> Setting:
    """What targets ask of a cell of the grid."""
    names = ("method", "pattern", "sparsity", "variant", "compression")
    return {"source": cell.source.source, **{name: getattr(cell, name) for name in names}}


TABLES = {
    target.name: target
    for target in (
        Target("accuracy", "Perplexity and mean accuracy"),
        Target(
            "accuracy_small", "Small models: 2:4 and PATCH-Joint",
            lambda s: _main(s) and s["source"] not in LARGE, lambda s: s["source"] in SMALL,
        ),
        Target("accuracy_large", "Large models: 2:4 and PATCH-Tile", lambda s: _main(s) and s["source"] in LARGE),
        Target("tasks", "Accuracy by task", _plain),
        Target(
            "unstructured", "Against unstructured pruning", _unstructured, lambda s: s["pattern"] == "unstructured"
        ),
        Target(
            "tile_size", "Tile size",
            _and_dense(lambda s: _joint(s) and s["variant"] == "default" and _tiles(s)),
            lambda s: _tiles(s) and s["pattern"] != PAPER_TILES,
        ),
        Target(
            "density_target", "One density target, or one per block",
            _and_dense(
                lambda s: _joint(s) and s["pattern"] == PAPER_TILES and s["variant"] in ("default", "per-block")
            ),
            lambda s: s["variant"] == "per-block",
        ),
        Target("frozen_mask", "The frozen 2:4 mask", _and_dense(_frozen), lambda s: s["variant"] != "default"),
        Target(
            "tile_prior", "Prior of the tiles",
            _and_dense(lambda s: _prior(s) and s["pattern"] == PAPER_TILES),
            lambda s: s["variant"] != "default",
        ),
        Target(
            "quantisation", "4-bit weights and SLiM-LoRA", lambda s: s["method"] == "dense" or _compressed(s),
            _compressed,
        ),
        Target("comparisons", "Differences between methods, item by item"),
        Target("training_cost", "What learning costs", lambda s: s["method"] in LEARNED and not _compressed(s)),
        Target("sparsity_by_depth", "Sparsity by depth", lambda s: _plain(s) and _tiles(s)),
        Target("sparsity_by_module", "Sparsity by kind of layer", lambda s: _plain(s) and _tiles(s)),
        Target("throughput", "Tokens per second", benchmark="generation.csv"),
        Target("memory", "Memory of inference", benchmark="generation.csv"),
        Target("weight_memory", "Memory of weights", benchmark="memory.csv"),
        Target("layer_speed", "Speed by layer", benchmark="layers.csv"),
        Target("claims", "The paper's claims"),
        Target("cells", "Cells: state, origin, logs"),
    )
}  # fmt: skip
"""The tables, in the order of the report."""

FIGURES = {
    target.name: target
    for target in (
        Target("perplexity_vs_sparsity", "Perplexity against sparsity", lambda s: not _ablation(s)),
        Target("accuracy_vs_sparsity", "Accuracy against sparsity", lambda s: not _ablation(s)),
        Target("sparsity_by_layer", "Sparsity by layer", lambda s: s["method"] != "dense"),
        *(TABLES[name] for name in ("sparsity_by_depth", "sparsity_by_module")),
        *(TABLES[name] for name in ("tile_size", "density_target", "frozen_mask", "tile_prior")),
        Target("training_curves", "Training curves", TABLES["training_cost"].cells),
        *(TABLES[name] for name in ("throughput", "layer_speed")),
    )
}
"""The figures, in the order of the report. One that shares its name with a table shows the same cells."""


def cells_of(name: str, cells: Sequence[Cell]) -> list[Cell]:
    """The cells of a grid that a table or figure shows. Raises PatchError for an unknown name."""
    chosen = _target(name).chosen([setting_of(cell) for cell in cells])
    return [cell for cell, asked in zip(cells, chosen, strict=True) if asked]


def benchmark_of(name: str) -> str | None:
    """The benchmark file that a table or figure shows, the claims beside cells.

    Raises PatchError for an unknown name.
    """
    return "generation.csv" if name == "claims" else _target(name).benchmark


def _target(name: str) -> Target:
    target = TABLES.get(name) or FIGURES.get(name)
    if target is None:
        raise PatchError(f"target {name!r}: unknown; choose of {', '.join(TABLES | FIGURES)}.")
    return target

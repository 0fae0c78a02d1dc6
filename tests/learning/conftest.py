"""Priors and runs on tiny models, shared by the tests of mask learning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from patch.data import TokenSet
from patch.learning import LearnedMasks, learn_masks, loop
from patch.learning.parametrisation import LearnableMasks
from patch.learning.trainer import make_masks
from patch.methods import Learned, Magnitude, MaskLLM, PatchJoint, PatchTile
from patch.pruning import prune_model
from patch.sparsity.maskset import MaskSet
from patch.sparsity.patterns import Pattern

SHORT: dict[str, Any] = {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "warmup_steps": 1, "learning_rate": 0.02}
METHODS: dict[str, tuple[type[Learned], str]] = {
    "maskllm": (MaskLLM, "2:4"),
    "patch_joint": (PatchJoint, "tiles:16x16"),
    "patch_tile": (PatchTile, "tiles:16x16"),
}


@pytest.fixture(autouse=True)
def states_whenever_a_method_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long saving takes beside the steps of a tiny model."""
    monkeypatch.setattr(loop, "SAVING", 1.0)


def magnitude_priors(model: transformers.PreTrainedModel, sparsity: float) -> dict[str, MaskSet]:
    """A 2:4 mask, and an unstructured one at the sparsity."""
    return {
        "pattern": prune_model(copy.deepcopy(model), Magnitude(), Pattern.parse("2:4"), 0.5),
        "reference": prune_model(copy.deepcopy(model), Magnitude(), Pattern.parse("unstructured"), sparsity),
    }


@pytest.fixture
def priors() -> Callable[..., dict[str, MaskSet]]:
    """`priors(model, sparsity)`: the one-shot masks that learning starts from."""
    return magnitude_priors


@pytest.fixture
def learnable(tiny_model: Callable[..., transformers.PreTrainedModel]) -> Callable[..., LearnableMasks]:
    """`learnable("patch_joint", pattern="tiles:16x16", sparsity=0.35, **options)`: masks put into a tiny Llama."""

    def make(name: str, pattern: str | None = None, sparsity: float = 0.35, **options: Any) -> LearnableMasks:
        kind, usual = METHODS[name]
        model = tiny_model("llama")
        priors = magnitude_priors(model, sparsity)
        parsed = Pattern.parse(pattern or usual)
        return make_masks(model, kind(**options), parsed, sparsity, priors, seed=0, device=torch.device("cpu"))

    return make


@pytest.fixture
def learn(
    tiny_model: Callable[..., transformers.PreTrainedModel], tokens: Callable[..., TokenSet]
) -> Callable[..., LearnedMasks]:
    """`learn("patch_joint", sparsity=0.35, run={}, **options)`: a short run on a tiny Llama."""

    def make(
        name: str, sparsity: float = 0.35, pattern: str | None = None, run: dict[str, Any] | None = None, **options: Any
    ) -> LearnedMasks:
        kind, usual = METHODS[name]
        model = tiny_model("llama")
        method = kind(**(SHORT | options))
        text = tokens(samples=method.steps * method.batch_size)
        priors = magnitude_priors(model, sparsity)
        parsed = Pattern.parse(pattern or usual)
        return learn_masks(model, method, parsed, sparsity, text, priors, **(run or {}))

    return make

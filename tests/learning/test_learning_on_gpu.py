"""Mask learning on a GPU: compiled blocks, Triton kernels and CUDA graphs compute what plain PyTorch does."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import transformers

from patch.data import TokenSet
from patch.learning import weights
from patch.learning.graphs import Replayed
from patch.learning.loop import LearnedMasks
from patch.learning.parametrisation import LearnableMasks
from patch.learning.trainer import Row, Trainer, make_masks
from patch.learning.weights import train_weights
from patch.methods import FineTune, Magnitude, PatchJoint
from patch.pruning import prune_model
from patch.sparsity.maskset import MaskSet
from patch.sparsity.patterns import Pattern

pytestmark = pytest.mark.gpu


def test_replayed_steps_are_those_of_plain_pytorch(
    tiny_model: Callable[..., transformers.PreTrainedModel],
    priors: Callable[..., dict[str, MaskSet]],
    tokens: Callable[..., TokenSet],
) -> None:
    """Seven steps of two micro-batches: three eager ones, the capture, and replays with moving schedules.

    Both run on the GPU: starting logits are drawn on the device, and devices draw differently.
    """
    method = PatchJoint(
        steps=7, batch_size=4, micro_batch_size=2, learning_rate=0.02, warmup_steps=1, optimizer="adamw_fused"
    )

    def curves(*, plain: bool) -> tuple[list[Row], LearnableMasks]:
        model = tiny_model("llama")
        masks = make_masks(
            model, method, Pattern.parse("tiles:16x16"), 0.35, priors(model, 0.35), seed=0,
            device=torch.device("cuda"), compiled=not plain,
        )  # fmt: skip
        trainer = Trainer(model, masks, tokens(samples=28), seed=0)
        trainer.prepare()
        if plain:
            trainer._micro_batch = Replayed(trainer._forward_backward, capture=False)
        return [trainer.step(step) for step in range(method.steps)], masks

    expected, _ = curves(plain=True)
    found, masks = curves(plain=False)
    for one, other in zip(expected, found, strict=True):
        for term in ("cross_entropy", "density", "norm_ratio", "gradient_norm"):
            assert other[term] == pytest.approx(one[term], rel=1e-4), term
    assert len(masks.gradients) == 2


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_fused"])
def test_replayed_fine_tuning_is_that_of_plain_pytorch(
    tiny_model: Callable[..., transformers.PreTrainedModel],
    tokens: Callable[..., TokenSet],
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
) -> None:
    """Seven steps of two micro-batches, whose gradients a graph adds up in place."""
    method = FineTune(
        steps=7, batch_size=4, micro_batch_size=2, learning_rate=0.01, warmup_steps=1, optimizer=optimizer
    )
    pattern = Pattern.parse("2:4")

    def run() -> LearnedMasks:
        model = tiny_model("llama").bfloat16()
        start = prune_model(copy.deepcopy(model), Magnitude(), pattern, 0.5)
        return train_weights(model, method, pattern, tokens(samples=28), {"start": start}, device="cuda")

    found = run()
    monkeypatch.setattr(weights, "Replayed", functools.partial(_eager, Replayed))
    expected = run()
    for one, other in zip(expected.curves, found.curves, strict=True):
        for term in ("cross_entropy", "gradient_norm"):
            assert other[term] == pytest.approx(one[term], rel=1e-3), term


def _eager(replayed: type[Replayed], function: Callable[[], torch.Tensor], *, capture: bool) -> Replayed:
    assert capture
    return replayed(function, capture=False)

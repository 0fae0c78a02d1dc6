"""Mask learning on a GPU: compiled blocks, Triton kernels and CUDA graphs compute what plain PyTorch does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers

from patch.data import TokenSet
from patch.learning.graphs import Replayed
from patch.learning.parametrisation import LearnableMasks
from patch.learning.trainer import Row, Trainer, make_masks
from patch.methods import PatchJoint
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

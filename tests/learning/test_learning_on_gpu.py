"""Mask learning on a GPU: compiled blocks, Triton kernels and CUDA graphs compute what plain PyTorch does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers

from patch.data import TokenSet
from patch.kernels.soft_mask import philox_noise
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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seven steps of two micro-batches: three eager ones, the capture, and replays with moving schedules.

    Learning rate and schedules are mild: Adam's first steps go up or down by the sign of a gradient, and where that is
    nearly 0 devices differ; at the paper's scales such a logit then turns its whole tile.
    """
    method = PatchJoint(
        steps=7, batch_size=4, micro_batch_size=2, learning_rate=1e-3, warmup_steps=1, optimizer="adamw_fused",
        pattern_scale=(100.0, 120.0), pattern_temperature=(4.0, 3.0),
        tile_scale=(25.0, 30.0), tile_temperature=(4.0, 3.0),
    )  # fmt: skip

    def curves(device: str) -> tuple[list[Row], LearnableMasks]:
        model = tiny_model("llama")
        masks = make_masks(
            model, method, Pattern.parse("tiles:16x16"), 0.35, priors(model, 0.35), seed=0,
            device=torch.device(device), compiled=device == "cuda",
        )  # fmt: skip
        masks.sampling.noise = philox_noise  # the GPU's noise
        uniform = torch.Generator().manual_seed(0)
        monkeypatch.setattr(  # the tiles' noise differs between devices otherwise
            torch, "rand", lambda n, generator, out: out.copy_(torch.empty(n).uniform_(generator=uniform))
        )
        trainer = Trainer(model, masks, tokens(samples=28), seed=0)
        trainer.prepare()
        return [trainer.step(step) for step in range(method.steps)], masks

    expected, _ = curves("cpu")
    found, masks = curves("cuda")
    for one, other in zip(expected, found, strict=True):
        assert other["cross_entropy"] == pytest.approx(one["cross_entropy"], abs=2e-3)
        assert other["density"] == pytest.approx(one["density"], abs=1e-3)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=0.02)
    assert len(masks.gradients) == 2

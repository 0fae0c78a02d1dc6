"""Whether two ways to learn the same masks learn the same: loss curves of ours and of the official code, over seeds.

Both start from the same priors and read the same sequences in the same order with the same hyper-parameters; what
differs is the noise. The yardstick is therefore how far two seeds of the same code are apart.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from transformers import PreTrainedModel

from patch.benchmarking.official import OfficialLearning
from patch.data import TokenSet
from patch.learning.order import Shuffled
from patch.learning.trainer import Trainer, make_masks
from patch.methods import Learned
from patch.provenance import stamp
from patch.sparsity.maskset import MaskSet
from patch.sparsity.patterns import Pattern

WINDOW = 20
"""Steps that a point of a curve is the mean of: single steps differ by their text."""
log = logging.getLogger(__name__)


def loss_curves(
    model: PreTrainedModel,
    method: Learned,
    pattern: Pattern,
    sparsity: float,
    training: TokenSet,
    priors: Mapping[str, MaskSet],
    checkout: Path,
    *,
    seeds: Sequence[int],
    device: torch.device,
) -> pd.DataFrame:
    """One row per contender, seed and WINDOW steps: contender, ours_logits_dtype, seed, step (the last), cross_entropy
    (the mean).

    The text is read in the order of seed 0 by all; model stays as it was. checkout: of the official code.
    """
    rows = []
    for seed in seeds:
        for contender, losses in {
            "ours": _ours(model, method, pattern, sparsity, training, priors, seed, device),
            "official": _official(model, method, pattern, sparsity, training, priors, checkout, seed, device),
        }.items():
            for last in range(WINDOW, method.steps + 1, WINDOW):
                mean = sum(losses[last - WINDOW : last]) / WINDOW
                rows.append(
                    {
                        "contender": contender,
                        "ours_logits_dtype": method.logits_dtype,
                        "seed": seed,
                        "step": last,
                        "cross_entropy": round(mean, 5),
                    }
                )
            log.info("%s, seed %d: cross-entropy %.4f at the end", contender, seed, rows[-1]["cross_entropy"])
    return pd.DataFrame(rows).assign(**stamp())


def summary(curves: pd.DataFrame) -> dict[str, float]:
    """How far apart the contenders' mean curves are, and how far two seeds of one contender, in nats per token.

    between: mean over the points of the distance of the mean curves. within: the distance that the means of as many
    seeds would have if all runs were of one contender, from the spread over seeds. Agreement: between is not several
    times within.
    """
    points = curves.pivot_table(index="step", columns=["contender", "seed"], values="cross_entropy")
    means = points.T.groupby(level="contender").mean().T
    deviations = points.T.groupby(level="contender").std().T
    seeds = points.shape[1] // 2
    within = (deviations.pow(2).sum(axis=1) / seeds).pow(0.5).mean() * math.sqrt(2 / math.pi)
    return {
        "ours at the end": means["ours"].iloc[-1],
        "official at the end": means["official"].iloc[-1],
        "between": (means["ours"] - means["official"]).abs().mean(),
        "within": within,
    }


def _ours(
    model: PreTrainedModel, method: Learned, pattern: Pattern, sparsity: float, training: TokenSet,
    priors: Mapping[str, MaskSet], seed: int, device: torch.device,
) -> list[float]:  # fmt: skip
    compiled = device.type == "cuda"
    masks = make_masks(model, method, pattern, sparsity, priors, seed=seed, device=device, compiled=compiled)
    try:
        trainer = Trainer(model, masks, training, seed=0)
        trainer.prepare()
        return [trainer.step(step)["cross_entropy"] for step in range(method.steps)]
    finally:
        masks.remove()


def _official(
    model: PreTrainedModel, method: Learned, pattern: Pattern, sparsity: float, training: TokenSet,
    priors: Mapping[str, MaskSet], checkout: Path, seed: int, device: torch.device,
) -> list[float]:  # fmt: skip
    torch.manual_seed(seed)
    masked = copy.deepcopy(model)
    masked.to(device)  # type: ignore[arg-type]
    official = OfficialLearning(masked, method, sparsity, pattern.tile, checkout, priors=priors)
    text = Shuffled(training.ids, seed=0)

    def micro_batches(step: int) -> list[torch.Tensor]:
        first = step * method.batch_size
        batch = text[range(first, first + method.batch_size)].to(device).long()
        return list(batch.split(method.micro_batch_size))

    return [official.step(step, micro_batches(step)) for step in range(method.steps)]

"""Random pruning: keep weights drawn uniformly, N of every M or a share of the layer. A control, of no paper."""

from __future__ import annotations

import torch
from torch import Tensor

from patch.methods import Random
from patch.pruning.base import Pruned, Statistic, select
from patch.sparsity.patterns import Pattern


class RandomPruner:
    """Draws on the CPU, layer after layer, so that a seed means the same masks on every device."""

    statistic = None

    def __init__(self, options: Random, seed: int):
        self.options = options
        self.generator = torch.Generator().manual_seed(seed)

    def prune(self, weight: Tensor, statistic: Statistic | None, pattern: Pattern, sparsity: float) -> Pruned:
        scores = torch.rand(weight.shape, generator=self.generator).to(weight.device)
        return Pruned(select(scores, pattern, sparsity, per_row=False))

"""Magnitude pruning: keep the largest |w|. WANDA `lib/prune.py: prune_magnitude`.

The reference's unstructured threshold (`<=`) drops one weight more than asked for, and all ties; here the
target is met exactly.
"""

from __future__ import annotations

from torch import Tensor

from patch.methods import Magnitude
from patch.pruning.base import Pruned, Statistic, select
from patch.sparsity.patterns import Pattern


class MagnitudePruner:
    statistic = None

    def __init__(self, options: Magnitude):
        self.options = options

    def prune(self, weight: Tensor, statistic: Statistic | None, pattern: Pattern, sparsity: float) -> Pruned:
        return Pruned(select(weight.float().abs(), pattern, sparsity, per_row=False))

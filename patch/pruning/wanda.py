"""Wanda: keep the largest |w_ij| * ||x_j||. arXiv 2306.11695; WANDA `lib/prune.py`, `lib/layerwrapper.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from patch.methods import Wanda
from patch.pruning.base import Pruned, Statistic, select
from patch.pruning.hessian import sequence_count, sum_dtype, token_parts
from patch.sparsity.patterns import Pattern


class InputNorm:
    """Mean over sequences of the squared L2 norm of every input feature, float32 [in_features], of sums in
    `sum_dtype`."""

    def __init__(self, in_features: int, device: torch.device):
        self.sum_of_squares = torch.zeros(in_features, dtype=sum_dtype(in_features, device), device=device)
        self.sequences = 0

    def add(self, inputs: Tensor) -> None:
        for tokens in token_parts(inputs):  # of which one at a time is in another dtype
            self.sum_of_squares += torch.linalg.vector_norm(tokens, dim=0, dtype=self.sum_of_squares.dtype).square()
        self.sequences += sequence_count(inputs)

    def mean(self) -> Tensor:
        return (self.sum_of_squares / self.sequences).float()

    def is_finite(self) -> bool:
        return bool(self.sum_of_squares.float().isfinite().all())


class WandaPruner:
    statistic = InputNorm

    def __init__(self, options: Wanda):
        self.options = options

    def prune(self, weight: Tensor, statistic: Statistic | None, pattern: Pattern, sparsity: float) -> Pruned:
        assert isinstance(statistic, InputNorm)
        norms = statistic.mean()
        if self.options.shift_zero_metrics:
            norms = shift_zeros(norms)
        return Pruned(select(score(weight, norms), pattern, sparsity, per_row=True))


def score(weight: Tensor, squared_norms: Tensor) -> Tensor:
    """|w_ij| * sqrt(a_j) in float32; weight [out, in], squared_norms [in]."""
    return weight.float().abs().mul_(squared_norms.sqrt())


def shift_zeros(squared_norms: Tensor) -> Tensor:
    """Add the smallest positive entry to all, so that dead inputs get a small norm instead of none.

    SLIM `slim/utils.py: shift_zeros`, which takes zeros as 1 when it looks for the minimum.
    """
    return squared_norms + torch.where(squared_norms > 0, squared_norms, 1.0).min()

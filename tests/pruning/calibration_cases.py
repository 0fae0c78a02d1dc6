"""One layer's weights and inputs, for methods that correct weights."""

from __future__ import annotations

import torch

from patch.pruning.base import Pruned, Pruner
from patch.sparsity.patterns import Pattern

CPU = torch.device("cpu")
TWO_FOUR = Pattern("n:m", 2, 4)
UNSTRUCTURED = Pattern("unstructured")
ROWS, WIDTH = 12, 32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int = ROWS, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=generator(seed))


def correlated(sequences: int = 4, length: int = 40, width: int = WIDTH, seed: int = 1) -> torch.Tensor:
    """Inputs whose features are mixtures of common causes."""
    causes = torch.randn(sequences, length, width, generator=generator(seed))
    return causes @ torch.randn(width, width, generator=generator(seed + 1)) / width**0.5


def pruned_by(
    pruner: Pruner, weight: torch.Tensor, sequences: torch.Tensor, pattern: Pattern, sparsity: float = 0.5
) -> Pruned:
    statistic = pruner.statistic(weight.shape[1], CPU) if pruner.statistic else None
    for sequence in sequences if statistic else ():
        statistic.add(sequence[None])
    return pruner.prune(weight, statistic, pattern, sparsity)


def output_error(weight: torch.Tensor, new: torch.Tensor, sequences: torch.Tensor) -> float:
    return ((sequences.double() @ (weight - new).double().T) ** 2).sum().item()

"""What the driver asks of a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from patch.sparsity.patterns import Pattern, keep_largest, keep_n_of_m


class Statistic(Protocol):
    """What a method accumulates over the inputs of one layer, or of several that share their inputs."""

    def __init__(self, in_features: int, device: torch.device): ...

    def add(self, inputs: Tensor) -> None:
        """Account for inputs [sequences, tokens, in_features], any float dtype."""
        ...

    def is_finite(self) -> bool:
        """False once a NaN or an infinity was among the inputs."""
        ...


@dataclass(frozen=True)
class Pruned:
    """Result for one layer [out_features, in_features]."""

    keep_mask: Tensor
    """bool, True = kept"""
    new_weight: Tensor | None = None
    """Updated weights in the layer's dtype; None where the method keeps the weights as they are."""
    pattern: Pattern | None = None
    """What the mask follows where it is not the pattern asked for, e.g. because a row stays dense."""
    dense_tiles: Tensor | None = None
    """bool [tile rows, tile columns], True = dense; with a pattern of tiles only."""


class Pruner(Protocol):
    """A method with its hyper-parameters."""

    @property
    def statistic(self) -> type[Statistic] | None:
        """What it accumulates, or None for methods that do not look at inputs. Methods of one kind share it."""
        ...

    def prune(self, weight: Tensor, statistic: Statistic | None, pattern: Pattern, sparsity: float) -> Pruned:
        """Choose what survives of `weight` [out_features, in_features]; sparsity is a share of 1."""
        ...


def select(scores: Tensor, pattern: Pattern, sparsity: float, *, per_row: bool) -> Tensor:
    """Turn scores [out, in] into a keep mask: N of every M, or the largest of each row or of the layer."""
    if pattern.kind == "n:m":
        return keep_n_of_m(scores, pattern.n, pattern.m)
    return keep_largest(scores if per_row else scores.reshape(1, -1), sparsity).reshape(scores.shape)

"""Magnitude pruning against sorting by hand."""

from __future__ import annotations

import pytest
import torch

from patch.methods import Magnitude
from patch.pruning.magnitude import MagnitudePruner
from patch.sparsity.patterns import Pattern


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (4, 8)])
def test_the_largest_of_every_group_are_kept(n, m):
    weight = weights(12, 32)
    expected = torch.zeros_like(weight, dtype=torch.bool)
    for row in range(12):
        for start in range(0, 32, m):
            for i in sorted(range(m), key=lambda i: -abs(weight[row, start + i].item()))[:n]:
                expected[row, start + i] = True
    pruned = MagnitudePruner(Magnitude()).prune(weight, None, Pattern("n:m", n, m), 0.123)
    assert torch.equal(pruned.keep_mask, expected)
    assert pruned.new_weight is None


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.45, 0.9])
def test_unstructured_pruning_drops_the_smallest_of_the_whole_layer(sparsity):
    weight = weights(12, 32)
    drop = int(12 * 32 * sparsity)
    smallest = sorted(range(12 * 32), key=lambda i: abs(weight.flatten()[i].item()))[:drop]
    expected = torch.ones(12 * 32, dtype=torch.bool)
    expected[smallest] = False
    pruned = MagnitudePruner(Magnitude()).prune(weight, None, Pattern("unstructured"), sparsity)
    assert torch.equal(pruned.keep_mask.flatten(), expected)


def test_the_target_is_exact_where_all_weights_are_equal():
    pruned = MagnitudePruner(Magnitude()).prune(torch.ones(8, 10), None, Pattern("unstructured"), 0.5)
    assert int(pruned.keep_mask.sum()) == 40


def test_it_looks_at_no_inputs():
    assert MagnitudePruner(Magnitude()).statistic is None

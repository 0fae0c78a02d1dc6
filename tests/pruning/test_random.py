"""Random pruning: any mask is as likely as any other, and a seed always means the same ones."""

from __future__ import annotations

import pytest
import torch

from patch.methods import Random
from patch.pruning import prune_model
from patch.pruning.random import RandomPruner
from patch.sparsity.patterns import Pattern

TWO_FOUR = Pattern("n:m", 2, 4)


def test_every_pattern_is_as_likely_whatever_the_weights():
    weight = torch.tensor([9.0, 0, 0, 0]).repeat(600, 10)
    keep = RandomPruner(Random(), seed=0).prune(weight, None, TWO_FOUR, 0.5).keep_mask.reshape(-1, 4)
    patterns, counts = keep.int().unique(dim=0, return_counts=True)
    assert len(patterns) == 6
    assert (patterns.sum(1) == 2).all()
    assert counts.min() > 900  # of 1000 expected


@pytest.mark.parametrize("sparsity", [0.25, 0.45])
def test_unstructured_pruning_meets_the_target(sparsity):
    keep = RandomPruner(Random(), seed=0).prune(torch.ones(20, 50), None, Pattern("unstructured"), sparsity).keep_mask
    assert int((~keep).sum()) == int(1000 * sparsity)


def test_the_seed_decides_and_layers_differ(tiny_model):
    first, again, other = (prune_model(tiny_model("llama"), Random(), TWO_FOUR, 0.5, seed=seed) for seed in (0, 0, 1))
    for name, mask in first.linears.items():
        assert torch.equal(mask.packed, again.linears[name].packed)
        assert not torch.equal(mask.packed, other.linears[name].packed)
    queries = [mask.packed for name, mask in first.linears.items() if "q_proj" in name]
    assert not torch.equal(*queries)

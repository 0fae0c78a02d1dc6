"""Wanda against the paper's formula, element by element."""

from __future__ import annotations

import math

import pytest
import torch

from patch.methods import Wanda
from patch.pruning.wanda import InputNorm, WandaPruner, score, shift_zeros
from patch.sparsity.patterns import Pattern

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(batch: int = 3, length: int = 10, features: int = 32, seed: int = 0) -> torch.Tensor:
    scales = torch.rand(features, generator=generator(seed)) * 3
    return torch.randn(batch, length, features, generator=generator(seed + 1)) * scales


def statistic_of(*batches: torch.Tensor) -> InputNorm:
    statistic = InputNorm(batches[0].shape[-1], CPU)
    for batch in batches:
        statistic.add(batch)
    return statistic


def naive_scores(weight: torch.Tensor, sequences: torch.Tensor) -> list[list[float]]:
    """|w_ij| * sqrt(mean over sequences of ||x_j||^2) in Python floats."""
    norms = []
    for j in range(sequences.shape[-1]):
        per_sequence = [sum(x * x for x in sequence[:, j].tolist()) for sequence in sequences]
        norms.append(math.sqrt(sum(per_sequence) / len(per_sequence)))
    return [[abs(w) * norm for w, norm in zip(row, norms, strict=True)] for row in weight.tolist()]


def running_mean(batches: list[torch.Tensor]) -> torch.Tensor:
    """The reference's update for every batch: rescale the old mean, then add the new sequences' share."""
    mean, count = torch.zeros(batches[0].shape[-1], dtype=torch.float64), 0
    for batch in batches:
        mean *= count / (count + batch.shape[0])
        count += batch.shape[0]
        mean += batch.double().reshape(-1, batch.shape[-1]).T.norm(p=2, dim=1) ** 2 / count
    return mean


def test_the_statistic_is_the_references_running_mean():
    batches = [inputs(batch, seed=seed) for seed, batch in enumerate([1, 4, 2, 1])]
    torch.testing.assert_close(statistic_of(*batches).mean().double(), running_mean(batches), rtol=1e-5, atol=0)


def test_the_statistic_does_not_depend_on_the_batches():
    sequences = inputs(batch=6)
    parts = statistic_of(*sequences.split([1, 2, 3])).mean()
    torch.testing.assert_close(parts, statistic_of(sequences).mean(), rtol=1e-5, atol=0)


def test_half_precision_inputs_are_summed_in_float32():
    norm = statistic_of(torch.ones(1, 5000, 4, dtype=torch.bfloat16))
    assert norm.mean().tolist() == [5000.0] * 4


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (4, 8)])
def test_the_best_scores_of_every_group_are_kept(n, m):
    weight, sequences = torch.randn(8, 32, generator=generator(5)), inputs()
    keep = WandaPruner(Wanda()).prune(weight, statistic_of(sequences), Pattern("n:m", n, m), 0.0).keep_mask
    for kept, scores in zip(keep.tolist(), naive_scores(weight, sequences), strict=True):
        for start in range(0, 32, m):
            best = sorted(range(start, start + m), key=lambda i: -scores[i])[:n]
            assert [i for i in range(start, start + m) if kept[i]] == sorted(best)


@pytest.mark.parametrize("sparsity", [0.25, 0.45, 0.5])
def test_unstructured_pruning_drops_the_same_number_in_every_row(sparsity):
    weight, sequences = torch.randn(8, 32, generator=generator(5)), inputs()
    keep = WandaPruner(Wanda()).prune(weight, statistic_of(sequences), Pattern("unstructured"), sparsity).keep_mask
    for kept, scores in zip(keep.tolist(), naive_scores(weight, sequences), strict=True):
        dropped = sorted(range(32), key=lambda i: scores[i])[: int(32 * sparsity)]
        assert [i for i in range(32) if not kept[i]] == sorted(dropped)


def test_large_inputs_save_small_weights():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    sequences = torch.tensor([[[100.0, 1.0, 1.0, 1.0]]])
    keep = WandaPruner(Wanda()).prune(weight, statistic_of(sequences), Pattern("n:m", 2, 4), 0.0).keep_mask
    assert keep.tolist() == [[True, False, False, True]]


def test_scores_of_half_precision_weights_are_float32():
    assert score(torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4)).dtype == torch.float32


@pytest.mark.parametrize(
    ("norms", "shifted"),
    [
        ([0.0, 0.5, 4.0, 0.0], [0.5, 1.0, 4.5, 0.5]),
        ([0.25, 0.5], [0.5, 0.75]),  # without zeros too
        ([0.0, 3.0], [1.0, 4.0]),  # zeros count as 1 when the minimum is taken
        ([0.0, 0.0], [1.0, 1.0]),
    ],
)
def test_shifting_adds_the_smallest_positive_statistic(norms, shifted):
    assert shift_zeros(torch.tensor(norms)).tolist() == shifted


def test_shifting_orders_weights_on_dead_inputs_by_magnitude():
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    statistic = statistic_of(torch.zeros(1, 5, 4))
    shifted = WandaPruner(Wanda(shift_zero_metrics=True)).prune(weight, statistic, Pattern("n:m", 2, 4), 0.0)
    assert shifted.keep_mask.tolist() == [[True, True, False, False]]
    plain = WandaPruner(Wanda()).prune(weight, statistic, Pattern("n:m", 2, 4), 0.0)
    assert plain.keep_mask.sum() == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_inputs_are_noticed(bad):
    sequences = inputs()
    assert statistic_of(sequences).is_finite()
    sequences[1, 2, 3] = bad
    assert not statistic_of(sequences).is_finite()

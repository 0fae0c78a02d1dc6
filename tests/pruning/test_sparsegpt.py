"""SparseGPT against a naive float64 version written from the reference's description."""

from __future__ import annotations

import pytest
import torch
from calibration_cases import (
    CPU,
    ROWS,
    TWO_FOUR,
    UNSTRUCTURED,
    WIDTH,
    correlated,
    generator,
    output_error,
    pruned_by,
    weights,
)

from patch.artefacts import PatchError
from patch.methods import Magnitude, SparseGPT, Wanda
from patch.pruning.hessian import Hessian
from patch.pruning.magnitude import MagnitudePruner
from patch.pruning.sparsegpt import SparseGPTPruner
from patch.pruning.wanda import InputNorm, WandaPruner
from patch.sparsity.patterns import Pattern


def naive_hessian(sequences: torch.Tensor, damping: float) -> torch.Tensor:
    tokens = sequences.double().reshape(-1, sequences.shape[-1])
    hessian = 2 / len(sequences) * sum(torch.outer(x, x) for x in tokens)
    for j in range(len(hessian)):
        if hessian[j, j] == 0:
            hessian[j, j] = 1
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def naive_sparsegpt(
    weight: torch.Tensor, sequences: torch.Tensor, pattern: Pattern, sparsity: float, block_size: int, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """New weight and keep mask, float64, column by column, nothing delayed to the end of a block."""
    weight = weight.double().clone()
    rows, width = weight.shape
    for j in range(width):
        if sequences[..., j].abs().max() == 0:
            weight[:, j] = 0
    factor = torch.linalg.cholesky(torch.linalg.inv(naive_hessian(sequences, damping)), upper=True)
    scales = factor.diagonal()
    keep = torch.ones(rows, width, dtype=torch.bool)
    for j in range(width):
        if pattern.kind == "unstructured" and j % block_size == 0:
            columns = range(j, min(j + block_size, width))
            scores = {(r, c): (weight[r, c] / scales[c]).item() ** 2 for r in range(rows) for c in columns}
            for r, c in sorted(scores, key=scores.get)[: int(len(scores) * sparsity)]:
                keep[r, c] = False
        if pattern.kind == "n:m" and j % pattern.m == 0:
            for r in range(rows):
                group = range(j, j + pattern.m)
                ranked = sorted(group, key=lambda c: (weight[r, c] / scales[c]).item() ** 2)
                keep[r, ranked[: pattern.m - pattern.n]] = False
        for r in range(rows):
            if not keep[r, j]:
                weight[r, j + 1 :] -= weight[r, j] / factor[j, j] * factor[j, j + 1 :]
                weight[r, j] = 0
    return weight, keep


def run(
    weight: torch.Tensor, sequences: torch.Tensor, pattern: Pattern, sparsity: float = 0.5, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    pruned = pruned_by(SparseGPTPruner(SparseGPT(**options)), weight, sequences, pattern, sparsity)
    return pruned.new_weight, pruned.keep_mask


@pytest.mark.parametrize("block_size", [8, 12, WIDTH, 128])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "unstructured"])
def test_masks_and_weights_are_those_of_the_naive_version(pattern, block_size):
    weight, sequences, parsed = weights(), correlated(), Pattern.parse(pattern)
    expected, expected_keep = naive_sparsegpt(weight, sequences, parsed, 0.4, block_size, 0.01)
    new, keep = run(weight, sequences, parsed, 0.4, block_size=block_size)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(new.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("damping", [0.001, 0.1])
def test_damping_is_a_share_of_the_mean_diagonal(damping):
    weight, sequences = weights(), correlated()
    expected, expected_keep = naive_sparsegpt(weight, sequences, TWO_FOUR, 0.5, 128, damping)
    new, keep = run(weight, sequences, TWO_FOUR, damping=damping)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(new.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_factor_belongs_to_the_inverse_of_the_damped_hessian():
    sequences = correlated()
    statistic = Hessian(WIDTH, CPU)
    for part in sequences.split([1, 3]):
        statistic.add(part)
    factor = statistic.inverse_factor(0.01).double()
    assert torch.equal(factor, factor.triu())
    inverse = torch.linalg.inv(naive_hessian(sequences, 0.01))
    torch.testing.assert_close(factor.T @ factor, inverse, rtol=1e-4, atol=1e-5)


def test_one_column_is_the_optimal_brain_surgeon_of_the_inputs_after_it():
    """w_j = 0 moves the later weights by -w_j / [F^-1]_jj * [F^-1]_j:, with F the Hessian of inputs j and later."""
    sequences = correlated(width=4)
    weight = torch.tensor([[0.01, 1.0, 2.0, 3.0]])
    new, keep = run(weight, sequences, Pattern("n:m", 3, 4))
    assert keep.tolist() == [[False, True, True, True]]
    inverse = torch.linalg.inv(naive_hessian(sequences, 0.01))
    expected = weight.double() - weight[0, 0].double() / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(new.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_the_block_size_does_not_change_n_m_results(pattern):
    weight, sequences, parsed = weights(), correlated(), Pattern.parse(pattern)
    whole, whole_keep = run(weight, sequences, parsed, block_size=WIDTH)
    for block_size in (8, 16):
        new, keep = run(weight, sequences, parsed, block_size=block_size)
        assert torch.equal(keep, whole_keep)
        torch.testing.assert_close(new, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pattern", "block_size", "width"), [("4:8", 4, 32), ("4:8", 12, 32), ("1:3", 8, 24)])
def test_groups_that_do_not_fit_the_block_size_are_still_whole(pattern, block_size, width):
    weight, sequences, parsed = weights(width=width), correlated(width=width), Pattern.parse(pattern)
    expected, expected_keep = naive_sparsegpt(weight, sequences, parsed, 0.5, width, 0.01)
    new, keep = run(weight, sequences, parsed, block_size=block_size)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(new.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", [TWO_FOUR, UNSTRUCTURED], ids=str)
def test_pruned_weights_are_exactly_zero_and_counted(pattern):
    new, keep = run(weights(), correlated(), pattern, 0.5)
    assert torch.equal(new == 0, ~keep)
    assert int(keep.sum()) == ROWS * WIDTH // 2


def test_it_beats_magnitude_and_wanda_on_correlated_inputs():
    for seed in range(3):
        weight, sequences = weights(seed=seed), correlated(seed=10 + seed)
        statistic = InputNorm(WIDTH, CPU)
        statistic.add(sequences)
        magnitude = weight * MagnitudePruner(Magnitude()).prune(weight, None, TWO_FOUR, 0.5).keep_mask
        wanda = weight * WandaPruner(Wanda()).prune(weight, statistic, TWO_FOUR, 0.5).keep_mask
        ours, _ = run(weight, sequences, TWO_FOUR)
        worst_peer = min(output_error(weight, magnitude, sequences), output_error(weight, wanda, sequences))
        assert output_error(weight, ours, sequences) < 0.8 * worst_peer


def test_the_updates_are_what_helps():
    weight, sequences = weights(), correlated()
    new, keep = run(weight, sequences, TWO_FOUR)
    assert output_error(weight, new, sequences) < 0.8 * output_error(weight, weight * keep, sequences)


def test_uncorrelated_inputs_need_no_updates():
    """A diagonal Hessian propagates nothing: the mask is that of |w| * ||x|| and kept weights stay."""
    scales = 1 + torch.arange(WIDTH) % 5
    sequences = torch.diag(scales.float())[None]
    weight = weights()
    new, keep = run(weight, sequences, TWO_FOUR, damping=1e-6)
    scores = (weight.abs() * scales).reshape(ROWS, -1, 4)
    expected = (scores.argsort(-1).argsort(-1) >= 2).reshape(ROWS, WIDTH)
    assert torch.equal(keep, expected)
    torch.testing.assert_close(new, weight * expected)


def test_weights_on_dead_inputs_become_zero_and_the_rest_stays_right():
    sequences = correlated()
    sequences[..., [3, 17]] = 0
    expected, _ = naive_sparsegpt(weights(), sequences, TWO_FOUR, 0.5, 128, 0.01)
    new, keep = run(weights(), sequences, TWO_FOUR)
    assert new.isfinite().all()
    assert (new[:, [3, 17]] == 0).all()
    assert (keep.reshape(ROWS, -1, 4).sum(-1) == 2).all()
    torch.testing.assert_close(new.double(), expected, rtol=1e-3, atol=1e-4)


def test_all_inputs_dead_is_survived():
    new, keep = run(weights(), torch.zeros(2, 5, WIDTH), TWO_FOUR)
    assert (new == 0).all()
    assert (keep.reshape(ROWS, -1, 4).sum(-1) == 2).all()


def test_fewer_tokens_than_inputs_are_enough():
    sequences = correlated(sequences=1, length=5)
    expected, expected_keep = naive_sparsegpt(weights(), sequences, TWO_FOUR, 0.5, 128, 0.01)
    new, keep = run(weights(), sequences, TWO_FOUR)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(new.double(), expected, rtol=1e-2, atol=1e-3)


def test_inputs_that_are_all_identical_are_survived():
    """H is all ones: any weights with the same sum are equally good, and SparseGPT nearly keeps the sums."""
    sequences = torch.ones(2, 30, WIDTH)
    weight = weights()
    new, keep = run(weight, sequences, TWO_FOUR)
    assert new.isfinite().all()
    assert (keep.reshape(ROWS, -1, 4).sum(-1) == 2).all()
    assert output_error(weight, new, sequences) < 0.1 * output_error(weight, weight * keep, sequences)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_get_half_precision_weights(dtype):
    weight, sequences = weights().to(dtype), correlated()
    new, keep = run(weight, sequences, TWO_FOUR)
    expected, expected_keep = naive_sparsegpt(weight, sequences, TWO_FOUR, 0.5, 128, 0.01)
    assert new.dtype == dtype
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(new.double(), expected, rtol=1e-2, atol=1e-2)


def test_the_given_weight_is_not_changed():
    weight = weights()
    before = weight.clone()
    run(weight, correlated(), TWO_FOUR)
    assert torch.equal(weight, before)


def test_a_hessian_that_cannot_be_inverted_says_what_to_do():
    statistic = Hessian(8, CPU)
    statistic.add(torch.randn(1, 20, 8, generator=generator(0)))
    statistic.sum[0, 1] = statistic.sum[1, 0] = 1e9
    with pytest.raises(PatchError, match=r"Hessian of 8 inputs: not invertible .*; use more calibration tokens"):
        statistic.inverse_factor(0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_bad_inputs_are_noticed(bad):
    statistic = Hessian(WIDTH, CPU)
    sequences = correlated()
    statistic.add(sequences)
    assert statistic.is_finite()
    sequences[1, 2, 3] = bad
    statistic.add(sequences)
    assert not statistic.is_finite()

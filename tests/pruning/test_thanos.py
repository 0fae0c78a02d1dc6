"""Thanos against constrained least squares in float64, and against figures of its reference implementation."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from calibration_cases import (
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
from patch.methods import Magnitude, SparseGPT, Thanos, Wanda
from patch.models import prunable_linears
from patch.pruning import prune_model, thanos
from patch.pruning.base import Pruned, Pruner
from patch.pruning.magnitude import MagnitudePruner
from patch.pruning.sparsegpt import SparseGPTPruner
from patch.pruning.thanos import ThanosPruner, joint_multipliers
from patch.pruning.wanda import WandaPruner
from patch.sparsity.maskset import MaskSet
from patch.sparsity.patterns import Pattern


def run(
    weight: torch.Tensor, sequences: torch.Tensor, pattern: Pattern, sparsity: float = 0.5, **options: object
) -> Pruned:
    return pruned_by(ThanosPruner(Thanos(**options)), weight, sequences, pattern, sparsity)


def least_squares(
    weight: torch.Tensor, sequences: torch.Tensor, pattern: Pattern, sparsity: float, block_size: int, damping: float
) -> tuple[np.ndarray, np.ndarray]:
    """New weight and keep mask: row by row, the free weights that bring the outputs back best, by numpy's lstsq.

    Damping is a row of inputs of its own for every feature, dead features get one of length 1.
    """
    weight, tokens = weight.double().numpy().copy(), sequences.double().flatten(0, 1).numpy()
    norms = np.sqrt((tokens**2).sum(0))
    weight[:, norms == 0] = 0
    tokens = np.concatenate([np.sqrt(2 / len(sequences)) * tokens, np.diag((norms == 0).astype(float))])
    damped = np.concatenate([tokens, np.eye(len(norms)) * np.sqrt(damping * (tokens**2).sum() / len(norms))])
    keep = np.ones(weight.shape, dtype=bool)
    to_prune = int(weight.size * sparsity)
    for start in range(0, weight.shape[1], block_size):
        columns = np.arange(start, min(start + block_size, weight.shape[1]))
        scores = np.abs(weight) * norms
        if pattern.kind == "n:m":
            for r in range(len(weight)):
                for group in columns.reshape(-1, pattern.m):
                    keep[r, group[np.argsort(scores[r, group], kind="stable")[: pattern.m - pattern.n]]] = False
        else:
            ranked = sorted((scores[r, c], r, c) for r in range(len(weight)) for c in range(start, weight.shape[1]))
            for _, r, c in ranked[:to_prune]:
                if c in columns:
                    keep[r, c] = False
                    to_prune -= 1
        for r in range(len(weight)):
            gone = columns[~keep[r, columns]]
            free = np.array([c for c in range(start, weight.shape[1]) if c not in gone])
            lost = damped[:, gone] @ weight[r, gone]
            if len(free):
                weight[r, free] += np.linalg.lstsq(damped[:, free], lost, rcond=None)[0]
            weight[r, gone] = 0
    return weight, keep


@pytest.mark.parametrize("block_size", [8, 12, WIDTH, 512])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "unstructured"])
def test_every_row_is_the_least_squares_solution_of_every_block(pattern, block_size):
    weight, sequences, parsed = weights(), correlated(), Pattern.parse(pattern)
    expected, expected_keep = least_squares(weight, sequences, parsed, 0.4, block_size, 0.01)
    pruned = run(weight, sequences, parsed, 0.4, block_size=block_size)
    assert pruned.keep_mask.tolist() == expected_keep.tolist()
    np.testing.assert_allclose(pruned.new_weight.double().numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("rows", "width", "block_size"), [(1, 30, 8), (7, 33, 16), (3, 5, 512)])
def test_ragged_sizes(rows, width, block_size):
    weight, sequences = weights(rows, width), correlated(width=width)
    expected, expected_keep = least_squares(weight, sequences, UNSTRUCTURED, 0.45, block_size, 0.01)
    pruned = run(weight, sequences, UNSTRUCTURED, 0.45, block_size=block_size)
    assert pruned.keep_mask.tolist() == expected_keep.tolist()
    np.testing.assert_allclose(pruned.new_weight.double().numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("pattern", "block_size", "width"), [("4:8", 12, 32), ("1:3", 8, 24)])
def test_groups_that_do_not_fit_the_block_size_are_still_whole(pattern, block_size, width):
    weight, sequences, parsed = weights(width=width), correlated(width=width), Pattern.parse(pattern)
    whole = -(-block_size // parsed.m) * parsed.m
    expected, expected_keep = least_squares(weight, sequences, parsed, 0.5, whole, 0.01)
    pruned = run(weight, sequences, parsed, block_size=block_size)
    assert pruned.keep_mask.tolist() == expected_keep.tolist()
    np.testing.assert_allclose(pruned.new_weight.double().numpy(), expected, rtol=1e-3, atol=1e-4)


# From vectozavr/thanos at 1bc9aed, `Thanos.snap` with blocksize 8 and perc_outliers 0 on a CPU in float32, for
# weights(5, 16) and correlated(2, 20, 16): pruned weights per row, ||X (W - W')||^2, and one row of W'.
REFERENCE = {
    "2:4": (
        [8, 8, 8, 8, 0],
        156.02884,
        [-0.1708, 0, -1.0397, 0, 0.4166, 0, 1.1096, 0, 0.1679, 0.2747, 0, 0, 0, 0.7929, 0, -1.7721],
    ),
    "unstructured": (
        [7, 5, 8, 7, 5],
        59.046436,
        [-1.5531, 0, 0, 0, 0.9394, 0, 0, 0, 0.8466, 0.6953, 0, 0, 0.5429, 1.8861, -1.0253, -1.8246],
    ),
}


@pytest.mark.parametrize("pattern", REFERENCE)
def test_figures_are_those_of_the_reference(pattern):
    weight, sequences = weights(5, 16), correlated(2, 20, 16)
    pruned = run(weight, sequences, Pattern.parse(pattern), 0.4, block_size=8, dense_row=True)
    counts, error, row = REFERENCE[pattern]
    assert (~pruned.keep_mask).sum(1).tolist() == counts
    assert output_error(weight, pruned.new_weight, sequences) == pytest.approx(error, rel=1e-5)
    torch.testing.assert_close(pruned.new_weight[2], torch.tensor(row), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bytes_at_once", [1, 3000])
@pytest.mark.parametrize("pattern", [TWO_FOUR, UNSTRUCTURED], ids=str)
def test_how_many_rows_are_solved_together_does_not_matter(pattern, bytes_at_once, monkeypatch):
    together = run(weights(), correlated(), pattern)
    monkeypatch.setitem(thanos.SYSTEM_BYTES, "cpu", bytes_at_once)
    few = run(weights(), correlated(), pattern)
    assert torch.equal(few.keep_mask, together.keep_mask)
    torch.testing.assert_close(few.new_weight, together.new_weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_unstructured_pruning_meets_the_target_exactly(sparsity):
    weight = weights()
    pruned = run(weight, correlated(), UNSTRUCTURED, sparsity, block_size=8)
    assert int((~pruned.keep_mask).sum()) == int(weight.numel() * sparsity)
    assert torch.equal(pruned.new_weight == 0, ~pruned.keep_mask)
    if sparsity == 0:
        assert torch.equal(pruned.new_weight, weight)


@pytest.mark.parametrize("seed", range(3))
def test_errors_come_in_the_expected_order(seed):
    """SparseGPT and Thanos below Wanda below magnitude, where inputs are correlated and differ in size."""
    weight, sequences = weights(seed=seed), correlated(seed=10 + seed)
    sequences = sequences * torch.rand(WIDTH, generator=generator(seed)) * 3

    def error(pruner: Pruner) -> float:
        pruned = pruned_by(pruner, weight, sequences, TWO_FOUR)
        new = weight * pruned.keep_mask if pruned.new_weight is None else pruned.new_weight
        return output_error(weight, new, sequences)

    magnitude, wanda = error(MagnitudePruner(Magnitude())), error(WandaPruner(Wanda()))
    assert max(error(SparseGPTPruner(SparseGPT())), error(ThanosPruner(Thanos()))) < 0.8 * wanda < 0.8 * magnitude


@pytest.mark.parametrize("pattern", [TWO_FOUR, UNSTRUCTURED], ids=str)
def test_weights_on_dead_inputs_become_zero_and_the_rest_stays_right(pattern):
    sequences = correlated()
    sequences[..., [3, 17]] = 0
    expected, _ = least_squares(weights(), sequences, pattern, 0.5, 8, 0.01)
    new = run(weights(), sequences, pattern, block_size=8).new_weight
    assert (new[:, [3, 17]] == 0).all()
    np.testing.assert_allclose(new.double().numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inputs", [torch.zeros(2, 5, WIDTH), torch.ones(2, 30, WIDTH)], ids=["all dead", "identical"])
@pytest.mark.parametrize("pattern", [TWO_FOUR, UNSTRUCTURED], ids=str)
def test_inputs_without_information_are_survived(inputs, pattern):
    pruned = run(weights(), inputs, pattern)
    assert pruned.new_weight.isfinite().all()
    assert int(pruned.keep_mask.sum()) == ROWS * WIDTH // 2


def test_fewer_tokens_than_inputs_are_enough():
    sequences = correlated(sequences=1, length=5)
    expected, expected_keep = least_squares(weights(), sequences, TWO_FOUR, 0.5, 512, 0.01)
    pruned = run(weights(), sequences, TWO_FOUR)
    assert pruned.keep_mask.tolist() == expected_keep.tolist()
    np.testing.assert_allclose(pruned.new_weight.double().numpy(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 100])
def test_systems_of_any_size_are_solved_panel_by_panel(size):
    roots = torch.randn(5, size, size, generator=generator(0)).double()
    systems = (roots @ roots.mT / size + 0.1 * torch.eye(size)).float()
    values = torch.randn(5, size, 1, generator=generator(1))
    expected = torch.linalg.solve(systems.double(), values.double())
    assert thanos._solve_(systems, values)
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_system_that_fails_in_a_later_panel_is_noticed():
    systems = torch.eye(40).repeat(3, 1, 1)
    systems[1, 39, 39] = -1
    assert not thanos._solve_(systems, torch.ones(3, 40, 1))


def test_a_system_that_is_not_positive_definite_is_noticed():
    inverse = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    block, both, one = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), torch.eye(2, dtype=torch.bool)
    assert joint_multipliers(inverse, block, both) is None
    assert joint_multipliers(inverse, block, one).tolist() == [[1, 0], [0, 1]]


def test_singular_systems_are_damped_more_and_the_log_says_so(monkeypatch, caplog):
    solved: list[None] = []

    def fail_twice(*arguments: torch.Tensor) -> torch.Tensor | None:
        solved.append(None)
        return None if len(solved) <= 2 else joint_multipliers(*arguments)

    monkeypatch.setattr(thanos, "joint_multipliers", fail_twice)
    with caplog.at_level(logging.WARNING, logger="patch"):
        new = run(weights(), correlated(), TWO_FOUR).new_weight
    assert [message.split()[-1] for message in caplog.messages] == ["0.01", "0.1"]
    torch.testing.assert_close(new, run(weights(), correlated(), TWO_FOUR, damping=1.0).new_weight)


def test_systems_that_stay_singular_are_an_error(monkeypatch):
    monkeypatch.setattr(thanos, "joint_multipliers", lambda *arguments: None)
    with pytest.raises(PatchError, match=r"32 inputs: its systems are singular even at damping 10; use more"):
        run(weights(), correlated(), TWO_FOUR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_get_half_precision_weights(dtype):
    weight = weights().to(dtype)
    before = weight.clone()
    expected, _ = least_squares(weight, correlated(), TWO_FOUR, 0.5, 512, 0.01)
    new = run(weight, correlated(), TWO_FOUR).new_weight
    assert new.dtype == dtype
    np.testing.assert_allclose(new.double().numpy(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(weight, before)


# the reference's dense row


def test_the_dense_row_is_that_of_the_last_sequence():
    sequences = torch.zeros(2, 1, 4)
    sequences[0, 0], sequences[1, 0] = torch.tensor([9.0, 9, 9, 1]), torch.tensor([1.0, 1, 1, 9])
    weight = torch.tensor([[2.0, 2, 2, 1], [1.0, 1, 1, 2]])
    pruned = run(weight, sequences, TWO_FOUR, dense_row=True)
    assert pruned.keep_mask.sum(1).tolist() == [2, 4]
    assert torch.equal(pruned.new_weight[1], weight[1])


def test_a_mask_with_a_dense_row_says_so(tiny_model, tokens, tmp_path):
    model = tiny_model("llama")
    masks = prune_model(model, Thanos(dense_row=True), TWO_FOUR, 0.5, tokens())
    masks.save(tmp_path / "mask")
    masks = MaskSet.load(tmp_path / "mask")
    for name, linear in prunable_linears(model).items():
        rows, columns = linear.weight.shape
        assert str(masks.linears[name].pattern) == f"tiles:1x{columns}"
        assert masks.linears[name].dense_tiles().sum() == 1
        assert masks.linears[name].sparsity == pytest.approx((rows - 1) / rows / 2)


def test_a_dense_row_needs_the_pattern_2_4():
    with pytest.raises(PatchError, match="dense_row goes with the pattern 2:4, not with 4:8"):
        run(weights(), correlated(), Pattern.parse("4:8"), dense_row=True)

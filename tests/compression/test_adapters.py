"""SLiM-LoRA: the best low-rank approximation in the weighted norm, by an SVD in float64 and by SLiM's own figures."""

import pytest
import torch
from torch import Tensor

from patch.artefacts import PatchError
from patch.compression.adapters import MeanMagnitude, low_rank, prune_left, rank_of
from patch.compression.compress import compress_weight
from patch.compression.options import Compression
from patch.sparsity.maskset import LinearMask
from patch.sparsity.patterns import Pattern

SHAPES = [(24, 16), (16, 24), (20, 20)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weighted(error: Tensor, norms: Tensor) -> float:
    return (error.double() * norms.double()).norm().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_adapters_are_the_best_approximation_of_their_rank(shape: tuple[int, int], rank: int) -> None:
    error, norms = random(*shape), torch.linspace(0.01, 3, shape[1])
    left, right = low_rank(error, norms, rank)
    assert left.shape == (shape[1], rank)
    assert right.shape == (rank, shape[0])
    u, s, v = torch.linalg.svd(error.double() * norms.double())
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    torch.testing.assert_close(((left @ right).T * norms).double(), best, rtol=0, atol=2e-6 * s[0].item())
    assert weighted(error - (left @ right).T, norms) == pytest.approx(s[rank:].norm().item(), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(right @ right.T, torch.eye(rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_dead_inputs_do_not_change_what_the_others_get(shape: tuple[int, int]) -> None:
    """SLiM falls back to the plain SVD for the whole layer; the weighted optimum leaves dead inputs free."""
    error, norms = random(*shape), torch.linspace(0.5, 3, shape[1])
    norms[[2, 5]] = 0
    alive = norms > 0
    left, right = low_rank(error, norms, 3)
    assert left.isfinite().all()
    some, other = low_rank(error[:, alive], norms[alive], 3)
    torch.testing.assert_close((left @ right)[alive], some @ other, rtol=0, atol=1e-5)
    almost = torch.where(alive, norms, 1e-4)
    some, other = low_rank(error, almost, 3)
    torch.testing.assert_close(left @ right, some @ other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_of_lower_rank_than_the_adapter_vanish(shape: tuple[int, int]) -> None:
    error = torch.outer(random(shape[0]), random(shape[1], seed=1))
    left, right = low_rank(error, torch.ones(shape[1]), 5)
    torch.testing.assert_close((left @ right).T, error, rtol=0, atol=1e-5)
    left, right = low_rank(torch.zeros(shape), torch.ones(shape[1]), 5)
    assert (left @ right).abs().max() == 0


def test_a_layer_whose_inputs_are_all_dead_gets_finite_factors() -> None:
    left, right = low_rank(random(8, 12), torch.zeros(12), 2)
    assert left.isfinite().all()
    assert right.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "shape", "rank"),
    [
        ({"adapter_rank": 0.1}, (576, 1536), 57),
        ({"adapter_rank": 0.1}, (5, 100), 1),  # never none where one is asked for
        ({"adapter_rank": 0.1, "adapter_rank_multiple": 128}, (4096, 4096), 512),
        ({"adapter_rank": 0.1, "adapter_rank_multiple": 128}, (64, 4096), 64),  # never above the smaller dimension
        ({}, (64, 64), 0),
    ],
)
def test_rank(settings: dict, shape: tuple[int, int], rank: int) -> None:
    assert rank_of(Compression(**settings), shape) == rank


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_the_left_factor_is_pruned_along_the_inputs_and_fitted_again(shape: tuple[int, int]) -> None:
    norms = torch.linspace(0.5, 3, shape[1])
    norms[3] = 0
    left, right = low_rank(random(*shape), norms, 4)
    pruned, fitted, keep = prune_left(left, right, norms, "layer")
    assert (keep.T.reshape(-1, 4).sum(1) == 2).all()
    assert (pruned[~keep] == 0).all()
    target = (left @ right).T
    before = weighted(target - (left * keep @ right).T, norms)
    assert weighted(target - (pruned @ fitted).T, norms) < 0.95 * before
    # entries that cost most are kept
    costs = (left * norms.unsqueeze(1)).abs().T.reshape(-1, 4)
    kept = keep.T.reshape(-1, 4)
    assert (costs.masked_fill(~kept, torch.inf).amin(1) >= costs.masked_fill(kept, 0).amax(1)).all()


def test_inputs_that_do_not_split_into_fours_are_told_with_their_layer() -> None:
    left, right = low_rank(random(8, 6), torch.ones(6), 2)
    with pytest.raises(PatchError, match="layer up_proj: 6 inputs do not split into 4s; use adapter_sparsity: dense"):
        prune_left(left, right, torch.ones(6), "up_proj")


def test_mean_magnitude() -> None:
    statistic = MeanMagnitude(5, torch.device("cpu"))
    first, second = random(2, 3, 5).bfloat16(), random(1, 3, 5, seed=1).bfloat16()
    statistic.add(first)
    statistic.add(second)
    expected = torch.cat([first, second]).reshape(-1, 5).float().abs().mean(0)
    torch.testing.assert_close(statistic.mean(), expected)
    assert statistic.is_finite()
    statistic.add(torch.full((1, 1, 5), torch.inf))
    assert not statistic.is_finite()


# Figures of SLiM's `add_lora` on the same weights, norms and masks, groups of 4, a quarter of the full rank: the
# weighted errors of the first quantised and pruned weight, of that with the adapter, and of the result.
@pytest.mark.parametrize(
    ("shape", "order", "sparsity", "figures"),
    [
        ((24, 16), "quantise_first", "dense", (4.0540, 2.1326, 1.9494)),
        ((24, 16), "prune_first", "dense", (4.0526, 2.1270, 1.9371)),
        ((16, 24), "quantise_first", "dense", (4.4145, 1.9046, 1.9032)),
        ((24, 16), "quantise_first", "2:4", (4.0540, 2.1561, 1.9797)),
        ((24, 16), "prune_first", "2:4", (4.0526, 2.1798, 1.9841)),
        ((16, 24), "quantise_first", "2:4", (4.4145, 2.4999, 2.4991)),
    ],
)
def test_errors_are_those_of_the_reference(
    shape: tuple[int, int], order: str, sparsity: str, figures: tuple[float, float, float]
) -> None:
    i, j = torch.arange(shape[0]).unsqueeze(1), torch.arange(shape[1])
    weight = ((i * 37 + j * 101 + i * j * 13) % 307 - 307 // 2).float() / 307
    norms = (0.1 * (torch.arange(shape[1]) % 5 + 1.0) ** 2).sqrt()
    patterns = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1]], dtype=torch.bool)
    keep = patterns[torch.arange(weight.numel() // 4) % 3].reshape(shape)
    mask = LinearMask.from_keep_mask(keep, Pattern("n:m", 2, 4))
    plain = Compression(group_size=4, order=order)
    first = compress_weight(weight, mask, norms, plain).weight.dense(torch.float32)
    assert weighted(weight - first, norms) == pytest.approx(figures[0], rel=1e-4)
    options = Compression(group_size=4, order=order, adapter_rank=0.25, adapter_sparsity=sparsity)
    made = compress_weight(weight, mask, norms, options)
    assert made.left
    assert made.right
    adapter = made.right.dense(torch.float32).T @ made.left.dense(torch.float32)
    compressed = made.weight.dense(torch.float32)
    assert (compressed[~keep] == 0).all()
    errors = weighted(weight - first - adapter, norms), weighted(weight - compressed - adapter, norms)
    if sparsity == "dense":  # but for factors in bfloat16, rounded once here and up to three times there
        assert errors == pytest.approx(figures[1:], rel=3e-3)
    else:  # judged by magnitude here, and fitted otherwise
        assert errors[0] < figures[1]
        assert errors[1] < 1.01 * figures[2]

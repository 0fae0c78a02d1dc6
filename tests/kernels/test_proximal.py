import itertools

import pytest
import torch
from torch import Tensor

from patch.kernels import proximal
from patch.kernels.proximal import proximal_, two_of_four

GROUPS = torch.tensor(
    [
        [0.9, -0.5, 0.3, 0.1],
        [1.2, 1.1, -1.0, 0.9],
        [0.02, -0.03, 0.01, 0.04],
        [2.0, 0.2, -1.5, 0.1],
        [-3.0, 2.5, 2.0, -1.0],
    ],
    dtype=torch.float64,
)
# What `prox_op` of amazon-science/ProxSparse (at 4a558bc) makes of GROUPS in float64.
REFERENCE = {
    0.25: [
        [0.87719636, -0.45614735, 0.19996730, 0.0],
        [0.91745183, 0.78034589, -0.62814742, 0.45440074],
        [0.01954274, -0.02966703, 0.00936616, 0.03973983],
        [2.0, 0.0, -1.5, 0.0],
        [-2.69503261, 2.11058290, 0.57797756, 0.0],
    ],
    0.85: [
        [0.9, -0.5, 0.0, 0.0],
        [1.2, 1.1, 0.0, 0.0],
        [0.01857222, -0.02898998, 0.00795674, 0.03922068],
        [2.0, 0.0, -1.5, 0.0],
        [-3.0, 2.5, 0.0, 0.0],
    ],
}


def objective(w: Tensor, z: Tensor, strength: float) -> Tensor:
    """[n], as in equation 6 of the paper."""
    triples = sum(w[:, list(three)].prod(dim=1).abs() for three in itertools.combinations(range(4), 3))
    return (w - z).square().sum(dim=1) / 2 + strength * triples


def result(z: Tensor, strength: float) -> Tensor:
    w = z.clone()
    proximal_(w, strength)
    return w


@pytest.mark.parametrize("strength", REFERENCE)
def test_the_result_is_the_reference_implementations(strength: float) -> None:
    assert torch.allclose(result(GROUPS, strength), torch.tensor(REFERENCE[strength], dtype=torch.float64), atol=2e-8)


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.85, 5.0])
def test_no_point_of_a_fine_grid_has_a_smaller_objective(strength: float) -> None:
    z = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.linspace(0, 1, 15, dtype=torch.float64)  # the minimum lies between 0 and z
    grid = torch.cartesian_prod(shares, shares, shares, shares)
    best = torch.stack([objective(grid * group, group.expand_as(grid), strength).min() for group in z])
    assert (objective(result(z, strength), z, strength) <= best + 1e-9).all()


def test_signs_and_order_carry_over() -> None:
    z = torch.randn(64, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for places in itertools.permutations(range(4)):
        assert torch.allclose(result(z[:, list(places)].contiguous(), 0.5), result(z, 0.5)[:, list(places)], atol=1e-7)
    assert torch.equal(result(-z, 0.5), -result(z, 0.5))


def test_two_of_four_stay_exactly_as_they_are() -> None:
    z = torch.tensor([[0.3, 0.0, -0.7, 0.0], [0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    assert torch.equal(result(z, 0.85), z)


def test_strength_zero_changes_nothing() -> None:
    assert torch.equal(result(GROUPS, 0.0), GROUPS)


def test_a_large_strength_leaves_the_two_largest() -> None:
    z = torch.randn(100, 4, generator=torch.Generator().manual_seed(2))
    keep = torch.zeros_like(z, dtype=torch.bool).scatter_(1, z.abs().topk(2).indices, True)
    assert torch.equal(result(z, 1e4), z * keep)


def test_bfloat16_weights_are_solved_in_float32_and_rounded_once() -> None:
    z = torch.randn(40, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert torch.equal(result(z, 0.85), result(z.float(), 0.85).bfloat16())


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(30, 20, generator=torch.Generator().manual_seed(4))
    whole = result(z, 0.85)
    monkeypatch.setattr(proximal, "GROUPS_PER_CHUNK", 7)
    assert torch.equal(result(z, 0.85), whole)


def test_groups_are_counted_that_are_two_of_four() -> None:
    z = torch.tensor([[1.0, 0.0, 2.0, 0.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0]])
    assert int(two_of_four(z)) == 3

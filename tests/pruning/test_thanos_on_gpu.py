"""The kernels of Thanos against float64 and against its plain PyTorch version."""

import math

import pytest
import torch

from patch.pruning import thanos
from patch.pruning.hessian import Hessian
from patch.sparsity.patterns import Pattern

thanos_triton = pytest.importorskip("patch.kernels.thanos_triton")
pytestmark = pytest.mark.gpu


def positive_definite(size: int, condition: float, count: int = 1) -> torch.Tensor:
    """float32 [count, size, size] on the GPU, each part of a wider matrix."""
    generator = torch.Generator().manual_seed(size)
    directions, _ = torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)
    wide = torch.zeros(count, size + 3, size + 5)
    wide[:, :size, :size] = 3e-3 * (directions * values) @ directions.mT
    return wide.cuda()[:, :size, :size]


@pytest.mark.parametrize("condition", [10.0, 1e4])
@pytest.mark.parametrize(("columns", "size"), [(128, 64), (128, 128), (256, 128), (100, 25), (36, 36), (7, 3), (1, 1)])
def test_the_multipliers_of_small_systems_are_those_of_float64(columns: int, size: int, condition: float) -> None:
    generator = torch.Generator().manual_seed(0)
    (inverse,), block = positive_definite(columns, condition), torch.randn(37, columns + 3, generator=generator)
    sizes = torch.arange(37).remainder(size + 1).unsqueeze(1)
    sizes[0], sizes[1] = 0, size
    ranks = torch.rand(37, columns + 3, generator=generator)[:, :columns].argsort(1).argsort(1)
    kept = torch.nn.functional.pad(ranks >= sizes, (0, 3)).cuda()[:, :columns]
    block = block.cuda()[:, :columns]
    failed = torch.zeros((), dtype=torch.int32, device="cuda")
    found = thanos_triton.joint_multipliers(inverse, block, kept, size, failed)
    expected = torch.zeros(37, columns, dtype=torch.float64, device="cuda")
    for row in range(37):
        (gone,) = (~kept[row]).nonzero(as_tuple=True)
        expected[row, gone] = torch.linalg.solve(inverse[gone][:, gone].double(), block[row, gone].double())
    assert int(failed) == 0
    assert (found[kept] == 0).all()
    assert (found - expected).norm() < 1e-6 * condition**0.75 * expected.norm()


def test_the_multipliers_are_found_without_waiting_for_the_gpu() -> None:
    (inverse,), block = positive_definite(128, 10.0), torch.randn(64, 128).cuda()
    kept = torch.arange(128, device="cuda").expand(64, 128) % 4 < 2
    failed = torch.zeros((), dtype=torch.int32, device="cuda")
    expected = thanos._multipliers(inverse, block, kept, 64, failed)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = thanos._multipliers(inverse, block, kept, 64, failed)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


@pytest.mark.parametrize("singular", [False, True])
def test_one_small_system_that_is_not_positive_definite_is_noticed(singular: bool) -> None:
    inverse, block = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).cuda(), torch.ones(300, 2).cuda()
    kept = torch.eye(2, dtype=torch.bool).repeat(150, 1).cuda()
    kept[211] &= not singular
    failed = torch.zeros((), dtype=torch.int32, device="cuda")
    thanos_triton.joint_multipliers(inverse, block, kept, 2, failed)
    assert int(failed) == singular


@pytest.mark.parametrize("condition", [10.0, 1e4])
@pytest.mark.parametrize("size", [1, 14, 16, 40, 64, 128])
def test_panels_are_inverted_as_in_float64(size: int, condition: float) -> None:
    matrices = positive_definite(size, condition, count=50)
    found, failed = thanos_triton.inverses(matrices)
    expected = torch.linalg.inv(matrices.double())
    assert not failed.any()
    assert (found - expected).norm() < 1e-6 * condition**0.75 * expected.norm()
    matrices[17, size // 2, size // 2] = -1
    assert thanos_triton.inverses(matrices)[1].nonzero().flatten().tolist() == [17]


@pytest.mark.parametrize("size", [1, 16, 37, 50])
def test_large_systems_are_filled_from_the_inverse(size: int, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    (inverse,) = positive_definite(50, 10.0)
    columns = torch.rand(20, 50, generator=generator).argsort(1)[:, :size].contiguous().cuda()
    real = (torch.rand(20, size, generator=generator) < 0.7).cuda()
    found = thanos._systems(inverse, columns, real)
    monkeypatch.setattr(thanos, "runs_triton", lambda tensor: False)
    assert torch.equal(found, thanos._systems(inverse, columns, real))


@pytest.mark.parametrize("block_size", [50, 128, 256, 512])
@pytest.mark.parametrize("pattern", ["2:4", "3:4", "unstructured"])
def test_thanos_prunes_with_its_kernels_as_without(pattern: str, block_size: int, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 600, generator=generator).cuda()
    statistic = Hessian(600, weight.device)
    causes, mixing = torch.randn(4, 500, 600, generator=generator), torch.randn(600, 600, generator=generator)
    statistic.add((causes @ mixing / 600**0.5).cuda())
    factor, norms = statistic.inverse_factor(0.01), statistic.input_norms()
    results = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(thanos, "runs_triton", lambda tensor: False)
        new = weight.clone()
        results.append((thanos.solve(new, factor, norms, Pattern.parse(pattern), 0.5, block_size), new))
    (found, new), (expected, other) = results
    assert found is not None
    assert expected is not None
    same = (found == expected).all(1)  # rounding may turn near ties
    assert same.float().mean() > 0.9
    torch.testing.assert_close(new[same], other[same], rtol=1e-2, atol=1e-3)

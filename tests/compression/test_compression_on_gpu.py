"""Compression on a GPU gives the numbers of the CPU."""

import pytest
import torch

from patch.compression.compress import compress_weight
from patch.compression.options import Compression
from patch.compression.quantisation import quantise, slim_quant_maximum
from patch.sparsity.maskset import LinearMask
from patch.sparsity.patterns import Pattern, keep_n_of_m

pytestmark = pytest.mark.gpu
TWO_FOUR = Pattern("n:m", 2, 4)


def layer(rows: int, columns: int) -> tuple[torch.Tensor, LinearMask, torch.Tensor]:
    """Weight in bfloat16, 2:4 mask by magnitude, norms; on the GPU."""
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().cuda()
    mask = LinearMask.from_keep_mask(keep_n_of_m(weight.abs(), 2, 4), TWO_FOUR)
    return weight, mask, torch.linspace(0.1, 3, columns, device="cuda")


@pytest.mark.parametrize("grouping", ["outputs", "inputs"])
def test_codes_and_scales_are_those_of_the_cpu(grouping: str) -> None:
    weight, _, _ = layer(300, 500)
    ours, theirs = (quantise(matrix, Compression(grouping=grouping)) for matrix in (weight, weight.cpu()))
    assert torch.equal(ours.codes.cpu(), theirs.codes)
    assert torch.equal(ours.maxima.cpu(), theirs.maxima)


def test_slim_quant_clips_where_it_does_on_the_cpu() -> None:
    weight, _, _ = layer(1000, 1000)
    assert slim_quant_maximum(weight).item() == pytest.approx(slim_quant_maximum(weight.cpu()).item(), rel=5e-3)


@pytest.mark.parametrize("sparsity", ["dense", "2:4"])
def test_adapters_make_up_for_as_much_as_on_the_cpu(sparsity: str) -> None:
    weight, mask, norms = layer(256, 384)
    options = Compression(adapter_rank=0.1, adapter_sparsity=sparsity)
    errors = []
    for device in ("cuda", "cpu"):
        made = compress_weight(weight.to(device), mask.to(device), norms.to(device), options)
        assert made.left
        assert made.right
        dense = made.weight.dense(torch.float32) + made.right.dense(torch.float32).T @ made.left.dense(torch.float32)
        errors.append(((weight.cpu().float() - dense) * norms.cpu()).norm().item())
    assert errors[0] == pytest.approx(errors[1], rel=2e-3)

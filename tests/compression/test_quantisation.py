"""4-bit codes and scales: against the definition, and against figures of SLiM's own code on the same matrices."""

import pytest
import torch
from torch import Tensor

from patch.compression.options import Compression
from patch.compression.quantisation import (
    pack_nibbles,
    quantise,
    quantise_blocks,
    slim_quant_maximum,
    unpack_nibbles,
)

# What SLiM's group kernels make of `lattice(8, 8)` with blocks of 4, down the outputs and along the inputs.
OUTPUTS = [
    [-7, 0, 7, -1, 7, -2, 6, -2], [-5, 3, -4, 6, -3, 7, -1, 7],
    [-2, 7, 1, -7, 4, -3, 7, 1], [0, -5, 5, 0, -5, 6, 0, -5],
    [3, -1, -5, 6, 2, -4, -7, 4], [6, 3, -1, -4, -7, 7, 2, -2],
    [-7, 7, 4, 2, -1, -5, -6, 7], [-4, -6, -7, 7, 5, 6, 3, 1],
]  # fmt: skip
INPUTS = [
    [-7, 0, 6, -1, 7, -2, 6, -2], [-7, 5, -5, 6, -2, 6, -1, 7],
    [-2, 7, 1, -5, 4, -2, 7, 1], [1, -6, 7, 0, -6, 7, 0, -7],
    [4, -1, -6, 7, 2, -3, -7, 4], [7, 3, -1, -5, -7, 5, 1, -2],
    [-7, 6, 4, 2, -1, -3, -5, 7], [-4, -5, -7, 7, 7, 5, 4, 2],
]  # fmt: skip


def lattice(rows: int, columns: int, modulus: int = 211) -> Tensor:
    """Numbers between -1/2 and 1/2 that look random."""
    i, j = torch.arange(rows).unsqueeze(1), torch.arange(columns)
    return ((i * 37 + j * 101 + i * j * 13) % modulus - modulus // 2).float() / modulus


@pytest.mark.parametrize(("grouping", "codes"), [("outputs", OUTPUTS), ("inputs", INPUTS)])
def test_groups_have_the_codes_and_maxima_of_the_reference(grouping: str, codes: list[list[int]]) -> None:
    matrix = lattice(8, 8)
    made = quantise(matrix, Compression(group_size=4, grouping=grouping))
    assert made.codes.tolist() == codes
    groups = matrix.reshape(2, 4, 8).abs().amax(1) if grouping == "outputs" else matrix.reshape(8, 2, 4).abs().amax(2)
    torch.testing.assert_close(made.maxima, groups, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grouping", ["outputs", "inputs"])
def test_every_weight_is_within_half_a_step_of_its_own_group(grouping: str, dtype: torch.dtype) -> None:
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    made = quantise(matrix, Compression(group_size=8, grouping=grouping))  # divides neither: the last groups are short
    assert made.maxima.dtype == dtype
    assert made.codes.shape == made.dequantise().shape == (20, 30)
    for row in range(20):
        for column in range(30):
            first = (row if grouping == "outputs" else column) // 8 * 8
            group = matrix[first : first + 8, column] if grouping == "outputs" else matrix[row, first : first + 8]
            step = group.abs().max().item() / 7
            code = made.codes[row, column].item()
            assert abs(matrix[row, column].item() - code * step) <= step * 0.5001
            assert made.dequantise()[row, column].item() == pytest.approx(code * step, rel=1e-6)


def test_a_group_may_be_larger_than_the_matrix() -> None:
    matrix = lattice(6, 5)
    made = quantise(matrix, Compression(group_size=128))
    assert made.maxima.shape == (1, 5)
    assert torch.equal(made.maxima[0], matrix.abs().amax(0))


def test_one_scale_per_matrix() -> None:
    matrix = lattice(6, 5)
    made = quantise(matrix, Compression(quantiser="absmax"))
    assert made.maxima.tolist() == [[matrix.abs().max().item()]]
    assert torch.equal(made.codes, (matrix / matrix.abs().max() * 7).round().to(torch.int8))


@pytest.mark.parametrize("quantiser", ["group_absmax", "absmax", "slim_quant"])
def test_zeros_stay_exact_zeros(quantiser: str) -> None:
    matrix = lattice(8, 8)
    matrix[:, 3] = 0  # a whole group, too
    matrix[2] = 0
    made = quantise(matrix, Compression(quantiser=quantiser, group_size=4)).dequantise()
    assert (made[:, 3] == 0).all()
    assert (made[2] == 0).all()
    nothing = quantise(torch.zeros(8, 8), Compression(quantiser=quantiser))
    assert not nothing.codes.any()
    assert torch.equal(nothing.dequantise(), torch.zeros(8, 8))


def test_slim_quant_clips_where_the_reference_does() -> None:
    matrix = lattice(64, 48, 1009) ** 3
    made = quantise(matrix, Compression(quantiser="slim_quant"))
    assert made.maxima.dtype == torch.float32
    assert made.maxima.item() == pytest.approx(0.11330988258123398, rel=1e-6)
    histogram = torch.bincount(made.codes.flatten().int() + 8, minlength=16).tolist()
    assert histogram == [13, 82, 62, 82, 113, 132, 166, 274, 1243, 273, 152, 116, 97, 94, 100, 73]


@pytest.mark.parametrize("rows", [519, 520])
def test_slim_quant_finds_the_least_expected_error_for_any_number_of_bins(rows: int) -> None:
    """With 519 bins the reference finds 0.47828; with 520 its second scan is empty and it returns 0.00048."""
    matrix = lattice(520, 1000, 10007)[:rows]
    found = slim_quant_maximum(matrix)
    assert found.item() == pytest.approx(0.4782758951187134, rel=2e-3)
    counts, edges = torch.histogram(matrix.abs().flatten(), rows)
    middles = ((edges[1:] + edges[:-1]) / 2).double()
    errors = []
    for clip in middles:
        rounded = torch.where(middles < clip, (middles / (clip / 16)).floor() * (clip / 16), clip)
        errors.append(((middles - rounded) ** 2 * counts).sum())
    best = torch.stack(errors)
    # within a per mille of the best of all bins, of which only some are looked at
    assert best[(middles - found).abs().argmin()] <= 1.001 * best.min()


def test_slim_quant_loses_less_than_absmax_where_tails_are_long() -> None:
    matrix = torch.randn(200, 200, generator=torch.Generator().manual_seed(0)) ** 3
    lost = {
        name: (quantise(matrix, Compression(quantiser=name)).dequantise() - matrix).norm().item()
        for name in ("absmax", "slim_quant")
    }
    assert lost["slim_quant"] < 0.6 * lost["absmax"]


def test_a_constant_magnitude_is_its_own_clipping_point() -> None:
    matrix = torch.tensor([[0.3, -0.3], [0.3, 0.3]])
    torch.testing.assert_close(quantise(matrix, Compression(quantiser="slim_quant")).dequantise(), matrix)


@pytest.mark.parametrize("count", [0, 1, 2, 16, 17])
def test_packing_two_codes_to_a_byte_is_reversible(count: int) -> None:
    codes = (torch.arange(count) * 5 % 16 - 8).to(torch.int8)
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (count + 1) // 2
    assert torch.equal(unpack_nibbles(packed, count), codes)
    if count > 1:
        assert packed[0].item() == (codes[0].item() & 15) + 16 * (codes[1].item() & 15)


def test_blocks_of_any_size() -> None:
    matrix = lattice(7, 9)
    made = quantise_blocks(matrix, (3, 4))
    assert made.maxima.shape == (3, 3)
    assert made.maxima[2, 2] == matrix[6:, 8:].abs().max()
    assert made.maxima[1, 0] == matrix[3:6, :4].abs().max()

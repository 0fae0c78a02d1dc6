"""Effective weights and their gradients on the CPU, against the plain formula in float64."""

from __future__ import annotations

import pytest
import torch
from layer_cases import LAYER, SHAPES, SHARPNESS, Case, assert_agree, make_sampling
from torch.utils.checkpoint import checkpoint

from patch.artefacts import PatchError
from patch.kernels import soft_mask
from patch.kernels.soft_mask import Sampling, effective_weight, reference, square_sums, tabulated_noise
from patch.sparsity.packing import PATTERNS_2_4
from patch.sparsity.tiles import expand

MODES = [{}, {"hard": True}, {"tiles": False}, {"codes": True}, {"codes": True, "tiles": False}]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_values_and_gradients_are_those_of_the_formula(shape, tile, mode):
    case, sampling = Case.random(shape, tile, **mode), make_sampling()
    assert_agree(case.run(sampling), case.expected(sampling), tolerance=3e-6)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_off_by_its_own_rounding_only(dtype, logits_dtype):
    case, sampling = Case.random((40, 64), (16, 32), dtype=dtype, logits_dtype=logits_dtype), make_sampling()
    results = case.run(sampling)
    assert results["effective"].dtype == dtype
    assert results["square_sum"].dtype == results["d_tiles"].dtype == torch.float32
    assert_agree(results, case.expected(sampling), tolerance=3e-6)


def test_the_reference_passes_a_gradient_check():
    case = Case.random((3, 12), (2, 8))
    gumbel = torch.randn(6, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = (case.patterns.double().requires_grad_(), case.tile_sample.double().requires_grad_())
    weight = case.weight.double()
    assert torch.autograd.gradcheck(
        lambda logits, tiles: reference(weight, logits, tiles, (2, 8), gumbel, 4, 0.7), leaves
    )


def test_the_reference_is_the_formula_entry_by_entry():
    case, sampling = Case.random((3, 12), (2, 8)), make_sampling()
    gumbel = sampling.noise(sampling, LAYER, 3)(3).double()
    dense = expand(case.tile_sample, (3, 12), (2, 8))
    effective, square_sum = reference(
        case.weight.double(), case.patterns.double(), case.tile_sample.double(), (2, 8), gumbel, 4, 0.7
    )
    for row in range(3):
        for column in range(12):
            scores = (4 * case.patterns[:, row, column // 4].double() + gumbel[:, row, column // 4]) / 0.7
            kept = (scores.exp() / scores.exp().sum() * PATTERNS_2_4[:, column % 4]).sum()
            mask = dense[row, column] + (1 - dense[row, column]) * kept
            assert abs(effective[row, column] - case.weight[row, column] * mask) < 1e-7
    torch.testing.assert_close(square_sum, effective.square().sum())


def test_noise_is_drawn_again_for_every_micro_step_and_only_then():
    case, sampling = Case.random((40, 64), (16, 32)), make_sampling()
    first, again = case.run(sampling), case.run(sampling)
    assert all(torch.equal(first[name], again[name]) for name in first)
    sampling.set(8, accumulate=False, **SHARPNESS)
    assert not torch.equal(case.run(sampling)["effective"], first["effective"])


def test_checkpointing_recomputes_the_same():
    case, sampling = Case.random((40, 64), (16, 32)), make_sampling()
    logits, tiles = case.patterns.clone().requires_grad_(), case.tile_sample.clone().requires_grad_()

    def product(logits, tiles):
        weight, square_sum = effective_weight(case.weight, logits, tiles, case.tile, sampling, LAYER)
        return (weight * case.d_effective).sum() + case.d_square_sum * square_sum

    checkpoint(product, logits, tiles, use_reentrant=False).backward()
    torch.testing.assert_close(logits.grad, case.run(sampling)["d_logits"])


@pytest.mark.parametrize("noise", [tabulated_noise, soft_mask.philox_noise])
def test_results_do_not_depend_on_the_size_of_a_block_nor_on_threads(monkeypatch, noise):
    case, sampling = Case.random((40, 72), (16, 24)), make_sampling()
    sampling.noise = noise
    whole = case.run(sampling)
    monkeypatch.setattr(soft_mask, "BLOCK_GROUPS", 60)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        blocks = case.run(sampling)
    finally:
        torch.set_num_threads(threads)
    assert_agree(blocks, whole, tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_go_into_a_buffer_or_are_added_to_it(dtype):
    case, sampling = Case.random((40, 64), (16, 32)), make_sampling()
    wanted = case.run(sampling)["d_logits"]
    buffer = torch.full_like(case.patterns, 3.0, dtype=dtype)
    squares = torch.full((square_sums(case.weight, case.tile),), 3.0)
    assert case.run(sampling, buffer, squares)["d_logits"] is None
    torch.testing.assert_close(buffer, wanted.to(dtype))
    torch.testing.assert_close(squares.sum(), wanted.square().sum())
    sampling.set(7, accumulate=True, **SHARPNESS)
    case.run(sampling, buffer, squares)
    total = wanted.to(dtype).float() + wanted
    torch.testing.assert_close(buffer.float(), total.to(dtype).float())
    torch.testing.assert_close(squares.sum(), total.square().sum())


def test_the_sum_of_squares_alone_can_be_differentiated():
    case, sampling = Case.random((40, 64), (16, 32)), make_sampling()
    case.d_effective = torch.zeros_like(case.weight)
    expected = case.expected(sampling)["d_logits"]
    logits = case.patterns.clone().requires_grad_()
    _, square_sum = effective_weight(case.weight, logits, case.tile_sample, case.tile, sampling, LAYER)
    (case.d_square_sum * square_sum).backward()
    assert (logits.grad - expected).norm() < 3e-6 * expected.norm()


@pytest.mark.parametrize("noise", [tabulated_noise, soft_mask.philox_noise])
@pytest.mark.parametrize("size", [0.0, 0.04, 1.0, 30.0])
def test_sharp_masks_stay_finite_and_keep_two_of_four(noise, size):
    sampling = Sampling(0, 0, "cpu", noise=noise)
    sampling.set(0, scale=500.0, temperature=0.05, accumulate=False)
    case = Case.random((64, 256), (32, 128), tiles=False)
    case.patterns *= size
    case.weight = torch.ones_like(case.weight)
    results = case.run(sampling)
    assert results["d_logits"].isfinite().all()
    kept = results["effective"].view(-1, 4)
    torch.testing.assert_close(kept.sum(1), torch.full((len(kept),), 2.0))


def test_a_hard_mask_keeps_exactly_two_of_four_also_between_equal_scores():
    sampling = Sampling(0, 0, "cpu", noise=lambda *_: lambda rows: torch.zeros(6, rows, 16))
    case = Case.random((8, 64), (16, 32), tiles=False, hard=True)
    case.weight, case.patterns = torch.ones_like(case.weight), torch.zeros_like(case.patterns)
    assert case.run(sampling)["effective"].view(-1, 4).tolist() == [[1.0, 1.0, 0.0, 0.0]] * 128


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_tiles_at_their_limits_are_sparse_or_dense(share):
    case = Case.random((32, 64), (16, 32), hard=True)
    case.tile_sample = torch.full_like(case.tile_sample, share)
    effective = case.run(make_sampling())["effective"]
    assert ((effective != 0).view(-1, 4).sum(1) == 2 + 2 * int(share)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 6)}, "6 inputs do not split into 4s"),
        ({"patterns": torch.zeros(4, 2, 6)}, r"this weight needs \(6, 4, 2\)"),
        ({"patterns": torch.zeros(6, 4, 2, dtype=torch.uint8)}, r"this weight needs \(4, 2\)"),
        ({"tile_sample": torch.zeros(2, 2)}, r"this weight needs \(2, 1\)"),
        ({"tile": (2, 6)}, "multiple of 4"),
        ({"gradient": torch.zeros(6, 4, 1)}, "gradient buffer"),
        ({"gradient_squares": torch.zeros(2)}, r"sums of squares of shape \(2,\): this weight needs \(1,\)"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    arguments = {
        "weight": torch.zeros(4, 8),
        "patterns": torch.zeros(6, 4, 2),
        "tile_sample": torch.zeros(2, 1),
        "tile": (2, 8),
        "sampling": make_sampling(),
        "layer": 0,
    }
    with pytest.raises(PatchError, match=message):
        effective_weight(**arguments | change)

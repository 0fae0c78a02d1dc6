"""The Triton kernels against the formula in float64 and against PyTorch on the CPU, from the same noise."""

from __future__ import annotations

import pytest
import torch
from layer_cases import LAYER, SHAPES, SHARPNESS, Case, assert_agree, make_sampling

from patch.kernels.adamw import FusedAdamW
from patch.kernels.proximal import proximal_
from patch.kernels.soft_mask import Sampling, effective_weight, square_sums

pytestmark = pytest.mark.gpu

MODES = [{}, {"hard": True}, {"tiles": False}, {"codes": True}, {"codes": True, "tiles": False}]


def set_sharpness(sampling, micro_step=7, accumulate=False):
    sampling.set(micro_step, accumulate=accumulate, **SHARPNESS)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(("shape", "tile"), [*SHAPES, ((4096, 256), (128, 128)), ((2080, 1152), (32, 576))])
def test_values_and_gradients_are_those_of_the_formula(shape, tile, mode):
    case, sampling = Case.random(shape, tile, device="cuda", **mode), make_sampling("cuda")
    assert_agree(case.run(sampling), case.expected(sampling), tolerance=2e-5)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_off_by_its_own_rounding_only(dtype, logits_dtype):
    case = Case.random((128, 256), (32, 128), dtype=dtype, logits_dtype=logits_dtype, device="cuda")
    sampling = make_sampling("cuda")
    assert_agree(case.run(sampling), case.expected(sampling), tolerance=2e-5)


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 + 11])
def test_every_seed_draws_the_bits_of_the_plain_generator(seed):
    case = Case.random((40, 200), (16, 128), device="cuda")
    sampling = make_sampling("cuda")
    sampling.seed = seed
    assert_agree(case.run(sampling), case.expected(sampling), tolerance=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_go_into_a_buffer_or_are_added_to_it(dtype):
    case, sampling = Case.random((40, 200), (16, 128), device="cuda"), make_sampling("cuda")
    wanted = case.run(sampling)["d_logits"]
    buffer = torch.full_like(case.patterns, float("nan"), dtype=dtype)
    squares = torch.full((square_sums(case.weight, case.tile),), float("nan"), device="cuda")
    assert case.run(sampling, buffer, squares)["d_logits"] is None
    torch.testing.assert_close(buffer.cpu(), wanted.to(dtype))
    torch.testing.assert_close(squares.sum().cpu(), wanted.square().sum())
    set_sharpness(sampling, accumulate=True)
    case.run(sampling, buffer, squares)
    total = wanted.to(dtype).float() + wanted
    torch.testing.assert_close(buffer.cpu().float(), total.to(dtype).float())
    torch.testing.assert_close(squares.sum().cpu(), total.square().sum())


def test_programs_of_several_blocks_add_to_what_is_there():
    shape, dtype = (4096, 4096), torch.bfloat16
    case = Case.random(shape, (128, 128), dtype=dtype, logits_dtype=dtype, device="cuda")
    sampling, alone = make_sampling("cuda"), torch.empty(2, *case.patterns.shape, device="cuda")
    squares = torch.empty(square_sums(case.weight, case.tile), device="cuda")
    assert len(squares) == 4096  # and there are 16384 blocks
    for micro_step in (0, 1):
        set_sharpness(sampling, micro_step)
        case.run(sampling, alone[micro_step], squares)
    total = alone[0].clone()
    set_sharpness(sampling, 1, accumulate=True)
    case.run(sampling, total, squares)
    torch.testing.assert_close(total, alone.sum(dim=0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(squares.double().sum(), total.double().square().sum(), rtol=1e-5, atol=0)


def test_results_are_the_same_bit_for_bit_every_time():
    case, sampling = Case.random((2048, 1024), (128, 128), dtype=torch.bfloat16, device="cuda"), make_sampling("cuda")
    first = case.run(sampling)
    for _ in range(5):
        assert all(torch.equal(first[name], again) for name, again in case.run(sampling).items())


def test_one_cuda_graph_serves_every_micro_step():
    case, sampling = Case.random((128, 256), (32, 128), device="cuda"), make_sampling("cuda")
    logits, tiles = case.patterns.clone().requires_grad_(), case.tile_sample.clone().requires_grad_()
    buffer, squares = torch.zeros_like(case.patterns), torch.zeros(square_sums(case.weight, case.tile), device="cuda")

    def step():
        weight, square_sum = effective_weight(
            *(case.weight, logits, tiles, case.tile, sampling, LAYER), gradient=buffer, gradient_squares=squares
        )
        torch.autograd.backward(
            [weight, square_sum], [case.d_effective, torch.full_like(square_sum, case.d_square_sum)]
        )
        return weight, square_sum

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight, square_sum = step()

    expected = torch.zeros_like(case.patterns)
    for micro_step in range(3):
        set_sharpness(sampling, micro_step, accumulate=micro_step > 0)
        graph.replay()
        alone = case.run(sampling, None)
        expected += alone["d_logits"].cuda()
        assert torch.equal(weight.cpu(), alone["effective"])
        assert torch.equal(square_sum.cpu(), alone["square_sum"])
        torch.testing.assert_close(buffer, expected)
        torch.testing.assert_close(squares.sum(), expected.square().sum())


@pytest.mark.parametrize("size", [0.0, 0.04, 30.0])
def test_sharp_masks_stay_finite_and_keep_two_of_four(size):
    sampling = Sampling(0, 0, "cuda")
    sampling.set(0, scale=500.0, temperature=0.05, accumulate=False)
    case = Case.random((2048, 1024), (32, 128), tiles=False, device="cuda")
    case.patterns *= size
    case.weight = torch.ones_like(case.weight)
    results = case.run(sampling)
    assert results["d_logits"].isfinite().all()
    kept = results["effective"].view(-1, 4)
    torch.testing.assert_close(kept.sum(1), torch.full((len(kept),), 2.0))


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("size", [5000, 8192])
def test_adamw_makes_the_steps_that_it_makes_on_the_cpu(state_bits, dtype, gradient_dtype, size):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator).to(dtype)
    gradients = [
        (torch.randn(size, generator=generator) * torch.logspace(-6, 0, size)).to(gradient_dtype) for _ in range(3)
    ]
    results = {}
    for device in ("cpu", "cuda"):
        parameter = start.clone().to(device).requires_grad_()
        optimizer = FusedAdamW([parameter], lr=1e-2, weight_decay=0.1, state_bits=state_bits, seed=2**35)
        for gradient in gradients:
            optimizer.step(gradients=[gradient.to(device)], gradient_scale=torch.tensor(0.5, device=device))
        results[device] = parameter.detach().cpu().float()
    apart, size_of = (results["cpu"] - results["cuda"]).abs(), results["cpu"].abs()
    exact = state_bits == 32 and dtype == torch.float32
    # A draw that falls between two values which differ in their last bits rounds to one level or the next.
    assert (apart > 1e-6 * size_of + 1e-7).float().mean() <= (0.0 if exact else 0.01)
    assert (apart <= 8 * torch.finfo(dtype).eps * size_of + (1e-2 if state_bits == 8 else 1e-7)).all()


@pytest.mark.parametrize("strength", [0.05, 0.85, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_proximal_operator_finds_what_it_finds_on_the_cpu(dtype, strength):
    weight = torch.randn(97, 516, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, found = weight.clone(), weight.cuda()
    proximal_(expected, strength)
    proximal_(found, strength)
    # Where two minima are equally good, rounding may decide for the other one.
    same = ((found.cpu() == 0) == (expected == 0)).view(-1, 4).all(1)
    assert same.float().mean() > 0.9999
    rounding = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(found.cpu().view(-1, 4)[same], expected.view(-1, 4)[same], rtol=rounding, atol=2e-5)

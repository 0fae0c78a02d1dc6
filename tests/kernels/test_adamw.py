"""AdamW against PyTorch's, with states in 32 and in 8 bits."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from patch.artefacts import PatchError
from patch.kernels.adamw import FusedAdamW, decode, encode, round_stochastically

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SIZE = 5000  # neither a multiple of a block nor of the entries that share a Philox call


def start(dtype=torch.float32):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def optimise(make, gradient, dtype=torch.float32, steps=200):
    """Parameters after some steps, float32."""
    parameter, generator = start(dtype), torch.Generator().manual_seed(1)
    optimizer = make([parameter])
    for _ in range(steps):
        parameter.grad = gradient(parameter.detach().float(), torch.randn(SIZE, generator=generator)).to(dtype)
        optimizer.step()
    return parameter.detach().float()


def quadratic(parameter, noise):
    return parameter - 1 + 0.1 * noise


def pure_noise(parameter, noise):
    """Sizes span several orders of magnitude, as gradients of mask logits do."""
    return noise * torch.logspace(-4, 0, SIZE)[torch.randperm(SIZE, generator=torch.Generator().manual_seed(2))]


def torch_adamw(parameters):
    return torch.optim.AdamW(parameters, **OPTIONS)


@pytest.mark.parametrize("gradient", [quadratic, pure_noise])
def test_32_bit_states_give_what_pytorch_gives(gradient):
    expected = optimise(torch_adamw, gradient)
    torch.testing.assert_close(optimise(lambda p: FusedAdamW(p, **OPTIONS), gradient), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("gradient", "bound"), [(quadratic, 0.02), (pure_noise, 0.15)])
def test_8_bit_states_stay_close_over_200_steps(gradient, bound):
    expected = optimise(torch_adamw, gradient)
    distance = (optimise(lambda p: FusedAdamW(p, **OPTIONS, state_bits=8), gradient) - expected).norm()
    assert distance < bound * (expected - start()).norm()


@pytest.mark.parametrize("state_bits", [32, 8])
def test_stochastic_rounding_keeps_steps_that_rounding_to_nearest_loses(state_bits):
    options = OPTIONS | {"lr": 1e-4, "weight_decay": 0.0, "state_bits": state_bits}
    moved = {}
    for stochastic in (True, False):
        final = optimise(
            lambda p, stochastic=stochastic: FusedAdamW(p, **options, stochastic_rounding=stochastic),
            lambda parameter, noise: torch.ones_like(parameter),
            torch.bfloat16,
        )
        large = start(torch.bfloat16).float().abs() > 1
        moved[stochastic] = -(final - start(torch.bfloat16).detach().float())[large].mean()
    assert abs(moved[True] - 200 * 1e-4) < 0.05 * 200 * 1e-4
    assert moved[False] == 0


def test_gradients_come_scaled_from_their_own_buffers():
    parameter, other = start(), start()
    parameter.grad = torch.ones(SIZE)
    one, two = FusedAdamW([parameter], **OPTIONS), FusedAdamW([other], **OPTIONS)
    for _ in range(3):
        one.step()
        two.step(gradients=[torch.full((SIZE,), 4.0, dtype=torch.bfloat16)], gradient_scale=torch.tensor(0.25))
    assert torch.equal(parameter, other)


def test_the_learning_rate_may_be_a_tensor():
    parameters = [start(), start()]
    for parameter, lr in zip(parameters, (0.5, torch.tensor(0.5)), strict=True):
        parameter.grad = torch.ones(SIZE)
        FusedAdamW([parameter], **OPTIONS | {"lr": lr}).step()
    assert torch.equal(*parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_bits", [32, 8])
def test_a_saved_state_goes_on_bit_for_bit(state_bits, dtype):
    def make(parameter):
        return FusedAdamW([parameter], **OPTIONS, state_bits=state_bits, seed=3)

    def steps(optimizer, parameter, count):
        for number in range(count):
            parameter.grad = torch.randn(SIZE, generator=torch.Generator().manual_seed(number)).to(dtype)
            optimizer.step()

    parameter = start(dtype)
    optimizer = make(parameter)
    steps(optimizer, parameter, 3)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), parameter.detach()], file)
    steps(optimizer, parameter, 2)

    state, other = torch.load(io.BytesIO(file.getvalue()))
    resumed = make(other.requires_grad_())
    resumed.load_state_dict(copy.deepcopy(state))
    for name, value in state["state"][0].items():
        assert torch.equal(resumed.state[other][name], value)
        assert resumed.state[other][name].dtype == value.dtype
    steps(resumed, other, 2)
    assert torch.equal(other, parameter)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_are_right_on_average_and_within_one_level(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator) * torch.logspace(-9, 0, 1000)
    values[::7] = 0
    if dtype == torch.uint8:
        values.abs_()
    total, draws = torch.zeros_like(values), 512
    for _ in range(draws):
        codes, scales = encode(values, torch.randint(256, (1000,), generator=generator), dtype)
        total += decode(codes, scales)
    codes, scales = encode(values, torch.zeros(1000, dtype=torch.int64), dtype)
    level = decode((codes.abs().clamp_min(1)).to(dtype), scales) * 8 / codes.abs().clamp_min(1)
    large = values.abs() > 1e-7
    error = (total / draws - values).abs()
    assert (error[large] < 6 * level.abs()[large] / draws**0.5).all()
    assert (total[values == 0] == 0).all()
    if dtype == torch.uint8:
        assert (codes[values > 0] > 0).all()


def test_an_all_zero_block_stays_zero():
    codes, scales = encode(torch.zeros(300), torch.full((300,), 255), torch.int8)
    assert not codes.any()
    assert not decode(codes, scales).any()


def test_stochastic_rounding_is_unbiased_and_leaves_representable_values_alone():
    value = torch.full((2**16,), 1.0 + 3 * 2.0**-10)  # 3/8 of the way between two neighbours
    rounded = round_stochastically(value, torch.arange(2**16)).double()
    assert rounded.mean() == value[0].double()
    assert sorted(set(rounded.tolist())) == [1.0, 1.0078125]
    exact = torch.tensor([0.0, -1.5, 3e38]).bfloat16()
    assert torch.equal(round_stochastically(exact.float(), torch.full((3,), 65535)), exact)


def test_unusable_arguments_are_named():
    with pytest.raises(PatchError, match="state_bits 4"):
        FusedAdamW([start()], state_bits=4)
    with pytest.raises(PatchError, match="float16"):
        FusedAdamW([start(torch.float16)])
    with pytest.raises(PatchError, match="contiguous"):
        FusedAdamW([torch.zeros(4, 4)[:, ::2].requires_grad_()])

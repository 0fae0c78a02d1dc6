"""Quantised inputs: against the definition, and that layers and their adapters see nothing else."""

import pytest
import torch
from torch import Tensor, nn

from patch.artefacts import PatchError
from patch.compression.inputs import float8_per_tensor, int8_per_token, quantise_inputs_


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_has_a_scale_per_token(dtype: torch.dtype) -> None:
    inputs = (random(2, 3, 8) * torch.tensor([1e-3, 1.0, 1e3]).reshape(1, 3, 1)).to(dtype)
    made = int8_per_token(inputs, torch.tensor(127.0))
    assert made.dtype == dtype
    steps = inputs.float().abs().amax(-1, keepdim=True) / 127
    levels = (inputs.float() / steps).round()
    torch.testing.assert_close(made, (levels * steps).to(dtype))
    assert (levels != (inputs.float() / steps)).any()


def test_float8_has_a_scale_per_tensor() -> None:
    inputs = random(4, 8)
    made = float8_per_tensor(inputs, torch.tensor(448.0))
    assert made.abs().max().item() == pytest.approx(inputs.abs().max().item(), rel=1e-6)
    large = inputs.abs() > inputs.abs().max() / 1000  # normal numbers have a mantissa of 3 bits
    assert ((made - inputs).abs()[large] <= inputs.abs()[large] / 16 * 1.001).all()
    assert not torch.equal(made, inputs)
    torch.testing.assert_close(float8_per_tensor(inputs * 1e4, torch.tensor(448.0)), made * 1e4)  # e4m3 at any size


@pytest.mark.parametrize("quantise", [int8_per_token, float8_per_tensor])
def test_zeros_stay_zeros(quantise) -> None:
    assert torch.equal(quantise(torch.zeros(2, 4), torch.tensor(127.0)), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("how", "function", "largest"), [("int8", int8_per_token, 127), ("float8", float8_per_tensor, 448)]
)
def test_layers_see_quantised_inputs(how: str, function, largest: int) -> None:
    layer, inputs = nn.Linear(8, 4), random(3, 8)
    before = inputs.clone()
    plain = set(layer.state_dict())
    quantise_inputs_([layer], how)
    expected = nn.functional.linear(function(inputs, torch.tensor(float(largest))), layer.weight, layer.bias)
    torch.testing.assert_close(layer(inputs), expected)
    assert torch.equal(inputs, before)  # where they come from is left alone
    assert set(layer.state_dict()) - plain == {"largest_level"}


def test_none_changes_nothing_and_others_are_refused() -> None:
    layer, inputs = nn.Linear(8, 4), random(3, 8)
    before = layer(inputs)
    quantise_inputs_([layer], "none")
    assert torch.equal(layer(inputs), before)
    with pytest.raises(PatchError, match="inputs 'int4': choose none, int8 or float8"):
        quantise_inputs_([layer], "int4")

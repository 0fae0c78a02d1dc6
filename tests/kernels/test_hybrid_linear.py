"""The packed layer as a module: products, gradients, states, copies, compilation, and layers fused with others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from patch.artefacts import PatchError
from patch.benchmarking.shapes import random_mask
from patch.kernels.hybrid.format import pack, unpack
from patch.kernels.hybrid.fusion import FusedLinear, Sibling
from patch.kernels.hybrid.linear import HybridLinear


def make(out_features=130, in_features=200, share=0.35, *, bias=True, dtype=torch.bfloat16, seed=0):
    """A hybrid layer and the dense one that it stands for."""
    generator = torch.Generator().manual_seed(seed)
    dense = nn.Linear(in_features, out_features, bias=bias, dtype=dtype).requires_grad_(False)
    dense.weight.copy_(torch.randn(dense.weight.shape, generator=generator))
    mask = random_mask(dense.weight, share, (128, 64), generator)
    mask.apply_(dense.weight)
    return HybridLinear(pack(dense.weight, mask.keep_mask()), dense.bias), dense


def inputs(*size, dtype=torch.bfloat16, seed=1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("size", [(200,), (3, 200), (2, 5, 200), (0, 200)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_those_of_the_masked_dense_layer(size, bias, dtype):
    hybrid, dense = make(bias=bias, dtype=dtype)
    x = inputs(*size, dtype=dtype)
    torch.testing.assert_close(hybrid(x), dense(x))


def test_gradients_reach_the_input():
    hybrid, dense = make()
    x = inputs(3, 200).requires_grad_()
    hybrid(x).float().square().sum().backward()
    other = x.detach().clone().requires_grad_()
    dense(other).float().square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("x", [torch.zeros(2, 200), torch.zeros(2, 199, dtype=torch.bfloat16)], ids=["dtype", "width"])
def test_other_inputs_are_refused(x):
    with pytest.raises(
        PatchError, match=r"HybridLinear 200 -> 130: the input is .* must end in 200 and be torch\.bfloat"
    ):
        make()[0](x)


def test_a_state_goes_into_a_layer_with_other_tiles():
    saved, dense = make(share=0.5)
    layer, _ = make(share=0.1, seed=5)
    stale = layer.weight
    stale.plans["kernel"] = "made for other tiles"
    layer.load_state_dict(saved.state_dict())
    x = inputs(4, 200)
    torch.testing.assert_close(layer(x), dense(x))
    assert not layer.weight.plans
    assert set(saved.state_dict()) == {"payload", "descriptors", "header", "bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(make(130, 256)[0].state_dict()), "they belong to different models"),
        (lambda state: state.update(make(dtype=torch.float16)[0].state_dict()), "they belong to different models"),
        (lambda state: state["descriptors"].add_(1), "the descriptors do not fit the payload"),
        (lambda state: state.update(payload=state["payload"][:-1024]), "the descriptors do not fit the payload"),
        (lambda state: state.pop("payload"), "Missing key"),
    ],
    ids=["shape", "dtype", "descriptors", "truncated", "missing"],
)
def test_states_that_would_give_wrong_products_are_refused(change, message):
    layer, dense = make()
    state = copy.deepcopy(layer.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    x = inputs(4, 200)
    torch.testing.assert_close(layer(x), dense(x))


def test_copies_are_independent():
    layer, dense = make()
    twin = copy.deepcopy(layer)
    assert twin.weight.payload is twin.payload
    layer.payload.zero_()
    x = inputs(4, 200)
    torch.testing.assert_close(twin(x), dense(x))


def test_the_weight_follows_its_buffers_to_another_device():
    layer, _ = make()
    layer.to("meta")
    assert layer.weight.device.type == "meta"
    assert layer.weight.payload is layer.payload


def test_compiled_as_one_operator_without_graph_breaks():
    hybrid, dense = make()
    x = inputs(4, 200)
    compiled = torch.compile(hybrid, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), dense(x))


def test_the_operator_keeps_the_promises_of_its_schema():
    hybrid, _ = make()
    arguments = (inputs(4, 200), hybrid.payload, hybrid.descriptors, 130, 200, hybrid.bias)
    torch.library.opcheck(torch.ops.patch.hybrid_linear.default, arguments)


# layers that share an input


class Counted(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def siblings():
    torch.manual_seed(0)
    whole = FusedLinear(Counted(6, 9).requires_grad_(False), [2, 3, 4])
    return whole.linear, [Sibling(whole, index) for index in range(3)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_one_product_serves_all_siblings_in_any_order(order):
    linear, members = siblings()
    for seed in range(2):
        x = inputs(5, 6, dtype=torch.float32, seed=seed)
        outputs = {index: members[index](x) for index in order}
        assert linear.calls == seed + 1
        expected = F.linear(x, linear.weight, linear.bias).split([2, 3, 4], -1)
        assert all(torch.equal(outputs[index], expected[index]) for index in order)


def test_siblings_on_different_inputs_do_not_mix():
    linear, (first, second, _) = siblings()
    x, other = inputs(5, 6, dtype=torch.float32), inputs(5, 6, dtype=torch.float32, seed=2)
    assert torch.equal(first(x), linear(x)[:, :2])
    assert torch.equal(second(other), linear(other)[:, 2:5])
    assert torch.equal(first(x), linear(x)[:, :2])


def test_nothing_stays_alive_once_all_have_theirs():
    _, members = siblings()
    x = inputs(5, 6, dtype=torch.float32)
    for member in members:
        member(x)
    whole = members[0]._whole[0]
    assert whole._input is None
    assert not whole._waiting


def test_packing_keeps_every_value():
    hybrid, dense = make()
    assert torch.equal(unpack(hybrid.weight), dense.weight)

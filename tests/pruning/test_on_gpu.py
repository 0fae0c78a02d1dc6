"""Pruning with the block at work on a GPU and the rest of the model in CPU memory."""

import pytest
import torch

from patch.methods import make_method
from patch.models import prunable_linears
from patch.pruning import prune_model
from patch.pruning.hessian import Hessian
from patch.sparsity.patterns import Pattern

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_hessian_of_half_precision_inputs_is_that_of_float64(dtype: torch.dtype) -> None:
    inputs = torch.randn(6, 3000, 1500, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    statistic = Hessian(1500, torch.device("cuda"))
    for part in inputs.split(2):
        statistic.add(part)
    tokens = inputs.flatten(0, 1).double()
    expected = tokens.T @ tokens
    size = expected.diagonal().sqrt()
    assert ((statistic.sum - expected).triu().abs() / size / size.unsqueeze(1)).max() < 2e-5


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "thanos"])
def test_masks_agree_with_the_cpu(name: str, pattern: str, tiny_model, tokens) -> None:
    masks = {}
    for device in ("cpu", "cuda"):
        model = tiny_model("llama")
        masks[device] = prune_model(model, make_method(name, {}), Pattern.parse(pattern), 0.4, tokens(), device)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        for linear in prunable_linears(model).values():
            assert linear.weight.isfinite().all()
    agreement = [
        (mask.keep_mask() == masks["cuda"].linears[layer].keep_mask()).float().mean()
        for layer, mask in masks["cpu"].linears.items()
    ]
    assert min(agreement) > 0.99  # rounding may turn near ties


def test_every_architecture_runs_block_by_block(architecture: str, tiny_model, tokens) -> None:
    model = tiny_model(architecture)
    masks = prune_model(model, make_method("wanda", {}), Pattern.parse("2:4"), 0.5, tokens(), "cuda")
    assert masks.sparsity == 0.5
    assert torch.isfinite(model(input_ids=tokens().ids.long()).logits).all()

"""Pruning with the block at work on a GPU and the rest of the model in CPU memory."""

import pytest
import torch

from patch.methods import make_method
from patch.models import prunable_linears
from patch.pruning import prune_model
from patch.sparsity.patterns import Pattern

pytestmark = pytest.mark.gpu


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

from collections.abc import Callable

import pytest
import torch
import transformers

from patch.artefacts import PatchError
from patch.data import PADDING
from patch.learning import objective
from patch.learning.objective import NextTokenLoss


def test_chunked_loss_and_its_gradient_are_those_of_the_whole_model(
    tiny_model: Callable[..., transformers.PreTrainedModel], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    monkeypatch.setattr(objective, "LOGIT_BYTES_PER_CHUNK", 4 * 256 * 64)  # 64 tokens per chunk, 115 in all
    model = tiny_model(architecture)
    ids = torch.randint(3, 256, (5, 24), generator=torch.Generator().manual_seed(1))
    weight = next(p for name, p in model.named_parameters() if "layers.0" in name and "q_proj.weight" in name)
    weight.requires_grad_()
    loss = NextTokenLoss(model)(ids)
    (ours,) = torch.autograd.grad(loss, weight)
    (theirs,) = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, weight)
    torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_the_heads_gradient_and_padding_are_those_of_the_whole_model(
    tiny_model: Callable[..., transformers.PreTrainedModel], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    monkeypatch.setattr(objective, "LOGIT_BYTES_PER_CHUNK", 4 * 256 * 64)
    model = tiny_model(architecture).requires_grad_()
    ids = torch.randint(3, 256, (5, 24), generator=torch.Generator().manual_seed(1))
    ids[1, 9:] = ids[4, 20:] = PADDING
    labels = ids.where(ids != PADDING, -100)
    parameters = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    loss, expected = NextTokenLoss(model)(ids), model(input_ids=ids.clamp_min(0), labels=labels).loss
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(NextTokenLoss(model.requires_grad_(False))(ids), expected)


def test_an_architecture_that_changes_its_logits_is_refused(
    tiny_model: Callable[..., transformers.PreTrainedModel],
) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self, model: transformers.PreTrainedModel):
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            output = self.model(input_ids=input_ids, use_cache=use_cache)
            output.logits = output.logits * 7
            return output

    model = tiny_model("llama")
    with pytest.raises(PatchError, match="transforms its logits"):
        NextTokenLoss(model).check(Scaled(model), torch.tensor([[5, 6, 7]]))  # type: ignore[arg-type]

"""Perplexity against the formula written out."""

import math

import pytest
import torch

from patch.artefacts import PatchError
from patch.evaluation import perplexity as module
from patch.evaluation.perplexity import perplexity


def naive_losses(model, ids) -> list[float]:
    """Mean negative log-probability of tokens 1.. of every window, by a plain softmax in float64."""
    losses = []
    for window in ids.long():
        logits = model(input_ids=window[None]).logits[0].double()
        total = 0.0
        for position in range(len(window) - 1):
            probabilities = torch.softmax(logits[position], 0)
            total -= math.log(probabilities[window[position + 1]].item())
        losses.append(total / (len(window) - 1))
    return losses


def test_perplexity_and_its_error_follow_the_papers_protocol(tiny_model, tokens) -> None:
    model, windows = tiny_model(), tokens(samples=5, length=20)
    losses = naive_losses(model, windows.ids)
    mean = sum(losses) / 5
    error = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 4 / 5)
    (metric,) = perplexity(model, "text", windows).metrics
    assert metric.value == pytest.approx(math.exp(mean), rel=1e-5)
    assert metric.stderr == pytest.approx(math.exp(mean) * error, rel=1e-3)
    assert (metric.subject, metric.name, metric.samples) == ("text", "perplexity", 5)


def test_chunks_of_logits_do_not_change_the_loss(tiny_model, tokens, monkeypatch) -> None:
    model, windows = tiny_model(), tokens(samples=1, length=30)
    whole = module.window_loss(model, windows.ids[0].long())
    monkeypatch.setattr(module, "TOKENS_PER_CHUNK", 7)
    assert module.window_loss(model, windows.ids[0].long()) == pytest.approx(whole, rel=1e-6)


def test_every_window_is_kept_as_an_item_for_paired_tests(tiny_model, tokens) -> None:
    model, windows = tiny_model(), tokens(samples=3, length=12)
    items = perplexity(model, "text", windows).items
    assert [item["value"] for item in items] == pytest.approx(naive_losses(model, windows.ids), rel=1e-5)
    assert [(item["subject"], item["item"]) for item in items] == [("text", 0), ("text", 1), ("text", 2)]


def test_broken_model_is_an_error_and_no_number(tiny_model, tokens) -> None:
    model = tiny_model()
    model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(PatchError, match="perplexity of text: the loss is nan"):
        perplexity(model, "text", tokens())

"""Perplexity of a causal LM on fixed windows of tokens.

The papers' protocol (SLIM `slim/eval.py`): windows without overlap; in each the mean cross-entropy of the
`length - 1` predicted tokens; perplexity = exp(mean over windows). Losses in float32.
"""

from __future__ import annotations

import logging
import math
import statistics

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patch.artefacts import PatchError
from patch.data import TokenSet
from patch.evaluation.result import Result
from patch.models import vocabulary_size
from patch.progress import track
from patch.records import Metric

TOKENS_PER_CHUNK = 1024
"""Tokens whose logits are widened to float32 at a time: 1024 x 256k x 4 B = 1 GB for the largest vocabulary."""
log = logging.getLogger(__name__)


@torch.no_grad()
def perplexity(model: PreTrainedModel, name: str, tokens: TokenSet) -> Result:
    """Measure perplexity on `tokens`; the model computes on its own device, in its own precision.

    The standard error comes from the spread of the windows' mean losses (delta method).
    Raises PatchError where the loss is not finite.
    """
    tokens.check_vocabulary(vocabulary_size(model))
    losses = [
        window_loss(model, window.to(model.device)) for window in track(list(tokens.ids.long()), f"{name} window", log)
    ]
    mean = statistics.fmean(losses)
    if not math.isfinite(mean):
        raise PatchError(f"perplexity of {name}: the loss is {mean}; load the model in bfloat16 or float32.")
    # exp overflows a float above 709; such a model is broken anyway, and says so by an infinite loss above
    value = math.exp(min(mean, 700.0))
    spread = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
    metric = Metric(name, "perplexity", value, None if spread is None else value * spread, len(losses))
    protocol = {**tokens.protocol, "dtype": str(model.dtype).removeprefix("torch."), "checksum": tokens.checksum}
    items = [{"subject": name, "item": i, "metric": "loss", "value": loss} for i, loss in enumerate(losses)]
    return Result([metric], protocol, items)


def window_loss(model: PreTrainedModel, ids: Tensor) -> float:
    """Mean cross-entropy in nats of the tokens ids[1:] given those before them; ids [length]."""
    logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1]
    total = 0.0
    for chunk, targets in zip(logits.split(TOKENS_PER_CHUNK), ids[1:].split(TOKENS_PER_CHUNK), strict=True):
        total += torch.nn.functional.cross_entropy(chunk.float(), targets, reduction="sum").item()
    return total / (len(ids) - 1)

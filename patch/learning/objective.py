"""The training loss: next-token cross-entropy plus the two regularisers (PATCH equation 6.5).

Where the paper's formula and the official code differ, the code's reading is the default, since the published
numbers come from it: the norm term is a ratio of norms, not of squares, and fades to 0 over the steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, masking_utils

from patch.artefacts import PatchError
from patch.data import PADDING
from patch.models import vocabulary_size

LOGIT_BYTES_PER_CHUNK = 2**27
"""Float32 logits of so many bytes exist at a time, whatever the vocabulary."""


class NextTokenLoss:
    """Mean cross-entropy of a causal LM whose logits never exist as a whole.

    With 4096 tokens and a vocabulary of 152,000 the float32 logits alone would take 2.5 GB, several times over.
    """

    def __init__(self, model: PreTrainedModel):
        self._body = model.base_model
        head = model.get_output_embeddings()
        if head is None:
            raise PatchError(f"model {type(model).__name__}: has no output embeddings, so it is not a causal LM.")
        self._head = head
        self._softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._tokens_per_chunk = max(64, LOGIT_BYTES_PER_CHUNK // (4 * vocabulary_size(model)))

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [sequences, length], integer, PADDING at the end of sequences that are shorter.

        Returns a float32 scalar: nats per predicted token, the mean over all.
        """
        with _plain_causal_attention():  # so that no token sees the padding after it
            hidden = self._body(input_ids=ids.clamp_min(0), use_cache=False).last_hidden_state[:, :-1]
        hidden, targets = hidden.flatten(0, 1), ids[:, 1:].flatten().long()
        if any(parameter.requires_grad for parameter in self._head.parameters()):
            return self._checkpointed(hidden, targets)
        return _ChunkedCrossEntropy.apply(hidden, targets, self._logits, self._tokens_per_chunk)

    def _checkpointed(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """With gradients for the head, too: autograd computes the logits of one chunk at a time again."""

        def summed(part: Tensor, target: Tensor) -> Tensor:
            return _summed_cross_entropy(self._logits(part), target)

        parts = zip(hidden.split(self._tokens_per_chunk), targets.split(self._tokens_per_chunk), strict=True)
        losses = [
            checkpoint(summed, part, target, use_reentrant=False, preserve_rng_state=False) for part, target in parts
        ]
        return torch.stack(losses).sum() / (targets != PADDING).sum()

    @torch.no_grad()
    def check(self, model: PreTrainedModel, ids: Tensor) -> None:
        """Raise PatchError for an architecture that does more to its logits than is accounted for here."""
        short = ids[:1, :8].long().clamp_min(0)
        ours = self._logits(self._body(input_ids=short, use_cache=False).last_hidden_state)
        theirs = model(input_ids=short, use_cache=False).logits
        if not torch.allclose(ours.float(), theirs.float(), atol=1e-2, rtol=1e-2):
            raise PatchError(
                f"model {type(model).__name__}: transforms its logits in a way that the training loss does not know."
            )

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._head(hidden)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


@contextlib.contextmanager
def _plain_causal_attention() -> Iterator[None]:
    """Keep transformers from replacing causal attention by an explicit mask, which is slower by far.

    It looks for several documents in a sequence, and so reads a result back from the device in every forward pass;
    training text is packed and attends across documents. While a CUDA graph is captured it makes a mask in any case.
    """
    before = masking_utils.find_packed_sequence_indices, masking_utils.is_tracing
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, masking_utils.is_tracing = before


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and its gradient by the hidden states in one pass over chunks of tokens; the head stays frozen."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], tokens: int
    ) -> Tensor:
        gradient, predicted = torch.empty_like(hidden), (targets != PADDING).sum()
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part, target, into in zip(hidden.split(tokens), targets.split(tokens), gradient.split(tokens), strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                loss = _summed_cross_entropy(logits_of(leaf), target) / predicted
            total += loss.detach()
            into.copy_(torch.autograd.grad(loss, leaf)[0])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def _summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: [tokens, vocabulary]; in float32."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=PADDING, reduction="sum")

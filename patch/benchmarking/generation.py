"""Greedy generation end to end, dense beside hybrid: the same transformers model, cache and CUDA graphs for both.

Random bfloat16 weights and tiles, and random text, of which the time does not depend. A static key-value cache, one
graph for the prefill and one for a decoding step; the sampled token stays on the device. Tokens per second count those
of the prompt and those generated, as the paper's table does.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from patch import inference
from patch.benchmarking.replay import captured, milliseconds
from patch.benchmarking.shapes import random_masks, random_model
from patch.kernels.hybrid.fusion import fuse_linears
from patch.models import vocabulary_size
from patch.provenance import stamp

REPEATS = 3
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    prefill_ms: float
    """From the prompt to the first generated token."""
    decode_ms: float
    """Of each further token."""
    gib: float
    """Of the model: weights, embeddings and head, without the cache."""

    def tokens_per_second(self, batch: int, prefill: int, generated: int) -> float:
        return 1e3 * batch * (prefill + generated) / (self.prefill_ms + (generated - 1) * self.decode_ms)


class Generator:
    """Greedy generation of a fixed number of tokens after a prompt of a fixed length."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor, generated: int, *, compiled: bool):
        """prompt: token ids [batch, prompt length], on the model's device. compiled: the model by `torch.compile`."""
        batch, length = prompt.shape
        device = prompt.device
        self._prompt, self._generated = prompt, generated
        self._cache = StaticCache(config=model.config, max_cache_len=length + generated)
        self._tokens = torch.zeros(batch, generated, dtype=torch.int64, device=device)
        self._token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._forward = model.forward
        self._start()  # allocates the cache, which must not happen in compiled code
        if compiled:
            self._forward = torch.compile(model.forward, dynamic=False)
        self.prefill = captured(self._start, device)
        self.step = captured(self._next, device)

    def __call__(self) -> Tensor:
        """The generated tokens, int64 [batch, generated]."""
        self.prefill()
        for _ in range(self._generated - 1):
            self.step()
        return self._tokens

    @torch.inference_mode()
    def _start(self) -> None:
        length = self._prompt.shape[1]
        for layer in self._cache.layers:
            if isinstance(layer, StaticLayer) and layer.is_initialized:
                layer.cumulative_length.zero_()  # older keys lie behind the mask until they are overwritten
        self._column.zero_()
        self._position.fill_(length)
        self._predict(self._prompt, torch.arange(length, device=self._prompt.device).unsqueeze(0))

    @torch.inference_mode()
    def _next(self) -> None:
        self._predict(self._token, self._position)
        self._position.add_(1)

    def _predict(self, ids: Tensor, positions: Tensor) -> None:
        logits = self._forward(
            input_ids=ids, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        ).logits
        self._token.copy_(logits[:, -1:].argmax(-1))
        self._tokens.index_copy_(1, self._column, self._token)
        self._column.add_(1)


def measure(
    shape: str,
    sparsities: Sequence[float],
    *,
    batch: int,
    prefill: int,
    generated: int,
    compiled: bool = False,
    fused: str = "both",
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Rows of results/reference/generation.csv, one for each sparsity (0 to 0.5).

    shape: one of SHAPES. compiled: both sides through `torch.compile`. fused: which sides compute query, key and value
    by one product, and gate and up: both, hybrid or none.
    """
    model = random_model(shape, device)
    if fused == "both":
        fuse_linears(model)
    dense = _cost("dense", model, batch, prefill, generated, compiled)
    for sparsity in sparsities:
        del model
        _free()
        model = random_model(shape, device)
        masks = random_masks(model, sparsity)
        model = inference.load(model, masks, fuse=fused != "none", tokens=(batch,))
        hybrid = _cost(f"hybrid at {100 * sparsity:g} %", model, batch, prefill, generated, compiled)
        dense_rate, hybrid_rate = (cost.tokens_per_second(batch, prefill, generated) for cost in (dense, hybrid))
        yield {
            "model": shape,
            "batch": batch,
            "prefill_tokens": prefill,
            "generated_tokens": generated,
            "sparsity_percent": round(100 * masks.sparsity, 2),
            "dense_tok_s": round(dense_rate, 1),
            "hybrid_tok_s": round(hybrid_rate, 1),
            "speedup": round(hybrid_rate / dense_rate, 3),
            "dense_gib": round(dense.gib, 3),
            "hybrid_gib": round(hybrid.gib, 3),
            **stamp(),
            "dense_prefill_ms": round(dense.prefill_ms, 3),
            "hybrid_prefill_ms": round(hybrid.prefill_ms, 3),
            "dense_decode_ms": round(dense.decode_ms, 3),
            "hybrid_decode_ms": round(hybrid.decode_ms, 3),
            "stack": "compiled" if compiled else "eager",
            "fused": fused,
        }


def _cost(name: str, model: PreTrainedModel, batch: int, prefill: int, generated: int, compiled: bool) -> Cost:
    torch.compiler.reset()
    device = model.device
    ids = torch.randint(vocabulary_size(model), (batch, prefill), generator=torch.Generator().manual_seed(0))
    generator = Generator(model, ids.to(device), generated, compiled=compiled)
    prefill_ms = milliseconds(generator.prefill, device, REPEATS)
    whole = milliseconds(generator, device, REPEATS)
    tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    gib = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 2**30
    cost = Cost(prefill_ms, (whole - prefill_ms) / (generated - 1), gib)
    log.info("%s: prefill %.2f ms, decode %.3f ms, %.2f GiB", name, cost.prefill_ms, cost.decode_ms, cost.gib)
    return cost


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

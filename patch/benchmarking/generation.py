"""Greedy generation end to end, dense beside hybrid: the same decoder, cache and CUDA graphs for both.

Random text, of which the time does not depend, and mostly random weights and tiles. A static key-value cache, one graph
for the prefill and one for a decoding step; the sampled token stays on the device. Tokens per second count those of the
prompt and those generated, as the paper's table does.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patch import inference
from patch.benchmarking.decoder import Decoder
from patch.benchmarking.replay import WARM_UP, captured, milliseconds
from patch.benchmarking.shapes import random_masks
from patch.kernels.hybrid.fusion import fuse_linears
from patch.models import vocabulary_size
from patch.provenance import stamp
from patch.sparsity.maskset import MaskSet

REPEATS = 3
Length = tuple[int, int]
"""Tokens of a prompt, and tokens to generate after it."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    prefill_ms: float
    """From the prompt to the first generated token."""
    decode_ms: float
    """Of each further token."""

    def tokens_per_second(self, batch: int, prefill: int, generated: int) -> float:
        return 1e3 * batch * (prefill + generated) / (self.prefill_ms + (generated - 1) * self.decode_ms)


class Generator:
    """Greedy generation after a prompt of a fixed length."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor, generated: int, *, compiled: bool):
        """prompt: token ids [batch, prompt length], on the model's device. generated: the most tokens after it.
        compiled: by `torch.compile`."""
        batch, length = prompt.shape
        device = prompt.device
        room = generated + WARM_UP  # for steps that are taken before a graph is captured
        self._prompt, self._generated = prompt, generated
        self._positions = torch.arange(length, device=device)
        self._tokens = torch.zeros(batch, room, dtype=torch.int64, device=device)
        self._token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._decoder = Decoder(model, batch, length + room, compiled=compiled)
        self.prefill = captured(self._start, device)
        self.step = captured(self._next, device)

    def __call__(self, generated: int | None = None) -> Tensor:
        """The generated tokens, int64 [batch, generated]; by default as many as there is room for."""
        generated = self._generated if generated is None else generated
        self.prefill()
        for _ in range(generated - 1):
            self.step()
        return self._tokens[:, :generated]

    def _start(self) -> None:
        self._column.zero_()
        self._position.fill_(self._prompt.shape[1])  # older keys lie behind it until they are overwritten
        self._predict(self._prompt, self._positions)

    def _next(self) -> None:
        self._predict(self._token, self._position)
        self._position.add_(1)

    def _predict(self, ids: Tensor, positions: Tensor) -> None:
        self._token.copy_(self._decoder(ids, positions).argmax(-1, keepdim=True))
        self._tokens.index_copy_(1, self._column, self._token)
        self._column.add_(1)


def measure(
    name: str,
    make: Callable[[], PreTrainedModel],
    masks: Sequence[tuple[str, float | MaskSet]],
    *,
    batches: Sequence[int],
    lengths: Sequence[Length],
    compiled: bool = False,
    fused: str = "both",
) -> Iterator[dict[str, Any]]:
    """Rows of results/reference/generation.csv: each mask with each number of sequences and each length.

    name: of the model in the rows. make: the dense model in bfloat16, on its device; called once for the dense side and
    once for each mask, since pruning changes the weights. masks: by their name in the rows, MaskSets or shares of
    weights to prune in random tiles (0 to 0.5). compiled: both sides by `torch.compile`. fused: which sides compute
    query, key and value by one product, and gate and up: both, hybrid or none.
    """
    torch.compiler.reset()  # of compiled versions for other models
    model = make()
    if fused == "both":
        fuse_linears(model)
    dense_gib, dense = _gib(model), _costs("dense", model, batches, lengths, compiled)
    for label, mask in masks:
        del model
        _free()
        model = make()
        mask_set = random_masks(model, mask) if isinstance(mask, float) else mask
        sparsity = 100 * mask_set.sparsity
        model = inference.load(model, mask_set, fuse=fused != "none", tokens=batches)
        hybrid_gib = _gib(model)
        for case, hybrid in _costs(f"hybrid at {sparsity:.4g} %", model, batches, lengths, compiled).items():
            dense_rate, hybrid_rate = (cost.tokens_per_second(*case) for cost in (dense[case], hybrid))
            batch, prefill, generated = case
            yield {
                "model": name,
                "batch": batch,
                "prefill_tokens": prefill,
                "generated_tokens": generated,
                "sparsity_percent": round(sparsity, 2),
                "dense_tok_s": round(dense_rate, 1),
                "hybrid_tok_s": round(hybrid_rate, 1),
                "speedup": round(hybrid_rate / dense_rate, 3),
                "dense_gib": round(dense_gib, 3),
                "hybrid_gib": round(hybrid_gib, 3),
                **stamp(),
                "dense_prefill_ms": round(dense[case].prefill_ms, 3),
                "hybrid_prefill_ms": round(hybrid.prefill_ms, 3),
                "dense_decode_ms": round(dense[case].decode_ms, 3),
                "hybrid_decode_ms": round(hybrid.decode_ms, 3),
                "stack": "compiled" if compiled else "eager",
                "fused": fused,
                "mask": label,
            }


def _costs(
    name: str, model: PreTrainedModel, batches: Sequence[int], lengths: Sequence[Length], compiled: bool
) -> dict[tuple[int, int, int], Cost]:
    """By sequences, tokens of the prompt and generated ones; prompts of one length share graphs and a cache."""
    costs = {}
    for batch in batches:
        for prefill in dict.fromkeys(prefill for prefill, _ in lengths):
            numbers = [generated for length, generated in lengths if length == prefill]
            ids = torch.randint(vocabulary_size(model), (batch, prefill), generator=torch.Generator().manual_seed(0))
            generator = Generator(model, ids.to(model.device), max(numbers), compiled=compiled)
            for generated in numbers:
                costs[batch, prefill, generated] = cost = _cost(generator, generated, model.device)
                log.info(
                    "%s, batch %d, %d + %d tokens: prefill %.2f ms, decode %.3f ms",
                    name, batch, prefill, generated, cost.prefill_ms, cost.decode_ms,
                )  # fmt: skip
            del generator
            _free()
    return costs


def _cost(generator: Generator, generated: int, device: torch.device) -> Cost:
    prefill_ms = milliseconds(generator.prefill, device, REPEATS)
    whole = milliseconds(lambda: generator(generated), device, REPEATS)
    return Cost(prefill_ms, (whole - prefill_ms) / (generated - 1))


def _gib(model: PreTrainedModel) -> float:
    """Of weights, embeddings and head, without the cache."""
    tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 2**30


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""The one-shot methods beside their reference implementations: time, memory, masks and what is left of the outputs.

One layer at a time, of a model's shapes, with random float32 weights (so that scores are never equal, which the
references break differently) and random inputs in bfloat16 whose features are correlated and differ in size, as in
language models. Both accumulate the same inputs and prune the same weights.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch.benchmarking.references import REPOSITORIES, Prune, load_reference
from patch.benchmarking.replay import synchronize
from patch.benchmarking.shapes import layer_shapes
from patch.methods import make_method
from patch.provenance import stamp
from patch.pruning.base import Statistic
from patch.pruning.hidden_states import TOKENS_PER_BATCH
from patch.pruning.sequential import make_pruner
from patch.sparsity.patterns import Pattern

REPEATS = 3
SLOW = 5.0
"""Seconds from which on one run is enough: no warm-up shows in it."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What one contender made of a layer."""

    new_weight: Tensor
    """[out, in]"""
    seconds: float
    """Median over the repeats, from the first inputs to the pruned weights."""
    peak_gib: float | None
    """Largest device memory on top of the layer's weight and inputs; None on a CPU."""


def measure(
    shape: str,
    method: str,
    pattern: Pattern,
    sparsity: float,
    checkouts: Mapping[str, Path],
    *,
    samples: int,
    length: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Rows of results/reference/pruning.csv, one for each different layer of the shape.

    shape: one of SHAPES, or a single layer as OUTxIN; checkouts: of the references, by the option that took them; the
    columns of those that are missing stay empty. mask_agreement is the share of weights on whose fate both agree;
    relative_output_error is ||X (W' - W)|| / ||X W|| of ours divided by that of the reference, so at most 1 is good.
    Rows of the weight that the reference leaves dense (one, for Thanos) count in neither. forward_s is the time of the
    layer's own two forward passes over all inputs in bfloat16, forward_with_statistic_s the same while the method's
    statistic is accumulated in the first of them, as the driver does.
    """
    option = REPOSITORIES[method][0] if method in REPOSITORIES else ""
    reference = load_reference(method, checkouts[option]) if option in checkouts else None
    for out_features, in_features in layer_shapes(shape):
        pattern.check_shape(out_features, in_features, shape)
        weight, inputs = random_layer(out_features, in_features, samples, length, device)
        ours = run(_ours(method), weight, inputs, pattern, sparsity)
        theirs = run(reference, weight, inputs, pattern, sparsity) if reference else None
        row: dict[str, Any] = {
            "method": method,
            "pattern": str(pattern),
            "out_features": out_features,
            "in_features": in_features,
            "ours_s": _rounded(ours.seconds, 4),
            "reference_s": _rounded(theirs.seconds if theirs else None, 4),
            "speedup": _rounded(theirs.seconds / ours.seconds if theirs else None, 2),
            "ours_peak_gib": _rounded(ours.peak_gib, 3),
            "reference_peak_gib": _rounded(theirs.peak_gib if theirs else None, 3),
            "mask_agreement": None,
            "relative_output_error": None,
        }
        if theirs:
            pruned = (theirs.new_weight == 0).any(dim=1)
            original, new, other = weight[pruned], ours.new_weight[pruned], theirs.new_weight[pruned]
            row["mask_agreement"] = _rounded(float(((new == 0) == (other == 0)).float().mean()), 6)
            errors = [output_norm(changed - original, inputs) for changed in (new, other)]
            row["relative_output_error"] = _rounded(errors[0] / errors[1], 6)
        kind = make_pruner(make_method(method, {})).statistic
        forward = {
            "forward_s": _rounded(forward_seconds(weight, inputs, None), 6),
            "forward_with_statistic_s": _rounded(forward_seconds(weight, inputs, kind), 6),
        }
        yield row | stamp() | forward


def random_layer(
    out_features: int, in_features: int, samples: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weight float32 [out, in], and inputs bfloat16 [samples, length, in] of correlated features of different size."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    weight = normal(out_features, in_features)
    mixing = torch.eye(in_features, device=device) + normal(in_features, in_features) / in_features**0.5
    mixing *= normal(in_features).exp()
    inputs = torch.empty(samples, length, in_features, dtype=torch.bfloat16, device=device)
    for sequence in inputs:
        sequence.copy_(normal(length, in_features) @ mixing)
    return weight, inputs


def run(prune: Prune, weight: Tensor, inputs: Tensor, pattern: Pattern, sparsity: float) -> Run:
    """Once to warm up, then REPEATS times; only once where that is SLOW."""
    seconds = []
    for _ in range(REPEATS + 1):
        gc.collect()
        base = 0
        synchronize(weight.device)
        if weight.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
        start = time.perf_counter()
        new_weight = prune(weight, inputs, pattern, sparsity)
        synchronize(weight.device)
        seconds.append(time.perf_counter() - start)
        peak = (torch.cuda.max_memory_allocated() - base) / 2**30 if weight.is_cuda else None
        if seconds[0] > SLOW:
            break
    return Run(new_weight, statistics.median(seconds[1:] or seconds), peak)


def forward_seconds(weight: Tensor, inputs: Tensor, kind: type[Statistic] | None) -> float:
    """Median of REPEATS after one to warm up, of two forward passes; `kind` is accumulated in the first."""
    layer = weight.to(inputs.dtype)
    batches = _batches(inputs)
    seconds = []
    for _ in range(REPEATS + 1):
        synchronize(weight.device)
        start = time.perf_counter()
        statistic = kind(weight.shape[1], weight.device) if kind else None
        for batch in batches:
            if statistic is not None:
                statistic.add(batch)
            torch.nn.functional.linear(batch, layer)
        for batch in batches:
            torch.nn.functional.linear(batch, layer)
        synchronize(weight.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _batches(inputs: Tensor) -> tuple[Tensor, ...]:
    """As many sequences at a time as the driver takes."""
    return inputs.split(max(1, TOKENS_PER_BATCH[inputs.device.type] // inputs.shape[1]))


def output_norm(weight: Tensor, inputs: Tensor) -> float:
    """||X W^T|| of weight [out, in] and inputs [samples, length, in]."""
    squares = [(sequence.float() @ weight.T).square().sum(dtype=torch.float64) for sequence in inputs]
    return float(torch.stack(squares).sum().sqrt())


def _ours(method: str) -> Prune:
    pruner = make_pruner(make_method(method, {}))

    def prune(weight: Tensor, inputs: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
        statistic = pruner.statistic(weight.shape[1], weight.device) if pruner.statistic else None
        if statistic is not None:
            for batch in _batches(inputs):
                statistic.add(batch)
        pruned = pruner.prune(weight, statistic, pattern, sparsity)
        return weight.masked_fill(~pruned.keep_mask, 0) if pruned.new_weight is None else pruned.new_weight

    return prune


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)

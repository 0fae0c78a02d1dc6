"""One layer with random weights and inputs, and what a contender makes of it, in which time and with how much memory.

Weights are random float32 numbers (so that scores are never equal, which references break differently) of the size that
models start from. Inputs are bfloat16, and their features are correlated and differ in size, as in language models.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patch.benchmarking.replay import synchronize
from patch.pruning.base import Statistic
from patch.pruning.hidden_states import TOKENS_PER_BATCH

REPEATS = 3
SLOW = 5.0
"""Seconds from which on one run is enough: no warm-up shows in it."""
WEIGHT_STD = 0.02
"""`initializer_range` of LLaMA and Qwen2."""


@dataclass(frozen=True)
class Run:
    """What one contender made of a layer."""

    new_weight: Tensor
    """[out, in]"""
    seconds: float
    """Median over the repeats, from the first inputs to the new weights."""
    peak_gib: float | None
    """Largest device memory on top of the layer's weight and inputs; None on a CPU."""


def random_layer(
    out_features: int, in_features: int, samples: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weight float32 [out, in], and inputs bfloat16 [samples, length, in] of correlated features of different size."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    weight = normal(out_features, in_features).mul_(WEIGHT_STD)
    mixing = torch.eye(in_features, device=device) + normal(in_features, in_features) / in_features**0.5
    mixing *= normal(in_features).exp()
    inputs = torch.empty(samples, length, in_features, dtype=torch.bfloat16, device=device)
    for sequence in inputs:
        sequence.copy_(normal(length, in_features) @ mixing)
    return weight, inputs


def run(contender: Callable[[], Tensor], device: torch.device) -> Run:
    """Once to warm up, then REPEATS times; only once where that is SLOW."""
    seconds = []
    for _ in range(REPEATS + 1):
        gc.collect()
        base = 0
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
        start = time.perf_counter()
        new_weight = contender()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        peak = (torch.cuda.max_memory_allocated() - base) / 2**30 if device.type == "cuda" else None
        if seconds[0] > SLOW:
            break
    return Run(new_weight, statistics.median(seconds[1:] or seconds), peak)


def compared(ours: Run, theirs: Run | None) -> dict[str, Any]:
    """The columns of times and memory; those of a missing reference are empty."""
    return {
        "ours_s": rounded(ours.seconds, 6),
        "reference_s": rounded(theirs.seconds if theirs else None, 6),
        "speedup": rounded(theirs.seconds / ours.seconds if theirs else None, 2),
        "ours_peak_gib": rounded(ours.peak_gib, 3),
        "reference_peak_gib": rounded(theirs.peak_gib if theirs else None, 3),
    }


def batches(inputs: Tensor) -> tuple[Tensor, ...]:
    """As many sequences at a time as the driver takes."""
    return inputs.split(max(1, TOKENS_PER_BATCH[inputs.device.type] // inputs.shape[1]))


def accumulated(kind: type[Statistic], inputs: Tensor) -> Statistic:
    """The statistic of inputs [samples, length, in], as the driver accumulates it."""
    statistic = kind(inputs.shape[-1], inputs.device)
    for batch in batches(inputs):
        statistic.add(batch)
    return statistic


def output_norm(weight: Tensor, inputs: Tensor) -> float:
    """||X W^T|| of weight [out, in] and inputs [samples, length, in]."""
    squares = [(sequence.float() @ weight.T).square().sum(dtype=torch.float64) for sequence in inputs]
    return float(torch.stack(squares).sum().sqrt())


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)

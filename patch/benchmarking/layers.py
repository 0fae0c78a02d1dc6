"""One linear layer with dense and 2:4 tiles, beside cuBLAS and `torch.compile` on the dense and cuSPARSELt on the fully
2:4 weight.

Everything that a call costs counts: layout of the inputs, reductions, bfloat16 outputs. Weights are random and so many
copies of each are used in turn that the L2 cache cannot hold them; calls are replayed as CUDA graphs.

The floor of a call is the larger of two times: its bytes (weight, inputs and outputs once each) at the measured
bandwidth of a large copy, and its multiply-adds (a 2:4 weight has half) at the measured rate of a large dense product.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from patch.artefacts import PatchError
from patch.benchmarking.decoder import MODE
from patch.benchmarking.options import RANDOM
from patch.benchmarking.replay import Call, copies_past_cache, copy_bandwidth, matmul_rate, microseconds
from patch.benchmarking.shapes import random_mask
from patch.kernels.hybrid import dispatch
from patch.kernels.hybrid.format import HybridWeight, pack
from patch.provenance import stamp
from patch.sparsity.maskset import LinearMask, MaskSet
from patch.sparsity.patterns import keep_n_of_m

DTYPE = torch.bfloat16
TILE = (128, 128)
log = logging.getLogger(__name__)


def measure(
    out_features: int,
    in_features: int,
    tokens: Sequence[int],
    mask: LinearMask | float,
    kernels: Sequence[str],
    device: torch.device,
    *,
    compiled: bool = False,
    mask_name: str = RANDOM,
) -> Iterator[dict[str, Any]]:
    """Rows of results/reference/layers.csv for one layer: each number of tokens with each of `kernels`.

    mask: a learned one, or the share of weights to prune (0 to 0.5) in random tiles of 128 x 128. kernels: names of
    `dispatch.kernels`; "auto" is the one that dispatch chooses. compiled: time the dense layer by `torch.compile` too,
    which searches among cuBLAS and Triton kernels. max_relative_error is the largest difference from the product in
    float64, over the largest output.
    """
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator, device=device).to(DTYPE)
    if isinstance(mask, float):
        mask = random_mask(weight, mask, TILE, torch.Generator().manual_seed(0))
    keep = mask.to(device).keep_mask()
    hybrids = _copies(pack(weight, keep))
    pruned = weight.masked_fill(~keep, 0)
    denses = [weight.clone() for _ in range(copies_past_cache(weight.numel() * weight.element_size(), device))]
    cusparselt = _CuSparseLt(weight) if device.type == "cuda" else None
    for number in tokens:
        x = torch.randn(number, in_features, generator=generator, device=device).to(DTYPE)
        expected = x.double() @ pruned.double().T
        dense_us = microseconds([functools.partial(F.linear, x, dense) for dense in denses], device)
        compiled_us = _compiled_microseconds(number, out_features, in_features, device) if compiled else None
        cusparselt_us = microseconds(cusparselt.calls(x), device) if cusparselt else None
        floor = 1e6 * _floor_seconds(hybrids[0], x, device)
        for kernel in kernels:
            name, reason = _resolve(kernel, number, hybrids[0], device)
            if name is None:
                log.info("%dx%d, %d tokens: %s", out_features, in_features, number, reason)
                continue
            multiply = dispatch.kernels()[name].multiply
            error = (multiply(x, hybrids[0], None).double() - expected).abs().max() / expected.abs().max()
            us = microseconds([functools.partial(multiply, x, hybrid, None) for hybrid in hybrids], device)
            log.info("%dx%d, %d tokens: %s, %s", out_features, in_features, number, name, reason)
            yield {
                "out_features": out_features,
                "in_features": in_features,
                "tokens": number,
                "sparsity_percent": round(100 * mask.sparsity, 2),
                "kernel": name,
                "us": round(us, 2),
                "dense_us": round(dense_us, 2),
                "speedup": round(dense_us / us, 3),
                "floor_us": round(floor, 2),
                "fraction_of_floor": round(floor / us, 3),
                "cusparselt_full_2_4_us": None if cusparselt_us is None else round(cusparselt_us, 2),
                "max_relative_error": float(f"{float(error):.2g}"),
                **stamp(),
                "compiled_dense_us": None if compiled_us is None else round(compiled_us, 2),
                "mask": mask_name,
            }


def layers_of_masks(masks: MaskSet) -> list[LinearMask]:
    """One mask of every shape and share of pruned weights (to 1 %) among those with 2:4 tiles."""
    different = {
        (mask.shape, round(100 * mask.sparsity)): mask
        for mask in masks.linears.values()
        if (mask.pattern.n, mask.pattern.m) == (2, 4) and mask.sparsity > 0
    }
    if not different:
        raise PatchError("no layer of this mask has 2:4 tiles; there is nothing to measure.")
    return list(different.values())


def _resolve(kernel: str, tokens: int, weight: HybridWeight, device: torch.device) -> tuple[str | None, str]:
    """The kernel's name and why it runs; None and why it does not."""
    if kernel == "auto":
        choice = dispatch.choose(tokens, weight)
        return choice.kernel, f"chosen: {choice.reason}"
    if kernel not in dispatch.kernels():
        raise PatchError(f"kernel {kernel!r}: not one of auto, {', '.join(dispatch.kernels())}.")
    refusal = dispatch.kernels()[kernel].refusal(device, tokens, weight)
    return (None, f"{kernel} cannot run: {refusal}") if refusal else (kernel, "as asked for")


def _copies(weight: HybridWeight) -> list[HybridWeight]:
    """Enough of them that the cache cannot hold all."""
    number = copies_past_cache(weight.nbytes, weight.device)
    return [weight] + [replace(weight, payload=weight.payload.clone()) for _ in range(number - 1)]


@functools.cache
def _compiled_microseconds(tokens: int, out_features: int, in_features: int, device: torch.device) -> float:
    """Of the dense layer by `torch.compile`: once for all sparsities, since compiling takes seconds."""
    torch.compiler.reset()
    linear = torch.compile(_linear, mode=MODE, dynamic=False, fullgraph=True)
    x = torch.randn(tokens, in_features, device=device).to(DTYPE)
    weight = torch.randn(out_features, in_features, device=device).to(DTYPE)
    copies = [weight.clone() for _ in range(copies_past_cache(weight.nbytes, device))]
    with torch.no_grad():
        return microseconds([functools.partial(linear, x, copy) for copy in copies], device)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _floor_seconds(weight: HybridWeight, x: Tensor, device: torch.device) -> float:
    moved = weight.nbytes + x.element_size() * len(x) * sum(weight.shape)
    operations = len(x) * weight.shape[0] * weight.shape[1] * (1 - dispatch.sparse_share(weight) / 2)
    return max(moved / _bandwidth(device), operations / _rate(device))


@functools.cache
def _bandwidth(device: torch.device) -> float:
    bandwidth = copy_bandwidth(device)
    log.info("copy bandwidth: %.2f TB/s", bandwidth / 1e12)
    return bandwidth


@functools.cache
def _rate(device: torch.device) -> float:
    rate = matmul_rate(DTYPE, device)
    log.info("dense matrix product: %.0f TFLOP/s", 2 * rate / 1e12)
    return rate


class _CuSparseLt:
    """The library's product with a 2:4 weight as `torch.sparse` calls it, with a search for the best algorithm."""

    def __init__(self, weight: Tensor):
        pruned = torch.where(keep_n_of_m(weight.abs(), 2, 4), weight, 0)
        compressed = torch._cslt_compress(pruned)
        size = compressed.numel() * compressed.element_size()
        self.compressed = [compressed.clone() for _ in range(copies_past_cache(size, weight.device))]
        log.info("cuSPARSELt %s", torch.backends.cusparselt.version())

    def calls(self, x: Tensor) -> list[Call]:
        padded = F.pad(x, (0, 0, 0, -len(x) % 8)).t()  # [in, tokens], inputs next to each other
        algorithm = torch._cslt_sparse_mm_search(self.compressed[0], padded, transpose_result=True)
        return [
            functools.partial(torch._cslt_sparse_mm, one, padded, transpose_result=True, alg_id=algorithm)
            for one in self.compressed
        ]

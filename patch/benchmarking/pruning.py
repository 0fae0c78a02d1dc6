"""Pruning methods beside their reference implementations: time, memory, masks and what is left of the outputs.

One layer at a time, of a model's shapes. Both sides accumulate the same inputs and prune the same weights. Of
ProxSparse, which trains, it is one application of the proximal operator, as after every step of the optimiser; in
float32 like the others, where its scripts have bfloat16.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch.artefacts import PatchError
from patch.benchmarking.contenders import (
    REPEATS,
    accumulated,
    batches,
    compared,
    output_norm,
    random_layer,
    rounded,
    run,
)
from patch.benchmarking.references import REPOSITORIES, Prune, load_reference
from patch.benchmarking.replay import synchronize
from patch.benchmarking.shapes import layer_shapes
from patch.kernels.proximal import proximal_
from patch.methods import METHODS, ProxSparse, make_method
from patch.provenance import stamp
from patch.pruning.base import Pruner, Statistic
from patch.pruning.sequential import make_pruner
from patch.sparsity.patterns import Pattern


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
    ProxSparse's W' is the operator's result, so mask_agreement is about the weights that it makes exactly 0, and the
    two change the outputs equally where relative_output_error is 1. The 2 largest of each 4, which the method keeps in
    the end, tell nothing after one application: the operator leaves their order as it was.
    Raises PatchError for a pattern that the method cannot make.
    """
    if not makes(method, pattern):
        raise PatchError(f"method {method}: cannot make {pattern}; it makes {', '.join(METHODS[method].patterns)}.")
    contender, kind = _ours(method)
    option = REPOSITORIES[method][0] if method in REPOSITORIES else ""
    reference = load_reference(method, checkouts[option]) if option in checkouts else None
    for out_features, in_features in layer_shapes(shape):
        pattern.check_shape(out_features, in_features, shape)
        weight, inputs = random_layer(out_features, in_features, samples, length, device)
        ours = run(partial(contender, weight, inputs, pattern, sparsity), device)
        theirs = run(partial(reference, weight, inputs, pattern, sparsity), device) if reference else None
        row: dict[str, Any] = {
            "method": method,
            "pattern": str(pattern),
            "out_features": out_features,
            "in_features": in_features,
            **compared(ours, theirs),
            "mask_agreement": None,
            "relative_output_error": None,
        }
        if theirs:
            pruned = (theirs.new_weight == 0).any(dim=1)
            original, new, other = weight[pruned], ours.new_weight[pruned], theirs.new_weight[pruned]
            row["mask_agreement"] = rounded(float(((new == 0) == (other == 0)).float().mean()), 6)
            errors = [output_norm(changed - original, inputs) for changed in (new, other)]
            row["relative_output_error"] = rounded(errors[0] / errors[1], 6)
        forward = {
            "forward_s": rounded(forward_seconds(weight, inputs, None), 6),
            "forward_with_statistic_s": rounded(forward_seconds(weight, inputs, kind), 6),
        }
        yield row | stamp() | forward


def makes(method: str, pattern: Pattern) -> bool:
    """Raises PatchError for an unknown method."""
    return not {pattern.kind, str(pattern)}.isdisjoint(make_method(method, {}).patterns)


def forward_seconds(weight: Tensor, inputs: Tensor, kind: type[Statistic] | None) -> float:
    """Median of REPEATS after one to warm up, of two forward passes; `kind` is accumulated in the first."""
    layer = weight.to(inputs.dtype)
    parts = batches(inputs)
    seconds = []
    for _ in range(REPEATS + 1):
        synchronize(weight.device)
        start = time.perf_counter()
        statistic = kind(weight.shape[1], weight.device) if kind else None
        for batch in parts:
            if statistic is not None:
                statistic.add(batch)
            torch.nn.functional.linear(batch, layer)
        for batch in parts:
            torch.nn.functional.linear(batch, layer)
        synchronize(weight.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _ours(method: str) -> tuple[Prune, type[Statistic] | None]:
    """And the statistic that it accumulates."""
    chosen = make_method(method, {})
    if isinstance(chosen, ProxSparse):
        return partial(_proximal, chosen.proximal_weight), None
    pruner = make_pruner(chosen)
    return partial(prune, pruner), pruner.statistic


def prune(pruner: Pruner, weight: Tensor, inputs: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """New weight [out, in]: statistic, mask, and updates where the method has them."""
    statistic = accumulated(pruner.statistic, inputs) if pruner.statistic else None
    pruned = pruner.prune(weight, statistic, pattern, sparsity)
    return weight.masked_fill(~pruned.keep_mask, 0) if pruned.new_weight is None else pruned.new_weight


def _proximal(strength: float, weight: Tensor, inputs: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    new_weight = weight.clone()  # is part of the time
    proximal_(new_weight, strength)
    return new_weight

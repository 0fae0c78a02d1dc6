"""4-bit quantisation and low-rank adapters beside SLiM's own code: time, memory, codes and what is left of the outputs.

One layer at a time, of a model's shapes. Without adapters all weights are quantised; with them half are pruned, by
Wanda's 2:4 mask, and the adapters make up for both. Both sides get the same weights, mask and inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch.benchmarking.contenders import accumulated, compared, output_norm, random_layer, rounded, run
from patch.benchmarking.pruning import prune
from patch.benchmarking.references import load_slim, slim_obstacle
from patch.benchmarking.shapes import layer_shapes
from patch.compression.compress import TWO_FOUR, compress_weight
from patch.compression.options import Compression
from patch.compression.quantisation import quantise
from patch.methods import Wanda
from patch.provenance import stamp
from patch.pruning.wanda import InputNorm, WandaPruner
from patch.sparsity.maskset import LinearMask

SAME_CODE = 0.05
"""Largest relative difference of two weights with the same 4-bit code: scales differ by less, codes by an eighth."""
log = logging.getLogger(__name__)


def measure(
    shape: str, options: Compression, checkout: Path | None, *, samples: int, length: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Rows of results/reference/compression.csv, one for each different layer of the shape.

    shape: one of SHAPES, or a single layer as OUTxIN. checkout: of SLiM; the reference's columns are empty without, and
    where its quantiser cannot run. code_agreement is the share of weights to which both give the same
    4-bit code; empty with adapters, which differ in every number. relative_output_error is ||X (W' - W)|| of ours
    divided by that of the reference, adapters included in W', so at most 1 is good. With slim_quant and adapters it may
    be a per cent off 1 in either direction: where the weights beside them are clipped depends on their last bits.
    """
    reference = load_slim(checkout, options) if checkout else None
    for out_features, in_features in layer_shapes(shape):
        if options.adapter_rank:
            TWO_FOUR.check_shape(out_features, in_features, shape)
        weight, inputs = random_layer(out_features, in_features, samples, length, device)
        mask = _mask(weight, inputs, options)
        ours = run(partial(_ours, options, weight, mask, inputs), device)
        theirs = None
        if reference and (obstacle := slim_obstacle(weight, options)):
            log.warning("SLiM is not timed: %s", obstacle)
        elif reference:
            theirs = run(partial(reference, weight, mask.keep_mask(), inputs), device)
        row: dict[str, Any] = {
            "quantiser": options.quantiser,
            "adapter_rank": options.adapter_rank,
            "pattern": str(mask.pattern),
            "out_features": out_features,
            "in_features": in_features,
            **compared(ours, theirs),
            "code_agreement": None,
            "relative_output_error": None,
        }
        if theirs:
            if options.adapter_rank == 0:
                same = ours.new_weight.isclose(theirs.new_weight, rtol=SAME_CODE, atol=0)
                row["code_agreement"] = rounded(float(same.float().mean()), 6)
            errors = [output_norm(made.new_weight - weight, inputs) for made in (ours, theirs)]
            row["relative_output_error"] = rounded(errors[0] / errors[1], 6)
        yield row | stamp()


def _mask(weight: Tensor, inputs: Tensor, options: Compression) -> LinearMask:
    if options.adapter_rank == 0:
        return LinearMask.dense((weight.shape[0], weight.shape[1])).to(weight.device)
    pruned = prune(WandaPruner(Wanda()), weight, inputs, TWO_FOUR, 0.5)
    return LinearMask.from_keep_mask(pruned != 0, TWO_FOUR)


def _ours(options: Compression, weight: Tensor, mask: LinearMask, inputs: Tensor) -> Tensor:
    """New weight [out, in], adapters included."""
    if options.adapter_rank == 0:
        return quantise(weight, options).dequantise()
    statistic = accumulated(InputNorm, inputs)
    assert isinstance(statistic, InputNorm)
    made = compress_weight(weight, mask, statistic.mean().sqrt(), options)
    new_weight, left, right = (matrix.dense(torch.float32, weight.device) for _, matrix in made.matrices())
    return new_weight.addmm_(right.T, left)

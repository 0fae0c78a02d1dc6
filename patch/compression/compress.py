"""Quantise a model, after a mask or dense, and fit adapters to what is lost: the recipe of SLIM's `prune_wanda`.

Block after block as in pruning (`patch.pruning.sequential`): inputs come through the compressed blocks before, and
statistics are taken while the block itself is still as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patch.artefacts import PatchError
from patch.compression.adapters import MeanMagnitude, low_rank, prune_left, rank_of
from patch.compression.artefact import CompressedLinear, CompressedSet, StoredMatrix
from patch.compression.options import Compression
from patch.compression.quantisation import group_block, quantise, quantise_blocks
from patch.data import TokenSet
from patch.models import prunable_linears
from patch.pruning.base import Statistic
from patch.pruning.sequential import calibrated_blocks
from patch.pruning.wanda import InputNorm, shift_zeros
from patch.sparsity.maskset import LinearMask, MaskSet, check_model, fingerprint
from patch.sparsity.patterns import Pattern

TWO_FOUR = Pattern("n:m", 2, 4)


@torch.no_grad()
def compress_model(
    model: PreTrainedModel,
    options: Compression,
    masks: MaskSet | None = None,
    calibration: TokenSet | None = None,
    device: str = "cpu",
) -> CompressedSet:
    """Compress the linears of the model's decoder blocks, in place, and return what was made of them.

    model: unpruned. masks: what to prune; None for nothing. calibration: token ids [sequences, length]; needed for
    adapters that weigh inputs.
    Raises PatchError for masks of another model, for missing or foreign calibration tokens, and for NaN or infinite
    weights and activations (the layer is named). The model is then partly compressed.
    """
    linears = prunable_linears(model)
    if options.uses_calibration and calibration is None:
        raise PatchError("compression: adapters need calibration tokens; or set adapter_norm: none.")
    if masks is None:
        dense = {name: LinearMask.dense((linear.out_features, linear.in_features)) for name, linear in linears.items()}
        masks = MaskSet(dense, fingerprint(linears))
    check_model(masks.linears, masks.base_fingerprint, linears)
    base = fingerprint(linears)
    tokens = calibration if options.uses_calibration else None
    new_statistic = MeanMagnitude if options.adapter_norm == "mean_abs" else InputNorm
    compressed: dict[str, CompressedLinear] = {}
    for layers, statistics in calibrated_blocks(model, linears, new_statistic, tokens, device):
        for name, linear in layers.items():
            compressed[name] = _compress_linear(name, linear, options, masks.linears[name], statistics.get(name))
    return CompressedSet(compressed, base)


def _compress_linear(
    name: str, linear: nn.Linear, options: Compression, mask: LinearMask, statistic: Statistic | None
) -> CompressedLinear:
    if not linear.weight.isfinite().all():
        raise PatchError(f"layer {name}: its weights hold NaN or Inf; the checkpoint is damaged, load it again.")
    norms = input_norms(statistic, options, linear)
    made = compress_weight(linear.weight, mask.to(linear.weight.device), norms, options, name)
    made.apply_(linear)
    if not linear.weight.isfinite().all():
        raise PatchError(f"layer {name}: compression made NaN or Inf weights; load the model in bfloat16 or float32.")
    return made.to("cpu")


def input_norms(statistic: Statistic | None, options: Compression, linear: nn.Linear) -> Tensor:
    """x [in_features] in float32: how strongly errors at each input count."""
    if isinstance(statistic, InputNorm):
        squared = statistic.mean()
        return (shift_zeros(squared) if options.shift_zero_metrics else squared).sqrt()
    if isinstance(statistic, MeanMagnitude):
        return shift_zeros(statistic.mean()) if options.shift_zero_metrics else statistic.mean()
    return torch.ones(linear.in_features, device=linear.weight.device)


def compress_weight(
    weight: Tensor, mask: LinearMask, norms: Tensor, options: Compression, layer: str = "?"
) -> CompressedLinear:
    """Compress one weight [out, in]; mask and norms [in] on its device.

    Without adapters: mask * quant(W), or quant(mask * W) with `prune_first`. With adapters, D = right^T left is fitted
    to what that loses, and the weight becomes quant(mask * (W - D)): where the mask keeps a weight, both together give
    W again but for one rounding; where it does not, D is all there is. What D stands for is what is stored of it, its
    own pruning and rounding included (SLIM quantises adapters when the weights are done).
    Weights that the mask brings along (SparseGPT, Thanos) are W without adapters. With them W is always the model's own
    weight: to make up for the loss by adapters does more than by updates, and one undoes the other (SmolLM2-135M,
    SparseGPT 2:4: perplexity 97 before quantisation, 90 with adapters to the model's weights, 101 to the updated ones).
    """
    keep, rank = mask.keep_mask(), rank_of(options, mask.shape)
    if mask.values is not None and rank == 0:
        weight = weight.clone()
        mask.apply_(weight)
    quantised = quantise(weight if options.order == "quantise_first" else weight * keep, options)
    if rank == 0:
        return CompressedLinear(StoredMatrix.quantised(quantised, mask))
    error = weight.float() - quantised.dequantise().mul_(keep)
    left, right = low_rank(error, norms, rank)
    kept = None
    if options.adapter_sparsity == "2:4":
        left, right, kept = prune_left(left, right, norms, layer)
    stored = _store_factors(left, right, kept, options)
    left_t, right = (factor.dense(torch.float32, weight.device) for factor in stored)
    residual = (weight.float() - right.T @ left_t).mul_(keep).to(weight.dtype)
    return CompressedLinear(StoredMatrix.quantised(quantise(residual, options), mask), *stored)


def _store_factors(
    left: Tensor, right: Tensor, keep: Tensor | None, options: Compression
) -> tuple[StoredMatrix, StoredMatrix]:
    """left [in, rank], which is stored transposed; right [rank, out]; keep: what of left is not pruned (None: all)."""
    pruned = None if keep is None else LinearMask.from_keep_mask(keep.T, TWO_FOUR)
    height, width = group_block(options)
    blocks = (width, height), (height, width)
    factors = (left.T.to(torch.bfloat16), pruned), (right.to(torch.bfloat16), None)
    if options.adapter_bits == 16:
        first, second = (StoredMatrix.plain(factor, mask) for factor, mask in factors)
    else:
        first, second = (
            StoredMatrix.quantised(quantise_blocks(factor, block), mask)
            for (factor, mask), block in zip(factors, blocks, strict=True)
        )
    return first, second

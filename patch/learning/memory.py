"""What a learning job needs on its device, per component: printed when it does not fit."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from patch.learning.objective import LOGIT_BYTES_PER_CHUNK
from patch.methods import Learned, LearnedPatterns, ProxSparse, TrainedWeights
from patch.models import prunable_linears
from patch.sparsity.patterns import Pattern
from patch.sparsity.tiles import grid_shape


def memory_estimate(
    model: PreTrainedModel, method: Learned, pattern: Pattern, length: int, processes: int = 1
) -> dict[str, float]:
    """GiB per component on one device.

    length: tokens per sequence; processes: how many devices share the blocks' weights and logits (1 unless sharded).
    An estimate: activations are those of a compiled Llama block, fragmentation and libraries are left out.
    """
    shapes = [(linear.out_features, linear.in_features) for linear in prunable_linears(model).values()]
    weights = sum(rows * columns for rows, columns in shapes)
    grids = [grid_shape(shape, pattern.for_layer(*shape).tile) for shape in shapes] if pattern.kind == "tiles" else []
    tiles = sum(map(math.prod, grids))
    element = model.dtype.itemsize
    logit, gradient, state = method.logit_bytes
    pattern_logits = 1.5 * weights if isinstance(method, LearnedPatterns) else 0.0
    other = sum(parameter.numel() for parameter in model.parameters()) - weights
    blocks = model.config.get_text_config().num_hidden_layers
    effective = 2 * weights * element / blocks if method.checkpointing == "all" else weights * element
    parts = {
        "weights": weights * element / processes + other * element,
        "logits": (pattern_logits * logit / processes + tiles * logit),
        "gradients": (pattern_logits * gradient / processes + tiles * logit),
        "optimizer": (pattern_logits * state / processes + tiles * state),
        "effective weights": effective,
        "activations": _activations(model, method.micro_batch_size * length, method.checkpointing, compiled=True),
        "loss": 3 * LOGIT_BYTES_PER_CHUNK,
    }
    return _in_gib(parts)


def weights_memory_estimate(model: PreTrainedModel, method: TrainedWeights, length: int) -> dict[str, float]:
    """GiB per component on one device, of training weights; otherwise as `memory_estimate`."""
    prunable = sum(linear.weight.numel() for linear in prunable_linears(model).values())
    everything = sum(parameter.numel() for parameter in model.parameters())
    trained = everything if isinstance(method, ProxSparse) else prunable
    element = model.dtype.itemsize
    copy, gradient, moments = method.weight_bytes(element)
    parts = {
        "weights": everything * element,
        "float32 copy": trained * copy,
        "gradients": trained * gradient,
        "optimizer": trained * moments,
        "masks": 0 if isinstance(method, ProxSparse) else prunable,
        "activations": _activations(model, method.micro_batch_size * length, method.checkpointing, compiled=False),
        "loss": 3 * LOGIT_BYTES_PER_CHUNK,
    }
    return _in_gib(parts)


def _activations(model: PreTrainedModel, tokens: int, checkpointing: str, *, compiled: bool) -> float:
    """Bytes: the inputs of all blocks, what the block under way computes, and what the others keep of that."""
    config = model.config.get_text_config()
    hidden, blocks = config.hidden_size, config.num_hidden_layers
    mlp = getattr(config, "intermediate_size", 4 * hidden)
    # Per token, about 16 hidden and 4 MLP widths. A compiled block keeps of them what its products and its attention
    # read: both norms' outputs, queries, keys and values, the attention's output, the stream after it; gate, up and
    # their product.
    inner = 16 * hidden + 4 * mlp
    kept = 6 * hidden + 3 * mlp if compiled else inner
    others = kept * (blocks - 1) if checkpointing == "off" else 0
    return tokens * model.dtype.itemsize * (hidden * blocks + inner + others)


def _in_gib(parts: dict[str, float]) -> dict[str, float]:
    return {name: round(size / 2**30, 2) for name, size in parts.items()} | {
        "sum": round(math.fsum(parts.values()) / 2**30, 2)
    }

"""What a learning job needs on its device, per component: printed when it does not fit."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from patch.learning.objective import LOGIT_BYTES_PER_CHUNK
from patch.methods import Learned, LearnedPatterns
from patch.models import prunable_linears
from patch.sparsity.patterns import Pattern
from patch.sparsity.tiles import grid_shape


def memory_estimate(
    model: PreTrainedModel, method: Learned, pattern: Pattern, length: int, processes: int = 1
) -> dict[str, float]:
    """GiB per component on one device.

    length: tokens per sequence; processes: how many devices share the blocks' weights and logits (1 unless sharded).
    An estimate: activations are those of a Llama block, fragmentation and libraries are left out.
    """
    shapes = [(linear.out_features, linear.in_features) for linear in prunable_linears(model).values()]
    weights = sum(rows * columns for rows, columns in shapes)
    grids = [grid_shape(shape, pattern.for_layer(*shape).tile) for shape in shapes] if pattern.kind == "tiles" else []
    tiles = sum(map(math.prod, grids))
    element = model.dtype.itemsize
    logit, gradient, state = method.logit_bytes
    config = model.config.get_text_config()
    blocks = config.num_hidden_layers
    tokens = method.micro_batch_size * length
    pattern_logits = 1.5 * weights if isinstance(method, LearnedPatterns) else 0.0
    other = sum(parameter.numel() for parameter in model.parameters()) - weights
    stored = tokens * config.hidden_size * element * blocks
    # attention and MLP intermediates of one block: about 16 hidden and 4 MLP widths per token
    mlp = getattr(config, "intermediate_size", 4 * config.hidden_size)
    inner = tokens * (16 * config.hidden_size + 4 * mlp) * element
    live = blocks if method.checkpointing == "off" else 1
    effective = 2 * weights * element / blocks if method.checkpointing == "all" else weights * element
    parts = {
        "weights": weights * element / processes + other * element,
        "logits": (pattern_logits * logit / processes + tiles * logit),
        "gradients": (pattern_logits * gradient / processes + tiles * logit),
        "optimizer": (pattern_logits * state / processes + tiles * state),
        "effective weights": effective,
        "activations": stored + inner * live,
        "loss": 3 * LOGIT_BYTES_PER_CHUNK,
    }
    return {name: round(size / 2**30, 2) for name, size in parts.items()} | {
        "sum": round(math.fsum(parts.values()) / 2**30, 2)
    }

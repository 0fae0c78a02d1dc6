"""Attention of one new token per sequence over a static cache: only the part of the cache that is filled is read.

The number of filled positions stays on the device, so that one CUDA graph serves all steps of a generation. With a mask
over the whole cache, as `scaled_dot_product_attention` takes it, every step would read all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from patch.kernels import runs_triton


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """softmax(query keys^T / sqrt(size)) values over positions up to `position` -> [batch, heads, 1, size].

    query: [batch, heads, 1, size], contiguous. keys, values: the cache, [batch, key heads, length, size], contiguous;
    heads are a multiple of key heads. position: of the new token, whose key is in the cache already; int64 [1].
    """
    if runs_triton(query):
        from patch.kernels.attention import decode_triton

        if decode_triton.supports(query, keys):
            return decode_triton.decode_attention(query, keys, values, position)
    return reference(query, keys, values, position)


def reference(query: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """The same by PyTorch's own attention with a mask, on any device."""
    filled = torch.arange(keys.shape[2], device=keys.device) <= position
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=filled.view(1, 1, 1, -1), enable_gqa=True)

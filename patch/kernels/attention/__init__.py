"""Attention while generating, for both sides of a comparison: what PyTorch's own attention does not do well."""

from patch.kernels.attention.decode import decode_attention, reference

__all__ = ["decode_attention", "reference"]

"""Products with weights whose tiles are dense or 2:4: the format, the kernels, and a reference that runs anywhere."""

from patch.kernels.hybrid.format import HybridWeight, pack, reference_matmul, unpack
from patch.kernels.hybrid.hopper import decode, prefill, supports

__all__ = ["HybridWeight", "decode", "pack", "prefill", "reference_matmul", "supports", "unpack"]

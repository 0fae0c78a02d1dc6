"""Products with weights whose tiles are dense or 2:4: the format, the kernels, and a reference that runs anywhere."""

from patch.kernels.hybrid.format import HybridWeight, pack, reference_matmul, unpack

__all__ = ["HybridWeight", "pack", "reference_matmul", "unpack"]

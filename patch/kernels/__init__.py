"""Fused kernels of mask learning, each beside a plain PyTorch version that runs anywhere and says what it computes."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels can work on `tensor`: it is on a GPU, and Triton is installed."""
    return tensor.is_cuda and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None

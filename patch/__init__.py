"""PATCH: learnable tile-level hybrid sparsity for language models, its baselines, and their reproduction.

The public API; it is imported on first use, so that the command line starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patch.exporting import export
    from patch.inference import load
    from patch.kernels.hybrid.linear import HybridLinear
    from patch.quickstart import evaluate, get_llm, learn_mask, prepare_pruned_model

__all__ = ["HybridLinear", "evaluate", "export", "get_llm", "learn_mask", "load", "prepare_pruned_model"]
_HOMES = {
    "HybridLinear": "patch.kernels.hybrid.linear",
    "export": "patch.exporting",
    "load": "patch.inference",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'patch' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "patch.quickstart")), name)

"""PATCH: learnable tile-level hybrid sparsity for language models, its baselines, and their reproduction.

The public API; it is imported on first use, so that the command line starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patch.quickstart import evaluate, get_llm, learn_mask, prepare_pruned_model

__all__ = ["evaluate", "get_llm", "learn_mask", "prepare_pruned_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'patch' has no attribute {name!r}")
    return getattr(importlib.import_module("patch.quickstart"), name)

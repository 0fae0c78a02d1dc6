"""Import alias: the official Quick Start finds these functions here. They live in `patch.quickstart`."""

from patch.quickstart import evaluate, prepare_pruned_model

__all__ = ["evaluate", "prepare_pruned_model"]

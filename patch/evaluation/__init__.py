"""What a model is worth: perplexity by the papers' protocol, and zero-shot accuracy by lm-evaluation-harness."""

from patch.evaluation.suite import evaluate_model

__all__ = ["evaluate_model"]

"""One-shot pruning: a block-by-block calibration driver, and one module per method.

A method has three parts that can be read and tested alone: what it accumulates over a layer's inputs (a
`Statistic`), how it scores weights, and how the scores become a mask.
"""

from patch.pruning.sequential import Job, prune_model, prune_together

__all__ = ["Job", "prune_model", "prune_together"]

"""Learning masks on frozen weights: MaskLLM, PATCH-Joint and PATCH-Tile."""

from patch.learning.stopping import Stopped
from patch.learning.trainer import LearnedMasks, learn_masks

__all__ = ["LearnedMasks", "Stopped", "learn_masks"]

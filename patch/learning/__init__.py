"""Training: masks on frozen weights (MaskLLM, PATCH-Joint, PATCH-Tile), and weights (ProxSparse, fine-tuning)."""

from patch.learning.loop import LearnedMasks
from patch.learning.stopping import Stopped
from patch.learning.trainer import learn_masks
from patch.learning.weights import train_weights

__all__ = ["LearnedMasks", "Stopped", "learn_masks", "train_weights"]

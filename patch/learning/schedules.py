"""How learning rate, temperatures, scales and the norm term change over the steps (PATCH table 6.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from patch.methods import Learned, LearnedPatterns, LearnedTiles, PatchJoint, Trained


@dataclass(frozen=True)
class Sharpness:
    """Scale and temperature of one Gumbel-softmax at one step: softmax((scale * logits + gumbel) / temperature)."""

    scale: float
    temperature: float


@dataclass(frozen=True)
class Schedule:
    """What depends on the optimiser step, counted from 0."""

    method: Trained

    def learning_rate(self, step: int) -> float:
        """Linear warm-up from 0, then a cosine or a line to 0 (transformers' schedules "cosine" and "linear")."""
        warmup, total = self.method.warmup_steps, self.method.steps
        if step < warmup:
            return self.method.learning_rate * step / warmup
        progress = (step - warmup) / max(1, total - warmup)
        falling = 0.5 * (1 + math.cos(math.pi * progress)) if self.method.decay == "cosine" else 1 - progress
        return self.method.learning_rate * falling


@dataclass(frozen=True)
class MaskSchedule(Schedule):
    """Of mask learning; the last of T steps computes at (T - 1) / T of every range."""

    method: Learned
    sparsity: float
    """Target share of pruned weights, 0 to 1."""

    def patterns(self, step: int) -> Sharpness:
        """Of the 2:4 logits; methods without any get a constant that nothing reads."""
        if not isinstance(self.method, LearnedPatterns):
            return Sharpness(1.0, 1.0)
        return self._sharpness(step, self.method.pattern_scale, self.method.pattern_temperature)

    def tiles(self, step: int) -> Sharpness:
        """Of the tile logits; methods without any get a constant that nothing reads."""
        if not isinstance(self.method, LearnedTiles):
            return Sharpness(1.0, 1.0)
        return self._sharpness(step, self.method.tile_scale, self.tile_temperature)

    @property
    def tile_temperature(self) -> tuple[float, float]:
        """Start and end; the paper's depend on the method and the sparsity."""
        assert isinstance(self.method, LearnedTiles)
        if self.method.tile_temperature is not None:
            return self.method.tile_temperature
        start = 4.0 if isinstance(self.method, PatchJoint) and self.sparsity >= 0.4 else 2.0
        return start, 0.05

    def norm_weight(self, step: int) -> float:
        fade = 1 - step / self.method.steps if self.method.norm_decay else 1.0
        return self.method.norm_weight * fade

    def _sharpness(self, step: int, scale: tuple[float, float], temperature: tuple[float, float]) -> Sharpness:
        share = step / self.method.steps
        return Sharpness(_between(scale, share), _between(temperature, share))


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share

"""One layer's inputs, and what `reference` makes of them in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patch.kernels.soft_mask import Sampling, effective_weight, philox_noise, reference
from patch.sparsity.tiles import grid_shape

LAYER = 3
SHARPNESS = {"scale": 4.0, "temperature": 0.7}

# whole tiles; ragged ones; odd shapes; tiles larger than the matrix; narrow ones; panels; rows that are not in eights
SHAPES = [
    ((64, 256), (32, 128)),
    ((40, 200), (16, 128)),
    ((3, 12), (2, 8)),
    ((7, 20), (128, 128)),
    ((40, 64), (5, 4)),
    ((24, 576), (8, 576)),
    ((260, 132), (8, 128)),
]


@dataclass
class Case:
    """A layer; every tensor has the values that it was rounded to."""

    weight: Tensor
    patterns: Tensor
    tile_sample: Tensor | None
    tile: tuple[int, int]
    d_effective: Tensor
    hard: bool
    d_square_sum: float = 0.3

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        tile: tuple[int, int],
        *,
        dtype: torch.dtype = torch.float32,
        logits_dtype: torch.dtype = torch.float32,
        tiles: bool = True,
        codes: bool = False,
        hard: bool = False,
        device: str = "cpu",
    ) -> Case:
        generator = torch.Generator().manual_seed(0)
        groups = (shape[0], shape[1] // 4)
        patterns = torch.randn(6, *groups, generator=generator).to(logits_dtype)
        if codes:
            patterns = torch.randint(6, groups, generator=generator, dtype=torch.uint8)
        return cls(
            torch.randn(shape, generator=generator).to(device, dtype),
            patterns.to(device),
            torch.rand(grid_shape(shape, tile), generator=generator).to(device) if tiles else None,
            tile,
            torch.randn(shape, generator=generator).to(device, dtype),
            hard,
        )

    def run(
        self, sampling: Sampling, gradient: Tensor | None = None, gradient_squares: Tensor | None = None
    ) -> dict[str, Any]:
        """Values and gradients of `effective_weight`."""
        inputs = self._inputs()
        effective, square_sum = effective_weight(
            self.weight,
            *inputs,
            self.tile,
            sampling,
            LAYER,
            hard=self.hard,
            gradient=gradient,
            gradient_squares=gradient_squares,
        )
        return self._results(effective, square_sum, inputs)

    def expected(self, sampling: Sampling) -> dict[str, Any]:
        """The same by `reference` in float64 on the CPU, from the same noise."""
        patterns, tile_sample = (None if x is None else x.detach().cpu() for x in self._inputs())
        weight = self.weight.cpu().double()
        assert patterns is not None
        if patterns.is_floating_point():
            draw = sampling.noise(sampling, LAYER, patterns.shape[2])
            logits, gumbel = patterns.double(), draw(patterns.shape[1]).double()
        else:  # a frozen mask is the limit of certain patterns
            logits = torch.nn.functional.one_hot(patterns.long(), 6).movedim(-1, 0).double() * 1e6
            gumbel = torch.zeros_like(logits)
        inputs = (
            logits.requires_grad_(patterns.is_floating_point()),
            None if tile_sample is None else tile_sample.double().requires_grad_(),
        )
        sharpness = (sampling.scale, sampling.temperature)
        results = reference(weight, inputs[0], inputs[1], self.tile, gumbel, *sharpness, self.hard)
        return self._results(*results, inputs)

    def _inputs(self) -> tuple[Tensor, Tensor | None]:
        patterns = self.patterns.clone()
        tile_sample = None if self.tile_sample is None else self.tile_sample.clone().requires_grad_()
        return patterns.requires_grad_(patterns.is_floating_point()), tile_sample

    def _results(self, effective: Tensor, square_sum: Tensor, inputs: tuple[Tensor, Tensor | None]) -> dict[str, Any]:
        leaves = [leaf for leaf in inputs if leaf is not None and leaf.requires_grad]
        loss = (effective * self.d_effective.to(effective)).sum(dtype=torch.float64) + self.d_square_sum * square_sum
        if leaves:
            loss.backward()
        return {
            "effective": effective.detach().cpu(),
            "square_sum": square_sum.detach().cpu(),
            "d_logits": None if inputs[0].grad is None else inputs[0].grad.cpu(),
            "d_tiles": None if inputs[1] is None or inputs[1].grad is None else inputs[1].grad.cpu(),
        }


def assert_agree(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Relative error, in the norm, of every result; its dtype's rounding comes on top."""
    for name, wanted in expected.items():
        if wanted is None or actual[name] is None:
            assert actual[name] is wanted, name
            continue
        allowed = tolerance + torch.finfo(actual[name].dtype).eps / 2
        error = (actual[name].double() - wanted).norm() / wanted.norm().clamp_min(1e-12)
        assert error <= allowed, f"{name}: {float(error):.1e} > {allowed:.1e}"


def make_sampling(device: str = "cpu") -> Sampling:
    """With the noise that CPU and GPU share."""
    sampling = Sampling(seed=2**40 + 5, rank=1, device=device, noise=philox_noise)
    sampling.set(micro_step=7, accumulate=False, **SHARPNESS)
    return sampling

"""The Hessian of a layer's output error, which SparseGPT and Thanos accumulate, and the inverse that both work with.

Damping, dead inputs and scale are those of SGPT `sparsegpt.py` and THAN `lib/thanos.py`, which agree.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from patch.artefacts import PatchError

DAMPING_RETRIES = 4
STRIP = 1024
TOKENS, TOKENS_OF_16_BITS = 4096, 16384
"""At a time: those that are converted to the dtype of sums, and those of 16 bits on a GPU, which are not."""
DOUBLE = 2048
"""Inputs up to which sums on a CPU are in float64: it is cheap there, and masks do not turn with the order of sums."""
log = logging.getLogger(__name__)


def sum_dtype(in_features: int, device: torch.device) -> torch.dtype:
    """Of sums over tokens: float32, and float64 for up to DOUBLE inputs on a CPU."""
    return torch.float64 if device.type == "cpu" and in_features <= DOUBLE else torch.float32


def token_parts(inputs: Tensor) -> tuple[Tensor, ...]:
    """[..., in_features] as [tokens, in_features] each, so many at a time as can be in the dtype of sums, too."""
    tokens = inputs.reshape(-1, inputs.shape[-1])
    return tokens.split(TOKENS_OF_16_BITS if _taken_as_they_are(inputs) else TOKENS)


def sequence_count(inputs: Tensor) -> int:
    """Of [sequences, tokens, in_features], or of the one [tokens, in_features]."""
    return inputs.shape[0] if inputs.dim() > 2 else 1


def _taken_as_they_are(inputs: Tensor) -> bool:
    """Numbers of 16 bits on a GPU, whose sums are in float32 without a copy of them in it."""
    return inputs.is_cuda and inputs.dtype in (torch.bfloat16, torch.float16)


class Hessian:
    """H = 2/n * sum of x x^T over the tokens of n sequences, [in_features, in_features] of `sum_dtype`.

    Symmetric: only what lies right of the diagonal, in strips of STRIP rows, is computed and read.
    """

    def __init__(self, in_features: int, device: torch.device):
        self.sum = torch.zeros(in_features, in_features, dtype=sum_dtype(in_features, device), device=device)
        self.sequences = 0
        self._factor: Tensor | None = None
        self._damping = 0.0

    def add(self, inputs: Tensor) -> None:
        # Tensor cores multiply 16-bit numbers exactly and add them up in float32, many times as fast as float32.
        exact = _taken_as_they_are(inputs)
        for part in token_parts(inputs):
            tokens = part if exact else part.to(self.sum.dtype)
            for start in range(0, len(self.sum), STRIP):
                rows, columns = tokens[:, start : start + STRIP].T, tokens[:, start:]
                strip = self.sum[start : start + STRIP, start:]
                if exact:
                    torch.addmm(strip, rows, columns, out_dtype=torch.float32, out=strip)
                else:
                    strip.addmm_(rows, columns)
        self.sequences += sequence_count(inputs)

    def is_finite(self) -> bool:
        return bool(self.sum.diagonal().float().isfinite().all())

    def dead_inputs(self) -> Tensor:
        """bool [in_features]: inputs that were 0 in every token."""
        return self.sum.diagonal() == 0

    def input_norms(self) -> Tensor:
        """Mean over sequences of the squared L2 norm of every input, float32 [in_features]: Wanda's statistic."""
        return (self.sum.diagonal() / self.sequences).float()

    def inverse_factor(self, damping: float) -> Tensor:
        """Upper Cholesky factor U of the inverse, inv(H) = U^T U, damped by a share of the mean diagonal; float32.

        Without its first i rows and columns it is the factor of the inverse of H without them.
        Kept for the next call, since layers that share their inputs share this object. When the Cholesky
        decomposition fails, the damping grows tenfold and a warning says so.
        """
        if self._factor is None or self._damping != damping:
            self._factor, self._damping = None, damping
            self._factor = self._invert(damping)
        return self._factor

    def _invert(self, damping: float) -> Tensor:
        size = len(self.sum)
        for _ in range(DAMPING_RETRIES):
            # With the order of inputs reversed, one Cholesky gives H = R R^T with R upper triangular, and
            # U = inv(R) is the factor: half the work of inverting H and factoring the inverse.
            reversed_lower, failed = torch.linalg.cholesky_ex(self._damped(damping).flip(0, 1))
            if not failed:
                factor = torch.eye(size, dtype=self.sum.dtype, device=self.sum.device)
                torch.linalg.solve_triangular(reversed_lower, factor, upper=False, out=factor)
                del reversed_lower
                return factor.flip(0, 1).float()
            log.warning("Hessian of %d inputs: not positive definite at damping %g", size, damping)
            damping *= 10
        raise PatchError(
            f"Hessian of {size} inputs: not invertible even at damping {damping / 10:g}; "
            "use more calibration tokens or a larger damping."
        )

    def _damped(self, damping: float) -> Tensor:
        hessian = self.sum * (2 / self.sequences)
        diagonal = hessian.diagonal()
        diagonal[self.dead_inputs()] = 1
        diagonal += damping * diagonal.mean()
        return hessian

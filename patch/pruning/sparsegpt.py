"""SparseGPT: prune column by column, each time correcting the columns to the right. arXiv 2301.00774; SGPT
`sparsegpt.py: fasterprune`.

The reference's unstructured threshold (`<=`) drops one weight more than asked for per block, and all ties;
here the target is met exactly.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from patch.artefacts import PatchError
from patch.methods import SparseGPT
from patch.pruning.base import Pruned, Statistic
from patch.sparsity.patterns import Pattern, keep_largest, keep_n_of_m

DAMPING_RETRIES = 4
log = logging.getLogger(__name__)


class Hessian:
    """H = 2/n * sum of x x^T over the tokens of n sequences, float32 [in_features, in_features]."""

    def __init__(self, in_features: int, device: torch.device):
        self.sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.sequences = 0
        self._factor: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        tokens = inputs.reshape(-1, inputs.shape[-1]).float()
        self.sum.addmm_(tokens.T, tokens)
        self.sequences += inputs.shape[0] if inputs.dim() > 2 else 1

    def is_finite(self) -> bool:
        return bool(self.sum.diagonal().isfinite().all())

    def dead_inputs(self) -> Tensor:
        """bool [in_features]: inputs that were 0 in every token."""
        return self.sum.diagonal() == 0

    def inverse_factor(self, damping: float) -> Tensor:
        """Upper Cholesky factor U of the inverse, inv(H) = U^T U, damped; computed once and kept.

        Layers that share their inputs share this object. When the Cholesky decomposition fails, the damping
        grows tenfold and a warning says so.
        """
        if self._factor is None:
            self._factor = self._invert(damping)
        return self._factor

    def _invert(self, damping: float) -> Tensor:
        hessian = self.sum * (2 / self.sequences)
        diagonal = hessian.diagonal()
        diagonal[self.dead_inputs()] = 1
        undamped, mean = diagonal.clone(), diagonal.mean()
        for _ in range(DAMPING_RETRIES):
            diagonal.copy_(undamped + damping * mean)
            # With the order of inputs reversed, one Cholesky gives H = R R^T with R upper triangular, and
            # U = inv(R) is the factor: half the work of inverting H and factoring the inverse.
            reversed_lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
            if not failed:
                identity = torch.eye(len(diagonal), device=hessian.device)
                return torch.linalg.solve_triangular(reversed_lower, identity, upper=False).flip(0, 1)
            log.warning("Hessian of %d inputs: not positive definite at damping %g", len(diagonal), damping)
            damping *= 10
        raise PatchError(
            f"Hessian of {len(diagonal)} inputs: not invertible even at damping {damping / 10:g}; "
            "use more calibration tokens or a larger damping."
        )


class SparseGPTPruner:
    def __init__(self, options: SparseGPT):
        self.options = options

    def new_statistic(self, in_features: int, device: torch.device) -> Hessian:
        return Hessian(in_features, device)

    def prune(self, weight: Tensor, statistic: Statistic | None, pattern: Pattern, sparsity: float) -> Pruned:
        assert isinstance(statistic, Hessian)
        factor = statistic.inverse_factor(self.options.damping)
        # Columns become rows: the loop then reads and writes contiguous memory.
        weight_io = weight.float().T.contiguous()
        weight_io[statistic.dead_inputs()] = 0
        keep_io = solve(weight_io, factor, pattern, sparsity, self.options.block_size)
        return Pruned(keep_io.T.contiguous(), weight_io.T.to(weight.dtype).contiguous())


def solve(weight_io: Tensor, factor: Tensor, pattern: Pattern, sparsity: float, block_size: int) -> Tensor:
    """Prune and correct `weight_io` [in, out] in place; returns the keep mask, bool [in, out].

    factor: upper Cholesky factor of the inverse Hessian [in, in]. Inside a block every input corrects the
    inputs after it; the inputs after the block get the block's corrections at once.
    """
    inputs, outputs = weight_io.shape
    if pattern.kind == "n:m":  # a group never crosses the end of a block
        block_size = -(-block_size // pattern.m) * pattern.m
    keep_io = torch.ones(inputs, outputs, dtype=torch.bool, device=weight_io.device)
    for start in range(0, inputs, block_size):
        end = min(start + block_size, inputs)
        block, block_factor = weight_io[start:end], factor[start:end, start:end]
        block_diagonal = block_factor.diagonal()
        errors = torch.empty_like(block)
        if pattern.kind == "unstructured":
            scores = (block / block_diagonal.unsqueeze(1)).square()
            # by position in [out, in], like the reference, should scores be equal
            kept = keep_largest(scores.T.reshape(1, -1), sparsity)
            keep_io[start:end] = kept.view(outputs, -1).T
        for i in range(end - start):
            if pattern.kind == "n:m" and i % pattern.m == 0:
                group = slice(i, i + pattern.m)
                scores = (block[group] / block_diagonal[group].unsqueeze(1)).square()
                keep_io[start + i : start + i + pattern.m] = keep_n_of_m(scores, pattern.n, pattern.m, dim=0)
            pruned = ~keep_io[start + i]
            errors[i] = block[i] * pruned / block_diagonal[i]
            # the input's own row becomes exactly 0 where pruned: block[i] - errors[i] * diagonal, without rounding
            block[i].masked_fill_(pruned, 0)
            block[i + 1 :].addr_(block_factor[i, i + 1 :], errors[i], alpha=-1)
        weight_io[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return keep_io

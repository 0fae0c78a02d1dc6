"""SparseGPT: prune column by column, each time correcting the columns to the right. arXiv 2301.00774; SGPT
`sparsegpt.py: fasterprune`.

The reference's unstructured threshold (`<=`) drops one weight more than asked for per block, and all ties;
here the target is met exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patch.methods import SparseGPT
from patch.pruning.base import Pruned, Statistic
from patch.pruning.hessian import Hessian
from patch.sparsity.patterns import Pattern, keep_largest, keep_n_of_column

PANEL = 16


class SparseGPTPruner:
    statistic = Hessian

    def __init__(self, options: SparseGPT):
        self.options = options

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

    factor: upper Cholesky factor of the inverse Hessian [in, in]. Inputs correct those after them: inside a panel
    (a group of an N:M pattern) one by one, the rest of the block once per panel, all others once per block.
    """
    inputs, outputs = weight_io.shape
    panel = pattern.m or PANEL
    if pattern.kind == "n:m":  # a group never crosses the end of a block
        block_size = -(-block_size // pattern.m) * pattern.m
    pruned_io = torch.empty(inputs, outputs, dtype=torch.bool, device=weight_io.device)
    for start in range(0, inputs, block_size):
        end = min(start + block_size, inputs)
        block, pruned = weight_io[start:end], pruned_io[start:end]
        scale = factor.diagonal()[start:end].unsqueeze(1)
        unit_factor = factor[start:end, start:] / scale  # rows of diagonal 1: what a removed weight of 1 costs others
        if pattern.kind == "unstructured":
            # by position in [out, in], like the reference, should scores be equal
            kept = keep_largest((block / scale).square().T.reshape(1, -1), sparsity)
            pruned.copy_(~kept.view(outputs, -1).T)
        removed = torch.empty_like(block)
        for first in range(0, end - start, panel):
            last = min(first + panel, end - start)
            if pattern.kind == "n:m":
                scores = (block[first:last] / scale[first:last]).square()
                torch.logical_not(keep_n_of_column(scores, pattern.n), out=pruned[first:last])
            for i in range(first, last):
                torch.mul(block[i], pruned[i], out=removed[i])
                block[i + 1 : last].addr_(unit_factor[i, i + 1 : last], removed[i], alpha=-1)
            block[last:].addmm_(unit_factor[first:last, last : end - start].T, removed[first:last], alpha=-1)
        block.masked_fill_(pruned, 0)
        weight_io[end:].addmm_(unit_factor[:, end - start :].T, removed, alpha=-1)
    return ~pruned_io

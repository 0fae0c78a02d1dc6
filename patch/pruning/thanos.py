"""Thanos: prune block by block, each time moving all other weights of a row to where its outputs change least.
arXiv 2504.05346; THAN `lib/thanos.py: Thanos.snap`.

The mask of a block is fixed before any of its weights moves (Wanda's scores of the weights as they are by then).
Every row then gets the least-squares update that makes all its pruned weights of the block 0 at once: with G the
inverse of the Hessian of this and all later inputs, and M the row's pruned inputs,

    w <- w - G[:, M] inv(G[M, M]) w[M]

Two things make it fast. G is never formed: the Cholesky factor of the whole inverse holds that of every G, of which
only the block's rows are needed. And inv(G[M, M]) w[M] is scattered into the block's columns, after which the update
of all rows is one matrix product instead of one per row. On a GPU `patch.kernels.thanos_triton` solves the systems.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from patch.artefacts import PatchError
from patch.kernels import runs_triton
from patch.methods import Thanos
from patch.pruning.base import Pruned, Statistic
from patch.pruning.hessian import DAMPING_RETRIES, Hessian
from patch.pruning.wanda import score
from patch.sparsity.patterns import Pattern, drop_lowest, keep_n_of_m, pruned_count

SYSTEM_BYTES = {"cpu": 2**26, "cuda": 2**28}
"""Size of the systems that are solved together; results do not depend on it."""
PANEL = {"cpu": 32, "cuda": 64}
"""Columns of a system that are eliminated at a time."""
log = logging.getLogger(__name__)


class HessianAndLast(Hessian):
    """The Hessian, and the squared inputs of the last sequence alone: the reference ranks rows by them."""

    last_squares: Tensor
    """float32 [in_features]"""

    def add(self, inputs: Tensor) -> None:
        super().add(inputs)
        last = inputs[-1] if inputs.dim() > 2 else inputs
        self.last_squares = last.float().square().sum(dim=0)


class ThanosPruner:
    def __init__(self, options: Thanos):
        self.options = options
        self.statistic = HessianAndLast if options.dense_row else Hessian

    def prune(self, weight: Tensor, statistic: Statistic | None, pattern: Pattern, sparsity: float) -> Pruned:
        """Raises PatchError where the systems stay singular at thousandfold damping."""
        assert isinstance(statistic, Hessian)
        original = weight.float().masked_fill(statistic.dead_inputs(), 0)
        rows = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        if isinstance(statistic, HessianAndLast) and pattern.kind == "n:m":
            if str(pattern) != "2:4":
                raise PatchError(f"Thanos: dense_row goes with the pattern 2:4, not with {pattern}.")
            rows[(original.square() @ statistic.last_squares).argmax()] = False
        damping = self.options.damping
        for _ in range(DAMPING_RETRIES):
            pruned_rows, factor = original[rows], statistic.inverse_factor(damping)
            keep = solve(pruned_rows, factor, statistic.input_norms(), pattern, sparsity, self.options.block_size)
            if keep is not None:
                new_weight, keep_mask = original.clone(), torch.ones_like(original, dtype=torch.bool)
                new_weight[rows], keep_mask[rows] = pruned_rows, keep
                return _pruned(keep_mask, new_weight.to(weight.dtype), rows)
            log.warning("Thanos, %d inputs: its systems are singular at damping %g", weight.shape[1], damping)
            damping *= 10
        raise PatchError(
            f"Thanos, {weight.shape[1]} inputs: its systems are singular even at damping {damping / 10:g}; "
            "use more calibration tokens or a larger damping."
        )


def _pruned(keep_mask: Tensor, new_weight: Tensor, rows: Tensor) -> Pruned:
    """With a row that stays dense, 2:4 becomes a pattern of tiles: every row is one. rows: bool [out], the others."""
    if rows.all():
        return Pruned(keep_mask, new_weight)
    tiles = Pattern("tiles", 2, 4, (1, keep_mask.shape[1]))
    return Pruned(keep_mask, new_weight, pattern=tiles, dense_tiles=~rows.unsqueeze(1))


def solve(
    weight: Tensor, factor: Tensor, input_norms: Tensor, pattern: Pattern, sparsity: float, block_size: int
) -> Tensor | None:
    """Prune and correct `weight`, float32 [out, in], in place; returns the keep mask, bool [out, in].

    factor: upper Cholesky factor of the inverse Hessian [in, in]; input_norms: of `score` [in]. None where a system is
    not positive definite, which rounding can do to nearly singular Hessians; the weights are then of no use.
    Unstructured, a block prunes what it holds of the layer's smallest scores that are still to go.
    """
    if pattern.kind == "n:m":  # a group never crosses the end of a block
        block_size = -(-block_size // pattern.m) * pattern.m
    keep_mask = torch.ones_like(weight, dtype=torch.bool)
    to_prune = pruned_count(weight.numel(), sparsity)
    failed = torch.zeros((), dtype=torch.int32, device=weight.device)
    for start in range(0, weight.shape[1], block_size):
        rest, rest_norms = weight[:, start:], input_norms[start:]
        block, kept = rest[:, :block_size], keep_mask[:, start : start + block_size]
        if pattern.kind == "n:m":
            kept.copy_(keep_n_of_m(score(block, rest_norms[:block_size]), pattern.n, pattern.m))
            largest = block.shape[1] // pattern.m * (pattern.m - pattern.n)
        else:
            kept_of_rest = drop_lowest(score(rest, rest_norms).view(1, -1), to_prune).view_as(rest)
            kept.copy_(kept_of_rest[:, :block_size])
            to_prune -= kept.numel() - int(kept.sum())
            largest = block.shape[1]
        inverse = _first_rows_of_inverse(factor[start:, start:], block.shape[1])
        multipliers = _multipliers(inverse[:, :block_size], block, kept, largest, failed)
        if multipliers is None:
            return None
        rest.addmm_(multipliers, inverse, alpha=-1)
        block.masked_fill_(~kept, 0)  # exactly
    return None if failed else keep_mask


def _first_rows_of_inverse(factor: Tensor, count: int) -> Tensor:
    """The first `count` rows [count, in] of U^T U, U = factor [in, in] upper triangular."""
    return factor[:count, :count].T @ factor[:count]


def _multipliers(inverse: Tensor, block: Tensor, kept: Tensor, largest: int, failed: Tensor) -> Tensor | None:
    """`joint_multipliers`, of which no row prunes more than `largest` inputs.

    Where a kernel solves them, `failed`, int32 [], becomes 1 and the result is not None: nothing waits for the GPU.
    """
    if runs_triton(block):
        from patch.kernels import thanos_triton

        if largest <= thanos_triton.LARGEST:
            return thanos_triton.joint_multipliers(inverse, block, kept, largest, failed)
    return joint_multipliers(inverse, block, ~kept)


def joint_multipliers(inverse: Tensor, block: Tensor, pruned: Tensor) -> Tensor | None:
    """inv(G[M, M]) w[M] of every row at its pruned inputs M, and 0 elsewhere: float32 [out, columns].

    inverse: G [columns, columns]; block: w [out, columns]; pruned: bool [out, columns]. The rows' systems are solved
    together, as many as SYSTEM_BYTES hold; smaller ones are padded with the identity. None where one is not positive
    definite.
    """
    multipliers = torch.zeros_like(block)
    solved = torch.ones((), dtype=torch.bool, device=block.device)
    for rows, size in _batches(pruned.sum(dim=1)):
        # the pruned inputs first, in order; in rows that prune fewer, others stand in
        columns = pruned[rows].byte().argsort(dim=1, descending=True, stable=True)[:, :size].contiguous()
        real = pruned[rows].gather(1, columns)
        systems = _systems(inverse, columns, real)
        values = block[rows].gather(1, columns) * real
        solved &= _solve_(systems, values.unsqueeze(2))
        del systems  # before memory is taken for the next ones
        multipliers[rows] = torch.zeros_like(block[rows]).scatter_(1, columns, values)
    return multipliers if solved else None


def _systems(inverse: Tensor, columns: Tensor, real: Tensor) -> Tensor:
    """inverse[columns, columns] of every row of `columns` [rows, size], and the identity where one is not `real`."""
    if runs_triton(inverse):
        from patch.kernels import thanos_triton

        return thanos_triton.systems(inverse, columns, real)
    systems = inverse[columns.unsqueeze(2), columns.unsqueeze(1)]
    systems.mul_(real.unsqueeze(1)).mul_(real.unsqueeze(2))
    systems.diagonal(dim1=1, dim2=2).masked_fill_(~real, 1)
    return systems


def _solve_(systems: Tensor, values: Tensor) -> Tensor:
    """Replace `values` [rows, size, 1] by inv(systems) values; False where a system is not positive definite.

    systems: symmetric [rows, size, size], overwritten; returns bool []. A = L D L^T by blocks, PANEL columns at a time:
    many small matrices are inverted well; of larger ones, little but matrix products is then left.
    """
    inverses, size = [], systems.shape[1]
    failed = torch.zeros(len(systems), dtype=torch.bool, device=systems.device)
    width = PANEL[systems.device.type]
    panels = [slice(start, min(start + width, size)) for start in range(0, size, width)]
    for panel in panels:  # L grows below the diagonal, D L^T above it, and inv(D) in `inverses`
        before, rest, below = slice(panel.start), slice(panel.start, size), slice(panel.stop, size)
        if panel.start > 0:
            systems[:, rest, panel].baddbmm_(systems[:, rest, before], systems[:, before, panel], alpha=-1)
            values[:, panel].baddbmm_(systems[:, panel, before], values[:, before], alpha=-1)
        inverse, panel_failed = _inverses(systems[:, panel, panel])
        inverses.append(inverse)
        failed |= panel_failed
        systems[:, panel, below] = systems[:, below, panel].mT
        torch.bmm(systems[:, panel, below].mT, inverse, out=systems[:, below, panel])
    for panel, inverse in zip(reversed(panels), reversed(inverses), strict=True):
        below = slice(panel.stop, size)
        values[:, panel] = inverse @ values[:, panel] - systems[:, below, panel].mT @ values[:, below]
    return ~failed.any()


def _inverses(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Of symmetric matrices [n, size, size], and where one is not positive definite, bool [n]."""
    if runs_triton(matrices):
        from patch.kernels import thanos_triton

        return thanos_triton.inverses(matrices)
    lower, info = torch.linalg.cholesky_ex(matrices)
    identity = torch.eye(lower.shape[1], device=lower.device).expand_as(lower)
    root = torch.linalg.solve_triangular(lower, identity, upper=False)
    return root.mT @ root, info != 0


def _batches(sizes: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows of similar size that are solved together, and the largest size among them; rows of size 0 need no solving.

    sizes: int64 [out]. Yields indices of rows and a number.
    """
    ordered, order = sizes.sort(stable=True)
    numbers = ordered.tolist()
    first = bisect.bisect_right(numbers, 0)
    if first == len(numbers):
        return
    count = max(1, SYSTEM_BYTES[sizes.device.type] // (4 * numbers[-1] ** 2))
    for start in range(first, len(numbers), count):
        stop = min(start + count, len(numbers))
        yield order[start:stop], numbers[stop - 1]

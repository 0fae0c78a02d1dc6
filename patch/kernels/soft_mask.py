"""Effective weights under a random soft mask: the forward pass of mask learning and its gradient.

Each group of 4 weights mixes the six 2:4 patterns by a Gumbel-softmax over its logits, each tile mixes that 2:4 mask
with "keep all" (PATCH, arXiv 2509.23410, section 3; MaskLLM, arXiv 2409.17481, is the case without tiles):

    E_i = -ln(u_i),  g_i = -ln(E_i)                  standard Gumbel noise from uniform u_i
    p   = softmax((scale * l + g) / temperature)     over the six patterns of a group
    m   = p @ PATTERNS                               soft 2:4 mask; every group of 4 sums to 2
    M   = t + (1 - t) * m                            t: share of density of the weight's tile
    W * M                                            the effective weight, and sum((W * M)^2)

With D = W * dL/d(W M) + 2 * dL/d(sum) * M * W^2, which is dL/dM, the gradients are

    e    = (1 - t) * (PATTERNS @ D)
    dl_i = scale / temperature * p_i * (e_i - sum_j p_j e_j)
    dt   = sum over the tile of D * (1 - m)

Nothing of size [6, out, in / 4] is kept between the passes: the backward pass draws the same noise again. `reference`
is the plain formula given the noise. `effective_weight` is what training calls: fused kernels on a GPU
(`soft_mask_triton`), and here a version in row blocks that stay in the cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from patch.artefacts import PatchError
from patch.kernels import runs_triton
from patch.kernels.philox import philox, spacings
from patch.sparsity.packing import PATTERNS_2_4
from patch.sparsity.tiles import expand, grid_shape, tile_sums

BLOCK_GROUPS = 32768
"""Groups that the CPU version works on at a time: 0.8 MB for one float32 of each pattern, so that a block stays in the
cache."""

Noise = Callable[["Sampling", int, int], Callable[[int], Tensor]]
"""`noise(sampling, layer, groups)` starts the stream of a layer; then `draw(rows)` gives the standard Gumbel noise of
its next rows, float32 [6, rows, groups], the same however many rows are drawn at once. A number added to all six of a
group changes nothing."""


def tabulated_noise(sampling: Sampling, layer: int, groups: int) -> Callable[[int], Tensor]:
    """The CPU's generator: 16 random bits (NumPy's SFC64) pick one of 65536 quantiles.

    Five times as fast as an exponential variate and its logarithm, and the same for any number of threads.
    """
    generator = np.random.SFC64([sampling.seed, sampling.rank, sampling.micro_step, layer])
    words = -(-6 * groups // 4)

    def draw(rows: int) -> Tensor:
        bits = generator.random_raw((rows, words)).view(np.uint16)[:, : 6 * groups]
        planar = bits.reshape(rows, 6, groups).transpose(1, 0, 2).astype(np.int32, order="C")
        return _QUANTILES.index_select(0, torch.from_numpy(planar).flatten()).view(6, rows, groups)

    return draw


def philox_noise(sampling: Sampling, layer: int, groups: int) -> Callable[[int], Tensor]:
    """The GPU's noise, the same bits: for comparisons between devices, since it is slow in PyTorch.

    Gumbel noise up to a number that the six entries of a group share (`philox.spacings`).
    """
    first_group = 0

    def draw(rows: int) -> Tensor:
        nonlocal first_group
        group = torch.arange(first_group, first_group + rows * groups).view(rows, groups)
        first_group += rows * groups
        words = philox(sampling.seed, (group, layer, sampling.micro_step, sampling.rank))
        return -spacings(words).log()

    return draw


def gumbel_of(integers: Tensor, bits: int) -> Tensor:
    """Integers k below 2**bits -> float64 Gumbel noise -ln(-ln(u)) with u = (k + 1/2) / 2**bits, never infinite."""
    return -torch.log(-torch.log((integers.double() + 0.5) / 2**bits))


_QUANTILES = gumbel_of(torch.arange(2**16), bits=16).float()


class Sampling:
    """Which noise is drawn and how sharp it is.

    Mirrored in two small tensors on `device`, which the kernels read: a captured CUDA graph sees every `set`.
    Forward and backward pass of a micro-step must lie between the same two calls of `set`.
    """

    def __init__(self, seed: int, rank: int, device: torch.device | str, noise: Noise = tabulated_noise):
        """seed: 64 bits. rank: of the process, so that each draws its own. noise: generator of the CPU version."""
        self.seed = seed
        self.rank = rank
        self.noise = noise
        self.integers = torch.zeros(2, dtype=torch.int32, device=device)
        """micro-step, accumulate"""
        self.reals = torch.zeros(2, dtype=torch.float32, device=device)
        """scale, temperature"""
        self.arrivals = torch.zeros(1, dtype=torch.int32, device=device)
        """Scratch of the kernels, so that calls with the same Sampling must follow each other on one stream."""
        self.set(micro_step=0, scale=1.0, temperature=1.0, accumulate=False)

    def set(self, micro_step: int, scale: float, temperature: float, accumulate: bool) -> None:
        """Move on to another draw.

        micro_step: count of forward passes, the same for all layers of one pass. scale: multiplier of the logits.
        temperature: of the softmax. accumulate: add to gradient buffers instead of overwriting them.
        """
        self.micro_step, self.scale, self.temperature, self.accumulate = micro_step, scale, temperature, accumulate
        # From pageable memory, which the driver copies before it returns: a pinned buffer could be overwritten by
        # the next `set` while its copy still waits in the stream.
        self.integers.copy_(torch.tensor([micro_step, accumulate], dtype=torch.int32), non_blocking=True)
        self.reals.copy_(torch.tensor([scale, temperature], dtype=torch.float32), non_blocking=True)


class Call(NamedTuple):
    """What a layer's forward and backward pass share besides tensors."""

    tile: tuple[int, int]
    sampling: Sampling
    layer: int
    hard: bool
    gradient: Tensor | None
    gradient_squares: Tensor | None


def effective_weight(
    weight: Tensor,
    patterns: Tensor,
    tile_sample: Tensor | None,
    tile: tuple[int, int],
    sampling: Sampling,
    layer: int,
    *,
    hard: bool = False,
    gradient: Tensor | None = None,
    gradient_squares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """W * M and sum((W * M)^2) under a freshly sampled mask; differentiable in `patterns` and `tile_sample`.

    weight: [out, in], frozen; float32, bfloat16 or float16.
    patterns: logits [6, out, in / 4] in the order of `PATTERNS_2_4`, float32 or bfloat16; or uint8 codes
        [out, in / 4] of a frozen 2:4 mask, which needs no noise.
    tile_sample: float32 [tile rows, tile columns] in [0, 1], share of density of every tile; None for 2:4 everywhere.
    tile: (height, width); tiles at the lower and right edge may be smaller.
    layer: number of the layer, which selects its stream of noise.
    hard: take the most probable pattern alone, and the gradient of the mixture (straight-through).
    gradient: buffer shaped like the logits, float32 or bfloat16, that the backward pass writes, or adds to where
        `sampling.accumulate`; autograd then gets none for the logits. Adding in bfloat16 rounds to nearest.
    gradient_squares: float32 [square_sums(weight, tile)] that the backward pass fills: together, the sum of squares of
        what goes into `gradient`, before it is rounded.

    Returns the effective weight in the dtype of `weight`, and a float32 scalar tensor.
    Raises PatchError where shapes or dtypes do not fit.
    """
    _check(weight, patterns, tile_sample, tile, gradient, gradient_squares)
    return _EffectiveWeight.apply(
        weight, patterns, tile_sample, Call(tile, sampling, layer, hard, gradient, gradient_squares)
    )


def square_sums(weight: Tensor, tile: tuple[int, int]) -> int:
    """Number of partial sums in `gradient_squares`; the caller adds up those of all layers at once."""
    return int(_backend(weight).programs(weight, tile))


def reference(
    weight: Tensor,
    pattern_logits: Tensor,
    tile_sample: Tensor | None,
    tile: tuple[int, int],
    gumbel: Tensor,
    scale: float,
    temperature: float,
    hard: bool = False,
) -> tuple[Tensor, Tensor]:
    """The formula as it stands, for comparison: any float dtype, gradients by autograd.

    gumbel: noise shaped like the logits [6, out, in / 4]. Everything else as in `effective_weight`.
    """
    probabilities = torch.softmax((scale * pattern_logits + gumbel) / temperature, dim=0).movedim(0, -1)
    if hard:
        choice = torch.nn.functional.one_hot(probabilities.argmax(-1), 6)
        probabilities = choice + probabilities - probabilities.detach()
    mask = (probabilities @ PATTERNS_2_4.to(probabilities)).flatten(1)
    if tile_sample is not None:
        dense = expand(tile_sample, (weight.shape[0], weight.shape[1]), tile)
        mask = dense + (1 - dense) * mask
    effective = weight * mask
    return effective, effective.square().sum()


class _EffectiveWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, patterns: Tensor, tile_sample: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, patterns, tile_sample)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return _backend(weight).forward(weight, patterns, tile_sample, call)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_effective: Tensor | None, d_square_sum: Tensor | None
    ) -> tuple[None, Tensor | None, Tensor | None, None]:
        weight, patterns, tile_sample = ctx.saved_tensors
        if d_effective is None:
            d_effective = torch.zeros_like(weight)
        gradients = _backend(weight).backward(weight, patterns, tile_sample, d_effective, d_square_sum, ctx.call)
        return None, *gradients, None


def _backend(weight: Tensor) -> Any:
    """The module whose `forward` and `backward` work on `weight`."""
    if runs_triton(weight):
        from patch.kernels import soft_mask_triton

        return soft_mask_triton
    return sys.modules[__name__]


def programs(weight: Tensor, tile: tuple[int, int]) -> int:
    """Parts of a layer that are worked on independently."""
    return 1


def forward(weight: Tensor, patterns: Tensor, tile_sample: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """Both results of `effective_weight`, block of rows by block of rows, in float32 arithmetic."""
    effective = torch.empty_like(weight)
    square_sum = torch.zeros((), dtype=torch.float32, device=weight.device)
    for block in _blocks(weight, patterns, tile_sample, call):
        product = block.mask().mul_(weight[block.rows])
        square_sum += product.square().sum()
        effective[block.rows] = product
    return effective, square_sum


def backward(
    weight: Tensor,
    patterns: Tensor,
    tile_sample: Tensor | None,
    d_effective: Tensor,
    d_square_sum: Tensor | None,
    call: Call,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the logits (None if `call.gradient` takes them or patterns are frozen) and of the tile sample."""
    slope = call.sampling.scale / call.sampling.temperature
    d_logits = call.gradient
    if d_logits is None and patterns.is_floating_point():
        d_logits = torch.empty_like(patterns)
    if call.gradient_squares is not None:
        call.gradient_squares.zero_()
    d_tile_rows = []
    for block in _blocks(weight, patterns, tile_sample, call):
        d_mask = _mask_gradient(block, weight[block.rows], d_effective[block.rows], d_square_sum)
        if block.dense is not None:
            d_tile_rows.append(tile_sums(d_mask * (1 - block.sparse), (1, call.tile[1])))
            d_mask *= 1 - block.dense
        if d_logits is not None and block.probabilities is not None:
            update = _softmax_gradient(d_mask, block.probabilities).mul_(slope)
            if call.gradient is not None and call.sampling.accumulate:
                update += d_logits[:, block.rows]
            if call.gradient_squares is not None:
                call.gradient_squares.add_(update.square().sum())
            d_logits[:, block.rows] = update
    d_tiles = tile_sums(torch.cat(d_tile_rows), (call.tile[0], 1)) if d_tile_rows else None
    return d_logits if call.gradient is None else None, d_tiles


class _Block(NamedTuple):
    """The mask of some rows."""

    rows: slice
    probabilities: Tensor | None
    """float32 [6, rows, groups]; None where the 2:4 mask is frozen"""
    sparse: Tensor
    """float32 [rows, in]: the 2:4 mask m"""
    dense: Tensor | None
    """float32 [rows, in]: the share of density t; None for 0 everywhere"""

    def mask(self) -> Tensor:
        """M, float32 [rows, in]; a new tensor."""
        return self.sparse.clone() if self.dense is None else torch.lerp(self.sparse, _ONE, self.dense)


def _blocks(weight: Tensor, patterns: Tensor, tile_sample: Tensor | None, call: Call) -> Iterator[_Block]:
    """The same blocks with the same noise, in the forward and in the backward pass."""
    height, width = weight.shape
    groups, sampling = width // 4, call.sampling
    draw = sampling.noise(sampling, call.layer, groups) if patterns.is_floating_point() else None
    tile_rows = None if tile_sample is None else tile_sample.detach().repeat_interleave(call.tile[0], dim=0)
    block_rows = max(1, BLOCK_GROUPS // groups)
    for first in range(0, height, block_rows):
        rows = slice(first, min(first + block_rows, height))
        dense = None if tile_rows is None else tile_rows[rows].repeat_interleave(call.tile[1], dim=1)[:, :width]
        if draw is None:
            yield _Block(rows, None, _select(patterns[rows]), dense)
            continue
        logits = draw(rows.stop - first).to(weight.device)
        logits.add_(patterns.detach()[:, rows], alpha=sampling.scale).mul_(1 / sampling.temperature)
        probabilities = logits.softmax(dim=0)
        sparse = _select(_argmax(probabilities)) if call.hard else _mix(probabilities)
        yield _Block(rows, probabilities, sparse, dense)


def _mix(p: Tensor) -> Tensor:
    """p @ PATTERNS: [6, rows, groups] -> [rows, in]. A matrix product as narrow as this takes three times as long."""
    mask = p.new_empty(*p.shape[1:], 4)
    for place, (a, b, c) in enumerate(_PATTERNS_WITH):
        torch.add(p[a] + p[b], p[c], out=mask[..., place])
    return mask.flatten(1)


def _argmax(p: Tensor) -> Tensor:
    """[6, rows, groups] -> uint8 [rows, groups], the first of equal ones; a tenth of the time of `Tensor.argmax`."""
    largest, so_far = p.amax(dim=0), p[0]
    codes = torch.zeros_like(so_far, dtype=torch.uint8)
    for candidate in p[1:]:
        codes += so_far < largest
        so_far = torch.maximum(so_far, candidate)
    return codes


def _select(codes: Tensor) -> Tensor:
    """Pattern codes [rows, groups] -> float32 [rows, in]."""
    return _PATTERNS.to(codes.device).index_select(0, codes.flatten().int()).view(codes.shape[0], -1)


def _mask_gradient(block: _Block, weight: Tensor, d_effective: Tensor, d_square_sum: Tensor | None) -> Tensor:
    """D = W * (dL/d(W M) + 2 * dL/d(sum) * W M), float32 [rows, in]."""
    if d_square_sum is None:
        return weight.float() * d_effective
    product = block.mask().mul_(weight)
    return torch.addcmul(d_effective.float(), product, 2 * d_square_sum).mul_(weight)


def _softmax_gradient(d_mask: Tensor, probabilities: Tensor) -> Tensor:
    """p_i * (e_i - sum_j p_j e_j) with e = PATTERNS @ d_mask, float32 [6, rows, groups]."""
    weighted = (_PATTERNS.to(d_mask.device) @ d_mask.view(-1, 4).T).view_as(probabilities).mul_(probabilities)
    return weighted.addcmul_(probabilities, weighted.sum(dim=0), value=-1)


_ONE = torch.ones(())
_PATTERNS = PATTERNS_2_4.float()
_PATTERNS_WITH = [kept.nonzero().flatten().tolist() for kept in PATTERNS_2_4.T]
"""For each of the 4 places, the three patterns that keep it."""


def _check(
    weight: Tensor,
    patterns: Tensor,
    tile_sample: Tensor | None,
    tile: tuple[int, int],
    gradient: Tensor | None,
    gradient_squares: Tensor | None,
) -> None:
    out_features, in_features = weight.shape
    if in_features % 4:
        raise PatchError(f"weight {out_features}x{in_features}: {in_features} inputs do not split into 4s.")
    if weight.numel() >= 2**30:
        raise PatchError(f"weight {out_features}x{in_features}: too large, the kernels count with 32 bits.")
    groups = (out_features, in_features // 4)
    expected = (6, *groups) if patterns.is_floating_point() else groups
    if tuple(patterns.shape) != expected:
        raise PatchError(f"patterns of shape {tuple(patterns.shape)}: this weight needs {expected}.")
    if gradient is not None and (gradient.shape != patterns.shape or not gradient.is_contiguous()):
        raise PatchError(f"gradient buffer of shape {tuple(gradient.shape)}: must be {expected} and contiguous.")
    grid = grid_shape((out_features, in_features), tile)
    if tile[1] % 4:
        raise PatchError(f"tile {tile[0]}x{tile[1]}: the width must be a multiple of 4.")
    if tile_sample is not None and tuple(tile_sample.shape) != grid:
        raise PatchError(f"tile sample of shape {tuple(tile_sample.shape)}: this weight needs {grid}.")
    if gradient_squares is not None and tuple(gradient_squares.shape) != (square_sums(weight, tile),):
        raise PatchError(
            f"sums of squares of shape {tuple(gradient_squares.shape)}: this weight needs "
            f"{(square_sums(weight, tile),)}."
        )

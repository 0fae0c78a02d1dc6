"""SLiM-LoRA: low-rank factors that make up for most of what pruning and quantisation take from a layer's outputs.

Of all matrices D of rank r, the adapter is the one with the least ||(E - D) diag(x)||_F, where E = W - W_c is the
error of the compressed weight and x_j says how strong input j is (SLIM `slim/lora.py: add_lora`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patch.artefacts import PatchError
from patch.compression.options import Compression
from patch.sparsity.patterns import keep_n_of_m

ROUNDS, STEPS = 50, 5
"""Of fitting pruned factors: rounds, and gradient steps of the left factor in each."""


class MeanMagnitude:
    """Mean over tokens of |x_j|, float32 [in_features]."""

    def __init__(self, in_features: int, device: torch.device):
        self.sum = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.sum += torch.linalg.vector_norm(rows, 1, dim=0, dtype=torch.float32)
        self.tokens += len(rows)

    def mean(self) -> Tensor:
        return self.sum / self.tokens

    def is_finite(self) -> bool:
        return bool(self.sum.isfinite().all())


def rank_of(options: Compression, shape: tuple[int, int]) -> int:
    """Rank of the adapter of a layer [out, in]; 0 for none."""
    if options.adapter_rank == 0:
        return 0
    multiple = options.adapter_rank_multiple
    rank = max(1, int(options.adapter_rank * min(shape)))
    return min(-(-rank // multiple) * multiple, min(shape))


def low_rank(error: Tensor, norms: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors left [in, rank] and right [rank, out] in float32 whose product best approximates error.T.

    error: [out, in]; norms: x [in], at least 0. With U the leading left singular vectors of error * diag(x), the best
    approximation of the error is its projection U U^T error, so right = U^T and left = error^T U. That equals
    V S / x, without the division: an input that was always 0 gets the projection, too, where SLIM gives up the
    weighting of the whole layer.
    U comes from the eigenvectors of the smaller Gram matrix in float64, which is as exact as an SVD in float32 and an
    order of magnitude faster on a GPU.
    """
    error, norms = error.float(), norms.double()
    # the weighted error in float64, made where it is used: it would be half of all memory beside the eigenvectors
    if error.shape[0] <= error.shape[1]:
        basis = _leading(_gram(error * norms), rank)
    else:
        leading = _leading(_gram((error * norms).T), rank)
        # orthonormal even where the error has less than this rank
        basis = torch.linalg.qr((error * norms) @ leading).Q
    right = basis.float().T.contiguous()
    return error.T @ right.T, right


def prune_left(left: Tensor, right: Tensor, norms: Tensor, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Prune the left factor to 2:4 along the inputs, and fit both factors to the product that they had.

    Returns both, and which entries of the left one are kept (bool [in, rank]).

    As in SLIM's `prune_and_optimize_lora`, entries are judged and errors measured with inputs weighted by their norms.
    It keeps the largest by sign, which cannot be meant, and runs 1000 steps of Adam. Since the rows of `right` are
    orthonormal, all happens in `rank` dimensions here: least squares for the right factor and gradient steps for the
    left one take turns, and never make the error larger.
    Raises PatchError where the inputs do not divide by 4.
    """
    if left.shape[0] % 4:
        raise PatchError(f"layer {layer}: {left.shape[0]} inputs do not split into 4s; use adapter_sparsity: dense.")
    target = left * norms.unsqueeze(1)
    keep = keep_n_of_m(target.abs().T.contiguous(), 2, 4).T
    pruned = target * keep
    for _ in range(ROUNDS):
        mixing = torch.linalg.pinv(pruned.T @ pruned, hermitian=True) @ (pruned.T @ target)
        rate = 1 / torch.linalg.matrix_norm(mixing, 2).square().clamp_min(torch.finfo(torch.float32).tiny)
        for _ in range(STEPS):
            pruned = pruned - rate * keep * ((pruned @ mixing - target) @ mixing.T)
    unweighted = torch.where(norms.unsqueeze(1) > 0, pruned / norms.unsqueeze(1), 0.0)
    return unweighted, mixing @ right, keep


def _gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.T


def _leading(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors [n, rank] of the largest eigenvalues of a symmetric matrix [n, n], largest first."""
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)

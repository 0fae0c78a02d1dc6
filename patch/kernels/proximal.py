"""ProxSparse's proximal operator, which pulls groups of four weights towards 2:4 (arXiv 2502.00258, equation 6).

For every group z of four consecutive inputs of a row it finds the w that minimises

    1/2 ||w - z||^2 + strength * (|w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|)

The penalty is 0 exactly where at most two of the four are not 0. Signs and order carry over from z to w, so let z be
positive and sorted. Then w is one of three points: the two largest of z alone; the only local minimum with three
weights above 0; or the only one with four. (The Hessian is linear in w, so the w where it allows a minimum are a convex
set, and the objective is convex on it.) Either of the last two is where minimising over one weight after the other
converges, from w = 0 and the smallest first. The best of the three is the global minimum.

The public implementation (amazon-science/ProxSparse `prox_op.py`) stops after 100 sweeps or when a whole matrix hardly
moves any more, and computes in the precision of the weights. Here every group iterates until it stands still itself,
in float32 at least; most are done after eight sweeps.

On a GPU `proximal_triton` does the same in one kernel, with the groups in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patch.kernels import runs_triton

GROUPS_PER_CHUNK = 2**15
"""Groups whose intermediate values exist at a time: about 150 bytes each, 5 MB."""
SWEEPS = 8
"""Between two looks at which groups still move."""
MAXIMUM_SWEEPS = 4000
"""Nothing in float32 moves after so many."""
RESOLUTION = 4
"""A group stands still when no weight moves by more than so many units in the last place of its largest one."""
_NETWORK = ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2))
"""Compare and exchange these: four numbers are sorted."""


@torch.no_grad()
def proximal_(weight: Tensor, strength: float) -> None:
    """Replace `weight` [out, in], any float dtype, contiguous, by the result of the operator on its groups of 4.

    strength: lambda, used as it is and not multiplied by a learning rate. Signs stay; zeros are exact.
    """
    if strength == 0:
        return
    if runs_triton(weight) and weight.dtype != torch.float64:
        from patch.kernels.proximal_triton import solve_

        solve_(weight, strength)
        return
    for groups in weight.view(-1, 4).split(GROUPS_PER_CHUNK):
        groups.copy_(_solved(groups, strength))


def two_of_four(weight: Tensor) -> Tensor:
    """Number of groups of 4 in `weight` [out, in] with at most two weights that are not 0, as a scalar tensor."""
    return (weight.view(-1, 4).count_nonzero(dim=1) <= 2).sum()


def _solved(groups: Tensor, strength: float) -> Tensor:
    """The operator on groups [n, 4]; float32, or float64 where `groups` is."""
    # times strength, the problem has none; z is [4, n], magnitudes in descending order
    z = (groups.to(torch.promote_types(groups.dtype, torch.float32)).abs() * strength).T.contiguous()
    swaps = []
    for a, b in _NETWORK:
        swaps.append(z[b] > z[a])
        z[a], z[b] = torch.maximum(z[a], z[b]), torch.minimum(z[a], z[b])
    w = torch.zeros_like(z)
    _converge(z, w)
    # On the box between 0 and z every row of the Hessian has off-diagonal entries of at most this sum; up to 1 the
    # objective is convex there, and the point that was found the only minimum.
    hard = 2 * (z[0] + z[1] + z[2]) > 1
    if hard.any():
        w[:, hard] = _best(z[:, hard], w[:, hard])
    for (a, b), swapped in zip(reversed(_NETWORK), reversed(swaps), strict=True):
        w[a], w[b] = torch.where(swapped, w[b], w[a]), torch.where(swapped, w[a], w[b])
    # what the operator leaves alone comes back as it was, without the rounding of scaling
    kept = groups.to(w.dtype).abs() * strength == w.T
    return torch.where(kept, groups, w.div_(strength).T.copysign_(groups))


def _sweep(z: list[Tensor], w: list[Tensor]) -> list[Tensor]:
    """Minimise over w3, w2, w1, w0 in turn, each exactly: the objective is a parabola in one of them."""
    w0, w1, w2, _ = w
    w3 = (z[3] - (w0 * (w1 + w2) + w1 * w2)).clamp_min(0)
    w2 = (z[2] - (w0 * (w1 + w3) + w1 * w3)).clamp_min(0)
    w1 = (z[1] - (w0 * (w2 + w3) + w2 * w3)).clamp_min(0)
    w0 = (z[0] - (w1 * (w2 + w3) + w2 * w3)).clamp_min(0)
    return [w0, w1, w2, w3]


def _converge(z: Tensor, w: Tensor) -> None:
    """Sweep in place, from `w` on, until every group stands still; z, w: [4, n]."""
    tolerance = RESOLUTION * torch.finfo(z.dtype).eps * z[0]
    moving = torch.arange(z.shape[1], device=z.device)
    for _ in range(0, MAXIMUM_SWEEPS, SWEEPS):
        if len(moving) == 0:
            return
        targets = list(z[:, moving].unbind())
        values = list(w[:, moving].unbind())
        for _ in range(SWEEPS):
            last, values = values, _sweep(targets, values)
        w[:, moving] = found = torch.stack(values)
        moving = moving[(found - torch.stack(last)).abs().amax(0) > tolerance[moving]]


def _best(z: Tensor, four: Tensor) -> Tensor:
    """Of the candidates with two, three and four weights the one with the least objective; z, four: [4, n]."""
    two, target = z.clone(), z.clone()
    two[2:] = target[3] = 0
    three = torch.zeros_like(z)
    _converge(target, three)
    candidates = torch.stack([two, three, four])
    best = torch.stack([_objective(z, candidate) for candidate in candidates]).argmin(0)
    return candidates.gather(0, best.expand(1, *z.shape)).squeeze(0)


def _objective(z: Tensor, w: Tensor) -> Tensor:
    """[n], at strength 1."""
    products = w[0] * w[1] * (w[2] + w[3]) + w[2] * w[3] * (w[0] + w[1])
    return 0.5 * (w - z).square().sum(0) + products

"""The optimisers that train masks or weights, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patch.artefacts import PatchError
from patch.kernels.adamw import FusedAdamW
from patch.methods import Trained


def make_optimizer(
    method: Trained, parameters: list[nn.Parameter], *, stochastic_rounding: bool
) -> torch.optim.Optimizer:
    """The method's optimiser; its learning rate is set before every step.

    stochastic_rounding: of bfloat16 parameters, by our kernel; the others round to nearest.
    Raises PatchError for adamw_apex where apex is not installed.
    """
    options: dict[str, Any] = {"betas": method.betas, "eps": method.epsilon, "weight_decay": method.weight_decay}
    if method.optimizer == "adamw_torch":
        return torch.optim.AdamW(parameters, lr=method.learning_rate, fused=True, **options)
    if method.optimizer == "adamw_apex":
        try:
            from apex.optimizers import FusedAdam
        except ImportError:
            raise PatchError(
                "optimizer adamw_apex: NVIDIA apex is not installed (github.com/NVIDIA/apex has the instructions); "
                "adamw_fused does the same without it."
            ) from None
        return FusedAdam(parameters, lr=method.learning_rate, adam_w_mode=True, **options)
    return FusedAdamW(
        parameters,
        lr=method.learning_rate,
        state_bits=8 if method.optimizer == "adamw_8bit" else 32,
        stochastic_rounding=stochastic_rounding,
        **options,
    )


def apply(optimizer: torch.optim.Optimizer, gradients: list[Tensor], factor: Tensor) -> None:
    """One step with the given gradients, all multiplied by the scalar tensor `factor`."""
    if isinstance(optimizer, FusedAdamW):  # its kernel reads them in their own precision, and scales as it reads
        optimizer.step(gradients=gradients, gradient_scale=factor)
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.mul_(factor)
    optimizer.step()
    optimizer.zero_grad()

"""AdamW in one pass over memory, with states in 32 or 8 bits and parameters in float32 or bfloat16.

The update is that of arXiv 1711.05101 with bias correction, as in torch.optim.AdamW, in float32 arithmetic:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    p = (1 - lr * decay) p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

States in 8 bits keep m and sqrt(v) in blocks of 256, each with the largest magnitude as its float32 scale, as
scale * (code / levels)^8. Gradients of mask logits differ by many orders of magnitude inside a block, since a group
whose softmax has settled hardly gets any; the eighth power spans 17 decades at 127 levels. Codes are rounded
stochastically, to the right mean: rounded to nearest, a small m would never decay.

Learning rate, step and gradient scale are read from tensors on the device, so that a CUDA graph can replay a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from patch.artefacts import PatchError
from patch.kernels import runs_triton
from patch.kernels.philox import philox

BLOCK = 256
"""Entries of a state that share a scale."""
LEVELS = {torch.int8: 127, torch.uint8: 255}
"""Largest code: of m, which has a sign, and of sqrt(v)."""
SMALLEST_SCALE = 1e-18
"""Far below what eps lets through, and far enough from the smallest float32 to divide by."""
STREAM = 0xFFFFFFFF
"""Last word of the noise's counters, where the masks' noise has the rank."""

_CHUNK = 64 * 4 * BLOCK


class FusedAdamW(torch.optim.Optimizer):
    """AdamW (module docstring); Triton on a GPU, the same in PyTorch elsewhere.

    params: contiguous tensors, float32 or bfloat16. lr: a tensor on the device of the parameters where a CUDA graph
        has to see it change (PyTorch's schedulers fill such a tensor).
    state_bits: 32 or 8. stochastic_rounding: of bfloat16 parameters; to nearest, steps below half a unit in the
        last place would be lost. seed: of both roundings.

    Raises PatchError for parameters or state_bits that it cannot handle.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        state_bits: int = 32,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ):
        if state_bits not in (8, 32):
            raise PatchError(f"state_bits {state_bits}: must be 8 or 32.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.state_bits = state_bits
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        for group in self.param_groups:
            group["step"] = torch.zeros((), dtype=torch.int64, device=group["params"][0].device)
            for parameter in group["params"]:
                if parameter.dtype not in (torch.float32, torch.bfloat16) or not parameter.is_contiguous():
                    raise PatchError(f"a parameter {parameter.dtype}: must be contiguous float32 or bfloat16.")
                self.state[parameter] = self._zero_state(parameter)

    def _zero_state(self, parameter: Tensor) -> dict[str, Tensor]:
        def zeros(entries: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(entries, dtype=dtype, device=parameter.device)

        entries = parameter.numel()
        if self.state_bits == 32:
            return {"exp_avg": zeros(entries, torch.float32), "exp_avg_sq": zeros(entries, torch.float32)}
        blocks = -(-entries // BLOCK)
        return {
            "exp_avg": zeros(entries, torch.int8),
            "exp_avg_scale": zeros(blocks, torch.float32),
            "root_exp_avg_sq": zeros(entries, torch.uint8),
            "root_exp_avg_sq_scale": zeros(blocks, torch.float32),
        }

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        gradients: Sequence[Tensor | None] | None = None,
        gradient_scale: Tensor | None = None,
    ) -> float | None:
        """Update all parameters in place.

        gradients: float32 or bfloat16, one for each parameter in order, where `.grad` is not the place (its dtype must
            be that of the parameter). gradient_scale: scalar tensor that multiplies all of them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            group["step"] += 1
            coefficients = _coefficients(group, gradient_scale)
            for parameter in group["params"]:
                gradient = parameter.grad if gradients is None else gradients[index]
                if gradient is not None:
                    self._update(parameter, gradient, group, coefficients, index)
                index += 1
        return loss

    def _update(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], coefficients: Tensor, index: int
    ) -> None:
        rounds = self.stochastic_rounding and parameter.dtype == torch.bfloat16
        update_ = _triton().update_ if runs_triton(parameter) else update_torch_
        update_(
            parameter.view(-1),
            gradient.reshape(-1),
            list(self.state[parameter].values()),
            coefficients,
            group["step"],
            betas=group["betas"],
            eps=group["eps"],
            stochastic_rounding=rounds,
            seed=self.seed,
            index=index,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Exactly what was saved: PyTorch's own version would cast the states to the dtype of the parameters."""
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(saved, parameters, strict=True):
            entries = state_dict["state"][key].items()
            self.state[parameter] = {name: value.to(parameter.device, copy=True) for name, value in entries}
        for group in self.param_groups:
            group["step"] = group["step"].to(group["params"][0].device)


def _triton() -> Any:
    from patch.kernels import adamw_triton

    return adamw_triton


def _coefficients(group: dict[str, Any], gradient_scale: Tensor | None) -> Tensor:
    """float64 [4]: step size, 1 / sqrt of the second bias correction, factor of the decay, gradient scale."""
    step, (beta1, beta2) = group["step"].double(), group["betas"]
    lr = group["lr"] + torch.zeros_like(step)
    scale = torch.ones_like(step) if gradient_scale is None else gradient_scale.double()
    return torch.stack([lr / (1 - beta1**step), (1 - beta2**step).rsqrt(), 1 - lr * group["weight_decay"], scale])


def update_torch_(
    parameter: Tensor,
    gradient: Tensor,
    state: list[Tensor],
    coefficients: Tensor,
    step: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    stochastic_rounding: bool,
    seed: int,
    index: int,
) -> None:
    """One update in place. parameter, gradient: [n]; state: m and v, or codes and scales of m and of sqrt(v)."""
    step_size, root_correction, decay, scale = coefficients.tolist()
    compressed = len(state) == 4
    for first in range(0, len(parameter), _CHUNK):
        part = slice(first, min(first + _CHUNK, len(parameter)))
        blocks = slice(first // BLOCK, -(-part.stop // BLOCK))
        noise = noise_words(part, (index, int(step), STREAM), seed) if compressed or stochastic_rounding else None
        p, g = parameter[part].float(), gradient[part].float() * scale
        if compressed:
            m, v = decode(state[0][part], state[1][blocks]), decode(state[2][part], state[3][blocks]).square_()
        else:
            m, v = state[0][part], state[1][part]
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        root = v.sqrt()
        if compressed and noise is not None:
            state[0][part], state[1][blocks] = encode(m, noise >> 16 & 0xFF, torch.int8)
            state[2][part], state[3][blocks] = encode(root, noise >> 24, torch.uint8)
        p.mul_(decay).addcdiv_(m, root.mul_(root_correction).add_(eps), value=-step_size)
        if stochastic_rounding and noise is not None:
            p = round_stochastically(p, noise & 0xFFFF)
        parameter[part] = p


def encode(values: Tensor, noise: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 [n] -> codes [n] of `dtype` and float32 scales [ceil(n / 256)], right on average over the noise.

    noise: int64 [n] in 0..255. Only zeros get the code 0 of uint8, so that m / sqrt(v) stays bounded.
    """
    levels = LEVELS[dtype]
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1).clamp_min_(SMALLEST_SCALE)
    powers = values.abs() * _spread(levels**8 / scales, len(values))
    lower = powers.sqrt().sqrt_().sqrt_().floor_()
    below, above = _eighth_power(lower), _eighth_power(lower + 1)
    codes = (lower + ((noise + 0.5) / 256 * (above - below) < powers - below)).clamp_max_(levels)
    if dtype == torch.uint8:
        codes = codes.maximum((values > 0).float())
    return codes.copysign_(values).to(dtype), scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Inverse of `encode` up to its rounding: float32 [n]."""
    roots = codes.float()
    return _eighth_power(roots).copysign_(roots).mul_(_spread(scales / LEVELS[codes.dtype] ** 8, len(codes)))


def _eighth_power(x: Tensor) -> Tensor:
    return x.square().square_().square_()


def _spread(scales: Tensor, entries: int) -> Tensor:
    return scales.repeat_interleave(BLOCK)[:entries]


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with probabilities that keep the mean. noise: int64 in 0..65535."""
    bits = values.view(torch.int32) + noise.int()
    return (bits & -0x10000).view(torch.float32).bfloat16()


def noise_words(part: slice, counter: tuple[int, int, int], seed: int) -> Tensor:
    """int64 [n] in 0..2**32 - 1, one for each entry of `part`, which starts at a multiple of 1024.

    The four words of one Philox call go to the entries at the same place of four consecutive blocks, so that a GPU
    thread draws once for four loads.
    """
    calls = torch.arange(part.start // 4, -(-part.stop // (4 * BLOCK)) * BLOCK)
    words = torch.stack(philox(seed, (calls, *counter))).view(4, -1, BLOCK).transpose(0, 1)
    return words.flatten()[: part.stop - part.start]

"""Quantised inputs of linear layers, as a model with 8-bit activations would see them. Scales are found at run time.

Follows SLIM `slim/quantization/quantization.py: attach_input_quantization_hooks`, whose 8 bits are float8 with a scale
per tensor and whose other widths are integers with a scale per token. SLIM changes to e5m2, with one bit less of
mantissa, for tensors with entries above 488; after scaling all of them fit e4m3, which is used here throughout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from patch.artefacts import PatchError


def quantise_inputs_(linears: Iterable[nn.Linear], how: str) -> None:
    """From now on let the layers see their inputs quantised, adapters included. Computed in float32.

    how: none, int8 or float8. The largest level becomes a buffer of the layer, so that its state differs from that of a
    layer without. Raises PatchError for anything else.
    """
    if how == "none":
        return
    known = {"int8": (127.0, int8_per_token), "float8": (448.0, float8_per_tensor)}
    if how not in known:
        raise PatchError(f"inputs {how!r}: choose none, {' or '.join(known)}.")
    largest, quantise = known[how]

    def hook(linear: nn.Module, arguments: tuple[Tensor, ...]) -> Any:
        assert isinstance(linear.largest_level, Tensor)
        return quantise(arguments[0], linear.largest_level), *arguments[1:]

    for linear in linears:
        linear.register_buffer("largest_level", torch.tensor(largest, device=linear.weight.device))
        linear.register_forward_pre_hook(hook)


def int8_per_token(inputs: Tensor, largest: Tensor) -> Tensor:
    """Nearest multiples of max |x| / 127 of each token; inputs [..., in_features], same dtype back."""
    scales = _positive(inputs.float().abs().amax(-1, keepdim=True)) / largest
    return ((inputs.float() / scales).round().clamp(-largest - 1, largest) * scales).to(inputs.dtype)


def float8_per_tensor(inputs: Tensor, largest: Tensor) -> Tensor:
    """The tensor scaled so that max |x| is 448, as float8 e4m3, and scaled back."""
    scale = _positive(inputs.float().abs().amax()) / largest
    return ((inputs.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(inputs.dtype)


def _positive(maxima: Tensor) -> Tensor:
    return torch.where(maxima > 0, maxima, 1.0)  # zeros stay zeros

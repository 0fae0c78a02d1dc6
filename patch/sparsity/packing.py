"""Bit packing of masks: one bit per weight, or one 3-bit code per group of 4 in 2:4 patterns."""

from __future__ import annotations

import torch
from torch import Tensor

# The six 2:4 patterns in the paper's order; bit i of a row says whether input i of the group is kept.
PATTERNS_2_4 = torch.tensor(
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.bool
)
_BIT_WEIGHTS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
INVALID_CODE = 7


def pack_bits(bits: Tensor) -> Tensor:
    """bool [...] -> uint8 [ceil(n / 8)], first element in the lowest bit, zero padded."""
    flat = torch.nn.functional.pad(bits.flatten().to(torch.uint8), (0, -bits.numel() % 8))
    return (flat.view(-1, 8) * _BIT_WEIGHTS.to(bits.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_bits`: uint8 -> bool of `shape`."""
    bits = (packed.unsqueeze(1) & _BIT_WEIGHTS.to(packed.device)) != 0
    return bits.flatten()[: torch.Size(shape).numel()].reshape(shape)


def codes_of(keep_mask: Tensor) -> Tensor:
    """bool [out, in] -> uint8 [out * in / 4]: index of each group's 2:4 pattern, INVALID_CODE for any other."""
    nibbles = (keep_mask.reshape(-1, 4).to(torch.uint8) * _BIT_WEIGHTS[:4].to(keep_mask.device)).sum(1)
    table = torch.full((16,), INVALID_CODE, dtype=torch.uint8)
    table[(PATTERNS_2_4.to(torch.uint8) * _BIT_WEIGHTS[:4]).sum(1)] = torch.arange(6, dtype=torch.uint8)
    return table.to(keep_mask.device)[nibbles]


def patterns_of(codes: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `codes_of` for valid codes: uint8 [groups] -> bool [out, in]."""
    return PATTERNS_2_4.to(codes.device)[codes.int()].reshape(shape)


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 [groups] below 8 -> uint8 [3 * ceil(groups / 8)]: eight 3-bit codes in three bytes, low bits first."""
    eight = torch.nn.functional.pad(codes, (0, -codes.numel() % 8)).view(-1, 8).int()
    words = (eight << (3 * torch.arange(8, device=codes.device, dtype=torch.int32))).sum(1, dtype=torch.int32)
    return torch.stack([words & 255, (words >> 8) & 255, (words >> 16) & 255], dim=1).to(torch.uint8).flatten()


def unpack_codes(packed: Tensor, groups: int) -> Tensor:
    """Inverse of `pack_codes`."""
    byte = packed.view(-1, 3).int()
    words = byte[:, 0] | (byte[:, 1] << 8) | (byte[:, 2] << 16)
    codes = (words.unsqueeze(1) >> (3 * torch.arange(8, device=packed.device, dtype=torch.int32))) & 7
    return codes.to(torch.uint8).flatten()[:groups]

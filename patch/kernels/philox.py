"""Counter-based random bits in plain PyTorch: Philox-4x32 (Salmon et al., SC 2011), bit for bit Triton's `tl.philox`.

Every group of four weights owns one counter, (group in the layer, layer, micro-step, rank), under the seed as the
key. So the noise of a forward pass can be drawn again in the backward pass, on any device and in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
"""Fewest rounds of Philox-4x32 that pass BigCrush (table 2 of the paper, which recommends 10 for good measure)."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(key: int, counter: tuple[Tensor | int, ...], rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Four 32-bit words for every counter.

    key: 64 bits. counter: four words below 2**32, int64 tensors or integers that broadcast against each other.
    Returns four int64 tensors with values below 2**32.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(word, dtype=torch.int64) for word in counter))
    k0, k1 = key & _WORD, key >> 32 & _WORD
    for _ in range(rounds):
        # int64 products wrap beyond 2**63, which leaves all 64 bits as they should be
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = product1 >> 32 & _WORD ^ c1 ^ k0, product0 >> 32 & _WORD ^ c3 ^ k1
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = k0 + _WEYL_STEPS[0] & _WORD, k1 + _WEYL_STEPS[1] & _WORD
    return c0, c1, c2, c3


def spacings(words: tuple[Tensor, ...]) -> Tensor:
    """Four 32-bit words [...] -> float32 [6, ...]: what lies between 0, five uniform numbers in order, and 1.

    Six independent exponentials divided by their sum are distributed the same, so -ln of the result is Gumbel noise
    but for a number that all six share, which no softmax sees.

    A number has 20 bits of a word, bits 3 to 22, or of the high bytes of the first three; the three places after them
    say which of the five it is, so that no two are equal.
    """
    a, b, c, _ = words
    high = a >> 24 << 16 | b >> 24 << 8 | c >> 24
    numbers = torch.stack([word & 0x7FFFF8 | tag for tag, word in enumerate([*words, high], start=1)])
    zero = torch.zeros_like(numbers[:1])
    return torch.cat([zero, numbers.sort(dim=0).values, zero + 2**23]).diff(dim=0).float() / 2**23

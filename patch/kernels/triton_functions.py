"""What Triton kernels call: the random words of `patch.kernels.philox`, and the GPU's own special functions."""
# Kernels without types, as is the custom in Triton:
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from patch.kernels.philox import ROUNDS

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _multiply(x, y):
    """Low and high word of a product of 32-bit words, by one instruction."""
    return tl.inline_asm_elementwise(
        "{ .reg .b64 wide; mul.wide.u32 wide, $2, $3; mov.b64 {$0, $1}, wide; }",
        "=r,=r,r,r",
        [x, y],
        dtype=(tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Four uint32 words for every counter; `tl.philox` gives the same with twice as many multiplications.

    c0 to c3: 32-bit integers that broadcast against each other. seed: an integer of up to 64 bits, the key.
    """
    k0, k1 = seed.to(tl.uint64).to(tl.uint32), (seed.to(tl.uint64) >> 32).to(tl.uint32)
    c0, c1, c2, c3 = c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        low_0, high_0 = _multiply(c0, 0xD2511F53)
        low_1, high_1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def log2(x):
    """Approximate: largest error 2**-22 for x in (0.5, 2), relative elsewhere."""
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp2(x):
    """Approximate: largest relative error 2**-22."""
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """Approximate: largest error one unit in the last place."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)

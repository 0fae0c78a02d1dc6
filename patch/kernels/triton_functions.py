"""What Triton kernels call: the random words of `patch.kernels.philox`, and the GPU's own special functions."""
# Compile-time constants are in capitals, and kernels without types, as is the custom in Triton:
# ruff: noqa: N803
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
def high_bytes(x, y, z):
    """The highest bytes of x, y and z as the third, second and lowest of a 32-bit word; the highest is undefined."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 pair; prmt.b32 pair, $1, $2, 0x4437; prmt.b32 $0, pair, $3, 0x4107; }",
        "=r,r,r,r",
        [x, y, z],
        dtype=tl.uint32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def to_float(x):
    """x as float32. The two bfloat16 of a register take an instruction each, a third less than as conversions."""
    if x.dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=&f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        y = x.to(tl.float32)
    return y


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


@triton.jit
def square_root(x):
    """Approximate: largest relative error 2**-22; numbers too small to be normal count as 0."""
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def whole_part(x):
    """floor(x) for x in [0, 2**22]. By additions, like the conversions of bytes: real ones are slow."""
    return tl.inline_asm_elementwise(
        "{ .reg .f32 sum; add.rm.f32 sum, $1, 0f4B000000; sub.f32 $0, sum, 0f4B000000; }",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


def _unpacking(shift: int) -> str:
    """Four bytes, plus `shift` modulo 256, from one register to four floats, less `shift`."""
    parts = [f"prmt.b32 part, word, 0x4B000000, 0x744{i}; sub.f32 ${i}, part, 0f4B0000{shift:02X};" for i in range(4)]
    return f"{{ .reg .b32 word, part; xor.b32 word, $4, 0x{4 * f'{shift:02X}'}; {' '.join(parts)} }}"


def _packing(shift: int) -> str:
    """Inverse of `_unpacking`."""
    sums = [f"add.f32 x{i}, ${i + 1}, 0f4B0000{shift:02X};" for i in range(4)]
    joined = "prmt.b32 x0, x0, x1, 0x0040; prmt.b32 x2, x2, x3, 0x0040; prmt.b32 x0, x0, x2, 0x5410;"
    return f"{{ .reg .b32 x<4>; {' '.join(sums)} {joined} xor.b32 $0, x0, 0x{4 * f'{shift:02X}'}; }}"


_UNPACK_SIGNED, _UNPACK_UNSIGNED = tl.constexpr(_unpacking(128)), tl.constexpr(_unpacking(0))
_SHARE_OF_BYTE_2, _SHARE_OF_BYTE_3 = (
    # times 2**-8, less 2**15 - 2**-9
    tl.constexpr(f"prmt.b32 $0, $1, 0x4B000000, 0x744{i}; fma.rn.f32 $0, $0, 0f3B800000, 0fC6FFFFFF;")
    for i in (2, 3)
)
_PACK_SIGNED, _PACK_UNSIGNED = tl.constexpr(_packing(128)), tl.constexpr(_packing(0))


@triton.jit
def bytes_to_float(x):
    """int8 or uint8 -> float32: a byte is the lowest of the float 2**23 + byte."""
    if x.dtype == tl.int8:
        y = tl.inline_asm_elementwise(_UNPACK_SIGNED, "=f,=f,=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=4)
    else:
        y = tl.inline_asm_elementwise(_UNPACK_UNSIGNED, "=f,=f,=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=4)
    return y


@triton.jit
def float_to_bytes(x, SIGNED: tl.constexpr):
    """Whole numbers -> int8 or uint8, which must hold them."""
    if SIGNED:
        codes = tl.inline_asm_elementwise(_PACK_SIGNED, "=r,f,f,f,f", [x], dtype=tl.int8, is_pure=True, pack=4)
    else:
        codes = tl.inline_asm_elementwise(_PACK_UNSIGNED, "=r,f,f,f,f", [x], dtype=tl.uint8, is_pure=True, pack=4)
    return codes


@triton.jit
def share_of_byte(word, BYTE: tl.constexpr):
    """(b + 1/2) / 256 for byte 2 or 3 of a 32-bit word."""
    asm: tl.constexpr = _SHARE_OF_BYTE_2 if BYTE == 2 else _SHARE_OF_BYTE_3
    return tl.inline_asm_elementwise(asm, "=f,r", [word], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def copy_sign(x, y):
    """|x| with the sign of y."""
    return tl.inline_asm_elementwise(
        "copysign.f32 $0, $2, $1;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
    )

"""Unpacking and dot products on 32-bit words: inline PTX where kernels are compiled, plain operations otherwise.

The compiler works on int8 tensors byte by byte; these snippets handle four weights per instruction. The interpreter
cannot run PTX, so each has a plain form that gives the same integers, chosen by the constexpr ASM.
"""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import os

import triton
import triton.language as tl

# Kernels run in triton's interpreter (on the CPU, for tests) when this variable was set before triton was imported.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


@triton.jit
def nibbles_times_16(w, ASM: tl.constexpr):
    """Low and high nibbles of bytes, each as int8 code * 16. The shift right by 4 is left to the accumulator."""
    # One snippet per result: the compiler cannot keep a tile in registers through an operation with two results.
    if ASM:
        low = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
        high = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        low = w << 4
        high = w & -16
    return low, high


@triton.jit
def _affine(w, mul, zero, SHIFT: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        add = (128 - (zero + 8) * mul) * 0x01010101
        # pack=4 hands over four copies of each int32 operand, one per byte; they are equal, and the first is used.
        if SHIFT == 4:
            return tl.inline_asm_elementwise(
                """{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 t, t, 0x0F0F0F0F; xor.b32 t, t, 0x08080808;
                mad.lo.u32 t, t, $2, $6; xor.b32 $0, t, 0x80808080; }""",
                "=r,r,r,r,r,r,r,r,r,r", [w, mul, add], dtype=tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                """{ .reg .b32 t; and.b32 t, $1, 0x0F0F0F0F; xor.b32 t, t, 0x08080808;
                mad.lo.u32 t, t, $2, $6; xor.b32 $0, t, 0x80808080; }""",
                "=r,r,r,r,r,r,r,r,r,r", [w, mul, add], dtype=tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
    else:
        code = (w << (4 - SHIFT)) >> 4
        return ((code.to(tl.int32) - zero) * mul).to(tl.int8)


@triton.jit
def nibbles_affine(w, mul_low, zero_low, mul_high, zero_high, ASM: tl.constexpr):
    """Low and high nibbles of bytes as int8 (code - zero) * mul; mul and zero are int32 [rows, 1].

    On words: with u = code + 8 in each byte, u * mul + (128 - (zero + 8) * mul) lies in [0, 255] in every byte, so one
    32-bit multiply-add does four weights without a carry between them, and flipping the top bits takes off the 128.
    """
    return _affine(w, mul_low, zero_low, 0, ASM), _affine(w, mul_high, zero_high, 4, ASM)


@triton.jit
def _byte(word, index: tl.constexpr):
    return (word << (24 - 8 * index)) >> 24


@triton.jit
def dp4a(a, b, acc, ASM: tl.constexpr):
    """acc + the dot product of the four signed bytes of a and b (int32 words)."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    for index in tl.static_range(4):
        acc += _byte(a, index) * _byte(b, index)
    return acc

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
    if ASM:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            shl.b32 t, $2, 4;
            and.b32 $1, $2, 0xF0F0F0F0;
            and.b32 $0, t, 0xF0F0F0F0;
            }""",
            "=r,=r,r",
            [w],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = w << 4
        high = w & -16
    return low, high


@triton.jit
def nibbles_affine(w, mul_low, zero_low, mul_high, zero_high, ASM: tl.constexpr):
    """Low and high nibbles of bytes as int8 (code - zero) * mul; mul and zero are int32 [rows, 1].

    On words: with u = code + 8 in each byte, u * mul + (128 - (zero + 8) * mul) lies in [0, 255] in every byte, so one
    32-bit multiply-add does four weights without a carry between them, and flipping the top bits takes off the 128.
    """
    if ASM:
        add_low = (128 - (zero_low + 8) * mul_low) * 0x01010101
        add_high = (128 - (zero_high + 8) * mul_high) * 0x01010101
        # pack=4 hands over four copies of each int32 operand, one per byte; they are equal, and the first is used.
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u;
            and.b32 t, $2, 0x0F0F0F0F;
            xor.b32 t, t, 0x08080808;
            shr.u32 u, $2, 4;
            and.b32 u, u, 0x0F0F0F0F;
            xor.b32 u, u, 0x08080808;
            mad.lo.u32 t, t, $3, $7;
            mad.lo.u32 u, u, $11, $15;
            xor.b32 $0, t, 0x80808080;
            xor.b32 $1, u, 0x80808080;
            }""",
            "=&r,=&r,r," + "r," * 15 + "r",
            [w, mul_low, add_low, mul_high, add_high],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = (((w << 4) >> 4).to(tl.int32) - zero_low) * mul_low
        high = ((w >> 4).to(tl.int32) - zero_high) * mul_high
        low = low.to(tl.int8)
        high = high.to(tl.int8)
    return low, high


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

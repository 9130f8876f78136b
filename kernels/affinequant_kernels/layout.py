"""Bit layouts of int4 weights as they are kept and exchanged. (`cpu/lanes.py` has the order of a copy that AVX512 reads.)

`hs128` ("half split, 128") is what a weight has and all other kernels read: uint8 [n, ceil(k/128)*64]. Columns go in
blocks of 128; byte j of block b holds column 128b+j in its low nibble and column 128b+64+j in its high nibble, both in
two's complement. A kernel thus unpacks a tile of bytes into two tiles of 64 *consecutive* columns, and activations stay
in natural order. Columns past k are code 0.

Shapes: n rows (output features), k columns (input features).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int, Int8, Int32, UInt8
from torch import Tensor

from affinequant_kernels.checks import check_tensor, fail

BLOCK = 128
HALF = BLOCK // 2


def packed_columns(k: int) -> int:
    """Bytes per row of `hs128` for k columns."""
    return -(-k // BLOCK) * HALF


def pack_hs128(codes: Int8[Tensor, "n k"]) -> UInt8[Tensor, "n bytes"]:
    """Pack signed codes in [-8, 7]; the last block is filled up with code 0."""
    check_tensor("codes", codes, (None, None), (torch.int8,))
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise fail("codes", "values in [-8, 7]", f"[{int(codes.min())}, {int(codes.max())}]")
    n, k = codes.shape
    blocks = F.pad(codes, (0, -k % BLOCK)).view(torch.uint8).reshape(n, -1, 2, HALF)
    return ((blocks[:, :, 0] & 0x0F) | (blocks[:, :, 1] << 4)).reshape(n, -1)


def unpack_hs128(packed: UInt8[Tensor, "n bytes"], k: int) -> Int8[Tensor, "n k"]:
    """Signed codes of the first k columns."""
    check_tensor("packed", packed, (None, packed_columns(k)), (torch.uint8,))
    n = packed.shape[0]
    # The shift left happens on uint8 (it drops the other nibble), the shift right on int8 (it brings the sign down).
    low = (packed << 4).view(torch.int8) >> 4
    high = packed.view(torch.int8) >> 4
    planes = torch.stack((low.view(n, -1, HALF), high.view(n, -1, HALF)), dim=2)
    return planes.reshape(n, -1)[:, :k].contiguous()


def _nibbles(words: Int32[Tensor, "n words"]) -> Int8[Tensor, "n eight_words"]:
    """The eight nibbles of each word, lowest first, as unsigned values 0..15."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.int8).flatten(-2)


def _words(values: Int8[Tensor, "n k"]) -> Int32[Tensor, "n words"]:
    """Unsigned values 0..15, eight to a word, lowest first; the last word is filled up with 0."""
    padded = F.pad(values, (0, -values.shape[-1] % 8)).to(torch.int32)
    shifts = torch.arange(0, 32, 4, device=values.device, dtype=torch.int32)
    return (padded.unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.int32)


def codes_from_compressed_tensors(weight_packed: Int32[Tensor, "n words"], k: int) -> Int8[Tensor, "n k"]:
    """Signed codes of `weight_packed` of the `pack-quantized` format: column c at bits 4*(c%8), stored as code+8."""
    check_tensor("weight_packed", weight_packed, (None, -(-k // 8)), (torch.int32,))
    return (_nibbles(weight_packed)[:, :k] - 8).contiguous()


def codes_to_compressed_tensors(codes: Int8[Tensor, "n k"]) -> Int32[Tensor, "n words"]:
    """`weight_packed` of the `pack-quantized` format. Inverse of `codes_from_compressed_tensors`."""
    check_tensor("codes", codes, (None, None), (torch.int8,))
    return _words(codes + 8)


def zeros_from_compressed_tensors(zero_packed: Int32[Tensor, "words groups"], n: int) -> Int8[Tensor, "n groups"]:
    """Signed zero points of `weight_zero_point`, which that format packs along the rows."""
    check_tensor("zero_packed", zero_packed, (-(-n // 8), None), (torch.int32,))
    return (_nibbles(zero_packed.t().contiguous())[:, :n] - 8).t().contiguous()


def zeros_to_compressed_tensors(zero: Int8[Tensor, "n groups"]) -> Int32[Tensor, "words groups"]:
    """`weight_zero_point` of the `pack-quantized` format. Inverse of `zeros_from_compressed_tensors`."""
    check_tensor("zero", zero, (None, None), (torch.int8,))
    return _words(zero.t() + 8).t().contiguous()


def codes_from_gptq(qweight: Int32[Tensor, "words n"], g_idx: Int[Tensor, " k"] | None, k: int) -> Int8[Tensor, "n k"]:
    """Signed codes of GPTQ's `qweight`: row c at bits 4*(c%8) of word c//8, stored as code+8.

    Raises ValueError for an activation-ordered checkpoint (`g_idx` not in ascending groups): its columns would have to
    be permuted, and the activations with them.
    """
    check_tensor("qweight", qweight, (k // 8, None), (torch.int32,))
    if g_idx is not None and bool((g_idx[1:] < g_idx[:-1]).any()):
        raise fail("g_idx", "groups in ascending order", "an activation-ordered (desc_act) checkpoint")
    return (_nibbles(qweight.t().contiguous()) - 8).contiguous()


def zeros_from_gptq(qzeros: Int32[Tensor, "groups words"], n: int, *, minus_one: bool) -> Int8[Tensor, "n groups"]:
    """Signed zero points of GPTQ's `qzeros`. `minus_one`: the first version of the format, which stores zero-1."""
    check_tensor("qzeros", qzeros, (None, -(-n // 8)), (torch.int32,))
    stored = _nibbles(qzeros)[:, :n]
    return ((stored + 1 if minus_one else stored) - 8).t().contiguous()


def codes_to_gptq(codes: Int8[Tensor, "n k"]) -> Int32[Tensor, "words n"]:
    """GPTQ's `qweight`. Inverse of `codes_from_gptq`; k must be a multiple of 8."""
    check_tensor("codes", codes, (None, None), (torch.int8,))
    if codes.shape[1] % 8:
        raise fail("codes", "a multiple of 8 columns", codes.shape[1])
    return _words(codes + 8).t().contiguous()


def pack_rows_hs128(q: Int8[Tensor, "m k"]) -> UInt8[Tensor, "m bytes"]:
    """Pack quantised activations, already known to lie in [-8, 7], without looking at the values (no device wait)."""
    m, k = q.shape
    blocks = F.pad(q, (0, -k % BLOCK)).view(torch.uint8).reshape(m, -1, 2, HALF)
    return ((blocks[:, :, 0] & 0x0F) | (blocks[:, :, 1] << 4)).reshape(m, -1)

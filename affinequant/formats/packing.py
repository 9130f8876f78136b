"""Codes in 32-bit words, as compressed-tensors holds them: code i of a row begins at bit i * bits, counted from the lowest.

Where a word holds whole codes the library packs and unpacks. At 3 bits its releases differ: 0.17 leaves two bits of each word
empty, later ones and vLLM let codes run on from word to word. What is written here runs on, whatever is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a plan asks formats, and must not wait for torch
    from torch import Tensor

_UNPACKED = 2**22
"""Codes that are unpacked at once."""


def words(count: int, bits: int) -> int:
    """How many words hold so many codes."""
    return -(-count * bits // 32)


def library_packs(bits: int) -> bool:
    """Whether the release that is installed packs codes of so many bits without gaps."""
    import torch
    from compressed_tensors.compressors import pack_to_int32

    return pack_to_int32(torch.zeros(1, 32, dtype=torch.int8), bits).shape[1] == words(32, bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """int32 [N, words] of signed codes int8 [N, K]."""
    from compressed_tensors.compressors import pack_to_int32

    if 32 % bits == 0:
        return pack_to_int32(codes, bits)
    import numpy as np
    import torch

    unsigned = (codes.numpy() + 2 ** (bits - 1)).astype(np.uint8)
    each = np.unpackbits(unsigned[..., None], axis=-1, count=bits, bitorder="little").reshape(len(codes), -1)
    room = words(codes.shape[1], bits) * 32 - each.shape[1]
    return torch.from_numpy(np.packbits(np.pad(each, ((0, 0), (0, room))), axis=-1, bitorder="little").view(np.int32))


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes int8 [N, columns] of words int32 [N, words]; some rows at a time, since every code is an int32 on the way."""
    import torch

    codes = torch.empty(len(packed), columns, dtype=torch.int8, device=packed.device)
    step = max(1, _UNPACKED // columns)
    for start in range(0, len(packed), step):
        codes[start : start + step] = _unpacked(packed[start : start + step], bits, columns)
    return codes


def _unpacked(packed: Tensor, bits: int, columns: int) -> Tensor:
    import torch
    from compressed_tensors.compressors import unpack_from_int32

    if 32 % bits == 0:
        return unpack_from_int32(packed, bits, torch.Size((len(packed), columns)))
    import numpy as np

    each = np.unpackbits(
        packed.cpu().contiguous().numpy().view(np.uint8), axis=-1, count=columns * bits, bitorder="little"
    )
    unsigned = np.packbits(each.reshape(len(packed), columns, bits), axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy(unsigned.astype(np.int8) - 2 ** (bits - 1)).to(packed.device)

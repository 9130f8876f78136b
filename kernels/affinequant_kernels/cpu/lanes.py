"""Codes in the order in which native_avx512.h reads them: sixteen output features side by side in the lanes of a vector,
four columns in each lane. A group's sums then stay within their lanes.

Filled up with zeros to whole vectors of features and whole blocks of columns; what is beyond n lies behind what is returned.

Shapes: n output features, k input features.
"""

from __future__ import annotations

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from affinequant_kernels.layout import BLOCK

LANES = 16


def whole_bytes(codes: Int8[Tensor, "n k"]) -> UInt8[Tensor, "n filled_k"]:
    """Codes plus 128, in the order [n / 16, k / 4, 16, 4]."""
    filled = _filled(codes) ^ -128
    ordered = filled.view(torch.uint8).unflatten(1, (-1, 4)).unflatten(0, (-1, LANES)).transpose(1, 2)
    return ordered.reshape(filled.shape)[: codes.shape[0]]


def nibbles(codes: Int8[Tensor, "n k"]) -> UInt8[Tensor, "n half_filled_k"]:
    """Codes of 4 bits plus 8, in the order [n / 16, k / 8, 16, 4]: of eight columns the first four lie in low nibbles."""
    filled = (_filled(codes) + 8).view(torch.uint8)
    ordered = filled.unflatten(1, (-1, 2, 4)).unflatten(0, (-1, LANES)).transpose(1, 2)
    low, high = ordered.unbind(3)
    return (low | high << 4).reshape(len(filled), -1)[: codes.shape[0]]


def _filled(codes: Tensor) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % BLOCK, 0, -codes.shape[0] % LANES))

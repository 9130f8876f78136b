"""What each op gives, as tensors without values: torch.compile traces with these. By the names of an op's arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from affinequant_kernels.weight import Weight


def rows(x: Tensor, group: int = 0) -> tuple[Tensor, ...]:
    """Quantised rows of x [m, k], or of groups of its columns."""
    return _rows(x, x.shape[1], group)


def rows_and_hidden(x: Tensor) -> tuple[Tensor, ...]:
    """The same, and x + residual."""
    return (*_rows(x, x.shape[1]), torch.empty_like(x))


def rows_of_half(gate_up: Tensor) -> tuple[Tensor, ...]:
    """Quantised rows [m, k] of [gate | up]."""
    return _rows(gate_up, gate_up.shape[1] // 2)


def _rows(x: Tensor, k: int, group: int = 0) -> tuple[Tensor, ...]:
    size, whole = (x.shape[0], k // group) if group else (x.shape[0],), torch.int32
    q, scale = x.new_empty((x.shape[0], k), dtype=torch.int8), x.new_empty(size, dtype=torch.float32)
    return q, scale, x.new_empty(size, dtype=whole), x.new_empty(size, dtype=whole)


def product(q: Tensor, weight: Weight, out_dtype: torch.dtype) -> Tensor:
    """[m, n] of quantised rows."""
    return q.new_empty((q.shape[0], weight.qweight.shape[0]), dtype=out_dtype)


def layer(x: Tensor, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """[..., n] of inputs [..., k]."""
    return x.new_empty((*x.shape[:-1], weight.qweight.shape[0]), dtype=out_dtype or x.dtype)


def packed(k: Tensor) -> tuple[Tensor, ...]:
    """Codes, scale and offset of keys [t, h, d]."""
    t, h, d = k.shape
    scale = k.new_empty((t, h), dtype=torch.float16)
    return k.new_empty((t, h, d // 2), dtype=torch.uint8), scale, torch.empty_like(scale)


def unpacked(packed: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The keys again."""
    t, h, half = packed.shape
    return packed.new_empty((t, h, 2 * half), dtype=out_dtype)

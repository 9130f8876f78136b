"""Int4 and int8 kernels for quantised linear layers: Triton on CUDA, oneDNN on the CPU, and their exact reference.

Importing this package costs nothing: torch, and triton where it is needed, are imported on first use.

    from affinequant_kernels import prepare_weight, linear

    weight = prepare_weight(codes, scale, zero)       # codes int8 [n, k], scale [n] or [n, groups]
    y = linear(x, weight, act_bits=4)                 # x [..., k] -> y [..., n]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from affinequant_kernels.ops import kv_pack as kv_pack
    from affinequant_kernels.ops import kv_unpack as kv_unpack
    from affinequant_kernels.ops import linear as linear
    from affinequant_kernels.ops import online_linear as online_linear
    from affinequant_kernels.ops import row_quant as row_quant
    from affinequant_kernels.weight import Weight as Weight
    from affinequant_kernels.weight import prepare_weight as prepare_weight
    from affinequant_kernels.weight import slice_columns as slice_columns
    from affinequant_kernels.weight import slice_rows as slice_rows

_HOME = {
    **dict.fromkeys(("kv_pack", "kv_unpack", "linear", "online_linear", "row_quant"), "ops"),
    **dict.fromkeys(("Weight", "prepare_weight", "slice_columns", "slice_rows"), "weight"),
}

__all__ = [
    "Weight",
    "kv_pack",
    "kv_unpack",
    "linear",
    "online_linear",
    "prepare_weight",
    "row_quant",
    "slice_columns",
    "slice_rows",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

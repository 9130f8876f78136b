"""Argument checks shared by every op: a ValueError names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_ONLY = 16
"""As bits of activations: they stay in their type."""


def fail(argument: str, expected: str, got: object) -> ValueError:
    """The error of this package, to be raised by the caller."""
    return ValueError(f"{argument}: expected {expected}, got {got}")


def check_tensor(
    argument: str,
    value: Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Check dtype, shape (None: any size), contiguity and, where given, the device."""
    if value.dtype not in dtypes:
        raise fail(argument, " or ".join(str(d) for d in dtypes), value.dtype)
    got = value.shape
    fits = len(got) == len(shape)
    for axis, want in enumerate(shape if fits else ()):
        fits &= want is None or got[axis] == want
    if not fits:
        wanted = "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
        raise fail(argument, f"shape {wanted}", list(got))
    if not value.is_contiguous():
        raise fail(argument, "a contiguous tensor", f"strides {value.stride()}")
    if device is not None and value.device != device:
        raise fail(argument, f"a tensor on {device}", value.device)


def check_quant(bits: int, clip: float) -> None:
    """Check the settings of a dynamic activation quantiser."""
    if bits not in (4, 8):
        raise fail("bits", "4 or 8", bits)
    if not (math.isfinite(clip) and 0.0 < clip <= 1.0):
        raise fail("clip", "a number in (0, 1]", clip)


def check_finite(argument: str, value: Tensor) -> None:
    """Check that every element is finite. Waits for the device: call it when loading, not when serving."""
    if not bool(torch.isfinite(value).all()):
        raise fail(argument, "finite values", f"{int((~torch.isfinite(value)).sum())} non-finite")

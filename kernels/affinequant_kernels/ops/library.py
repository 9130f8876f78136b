"""The torch.library namespace `affq`, and how an op is put into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("affq", "DEF")


def register(schema: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Define an op: `run` for CPU and CUDA tensors alike, `shapes` for tracing. Both check their arguments."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CPU")
    _LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"affq::{name}", shapes, lib=_LIBRARY)

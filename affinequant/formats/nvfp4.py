"""nvfp4: 4-bit floats in groups of 16, with 8-bit float scales and one scale per matrix, by compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from affinequant.formats import SHARD_BYTES, Contents, Shapes
from affinequant.formats.float4 import group_reason, online_reason, reload_floats, write_floats
from affinequant.formats.reading import Dtype
from affinequant.scheme import Scheme
from affinequant.sites import Placement

ABOUT = "4-bit floats in groups of 16, 8-bit float scales; weights only (vLLM: on GPUs)"
ROUNDS = "every weight, to a 4-bit float (e2m1) of its group of 16, and scales to 8-bit floats"
TOLERANCE = 0.5
WEIGHT_ONLY = True
GROUP = 16


def supports(scheme: Scheme, placements: Mapping[str, Placement], *, clipped: bool = False) -> str | None:
    """None, or why this cannot be written: stock engines have no transforms at run time."""
    return online_reason(placements)


def refuses(contents: Contents, shapes: Shapes) -> str | None:
    """None, or which linear the groups do not divide."""
    return group_reason(contents, shapes, GROUP)


def reload(out: Path, dtype: Dtype) -> tuple[Any, str]:
    """The folder in stock transformers."""
    return reload_floats(out, dtype)


def write(contents: Contents, out: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the folder and return its files; `config.json` is the last of them.

    Raises:
        OSError: the folder cannot be written.
    """
    return write_floats(contents, out, ("NVFP4A16", "nvfp4-pack-quantized"), shard_bytes=shard_bytes)

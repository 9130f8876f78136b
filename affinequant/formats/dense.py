"""dense: the dequantised weights in 16 bits, for inspection and for engines that know no integers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from affinequant.formats import SHARD_BYTES, Contents
from affinequant.formats.compressed_tensors import checkpoint_config
from affinequant.formats.shards import copy_source, write_json, write_shards
from affinequant.scheme import Scheme
from affinequant.sites import Placement

if TYPE_CHECKING:  # a plan asks `supports`, and must not wait for torch
    from torch import Tensor

ABOUT = "dequantised weights in 16 bits, rounded to them once more; any engine, no gain in size"


def supports(scheme: Scheme, placements: Mapping[str, Placement], *, clipped: bool = False) -> str | None:
    """None, or why this cannot be written: a plain linear has no place for a transform at run time."""
    online = sorted(site for site, placement in placements.items() if placement.how == "online")
    return f"the transform at {', '.join(online)} acts at run time, which a plain linear cannot do" if online else None


def write(contents: Contents, out: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the folder and return its files; `config.json` is the last of them.

    Raises:
        OSError: the folder cannot be written.
    """
    (out / "config.json").unlink(missing_ok=True)
    stages = (_dense_stage(stage, contents) for stage in contents.stages())
    files = write_shards(stages, out, shard_bytes=shard_bytes)
    files += copy_source(contents.source, out)
    return [*files, write_json(out / "config.json", checkpoint_config(contents))]


def _dense_stage(stage: Mapping[str, Tensor], contents: Contents) -> dict[str, Tensor]:
    import torch

    from affinequant.quantizer import dequantize

    dtype = getattr(torch, contents.dtype)
    linears = [name for name in contents.linears if f"{name}.codes" in stage]
    parts = {f"{name}.{part}" for name in linears for part in ("codes", "scale", "zero", "input_clip")}
    dense = {name: tensor for name, tensor in stage.items() if name not in parts}
    for name in linears:
        codes, scale = stage[f"{name}.codes"], stage[f"{name}.scale"]
        zero = stage.get(f"{name}.zero", torch.zeros_like(scale))
        dense[f"{name}.weight"] = dequantize(codes, scale, zero, contents.scheme.weight).to(dtype)
    return dense

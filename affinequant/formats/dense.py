"""dense: the dequantised weights in 16 bits, for inspection and for engines that know no integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.formats import SHARD_BYTES, Contents, Shapes, online_reason, split_stage
from affinequant.formats.compressed_tensors import checkpoint_config
from affinequant.formats.reading import Dtype, in_transformers
from affinequant.formats.shards import copy_source, write_json, write_shards
from affinequant.models import Family
from affinequant.models.sites import Placement
from affinequant.recipe.scheme import Scheme

if TYPE_CHECKING:  # a plan asks `supports`, and must not wait for torch
    from torch import Tensor

ABOUT = "dequantised weights in 16 bits, rounded to them once more; any engine, no gain in size"
ROUNDS = "the product of integer and scale, to 16 bits"
TOLERANCE = 0.01
WEIGHT_ONLY = True


def supports(scheme: Scheme, placements: Mapping[str, Placement], *, clipped: bool = False) -> str | None:
    """None, or why this cannot be written: a plain linear has no place for a transform at run time."""
    return online_reason(placements, "a plain linear cannot do")


def mixes(schemes: Sequence[Scheme]) -> str | None:
    """None: each linear's numbers are its own."""
    return None


def lacks(family: Family, schemes: Sequence[Scheme] = ()) -> str | None:
    """None: every family can be written."""
    return None


def refuses(contents: Contents, shapes: Shapes) -> str | None:
    """None: any size can be written."""
    return None


def reload(out: Path, dtype: Dtype) -> tuple[Any, str]:
    """The folder in stock transformers."""
    return in_transformers(out, dtype)


def write(contents: Contents, out: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the folder and return its files; `config.json` is the last of them.

    Raises:
        OSError: the folder cannot be written.
    """
    import torch

    dtype = getattr(torch, contents.dtype)

    def rounded(stage: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rest, values = dense_stage(stage, contents)
        return rest | {name: value.to(dtype) for name, value in values.items()}

    return write_folder(contents, out, map(rounded, contents.stages()), shard_bytes=shard_bytes)


def write_folder(
    contents: Contents,
    out: Path,
    stages: Iterable[dict[str, Tensor]],
    declared: Mapping[str, Any] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    stem: str = "model",
) -> list[Path]:
    """Shards of `stages` called `stem`, the source's other files, and last a config.json with `declared` in it."""
    (out / "config.json").unlink(missing_ok=True)
    files = write_shards(map(contents.in_files, stages), out, shard_bytes=shard_bytes, stem=stem)
    files += copy_source(contents.source, out)
    config = checkpoint_config(contents) | ({"quantization_config": dict(declared)} if declared else {})
    return [*files, write_json(out / "config.json", config)]


def dense_stage(stage: Mapping[str, Tensor], contents: Contents) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A stage's other tensors as they are, and its quantised linears' weights in float32, under `NAME.weight`."""
    import torch

    from affinequant.numbers import grid_of
    from affinequant.numbers.weights import dequantize

    rest, integers = split_stage(stage, contents)
    values = {}
    for name, (codes, scale, zero) in integers.items():
        zeros = torch.zeros_like(scale) if zero is None else zero.to(scale)
        values[f"{name}.weight"] = dequantize(codes, scale, zeros, grid_of(contents.numbers(name).weight))
    return rest, values

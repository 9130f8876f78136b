"""affinequant: our own form, for transforms that stay online. The tensors are those of compressed-tensors, and each linear's
transform lies beside it.

A stock engine must refuse such a folder: without the transforms it computes another function. vLLM refuses a
`quant_method` for which it has no plugin. transformers only warns, and would go on with random weights; so the files do
not have the name under which it looks for weights, and it stops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from affinequant.formats import SHARD_BYTES, Contents, Shapes, left_alone
from affinequant.formats.compressed_tensors import our_config, without_kernel, write_packed
from affinequant.models import Family
from affinequant.models.sites import Placement
from affinequant.recipe.scheme import Scheme

ABOUT = "integers with transforms that act at run time; affinequant.load or vLLM with our plugin"
ROUNDS = ""
TOLERANCE = 0.0001
WEIGHT_ONLY = False
STEM = "affinequant"
reload = None  # nobody else reads it


def supports(scheme: Scheme, placements: Mapping[str, Placement], *, clipped: bool = False) -> str | None:
    """None, or why this cannot be written."""
    return without_kernel(scheme)


def mixes(schemes: Sequence[Scheme]) -> str | None:
    """None: each linear's numbers are its own."""
    return None


def lacks(family: Family, schemes: Sequence[Scheme] = ()) -> str | None:
    """None: every family can be written."""
    return None


def refuses(contents: Contents, shapes: Shapes) -> str | None:
    """None: sizes that cannot be packed are refused before anything is quantised."""
    return None


def write(contents: Contents, out: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the folder and return its files; `config.json` is the last of them.

    Raises:
        OSError: the folder cannot be written.
    """
    return write_packed(contents, out, quantization_config, shard_bytes=shard_bytes, stem=STEM)


def quantization_config(contents: Contents, found: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in `config.json`."""
    return {"quant_method": "affinequant", "ignore": left_alone(contents), "affinequant": our_config(contents, found)}

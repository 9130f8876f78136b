"""humming: symmetric 4-bit weights, packed, with 4-bit activations declared: what vLLM's Humming kernels multiply as integers.

vLLM 0.32 has them, for NVIDIA GPUs from sm_80 (`pip install humming-kernels`), behind all its other kernels: unless
`--linear-backend humming` is given it takes one that leaves activations in 16 bits, and does not say so. Humming rounds each
token, or each group of one, symmetrically over its full range, as our runtime does. Not yet run on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from affinequant.formats import SHARD_BYTES, Contents, Shapes, floats_reason, mixed, network_of, online_reason
from affinequant.formats import compressed_tensors as packed
from affinequant.formats.reading import Dtype, in_transformers
from affinequant.models import Family
from affinequant.models.sites import Placement
from affinequant.recipe.scheme import Scheme

ABOUT = "symmetric W4A4 with activations that vLLM rounds on NVIDIA, with --linear-backend humming"
ROUNDS = ""
TOLERANCE = 0.0001
WEIGHT_ONLY = False


def supports(scheme: Scheme, placements: Mapping[str, Placement], *, clipped: bool = False) -> str | None:
    """None, or why Humming would not compute this: other widths, zero points, clipped activations."""
    weight, activation = scheme.weight, scheme.activation
    if reason := floats_reason(scheme) or online_reason(placements, "vLLM cannot do without this package"):
        return reason
    if activation is None or (weight.bits, activation.bits) != (4, 4):
        return f"it is for 4-bit weights and activations, not {scheme.name}; other formats hold that"
    if not (weight.symmetric and activation.symmetric):
        return "Humming reads no zero points of activations; quantise with --scheme w4a4-sym --tier merged"
    if clipped:
        return "Humming rounds activations over their full range, without clipping"
    return None


def mixes(schemes: Sequence[Scheme]) -> str | None:
    """Why not: one scheme for all."""
    return "it is for one scheme alone: 4-bit weights and activations"


def lacks(family: Family, schemes: Sequence[Scheme] = ()) -> str | None:
    """None, or that there are experts."""
    return "vLLM has no 4-bit activations for experts" if mixed(family) else None


def refuses(contents: Contents, shapes: Shapes) -> str | None:
    """None, or that there are experts; any size can be written."""
    return lacks(network_of(contents)[0])


def reload(out: Path, dtype: Dtype) -> tuple[Any, str]:
    """The weights in stock transformers. Activations stay in 16 bits: what rounds them needs a GPU."""
    from transformers import AutoConfig

    declared = json.loads((out / "config.json").read_text())["quantization_config"]
    for group in declared["config_groups"].values():
        group["input_activations"] = None
    config: Any = AutoConfig.from_pretrained(out, local_files_only=True)
    config.quantization_config = declared
    model, words = in_transformers(out, dtype, config=config)
    return model, f"{words}, activations in 16 bits"


def write(contents: Contents, out: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the folder and return its files; `config.json` is the last of them.

    Raises:
        OSError: the folder cannot be written.
    """
    return packed.write_packed(contents, out, _declared, shard_bytes=shard_bytes)


def _declared(contents: Contents, found: Mapping[str, Any]) -> dict[str, Any]:
    config = packed.quantization_config(contents, found, declared=False)
    assert contents.scheme.activation is not None
    config["config_groups"]["group_0"]["input_activations"] = packed.arguments(contents.scheme.activation)
    return config

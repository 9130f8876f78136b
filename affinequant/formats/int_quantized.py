"""int-quantized: compressed-tensors with one byte per weight and declared activations, W8A8 and symmetric W4A8.

Stock engines quantise each token symmetrically over its full range. vLLM runs W8A8 on CPUs and GPUs; it has a kernel
for W4A8 on CPUs only, and its GPU builds fail at start-up or fall back (llm-compressor issue 2693).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from affinequant.formats import SHARD_BYTES, Contents, Shapes, floats_reason, online_reason
from affinequant.formats import compressed_tensors as packed
from affinequant.models import Family
from affinequant.models.sites import Placement
from affinequant.recipe.scheme import Scheme

ABOUT = "W8A8, or symmetric W4A8 (vLLM: on CPUs only), with activations that stock engines quantise"
ROUNDS = ""
TOLERANCE = 0.0001
WEIGHT_ONLY = False


def supports(scheme: Scheme, placements: Mapping[str, Placement], *, clipped: bool = False) -> str | None:
    """None, or why stock engines would not compute this: asymmetric numbers, other widths, clipped or grouped ones."""
    weight, activation = scheme.weight, scheme.activation
    if reason := floats_reason(scheme) or online_reason(placements, "stock engines cannot do"):
        return reason
    if activation is None or activation.bits != 8:
        return f"engines of this form quantise activations to 8 bits, {scheme.name} does not; add --scheme w8a8"
    if not weight.symmetric:
        other = "; --scheme w8a8 holds the same integers" if weight.bits == 4 and not weight.group_size else ""
        return f"weights have zero points, which engines of this form do not read{other}"
    if not activation.symmetric:
        return "activations have zero points, for which not every engine of this form has a kernel"
    if activation.group_size:
        return "engines of this form quantise activations with one scale per token, not in groups"
    if weight.bits == 8 and weight.group_size:
        return "engines run W8A8 with one scale per output channel, not in groups"
    if clipped:
        return f"stock engines quantise the activations of {scheme.name} over their full range, without clipping"
    return None


def mixes(schemes: Sequence[Scheme]) -> str | None:
    """None: each linear's numbers are its own."""
    return None


def lacks(family: Family, schemes: Sequence[Scheme] = ()) -> str | None:
    """None: every family can be written."""
    return None


def refuses(contents: Contents, shapes: Shapes) -> str | None:
    """None: any size can be written."""
    return None


reload = packed.reload


def write(contents: Contents, out: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the folder and return its files; `config.json` is the last of them.

    Raises:
        AffineQuantError: a clipping ratio that stock engines would ignore.
        OSError: the folder cannot be written.
    """
    declare = partial(packed.quantization_config, declared=True)
    return packed.write_packed(contents, out, declare, shard_bytes=shard_bytes, whole=True)

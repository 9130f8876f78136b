"""compressed-tensors: what stock vLLM and transformers load with no code of ours.

The declared config is what those engines really run. Integer activations below 8 bits are ignored by some and refused
by others, so such a checkpoint declares its weights only; the activation part stands under our own key `affinequant`
in `quantization_config`, where the engines leave it alone and `affinequant.load` reads it. Symmetric W8A8 is declared
in full, because the engines do run it. A quantised KV cache stands under our key alone: the engines keep theirs in 16
bits, which is right, if larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.errors import AffineQuantError
from affinequant.formats import (
    SHARD_BYTES,
    VERSION,
    Contents,
    Shapes,
    float_packed,
    left_alone,
    network_of,
    online_reason,
)
from affinequant.formats.linear_tensors import pack_stage as pack_stage
from affinequant.formats.linear_tensors import unpack_linear as unpack_linear
from affinequant.formats.packing import library_packs
from affinequant.formats.reading import Dtype, decompressed, in_transformers
from affinequant.formats.shards import copy_source, write_json, write_shards
from affinequant.models import Family
from affinequant.models.multimodal import with_text
from affinequant.models.sites import Placement
from affinequant.models.source import open_source, unquantized
from affinequant.recipe.scheme import NumberFormat, Scheme
from affinequant.version import __version__

if TYPE_CHECKING:  # a plan asks `supports`, and must not wait for torch
    from torch import Tensor

ABOUT = "integers for stock vLLM and transformers; activations and KV cache by this package"

ROUNDS = ""
TOLERANCE = 0.0001
WEIGHT_ONLY = False


def supports(scheme: Scheme, placements: Mapping[str, Placement], *, clipped: bool = False) -> str | None:
    """None, or why this cannot be written in the form that stock engines compute correctly."""
    if online := online_reason(placements, "stock engines cannot do"):
        return online
    if clipped and declares_activations(scheme):
        return f"stock engines quantise the activations of {scheme.name} over their full range, without clipping"
    return without_kernel(scheme)


def lacks(family: Family) -> str | None:
    """None: every family can be written."""
    return None


def refuses(contents: Contents, shapes: Shapes) -> str | None:
    """None, or that what would read it back packs such codes differently, or that no engine runs experts of them; any size
    can be written."""
    weight, bits = contents.scheme.weight, contents.scheme.weight.bits
    if network_of(contents)[1].experts and (bits not in (4, 8) or (bits == 8 and not weight.symmetric)):
        kind = "" if weight.symmetric else "asymmetric "
        return f"experts of {bits} {kind}bits: vLLM has kernels for 4 bits, and for 8 symmetric ones"
    if library_packs(bits):
        return None
    return f"the compressed-tensors that is installed packs {bits}-bit weights another way; 0.20 reads what is written here"


def reload(out: Path, dtype: Dtype) -> tuple[Any, str]:
    """The folder in stock transformers, or, where there are experts, decompressed by the library whose form it is."""
    declared = open_source(out, weights=False).config["quantization_config"]
    if declared["affinequant"].get("experts"):
        return decompressed(out, dtype)
    return (float_packed.unpacked if declared["format"] in float_packed.LAYOUTS else in_transformers)(out, dtype)


def without_kernel(scheme: Scheme) -> str | None:
    """None, or why no integer kernel computes the scheme."""
    weight = scheme.weight
    if scheme.activation and weight.bits == 8 and weight.granularity == "group" and not weight.symmetric:
        return "8-bit weights in asymmetric groups have no integer kernel; leave out the group or add -sym"
    if scheme.activation and scheme.activation.group_size and weight.bits == 8 and not weight.symmetric:
        return "8-bit asymmetric weights have no integer kernel for activations in groups; leave out -ag or add -sym"
    return None


def declares_activations(scheme: Scheme) -> bool:
    """Whether stock engines quantise the activations themselves: 4-bit floats, and symmetric W8A8 with one scale per
    channel."""
    return scheme.engines_round_activations


def write(contents: Contents, out: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the folder and return its files; `config.json` is the last of them.

    Raises:
        AffineQuantError: a clipping ratio that stock engines would ignore, or one that is missing.
        OSError: the folder cannot be written.
    """
    return write_packed(contents, out, quantization_config, shard_bytes=shard_bytes)


def write_packed(
    contents: Contents,
    out: Path,
    declare: Callable[[Contents, Mapping[str, Any]], dict[str, Any]],
    *,
    shard_bytes: int,
    stem: str = "model",
    whole: bool | None = None,
) -> list[Path]:
    """Packed integers in shards called `stem`, and a config with what `declare(contents, found)` says of them; `found` is
    what was seen of the linears on the way, for `our_config`.

    `whole`: one byte per code, the form of engines that quantise the activations too (default: where they do).
    """
    clips: dict[str, float] = {}
    online: dict[str, dict[str, list[int]]] = {}
    whole = declares_activations(contents.scheme) if whole is None else whole

    def stages():
        for stage in contents.stages():
            packed = pack_stage(stage, contents, whole=whole)
            clips.update(_clips(stage, contents))
            online.update(_shapes(stage, contents))
            yield contents.in_files(packed)

    (out / "config.json").unlink(missing_ok=True)
    files = write_shards(stages(), out, shard_bytes=shard_bytes, stem=stem)
    if whole and stem == "model":  # stock engines read it
        _check_clips(clips, contents)
    files += copy_source(contents.source, out)
    config = checkpoint_config(contents) | {
        "quantization_config": declare(contents, {"input_clip": clips, "online": online})
    }
    return [*files, write_json(out / "config.json", config)]


def checkpoint_config(contents: Contents) -> dict[str, Any]:
    """The source's config with the result's dtype and tie, and without how the source was quantised."""
    config = {key: value for key, value in unquantized(contents.config).items() if key != "transformers_weights"}
    if "torch_dtype" in config:  # the older spelling of the same key, still read by older engines
        config["torch_dtype"] = contents.dtype
    return with_text(config, dtype=contents.dtype, tie_word_embeddings=contents.tied)


def quantization_config(
    contents: Contents, found: Mapping[str, Any], *, declared: bool | None = None
) -> dict[str, Any]:
    """What stands in `config.json`: the part for stock engines, and ours under `affinequant`. `declared`: with the
    activations (default: where engines have a kernel for them)."""
    scheme = contents.scheme
    declared = declares_activations(scheme) if declared is None else declared
    activation, form = scheme.activation, "int-quantized" if declared else "pack-quantized"
    if scheme.weight.kind == "int":
        group = {
            "targets": ["Linear"],
            "weights": arguments(scheme.weight),
            "input_activations": arguments(activation) if activation and declared else None,
            "output_activations": None,
        }
    else:
        form = float_packed.LAYOUT.format(scheme.weight.kind)
        group = float_packed.arguments(scheme) | {"format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": left_alone(contents),
        "config_groups": {"group_0": group},
        "affinequant": our_config(contents, found),
    }


def our_config(contents: Contents, found: Mapping[str, Any]) -> dict[str, Any]:
    """Our own part of `config.json`: everything that an engine needs to know of the tensors before it reads them.

    Per linear, `input_clip` is the ratio by which the range of its input is narrowed, and `online` has the shapes of what
    acts on that input at run time, part by part. `kv` are the numbers of a quantised cache; `qk` among the `placements`
    says whether queries and keys are rotated after RoPE. `experts`, where there are any, is how many a layer has.
    """
    experts = network_of(contents)[1].experts
    activation, kv = contents.scheme.activation, contents.scheme.kv
    return dict(contents.extra) | {
        "version": VERSION,
        "written_by": f"affinequant {__version__}",
        "scheme": contents.scheme.name,
        "weight": contents.scheme.weight.stored(),
        "activation": activation.stored() if activation else None,
        "kv": kv.stored() if kv else None,
        **({"experts": experts} if experts else {}),
        **found,
    }


def arguments(number: NumberFormat) -> dict[str, Any]:
    """A number format as compressed-tensors declares it."""
    return {
        "num_bits": number.bits,
        "type": "int",
        "symmetric": number.symmetric,
        "strategy": number.granularity,
        "group_size": number.group_size,
        "dynamic": number.dynamic,
    }


def _clips(stage: Mapping[str, Tensor], contents: Contents) -> dict[str, float]:
    if contents.scheme.activation is None:
        return {}
    names = [name for name in contents.linears if f"{name}.codes" in stage]
    return {name: float(stage[f"{name}.input_clip"]) for name in names}


def _shapes(stage: Mapping[str, Tensor], contents: Contents) -> dict[str, dict[str, list[int]]]:
    from affinequant.transforms.online import parts_of

    shapes = {}
    for name in contents.linears:
        if f"{name}.codes" in stage and (parts := parts_of(stage, name)):
            shapes[name] = {part: list(stage[stored].shape) for part, stored in parts.items()}
    return shapes


def _check_clips(clips: Mapping[str, float], contents: Contents) -> None:
    narrowed = [name for name, clip in clips.items() if clip != 1]
    if narrowed:
        raise AffineQuantError(
            f"the activation range of {len(narrowed)} linears is clipped, which stock engines ignore at {contents.scheme.name}",
            narrowed[0],
            "quantise with --activation-clip none",
        )

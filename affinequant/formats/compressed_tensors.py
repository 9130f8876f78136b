"""compressed-tensors: what stock vLLM and transformers load with no code of ours.

The declared config is what those engines really run. Integer activations below 8 bits are ignored by some and refused
by others, so such a checkpoint declares its weights only; the activation part stands under our own key `affinequant`
in `quantization_config`, where the engines leave it alone and `affinequant.load` reads it. Symmetric W8A8 is declared
in full, because the engines do run it. A quantised KV cache stands under our key alone: the engines keep theirs in 16
bits, which is right, if larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.errors import AffineQuantError
from affinequant.formats import (
    MIXED,
    SHARD_BYTES,
    VERSION,
    Contents,
    Shapes,
    float_packed,
    left_alone,
    mixed,
    named_to_engines,
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
    if clipped and scheme.engines_round_activations:
        return f"stock engines quantise the activations of {scheme.name} over their full range, without clipping"
    return without_kernel(scheme)


def mixes(schemes: Sequence[Scheme]) -> str | None:
    """None, or that activations which engines round stand beside others which they would not: of integers they can be left
    out of what is declared, of floats they cannot."""
    floats = [one.name for one in schemes if one.weight.kind != "int" and one.activation]
    if floats and not declares_activations(*schemes):
        others = [one.name for one in schemes if one.activation and not one.engines_round_activations]
        return f"engines round the activations of {floats[0]} and not those of {others[0]}; use {floats[0]}a16, or w8a8"
    return None


def lacks(family: Family, schemes: Sequence[Scheme] = ()) -> str | None:
    """None: every family can be written; or that no engine runs experts in these numbers."""
    if not mixed(family):
        return None
    for weight in (scheme.weight for scheme in schemes if scheme.weight.kind == "int"):
        if weight.bits not in (4, 8) or (weight.bits == 8 and not weight.symmetric):
            kind = "" if weight.symmetric else "asymmetric "
            kernels = "vLLM has kernels for 4 bits, and for 8 symmetric ones"
            return f"experts of {weight.bits} {kind}bits: {kernels}; the form affinequant holds others"
    return None


def refuses(contents: Contents, shapes: Shapes) -> str | None:
    """None, or that what would read it back packs such codes differently, or that no engine runs experts of them; any size
    can be written."""
    if reason := lacks(network_of(contents)[0], contents.schemes):
        return reason
    for bits in (scheme.weight.bits for scheme in contents.schemes):
        if not library_packs(bits):
            return f"the compressed-tensors that is installed packs {bits}-bit weights another way; 0.20 reads what is written"
    return None


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


def declares_activations(*schemes: Scheme) -> bool:
    """Whether stock engines quantise the activations themselves, of all linears that have some: 4-bit floats, and symmetric
    W8A8 with one scale per channel."""
    rounded = [scheme.engines_round_activations for scheme in schemes if scheme.activation is not None]
    return bool(rounded) and all(rounded)


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
    whole = declares_activations(*contents.schemes) if whole is None else whole

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
    declared = declares_activations(*contents.schemes) if declared is None else declared
    linears = dict[Scheme, list[str]]()
    told = named_to_engines(contents, contents.linears) if contents.others else ()
    for name, called in zip(contents.linears, told, strict=False):
        linears.setdefault(contents.numbers(name), []).append(called)
    # By name, where there are several: some versions of vLLM ask for a fused layer's class before its parts.
    parts = linears or {contents.scheme: ["Linear"]}
    forms = {scheme: _form(scheme, declared=declared) for scheme in parts}
    several = len(parts) > 1
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len({*forms.values()}) > 1 else next(iter(forms.values())),
        "quantization_status": "compressed",
        "ignore": left_alone(contents),
        "config_groups": {
            f"group_{index}": _group(scheme, targets, declared=declared)
            | ({"format": forms[scheme]} if several else {})
            for index, (scheme, targets) in enumerate(parts.items())
        },
        "affinequant": our_config(contents, found),
    }


def _form(scheme: Scheme, *, declared: bool) -> str:
    """What compressed-tensors calls the form in which the weights of a scheme are packed."""
    if scheme.weight.kind != "int":
        return float_packed.LAYOUT.format(scheme.weight.kind)
    return "int-quantized" if declared and scheme.activation else "pack-quantized"


def _group(scheme: Scheme, targets: list[str], *, declared: bool) -> dict[str, Any]:
    """The numbers of some linears as compressed-tensors declares them."""
    if scheme.weight.kind != "int":
        return float_packed.arguments(scheme) | {"targets": targets, "format": _form(scheme, declared=declared)}
    return {
        "targets": targets,
        "weights": arguments(scheme.weight),
        "input_activations": arguments(scheme.activation) if scheme.activation and declared else None,
        "output_activations": None,
    }


def our_config(contents: Contents, found: Mapping[str, Any]) -> dict[str, Any]:
    """Our own part of `config.json`: everything that an engine needs to know of the tensors before it reads them.

    Per linear, `input_clip` is the ratio by which the range of its input is narrowed, and `online` has the shapes of what
    acts on that input at run time, part by part. `kv` are the numbers of a quantised cache; `qk` among the `placements`
    says whether queries and keys are rotated after RoPE. `experts`, where there are any, is how many a layer has. `linears`
    names the schemes of those whose numbers are others, and `schemes` has these.
    """
    experts = network_of(contents)[1].experts
    kv, others = contents.scheme.kv, contents.others
    more = {
        "linears": {name: scheme.name for name, scheme in others.items()},
        "schemes": {scheme.name: _numbers(scheme) for scheme in others.values()},
    }
    return dict(contents.extra) | {
        "version": MIXED if others else VERSION,
        "written_by": f"affinequant {__version__}",
        "scheme": contents.scheme.name,
        **_numbers(contents.scheme),
        "kv": kv.stored() if kv else None,
        **({"experts": experts} if experts else {}),
        **(more if others else {}),
        **found,
    }


def _numbers(scheme: Scheme) -> dict[str, Any]:
    return {
        "weight": scheme.weight.stored(),
        "activation": scheme.activation.stored() if scheme.activation else None,
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
    names = [name for name in contents.linears if f"{name}.codes" in stage and contents.numbers(name).activation]
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

"""What a checkpoint is written as. A format has the face of `Format`, be it a module or data, and a line in `FORMATS`."""

import importlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from affinequant.errors import AffineQuantError, unknown_name
from affinequant.models import Dims, Family, resolve
from affinequant.models.linears import keeping
from affinequant.models.multimodal import in_file, patterns
from affinequant.models.sites import Placement, online_sites
from affinequant.models.source import unquantized
from affinequant.recipe.scheme import NumberFormat, Scheme
from affinequant.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

FORMATS: dict[str, str] = {
    "compressed-tensors": "affinequant.formats.compressed_tensors",
    "affinequant": "affinequant.formats.native",
    "dense": "affinequant.formats.dense",
    "int-quantized": "affinequant.formats.int_quantized",
    "humming": "affinequant.formats.humming",
    "gptq": "affinequant.formats.gptq",
    "gguf": "affinequant.formats.gguf",
    "nvfp4": "affinequant.formats.float4:NVFP4",
    "mxfp4": "affinequant.formats.float4:MXFP4",
    "transform-config": "affinequant.formats.transform_config",
    "fp_quant": "affinequant.formats.fp_quant",
}
"""What `affinequant list formats` shows: name to the module, or `module:attribute`, that writes it."""

Shapes = Mapping[str, tuple[int, ...]]
"""Sizes of a model's parameters by their Hugging Face names, quantised linears as the weights that they stand for."""

STORED = ("codes", "scale", "zero", "weight_unit", "input_clip", "input_unit")
"""What a stage keeps of a quantised linear, as far as its numbers have it."""

VERSION, MIXED = 1, 2
"""Version of our own part of `config.json`, the key `affinequant` inside `quantization_config`; and that of a checkpoint whose
linears are not all of one scheme, which readers of the first would run wrongly."""

SHARD_BYTES = 4 * 2**30
"""A shard is closed before it would grow past this; one larger tensor still makes a shard of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Everything a format writes down: the source, the numbers, and the tensors one stage at a time.

    Each call of `stages` yields flat dicts under full Hugging Face names, the outer tensors first, then the
    blocks in order. A quantised linear `M` is `M.codes` int8 [N, K], `M.scale` float32 [N, G], for asymmetric weights
    `M.zero` int8 [N, G], for quantised activations `M.input_clip` float32 [], and `M.bias` where the source has one. Where
    scales are counted in units, `M.weight_unit` and for activations `M.input_unit`, float32 [], are powers of two.
    """

    config: dict[str, Any]
    source: Path
    scheme: Scheme
    dtype: Literal["bfloat16", "float16"]
    tied: bool
    linears: tuple[str, ...]
    stages: "Callable[[], Iterator[dict[str, Tensor]]]"
    extra: Mapping[str, Any]
    others: Mapping[str, Scheme] = field(default_factory=dict)
    """By name, the linears whose numbers are not the scheme's; the KV cache's are the scheme's in any case."""
    kept: tuple[str, ...] = ()
    """Linears of the blocks that stay in 16 bits because somebody asked for that."""
    beside: tuple[str, ...] = ()
    """The parts of the model beside the decoder, whose tensors are copied."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of names that the source's files call otherwise."""

    def in_files(self, stage: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """What is written under the names of the source's files."""
        return {in_file(name, self.renamed): tensor for name, tensor in stage.items()}

    def numbers(self, linear: str) -> Scheme:
        """The numbers of a linear."""
        return self.others.get(linear, self.scheme)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """All that linears have, the most general first."""
        return tuple(dict.fromkeys((self.scheme, *self.others.values())))


class Format(Protocol):
    """The face of what `FORMATS` names."""

    ABOUT: str
    ROUNDS: str
    """What is rounded once more beyond the integers and scales of the contents, in words; "" where nothing is."""
    TOLERANCE: float
    """Nats per token by which what is read back may diverge from the contents' own weights."""
    WEIGHT_ONLY: bool
    """Whether nothing is written of how activations are quantised."""
    reload: Callable[[Path, Literal["float32", "bfloat16"]], tuple[Any, str]] | None
    """The folder as a transformers model on the CPU, and in words what has read it; None where `affinequant.load` does."""

    def supports(self, scheme: Scheme, placements: Mapping[str, Placement], *, clipped: bool = False) -> str | None:
        """None, or why this cannot be written.

        `placements` maps the name of a site to what becomes of its transform; `clipped` says that activation ranges
        are narrowed.
        """
        ...

    def mixes(self, schemes: Sequence[Scheme]) -> str | None:
        """None, or why linears of these schemes cannot be held together, each of which can be held."""
        ...

    def lacks(self, family: Family, schemes: Sequence[Scheme] = ()) -> str | None:
        """None, or why no model of this family can be held, whatever its numbers, or in these."""
        ...

    def refuses(self, contents: Contents, shapes: Shapes) -> str | None:
        """None, or what about these sizes, biases or numbers cannot be held, from headers and small tensors alone."""
        ...

    def write(self, contents: Contents, out: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
        """Write the folder and return its files; a failure leaves no `config.json` behind.

        Raises:
            AffineQuantError: contents that the format cannot hold.
            OSError: the folder cannot be written.
        """
        ...


def check_readable(ours: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint of another version, or one whose own part lacks what every version 1 has.

    Raises:
        AffineQuantError: with what wrote the checkpoint, where it says so.
    """
    version, writer = ours.get("version"), ours.get("written_by")
    if version not in (VERSION, MIXED):
        newer = isinstance(version, int) and version > MIXED
        by = f", written by {writer}" if writer else ""
        raise AffineQuantError(
            f"a checkpoint of version {version!r}{by}; this is affinequant {__version__}, which reads "
            f"versions {VERSION} and {MIXED}",
            where,
            f"update affinequant{f', at least to {writer}' if writer else ''}" if newer else "write the folder again",
        )
    try:
        schemes = dict(ours.get("schemes", {}))
        for part in (ours, *schemes.values()):
            for grid in ("weight", "activation"):
                if part[grid] is not None or grid == "weight":
                    NumberFormat(**part[grid])
        for name in ours.get("linears", {}).values():
            schemes[name]
        dict(ours["input_clip"])
    except (KeyError, TypeError, ValueError) as problem:
        raise AffineQuantError(
            f"the key affinequant of the quantization_config is not whole: {problem}",
            where,
            "write or fetch the folder again",
        ) from None


def numbers_of(ours: Mapping[str, Any], linear: str) -> Scheme:
    """The numbers of a linear by our own part of a config.json."""
    called = ours.get("linears", {}).get(linear)
    part, name = (ours, ours["scheme"]) if called is None else (ours["schemes"][called], called)
    activation = NumberFormat(**part["activation"]) if part["activation"] else None
    return Scheme(name=name, weight=NumberFormat(**part["weight"]), activation=activation)


def rounds_inputs(ours: Mapping[str, Any]) -> bool:
    """Whether any linear's input is rounded, by our own part of a config.json."""
    return any(part.get("activation") for part in (ours, *ours.get("schemes", {}).values()))


def unheld(
    form: Format,
    schemes: Sequence[Scheme],
    placements: Mapping[str, Placement],
    clipped: Collection[Scheme] = (),
    family: Family | None = None,
) -> str | None:
    """None, or why a format cannot hold linears of these schemes, of which the activations of some are `clipped`, in a model
    of this family."""
    each = (form.supports(scheme, placements, clipped=scheme in clipped) for scheme in schemes)
    reason = next(filter(None, each), None) or (form.mixes(schemes) if len(schemes) > 1 else None)
    return reason or (form.lacks(family, schemes) if family else None)


def holdable(name: str, schemes: Iterable[Scheme], placements: Mapping[str, Placement], family: Family) -> list[Scheme]:
    """Those of the schemes that the format of that name holds each by itself."""
    form = find_format(name, placements)
    return [scheme for scheme in schemes if unheld(form, (scheme,), placements, (), family) is None]


def held_elsewhere(
    name: str,
    among: Iterable[str],
    schemes: Sequence[Scheme],
    placements: Mapping[str, Placement],
    clipped: Collection[Scheme] = (),
    family: Family | None = None,
) -> str:
    """What to do where the format of that name cannot hold this: which `among` the others can, and how transforms fold."""
    others = [other for other in among if other in FORMATS and other != name]
    able = [other for other in others if unheld(find_format(other), schemes, placements, clipped, family) is None]
    folding = "--tier merged folds transforms away" if online_sites(placements) else ""
    fixes = [f"{', '.join(able)} can" if able else "", folding]
    return "; ".join((*filter(None, fixes), "`affinequant list formats` says what each is"))


def online_reason(placements: Mapping[str, Placement], engine: str) -> str | None:
    """None, or at which sites a transform acts at run time; `engine` says in words what cannot follow."""
    online = sorted(online_sites(placements))
    return f"the transform at {', '.join(online)} acts at run time, which {engine}" if online else None


def floats_reason(scheme: Scheme) -> str | None:
    """None, or that the weights are no integers, for forms that hold nothing else."""
    return None if scheme.weight.kind == "int" else f"it holds integers, and {scheme.name} has 4-bit floats"


def mixed(family: Family) -> bool:
    """Whether it has layers of experts."""
    return any(layer.experts for layer in family.layers.values())


def network_of(contents: Contents) -> tuple[Family, Dims]:
    """The family and sizes of what is written."""
    return resolve(unquantized(contents.config), where=str(contents.source / "config.json"))


def left_alone(contents: Contents) -> list[str]:
    """The linears that are not quantised, by their full names and as patterns: engines take all others to be."""
    family, dims = network_of(contents)
    names = keeping(family, contents.kept).left_alone(dims)
    return [*names, *(f"re:{pattern}" for pattern in patterns(contents.beside, names))]


def named_to_engines(contents: Contents, linears: Iterable[str]) -> list[str]:
    """Linears as engines are told of them: by their names; in a model of several parts, whose decoder each engine calls
    otherwise, by patterns."""
    if not contents.beside:
        return list(linears)
    blocks = network_of(contents)[0].blocks.rpartition(".")[2]
    inside = (name[name.index(f"{blocks}.") :] for name in linears)
    return [rf"re:(.*\.)?{re.escape(name)}$" for name in inside]


def split_stage(
    stage: "Mapping[str, Tensor]", contents: Contents
) -> "tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor, Tensor | None]]]":
    """A stage's other tensors, and (codes, scale, zero) of its quantised linears by name."""
    linears = [name for name in contents.linears if f"{name}.codes" in stage]
    parts = {f"{name}.{part}" for name in linears for part in STORED}
    rest = {name: tensor for name, tensor in stage.items() if name not in parts}
    integers = {name: (stage[f"{name}.codes"], stage[f"{name}.scale"], stage.get(f"{name}.zero")) for name in linears}
    return rest, integers


def without_zeros(codes: "Tensor", scale: "Tensor", zero: "Tensor | None") -> "Tensor":
    """Scales [N, G] of codes [N, K], those of groups that are all zero raised to what float16 holds: any scale does."""
    import torch

    offset = torch.zeros_like(scale) if zero is None else zero.to(scale)
    empty = (codes.unflatten(1, (scale.shape[1], -1)) == offset[..., None]).all(-1)
    return torch.where(empty, scale.clamp_min(2**-14), scale)


def find_format(name: str, placements: Mapping[str, Placement] | None = None) -> Format:
    """The format of that name; `auto` is what stock engines load, or our own where a transform stays online.

    Raises:
        AffineQuantError: unknown name.
    """
    if name == "auto":
        name = "affinequant" if online_sites(placements or {}) else "compressed-tensors"
    if name not in FORMATS:
        raise unknown_name("format", name, FORMATS, where="--format", listing="formats")
    module, _, attribute = FORMATS[name].partition(":")
    found = importlib.import_module(module)
    return cast(Format, getattr(found, attribute) if attribute else found)

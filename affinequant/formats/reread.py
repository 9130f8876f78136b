"""The integers of a finished folder, read back as a format takes them; nothing is rounded again."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.formats import Contents, Shapes, check_readable
from affinequant.formats.float_packed import UNITS
from affinequant.formats.linear_tensors import read_units, unpack_linear
from affinequant.models import resolve
from affinequant.models.linears import shapes_of
from affinequant.models.sites import Placement
from affinequant.models.source import Source, open_source, parts_beside, unquantized
from affinequant.recipe.scheme import NumberFormat, Scheme
from affinequant.run.run import Run
from affinequant.transforms.online import module_of

_WRITTEN_ANEW = ("version", "scheme", "weight", "activation", "kv", "experts", "input_clip", "online", "written_by")
"""Entries of our key that follow from the contents; all others are carried along."""
_RUN, _REPORT, _FAILED = ".run", "report.json", "report.failed.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What a finished folder holds. `clips`: by linear, how far the range of its input is narrowed."""

    contents: Contents
    placements: Mapping[str, Placement]
    clips: Mapping[str, float]
    shapes: Shapes

    @property
    def clipped(self) -> bool:
        """Whether any range of activations is narrowed."""
        return any(clip != 1 for clip in self.clips.values())


def read_finished(folder: Path) -> Finished:
    """Open a folder that `quantize` or `export` wrote as compressed-tensors, int-quantized or affinequant.

    Raises:
        AffineQuantError: no such folder, an interrupted or failed run, another version, or no integers of ours in it.
    """
    _check_finished(folder)
    source = open_source(folder)
    declared = source.config.get("quantization_config") or {}
    if "affinequant" not in declared:
        raise _foreign(folder, declared)
    ours = declared["affinequant"]
    check_readable(ours, str(folder / "config.json"))
    family, dims = resolve(unquantized(source.config), where=str(folder / "config.json"))
    alone = {*declared.get("ignore", ())}
    inside = re.compile(rf"({re.escape(family.blocks)}\.(\d+))\.")
    linears = _linears(source, inside)
    placements = {name: Placement(**one) for name, one in ours.get("placements", {}).items()}
    beside = {module_of(name) for name in source.entries} - {""}
    online = [name for name in linears if name in beside]
    if online and not any(placement.how == "online" for placement in placements.values()):
        placements[online[0]] = Placement(how="online", reason="its matrices are in the folder")
    scheme = Scheme.parse(ours["scheme"])
    if scheme.weight != NumberFormat(**ours["weight"]):
        what = f"the scheme {ours['scheme']!r} is not what its own numbers say: {ours['weight']}"
        raise AffineQuantError(what, str(folder / "config.json"), "write or fetch the folder again")
    if ours.get("kv"):
        scheme = replace(scheme, kv=NumberFormat(**ours["kv"]))  # with what it keeps, of which the name says nothing
    clips = {name: float(ours["input_clip"][name]) for name in linears} if scheme.activation else {}
    contents = Contents(
        config=unquantized(source.config),
        source=folder,
        scheme=scheme,
        dtype=source.config["dtype"],
        tied=bool(source.config["tie_word_embeddings"]),
        linears=linears,
        kept=tuple(name for name in shapes_of(family, dims) if name in alone),
        stages=lambda: _stages(source, linears, inside, scheme, clips),
        extra={name: value for name, value in ours.items() if name not in _WRITTEN_ANEW},
        beside=tuple(parts_beside(source, family)),
        renamed=source.renamed,
    )
    return Finished(contents=contents, placements=placements, clips=clips, shapes=_shapes(source, linears, scheme))


def under_scheme(found: Finished, text: str | None, *, weight_only: bool) -> Finished:
    """The same integers for other activations, or for 8-bit weights that hold the 4-bit ones.

    `w4a8` and the like keep the groups and the symmetry that the weights have. A 4-bit code less its zero point lies
    within [-15, 15], so 8 symmetric bits hold it with the same scale. Clips belong to the grid that they were found
    for: another grid of the activations starts again from the full range.

    Raises:
        AffineQuantError: a scheme that would need the weights or activations rounded anew, with what would do.
    """
    old = found.contents.scheme
    if text is None:
        new = _named(old.weight, None) if weight_only else old
    else:
        new = _resolved(text, old)
        if weight_only and new.activation is not None:
            what = f"{new.name} quantises activations, of which this format holds nothing"
            raise AffineQuantError(what, "--scheme", f"leave it out, or use w{new.weight.bits}a16")
    bits = new.activation.bits if new.activation else 16
    if bits < 8 and new.activation != old.activation:
        what = f"{new.name} has {bits}-bit activations, for which {old.name} was not made"
        raise AffineQuantError(what, "--scheme", f"`affinequant quantize --scheme {new.name}` makes such a checkpoint")
    if new.weight.bits != old.weight.bits and new.activation is not None and new.weight.group_size:
        what = f"no engine computes {new.weight.bits}-bit weights in groups on integer activations"
        raise AffineQuantError(what, "--scheme", f"use w{old.weight.bits}a16 or w{old.weight.bits}a{bits}")
    if new == old:
        return found
    clips = found.clips if new.activation == old.activation else dict.fromkeys(found.contents.linears, 1.0)
    return _with(found, new, clips if new.activation else {})


def full_range(found: Finished) -> Finished:
    """The same, for engines that quantise activations over their full range whatever was found to be better."""
    return _with(found, found.contents.scheme, dict.fromkeys(found.clips, 1.0))


def _with(found: Finished, new: Scheme, clips: Mapping[str, float]) -> Finished:
    old, inner = found.contents.scheme, found.contents.stages
    contents = replace(
        found.contents, scheme=new, stages=lambda: (_converted(stage, old, new, clips) for stage in inner())
    )
    return replace(found, contents=contents, clips=clips)


def _resolved(text: str, old: Scheme) -> Scheme:
    """The scheme that `text` asks for, groups and symmetry taken from the weights where it does not say them."""
    asked, said = Scheme.parse(text), text.lower()
    weight = old.weight
    if (weight.kind, asked.weight.kind) != ("int", "int"):
        if asked.weight != weight:
            raise _anew(text, old, asked)
        return asked
    if asked.weight.bits == 8 and weight.bits == 4:
        weight = replace(weight, bits=8, symmetric=True)
    wanted = replace(
        asked.weight,
        symmetric=asked.weight.symmetric if "sym" in said else weight.symmetric,
        **({} if "-g" in said else {"granularity": weight.granularity, "group_size": weight.group_size}),
    )
    if wanted != weight:
        raise _anew(text, _named(weight, asked.activation), asked, old)
    return _named(weight, asked.activation)


def _anew(text: str, there: Scheme, asked: Scheme, old: Scheme | None = None) -> AffineQuantError:
    fix = f"use {there.name}, or quantise again with --scheme {asked.name}"
    return AffineQuantError(f"the weights are {(old or there).name}; {text} would round them anew", "--scheme", fix)


def _named(weight: NumberFormat, activation: NumberFormat | None) -> Scheme:
    """The scheme of these weights with activations as wide and in groups as given, as symmetric as the weights."""
    if weight.kind != "int":
        return Scheme.parse(weight.kind + ("" if activation else "a16"))
    bits = activation.bits if activation else 16
    name = f"w{weight.bits}a{bits}" + (f"-g{weight.group_size}" if weight.group_size else "")
    name += f"-ag{activation.group_size}" if activation and activation.group_size else ""
    return Scheme.parse(f"{name}-{'sym' if weight.symmetric else 'asym'}")


def _converted(stage: dict[str, Tensor], old: Scheme, new: Scheme, clips: Mapping[str, float]) -> dict[str, Tensor]:
    gone = ".input_clip" if new.activation else (".input_clip", ".input_unit")
    result = {name: tensor for name, tensor in stage.items() if not name.endswith(gone)}
    for name in [name.removesuffix(".codes") for name in stage if name.endswith(".codes")]:
        if new.weight.bits != old.weight.bits and f"{name}.zero" in result:
            codes, zero = result[f"{name}.codes"], result.pop(f"{name}.zero")
            result[f"{name}.codes"] = codes - zero.repeat_interleave(codes.shape[1] // zero.shape[1], 1)
        if clips:
            result[f"{name}.input_clip"] = torch.tensor(clips[name])
    return result


def _stages(
    source: Source, linears: tuple[str, ...], inside: re.Pattern[str], scheme: Scheme, clips: Mapping[str, float]
) -> Iterator[dict[str, Tensor]]:
    for names in _by_block(source.entries, linears, inside).values():
        there = source.holding(names)
        mine = {name for name in linears if f"{name}.weight_scale" in there.entries}
        stage = there.read(name for name in names if name.rpartition(".")[0] not in mine or _beside(name))
        for name in sorted(mine):
            codes, scale, zero = unpack_linear(there, name, scheme.weight)
            _check_finite(scale, f"{name}.weight_scale", source.folder)
            stage |= {f"{name}.codes": codes, f"{name}.scale": scale}
            if zero is not None:
                stage[f"{name}.zero"] = zero
            stage |= {f"{name}.{part}": unit for part, unit in read_units(source, name).items()}
            if clips:
                stage[f"{name}.input_clip"] = torch.tensor(clips[name])
        yield stage


def _beside(name: str) -> bool:
    """Whether the tensor is no part of a linear's packed weight, but a bias or what acts on its input."""
    part = name.rpartition(".")[2]
    return not part.startswith("weight") and part not in UNITS.values()


def _by_block(names: Mapping[str, Any], linears: tuple[str, ...], inside: re.Pattern[str]) -> dict[str, list[str]]:
    """Names of tensors by the block that they are in; first, under the empty name, those outside of all."""
    blocks: dict[str, list[str]] = {"": []} | {found[1]: [] for name in linears if (found := inside.match(name))}
    for name in names:
        found = inside.match(name)
        blocks[found[1] if found else ""].append(name)
    return blocks


def _linears(source: Source, inside: re.Pattern[str]) -> tuple[str, ...]:
    def place(name: str) -> tuple[int, str]:
        found = inside.match(name)
        return int(found[2]) if found else -1, name

    suffix = ".weight_scale"
    return tuple(sorted((name.removesuffix(suffix) for name in source.entries if name.endswith(suffix)), key=place))


def _shapes(source: Source, linears: tuple[str, ...], scheme: Scheme) -> Shapes:
    shapes = {name: entry.shape for name, entry in source.entries.items() if not name.endswith("weight_shape")}
    packed = [f"{name}.weight_shape" for name in linears if f"{name}.weight_shape" in source.entries]
    for name, shape in source.read(packed).items():
        rows, columns = shape.tolist()
        shapes[name.removesuffix("_shape")] = rows, columns
    if scheme.weight.kind != "int":
        for name in linears:
            rows, halves = source.entries[f"{name}.weight_packed"].shape
            shapes[f"{name}.weight"] = rows, 2 * halves
    return shapes


def _check_finite(tensor: Tensor, name: str, folder: Path) -> None:
    wrong = int((~tensor.isfinite()).sum())
    if wrong:
        what = f"tensor {name} has {wrong} values that are not finite"
        raise AffineQuantError(what, str(folder), "write or fetch the folder again", exit_code=PREFLIGHT)


def _check_finished(folder: Path) -> None:
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"no such folder: {folder}"
        raise AffineQuantError(what, "RUN_OR_CKPT", "give the output folder of `affinequant quantize`")
    if (folder / _REPORT).exists():
        return
    if (folder / _FAILED).exists():
        raise AffineQuantError(
            "this checkpoint FAILED its verification; see report.failed.json",
            str(folder),
            "quantise the model again with --overwrite",
            exit_code=PREFLIGHT,
        )
    if Run.exists(folder / _RUN):
        fix = f"`affinequant inspect {folder}` shows how far it is and prints the command that goes on"
        raise AffineQuantError("this run is not finished", str(folder), fix, exit_code=PREFLIGHT)


def _foreign(folder: Path, declared: Mapping[str, Any]) -> AffineQuantError:
    method = declared.get("quant_method")
    what = (
        f"{folder} was quantised by something else, or is an export that keeps no integers of ours ({method})"
        if declared
        else f"{folder} holds no integers: a 16-bit model, or an export as dense or gguf"
    )
    fix = "give the output folder of `affinequant quantize` (formats compressed-tensors and affinequant)"
    return AffineQuantError(what, "RUN_OR_CKPT", fix, exit_code=PREFLIGHT)

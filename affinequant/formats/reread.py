"""The integers of a finished folder, read back as a format takes them; nothing is rounded again."""

import re
from collections.abc import Callable, Iterator, Mapping
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
from affinequant.models.sites import Placement, online_sites
from affinequant.models.source import Source, open_source, parts_beside, unquantized
from affinequant.recipe.scheme import NumberFormat, Scheme
from affinequant.run.run import Run
from affinequant.transforms.online import module_of

_WRITTEN_ANEW = (
    *("version", "scheme", "weight", "activation", "kv", "experts", "linears", "schemes"),
    *("input_clip", "online", "written_by"),
)
"""Entries of our key that follow from the contents; all others are carried along."""
Numbers = Callable[[str], Scheme]
"""Linear -> what its numbers are."""
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
        return bool(self.narrowed)

    @property
    def narrowed(self) -> frozenset[Scheme]:
        """The schemes of those that are."""
        return frozenset(self.contents.numbers(name) for name, clip in self.clips.items() if clip != 1)


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
    if online and not online_sites(placements):
        placements[online[0]] = Placement(how="online", reason="its matrices are in the folder")
    schemes = {called: Scheme.parse(called) for called in (ours["scheme"], *ours.get("schemes", {}))}
    for called, part in {ours["scheme"]: ours, **ours.get("schemes", {})}.items():
        if schemes[called].weight != NumberFormat(**part["weight"]):
            what = f"the scheme {called!r} is not what its own numbers say: {part['weight']}"
            raise AffineQuantError(what, str(folder / "config.json"), "write or fetch the folder again")
    scheme, others = schemes[ours["scheme"]], {name: schemes[one] for name, one in ours.get("linears", {}).items()}
    if ours.get("kv"):
        scheme = replace(scheme, kv=NumberFormat(**ours["kv"]))  # with what it keeps, of which the name says nothing

    def numbers(name: str) -> Scheme:
        return others.get(name, scheme)

    rounded = [name for name in linears if numbers(name).activation]
    clips = {name: float(ours["input_clip"][name]) for name in rounded}
    contents = Contents(
        config=unquantized(source.config),
        source=folder,
        scheme=scheme,
        dtype=source.config["dtype"],
        tied=bool(source.config["tie_word_embeddings"]),
        linears=linears,
        others=others,
        kept=tuple(name for name in shapes_of(family, dims) if name in alone),
        stages=lambda: _stages(source, linears, inside, numbers, clips),
        extra={name: value for name, value in ours.items() if name not in _WRITTEN_ANEW},
        beside=tuple(parts_beside(source, family)),
        renamed=source.renamed,
    )
    return Finished(
        contents=contents,
        placements=placements,
        clips=clips,
        shapes=_shapes(source, linears, numbers),
    )


def _stages(
    source: Source, linears: tuple[str, ...], inside: re.Pattern[str], numbers: Numbers, clips: Mapping[str, float]
) -> Iterator[dict[str, Tensor]]:
    for names in _by_block(source.entries, linears, inside).values():
        there = source.holding(names)
        mine = {name for name in linears if f"{name}.weight_scale" in there.entries}
        stage = there.read(name for name in names if name.rpartition(".")[0] not in mine or _beside(name))
        for name in sorted(mine):
            codes, scale, zero = unpack_linear(there, name, numbers(name).weight)
            _check_finite(scale, f"{name}.weight_scale", source.folder)
            stage |= {f"{name}.codes": codes, f"{name}.scale": scale}
            if zero is not None:
                stage[f"{name}.zero"] = zero
            stage |= {f"{name}.{part}": unit for part, unit in read_units(source, name).items()}
            if name in clips:
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


def _shapes(source: Source, linears: tuple[str, ...], numbers: Numbers) -> Shapes:
    shapes = {name: entry.shape for name, entry in source.entries.items() if not name.endswith("weight_shape")}
    packed = [f"{name}.weight_shape" for name in linears if f"{name}.weight_shape" in source.entries]
    for name, shape in source.read(packed).items():
        rows, columns = shape.tolist()
        shapes[name.removesuffix("_shape")] = rows, columns
    for name in (name for name in linears if numbers(name).weight.kind != "int"):
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

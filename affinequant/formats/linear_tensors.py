"""The tensors of one linear as compressed-tensors lays them out, integers and 4-bit floats; and read back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from affinequant.errors import AffineQuantError
from affinequant.formats import Contents, float_packed, split_stage
from affinequant.formats.packing import pack, unpack, words
from affinequant.models.source import Source
from affinequant.recipe.scheme import NumberFormat

if TYPE_CHECKING:  # a plan asks formats what they support, and must not wait for torch
    from torch import Tensor

_AGAIN = "write or fetch the folder again"


def pack_stage(stage: Mapping[str, Tensor], contents: Contents, *, whole: bool) -> dict[str, Tensor]:
    """One stage under the names and in the layout of compressed-tensors; other tensors pass through."""
    import torch

    dtype = getattr(torch, contents.dtype)
    packed, integers = split_stage(stage, contents)
    for name, (codes, scale, zero) in integers.items():
        weight = contents.numbers(name).weight
        if weight.kind != "int":
            packed |= pack_floats(stage, name, weight)
            continue
        assert weight.code_min <= int(codes.min()) and int(codes.max()) <= weight.code_max, name
        assert torch.equal(scale.to(dtype).float(), scale), f"{name}.scale is not exact in {dtype}"
        packed[f"{name}.weight_scale"] = scale.to(dtype)
        if whole and contents.numbers(name).activation is not None:
            packed[f"{name}.weight"] = codes
            continue
        packed[f"{name}.weight_packed"] = pack(codes, weight.bits)
        packed[f"{name}.weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
        if zero is not None:
            packed[f"{name}.weight_zero_point"] = pack(zero.T.contiguous(), weight.bits).T.contiguous()
    return packed


def pack_floats(stage: Mapping[str, Tensor], name: str, weight: NumberFormat) -> dict[str, Tensor]:
    """The tensors of one linear of 4-bit floats, by their full names, from its codes, scales and units."""
    parts = float_packed.pack(stage[f"{name}.codes"], stage[f"{name}.scale"], weight, stage.get(f"{name}.weight_unit"))
    if f"{name}.input_unit" in stage:
        parts["input_global_scale"] = 1 / stage[f"{name}.input_unit"].reshape(1)
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def unpack_linear(source: Source, name: str, weight: NumberFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes int8 [N, K], scale float32 [N, G], zero int8 [N, G] or None) of one linear, as `write` stored it.

    Raises:
        AffineQuantError: a tensor is missing, or its size is not what the others say.
    """
    if weight.kind != "int":
        codes, scale = float_packed.unpack(_read(source, name, float_packed.parts(weight)), weight)
        _check_size(scale, (codes.shape[0], weight.groups(codes.shape[1])), f"{name}.weight_scale")
        return codes, scale, None
    parts = ["weight_scale", *([] if weight.symmetric else ["weight_zero_point"])]
    whole = f"{name}.weight" in source.entries
    tensors = _read(source, name, [*parts, *(["weight"] if whole else ["weight_packed", "weight_shape"])])
    scale = tensors["weight_scale"].float()
    if whole:
        codes = tensors["weight"]
    else:
        rows, columns = tensors["weight_shape"].tolist()
        _check_size(tensors["weight_packed"], (rows, words(columns, weight.bits)), f"{name}.weight_packed")
        codes = unpack(tensors["weight_packed"], weight.bits, columns)
    _check_size(scale, (codes.shape[0], weight.groups(codes.shape[1])), f"{name}.weight_scale")
    if weight.symmetric:
        return codes, scale, None
    packed = tensors["weight_zero_point"]
    _check_size(packed, (words(len(scale), weight.bits), scale.shape[1]), f"{name}.weight_zero_point")
    return codes, scale, unpack(packed.T, weight.bits, len(scale)).T.contiguous()


def read_units(source: Source, name: str) -> dict[str, Tensor]:
    """`weight_unit` and `input_unit` of one linear, as stages have them; nothing where its numbers have no units."""
    names = [part for part in float_packed.UNITS.values() if f"{name}.{part}" in source.entries]
    return float_packed.units(_read(source, name, names))


def _read(source: Source, name: str, parts: list[str]) -> dict[str, Tensor]:
    for part in parts:
        if f"{name}.{part}" not in source.entries:
            raise AffineQuantError(f"the tensor {name}.{part} is missing", str(source.folder), _AGAIN)
    tensors = source.read(f"{name}.{part}" for part in parts)
    return {part: tensors[f"{name}.{part}"] for part in parts}


def _check_size(tensor: Tensor, size: tuple[int, int], name: str) -> None:
    if tuple(tensor.shape) != size:
        raise AffineQuantError(f"a tensor of size {tuple(tensor.shape)} where {size} was expected", name, _AGAIN)

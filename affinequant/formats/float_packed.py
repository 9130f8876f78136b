"""4-bit floats as compressed-tensors lays them out (`nvfp4-pack-quantized`, `mxfp4-pack-quantized`), two to a byte.

A linear is `weight_packed` uint8 [N, K / 2], the even inputs in the lower halves, and `weight_scale` [N, G]: 8-bit floats
(E4M3), or the exponents of powers of two plus 127. NVFP4 has `weight_global_scale` [1] beside them, one over the unit in
which scales are counted, and where activations are rounded `input_global_scale` [1], the same of its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.formats.reading import Dtype, in_transformers
from affinequant.recipe.scheme import FLOAT_BLOCKS, NumberFormat, Scheme

if TYPE_CHECKING:  # a plan asks formats what they support, and must not wait for torch
    from torch import Tensor

FLOATS = (0, 1, 2, 3, 4, 6, 8, 12)
"""Codes, twice the floats that they stand for, by their three lower bits in a file; the fourth is the sign."""

UNITS = {"weight_unit": "weight_global_scale", "input_unit": "input_global_scale"}
"""Units by their names in a stage, to the names of their reciprocals [1] in a file."""
LAYOUT = "{}-pack-quantized"
"""What compressed-tensors calls the form of a kind of numbers."""
LAYOUTS = tuple(LAYOUT.format(kind) for kind in FLOAT_BLOCKS)


def parts(weight: NumberFormat) -> list[str]:
    """Names of the tensors that a linear's weight is stored as."""
    return ["weight_packed", "weight_scale", *(["weight_global_scale"] if weight.has_unit else [])]


def arguments(scheme: Scheme) -> dict[str, Any]:
    """The numbers of weights and inputs as compressed-tensors declares them."""
    from compressed_tensors.quantization import preset_name_to_scheme

    preset = scheme.weight.kind.upper() + ("" if scheme.activation else "A16")
    return preset_name_to_scheme(preset, ["Linear"]).model_dump(mode="json", exclude_none=True)


def pack(codes: Tensor, scale: Tensor, weight: NumberFormat, unit: Tensor | None) -> dict[str, Tensor]:
    """The tensors of one linear by the names of `parts`. `unit` []: what scales are counted in, where they are."""
    import torch

    table = torch.zeros(25, dtype=torch.uint8)
    for bits, code in enumerate(FLOATS):
        table[12 - code], table[12 + code] = bits | 8, bits
    halves = table.to(codes.device)[codes.int() + 12].unflatten(1, (-1, 2))
    packed = {"weight_packed": halves[..., 0] | halves[..., 1] << 4}
    if unit is None:
        return packed | {"weight_scale": (scale.view(torch.int32) >> 23).to(torch.uint8)}
    counted = (scale / unit).to(torch.float8_e4m3fn)
    assert torch.equal(counted.float() * unit, scale), "scales that 8 bits do not hold"
    return packed | {"weight_scale": counted, "weight_global_scale": 1 / unit.reshape(1)}


def units(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weight_unit` and `input_unit` [], as stages have them, of the tensors of one linear by their names in a file."""
    return {unit: 1 / tensors[name].reshape(()) for unit, name in UNITS.items() if name in tensors}


def unpack(tensors: Mapping[str, Tensor], weight: NumberFormat) -> tuple[Tensor, Tensor]:
    """(codes int8 [N, K], scale float32 [N, G]) of one linear from its `parts`."""
    import torch

    packed = tensors["weight_packed"]
    table = torch.tensor([*FLOATS, *(-code for code in FLOATS)], dtype=torch.int8, device=packed.device)
    codes = table[torch.stack([packed & 15, packed >> 4], -1).int()].flatten(1)
    if not weight.has_unit:
        return codes, (tensors["weight_scale"].int() << 23).view(torch.float32)
    return codes, tensors["weight_scale"].float() / tensors["weight_global_scale"]


def unpacked(out: Path, dtype: Dtype) -> tuple[Any, str]:
    """A folder of 4-bit floats in stock transformers; compressed-tensors unpacks to bfloat16, at the first forward."""
    import torch

    model, words = in_transformers(out, "bfloat16")
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    # A model in bfloat16 keeps some buffers in float32, which `to(bfloat16)` would round.
    return model.to(torch.float32) if dtype == "float32" else model, f"{words}, unpacked to bfloat16"

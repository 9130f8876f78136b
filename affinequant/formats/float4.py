"""NVFP4 and MXFP4: 4-bit floats in groups, rounded and packed by compressed-tensors itself.

vLLM reads both, and has kernels for them on GPUs; its CPU builds refuse to start on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.formats import SHARD_BYTES, Contents, Shapes, left_alone, mixed, network_of, online_reason
from affinequant.formats.dense import dense_stage, write_folder
from affinequant.formats.float_packed import unpacked
from affinequant.formats.reading import Dtype
from affinequant.models import Family
from affinequant.models.sites import Placement
from affinequant.recipe.scheme import Scheme

if TYPE_CHECKING:  # a plan asks `supports`, and must not wait for torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Float4:
    """A `Format` of weights alone, in groups of `group` along their inputs."""

    ABOUT: str
    ROUNDS: str
    group: int
    preset: str
    """What compressed-tensors calls the numbers."""
    layout: str
    """What it calls the form in which they are packed."""
    TOLERANCE: float = 0.5
    WEIGHT_ONLY: bool = True

    def supports(self, scheme: Scheme, placements: Mapping[str, Placement], *, clipped: bool = False) -> str | None:
        """None, or why this cannot be written: stock engines have no transforms at run time."""
        if scheme.weight.kind != "int":
            return f"it rounds integers, and {scheme.name} has 4-bit floats; --format compressed-tensors writes those as they are"
        return online_reason(placements, "stock engines cannot do")

    def mixes(self, schemes: Sequence[Scheme]) -> str | None:
        """None: all are rounded to the same floats."""
        return None

    def lacks(self, family: Family, schemes: Sequence[Scheme] = ()) -> str | None:
        """None, or that there are experts, where there is a scale per matrix."""
        if self.layout == "nvfp4-pack-quantized" and mixed(family):
            return "of experts transformers leaves the scale per matrix out, and computes something else without a word"
        return None

    def refuses(self, contents: Contents, shapes: Shapes) -> str | None:
        """None, or which linear has rows that the groups do not divide; or experts, where there is a scale per matrix."""
        if reason := self.lacks(network_of(contents)[0]):
            return reason
        for name in contents.linears:
            columns = shapes[f"{name}.weight"][1]
            if columns % self.group:
                return f"{name} has {columns} inputs, which groups of {self.group} do not divide"
        return None

    def reload(self, out: Path, dtype: Dtype) -> tuple[Any, str]:
        """The folder in stock transformers."""
        return unpacked(out, dtype)

    def write(self, contents: Contents, out: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
        """Round the weights' values and write the folder; its files, of which `config.json` is the last.

        Raises:
            OSError: the folder cannot be written.
        """
        from compressed_tensors.quantization import preset_name_to_scheme

        scheme = preset_name_to_scheme(self.preset, ["Linear"])
        family, _ = network_of(contents)
        fused = [set(members) for _, members in family.input_groups()]

        def packed(stage: Mapping[str, Tensor]) -> dict[str, Tensor]:
            rest, values = dense_stage(stage, contents)
            for name, weight in values.items():
                linear = name.removesuffix(".weight")
                inside = next(members for members in fused if any(linear.endswith(f".{member}") for member in members))
                # Engines fuse what reads one input, and then have one scale of the whole for all of it.
                whole = scheme.weights is not None and scheme.weights.strategy == "tensor_group"
                together = [w for other, w in values.items() if whole and _relative(other, linear, inside)]
                parts = _compress(weight, together, scheme, self.layout)
                rest |= {f"{linear}.{part}": tensor for part, tensor in parts.items()}
            return rest

        group = scheme.model_dump(mode="json", exclude_none=True) | {"format": self.layout}
        declared = {
            "quant_method": "compressed-tensors",
            "format": self.layout,
            "quantization_status": "compressed",
            "ignore": left_alone(contents),
            "config_groups": {"group_0": group},
        }
        return write_folder(contents, out, map(packed, contents.stages()), declared, shard_bytes=shard_bytes)


NVFP4 = Float4(
    ABOUT="4-bit floats in groups of 16, 8-bit float scales; weights only (vLLM: on GPUs)",
    ROUNDS="every weight, to a 4-bit float (e2m1) of its group of 16, and scales to 8-bit floats",
    group=16,
    preset="NVFP4A16",
    layout="nvfp4-pack-quantized",
)
"""With one more scale per matrix."""
MXFP4 = Float4(
    ABOUT="4-bit floats in groups of 32, scales are powers of two; weights only (vLLM: on GPUs)",
    ROUNDS="every weight, to a 4-bit float (e2m1) of its group of 32, and scales to powers of two",
    group=32,
    preset="MXFP4A16",
    layout="mxfp4-pack-quantized",
)
"""OCP Microscaling."""


def _compress(weight: Tensor, together: list[Tensor], scheme: Any, name: str) -> dict[str, Tensor]:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    grid = scheme.weights
    groups = weight.unflatten(1, (-1, grid.group_size))
    state: dict[str, Tensor] = {"weight": weight}
    if grid.strategy == "tensor_group":
        low, high = min(w.min() for w in together), max(w.max() for w in together)
        state["weight_global_scale"] = generate_gparam(torch.as_tensor(low), torch.as_tensor(high))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), grid, state.get("weight_global_scale"))
    state["weight_scale"] = scale
    compressor: Any = BaseCompressor.get_value_from_registry(name)
    return compressor.compress(state, scheme)


def _relative(name: str, linear: str, members: set[str]) -> bool:
    """Whether the weight `name` belongs to one of `members` in the block of `linear`."""
    own = next(member for member in members if linear.endswith(f".{member}"))
    block = linear.removesuffix(own)
    return any(name == f"{block}{member}.weight" for member in members)

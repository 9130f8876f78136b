"""What NVFP4 and MXFP4 share: 4-bit floats in groups, rounded and packed by compressed-tensors itself.

vLLM reads both, and has kernels for them on GPUs; its CPU builds refuse to start on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.formats import Contents, Shapes
from affinequant.formats.dense import dense_stage, write_folder
from affinequant.formats.reading import Dtype, in_transformers
from affinequant.models import resolve
from affinequant.sites import Placement

if TYPE_CHECKING:  # a plan asks `supports`, and must not wait for torch
    from torch import Tensor

Layout = tuple[str, str]
"""Name of a preset of compressed-tensors, and of the form in which it packs it."""


def online_reason(placements: Mapping[str, Placement]) -> str | None:
    """None, or at which sites a transform acts at run time."""
    online = sorted(site for site, placement in placements.items() if placement.how == "online")
    return f"the transform at {', '.join(online)} acts at run time, which stock engines cannot do" if online else None


def group_reason(contents: Contents, shapes: Shapes, group: int) -> str | None:
    """None, or which linear has rows that groups of this size do not divide."""
    for name in contents.linears:
        columns = shapes[f"{name}.weight"][1]
        if columns % group:
            return f"{name} has {columns} inputs, which groups of {group} do not divide"
    return None


def reload_floats(out: Path, dtype: Dtype) -> tuple[Any, str]:
    """The folder in stock transformers; compressed-tensors unpacks to bfloat16, at the first forward."""
    import torch

    model, words = in_transformers(out, "bfloat16")
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    # A model in bfloat16 keeps some buffers in float32, which `to(bfloat16)` would round.
    return model.to(torch.float32) if dtype == "float32" else model, f"{words}, unpacked to bfloat16"


def write_floats(contents: Contents, out: Path, layout: Layout, *, shard_bytes: int) -> list[Path]:
    """Round the weights' values to the 4-bit floats of `layout`, and write the folder."""
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(layout[0], ["Linear"])
    family, _ = resolve(_plain(contents.config), where=str(contents.source / "config.json"))
    fused = [set(members) for _, members in family.input_groups()]

    def packed(stage: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rest, values = dense_stage(stage, contents)
        for name, weight in values.items():
            linear = name.removesuffix(".weight")
            inside = next(members for members in fused if any(linear.endswith(f".{member}") for member in members))
            # Engines fuse what reads one input, and then have one scale of the whole for all of it.
            together = [w for other, w in values.items() if _relative(other, linear, inside)]
            parts = _compress(weight, together, scheme, layout[1])
            rest |= {f"{linear}.{part}": tensor for part, tensor in parts.items()}
        return rest

    group = scheme.model_dump(mode="json", exclude_none=True) | {"format": layout[1]}
    declared = {
        "quant_method": "compressed-tensors",
        "format": layout[1],
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    return write_folder(contents, out, map(packed, contents.stages()), declared, shard_bytes=shard_bytes)


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


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}

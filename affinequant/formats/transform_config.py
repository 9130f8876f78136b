"""transform-config: 4-bit floats in the form of compressed-tensors, with a matrix at run time before each input's rounding.

Every input with a matrix B, shared by all its blocks of b features, has a config group of its own in `transform_config`, of type
`random-matrix`: vLLM keeps one matrix per group. Each linear that reads the input has it as `LINEAR.GROUP_input.weight` [b, b].

* Orientation: x B for B as it lies in the file. vLLM's dense product takes the transpose of it and a linear of that, which is
  the same; compressed-tensors multiplies with it as it is, and so does QuTLASS (row-major on both sides).
* Scale: vLLM divides what it reads by sqrt(b), in 16 bits; compressed-tensors does not. The file has B sqrt(b).
* On Blackwell vLLM gives QuTLASS NVFP4's activations without their unit: a block's scale, E4M3, is its largest value. So B is
  multiplied by the power of two that gives activations a unit of 1/8, by which these are 192 at most where calibration was, and
  the weights' unit divided by it: no number changes.

vLLM applies it on one rank, to linears without biases, that are called as the files call them. transformers reads no
`transform_config` and would compute another function without a word; so the files do not have the name under which it looks for
weights, and it stops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.formats import (
    SHARD_BYTES,
    Contents,
    Shapes,
    float_packed,
    left_alone,
    mixed,
    network_of,
    online_reason,
    shared_matrices,
    split_stage,
)
from affinequant.formats.dense import write_folder
from affinequant.formats.linear_tensors import pack_floats
from affinequant.formats.native import STEM
from affinequant.formats.reading import Dtype, decompressed_tensors, from_tensors
from affinequant.models import Family
from affinequant.models.sites import Placement
from affinequant.models.source import open_source
from affinequant.recipe.scheme import Scheme

if TYPE_CHECKING:  # a plan asks `supports`, and must not wait for torch
    from torch import Tensor

ABOUT = "4-bit floats with one matrix for all blocks of an input (shared-N); vLLM on GPUs"
ROUNDS = ""
TOLERANCE = 0.0001
WEIGHT_ONLY = False
UNIT = 0.125
"""What scales of activations are counted in."""

CARD = """\
    vllm serve DIR

Stock vLLM reads it as a compressed-tensors checkpoint with a `transform_config`. On Blackwell it transforms and rounds NVFP4's
activations in one kernel (QuTLASS) and needs FlashInfer's kernels for the product; MXFP4's are transformed by a product in 16
bits first. Other GPUs multiply the same weights with transformed activations in 16 bits. It runs on one GPU: with tensor
parallelism vLLM stops.

What has been checked: compressed-tensors' own weights, transforms and rounding give the logits of the checkpoint that this was
made from; vLLM 0.32's own loader and layers give them around stand-ins for kernels, on a CPU. What no GPU has shown yet: the
kernels themselves.

transformers does not apply a `transform_config`, and would compute another function: it stops, because the files of weights do
not have the name that it looks for.
"""


def supports(scheme: Scheme, placements: Mapping[str, Placement], *, clipped: bool = False) -> str | None:
    """None, or why this cannot be written."""
    if reason := shared_matrices.integers_reason(scheme, placements):
        return reason
    if online_reason(placements, "") is None:
        return "nothing acts at run time; --format compressed-tensors holds it"
    return shared_matrices.clipped_reason(scheme) if clipped and scheme.activation else None


def mixes(schemes: Sequence[Scheme]) -> str | None:
    """Why not: one scheme for all."""
    return "it is for one scheme alone"


def lacks(family: Family, schemes: Sequence[Scheme] = ()) -> str | None:
    """None, or why vLLM applies no transform to such linears."""
    if mixed(family):
        return "experts are not rounded to 4-bit floats"
    if family.blocks != "model.layers":
        return f"vLLM calls {family.blocks} otherwise, and would leave the transforms out"
    if cut := next((linear.name for linear in family.linears if linear.name.endswith(".in_proj_qkv")), ""):
        return f"vLLM cuts {cut} in three, and takes no transform of what it cuts"
    fused = [linear.name for linear in family.linears if not isinstance(linear.rows, str)]
    return f"vLLM takes no transform of {fused[0]}, which lies fused in the files" if fused else None


def refuses(contents: Contents, shapes: Shapes) -> str | None:
    """None, or what acts at run time that cannot be held, or where there is a bias."""
    parts = shared_matrices.parts_reason(contents)
    if reason := parts or lacks(network_of(contents)[0]) or shared_matrices.unheld(contents, shapes):
        return reason
    biased = [name for name in shared_matrices.widths(contents, shapes) if f"{name}.bias" in shapes]
    return f"{biased[0]} has a bias, which vLLM leaves no room for beside a transform" if biased else None


def write(contents: Contents, out: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the folder and return its files; `config.json` is the last of them.

    Raises:
        OSError: the folder cannot be written.
    """
    inputs, groups = shared_matrices.by_input(contents), dict[str, Any]()
    group_of = {name: group for group, members in inputs.items() for name in members}

    def packed(stage: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rest, integers = split_stage(stage, contents)
        for name in integers:
            matrix, group = shared_matrices.take(rest, name), group_of[name]
            factor = 1.0
            if matrix is not None:
                factor = _to_unit(stage.get(f"{name}.input_unit"))
                groups[group] = _scheme(inputs[group], len(matrix))
                rest[f"{name}.{group}_input.weight"] = matrix.float() * (factor * len(matrix) ** 0.5)
            rest |= pack_floats(_scaled(stage, name, factor), name, contents.scheme.weight)
        return rest

    layout = float_packed.LAYOUT.format(contents.scheme.weight.kind)
    declared = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": left_alone(contents),
        "config_groups": {"group_0": float_packed.arguments(contents.scheme) | {"format": layout}},
        "transform_config": {"config_groups": groups},
    }
    card = shared_matrices.write_card(contents, out, CARD)
    return [
        card,
        *write_folder(contents, out, map(packed, contents.stages()), declared, shard_bytes=shard_bytes, stem=STEM),
    ]


def reload(out: Path, dtype: Dtype) -> tuple[Any, str]:
    """The folder decompressed and transformed by compressed-tensors, matrices divided as vLLM divides them, in transformers'
    own code on the CPU. Nothing quantises activations there."""
    import torch
    from compressed_tensors.transform import TransformConfig, TransformFactory

    source = open_source(out)
    config = TransformConfig(**source.config["quantization_config"]["transform_config"])
    tensors, reader = decompressed_tensors(source)
    matrices = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_input.weight")}
    model = from_tensors(out, tensors, dtype)
    for group, scheme in config.config_groups.items():
        TransformFactory.from_scheme(scheme, name=group).apply_to_model(model, use_tqdm=False)
        for name in scheme.apply[0].targets:
            matrix = matrices[f"{name}.{group}_input.weight"]
            made = model.get_submodule(f"{name}.{group}_input")
            made.weight = torch.nn.Parameter(matrix / len(matrix) ** 0.5, requires_grad=False)
    return model, reader


def _to_unit(unit: Tensor | None) -> float:
    """By what activations are multiplied, a power of two; 1 where nothing is counted in a unit."""
    return 1.0 if unit is None else UNIT / float(unit)


def _scaled(stage: Mapping[str, Tensor], name: str, factor: float) -> dict[str, Tensor]:
    """What the stage has of a linear, for activations that come multiplied by a power of two."""
    by = {"scale": 1 / factor, "weight_unit": 1 / factor, "input_unit": factor}
    parts = {part: f"{name}.{part}" for part in ("codes", *by) if f"{name}.{part}" in stage}
    return {stored: stage[stored] * by[part] if part in by else stage[stored] for part, stored in parts.items()}


def _scheme(linears: tuple[str, ...], width: int) -> dict[str, Any]:
    from compressed_tensors.transform import TransformArgs, TransformScheme

    there = TransformArgs(targets=list(linears), location="input")  # pyright: ignore[reportArgumentType]
    return TransformScheme(type="random-matrix", apply=[there], head_dim=width).model_dump(mode="json")

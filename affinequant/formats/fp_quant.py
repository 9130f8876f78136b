"""fp_quant: 4-bit floats as FP-Quant lays them out (arXiv 2509.23202), which vLLM and transformers read on Blackwell.

Per linear of weights [N, K]: `qweight` uint8 [N, K / 2], two floats to a byte, the even inputs in the lower halves; `scales`
uint8, the bits of 8-bit floats [N, K / 16] (NVFP4) or the exponents of powers of two plus 127 [N, K / 32] (MXFP4);
`forward_hadamard_matrix` [g, g] of one g for all linears: x B for each block of g inputs, with B as it lies in the file, where no
transform acts the identity; `weight_global_scale` and `act_global_scale` [1], which the product is divided by.

Kernels round activations: NVFP4's as ours are rounded, in units of 1 / act_global_scale. MXFP4's (`abs_max`) take 2^floor(log2
reach) as a block's scale and round three times the value, which `act_global_scale` = 3 takes back: the floats end between 3 and 6
where ours, in powers of two alone, end between 3.5 and 7.
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
    shared_matrices,
    split_stage,
)
from affinequant.formats.dense import write_folder
from affinequant.formats.reading import Dtype, from_tensors
from affinequant.models import Family
from affinequant.models.sites import Placement
from affinequant.models.source import open_source
from affinequant.recipe.scheme import FLOAT_BLOCKS, NumberFormat, Scheme

if TYPE_CHECKING:  # a plan asks `supports`, and must not wait for torch
    from torch import Tensor

ABOUT = "4-bit floats with one matrix per linear as FP-Quant has them; vLLM on Blackwell"
ROUNDS = "the matrices at run time, to bfloat16"
TOLERANCE = 0.01
WEIGHT_ONLY = False
_UNITS = {"weight_unit": 1.0, "input_unit": 1 / 3}
"""Where numbers are not counted in units: 1, and of activations what the kernel for MXFP4 multiplies by."""
PARTS = ("qweight", "scales", "weight_global_scale", "act_global_scale", "forward_hadamard_matrix")

CARD = """\
    vllm serve DIR --dtype bfloat16 --allow-deprecated-quantization

Stock vLLM reads it as `fp_quant`, on Blackwell alone; 0.32 calls that form deprecated, hence the second flag. transformers reads
it with `fp_quant` and QuTLASS installed, on such a GPU too. Activations are rounded by the kernels: NVFP4's as in the checkpoint
that this was made from, MXFP4's with scales by a rule of FP-Quant's.

What has been checked: vLLM 0.32's own loader and layers give what that checkpoint computes, around stand-ins for kernels on a
CPU, and so does FP-Quant's Triton kernel, interpreted. What no GPU has shown yet: the kernels themselves.
"""


def supports(scheme: Scheme, placements: Mapping[str, Placement], *, clipped: bool = False) -> str | None:
    """None, or why this cannot be written."""
    if reason := shared_matrices.integers_reason(scheme, placements):
        return reason
    if scheme.activation is None:
        return f"its kernels round activations, which {scheme.name} leaves in 16 bits"
    return shared_matrices.clipped_reason(scheme) if clipped else None


def mixes(schemes: Sequence[Scheme]) -> str | None:
    """Why not: one scheme for all."""
    return "it is for one scheme alone"


def lacks(family: Family, schemes: Sequence[Scheme] = ()) -> str | None:
    """None, or that there are experts."""
    return "experts are not rounded to 4-bit floats" if mixed(family) else None


def refuses(contents: Contents, shapes: Shapes) -> str | None:
    """None, or what acts at run time that cannot be held, or whose inputs blocks of the one size do not divide."""
    parts = shared_matrices.parts_reason(contents)
    if reason := parts or lacks(network_of(contents)[0]) or shared_matrices.unheld(contents, shapes):
        return reason
    if contents.kept:
        return f"{contents.kept[0]} stays in 16 bits, which engines of this form look for under other names where they fuse"
    if contents.dtype != "bfloat16":
        return f"its kernels compute in bfloat16, and the model is in {contents.dtype}"
    size = _size(contents, shapes)
    for name in contents.linears:
        if (columns := shapes[f"{name}.weight"][1]) % size:
            return f"{name} has {columns} inputs, which blocks of {size}, of one size for all linears, do not divide"
    return None


def reload(out: Path, dtype: Dtype) -> tuple[Any, str]:
    """The folder unpacked by `unpack`, with 16-bit activations: what reads this form wants a GPU."""
    source = open_source(out)
    kind = source.config["quantization_config"]["forward_dtype"]
    names = {name.rpartition(".")[0] for name in source.entries if name.endswith(".qweight")}
    tensors = source.read(
        name for name in source.entries if name.rpartition(".")[0] not in names or name.endswith(".bias")
    )
    for name in names:
        parts = source.read(f"{name}.{part}" for part in PARTS)
        tensors[f"{name}.weight"] = unpack({part: parts[f"{name}.{part}"] for part in PARTS}, kind)
    return from_tensors(out, tensors, dtype), "unpacked by affinequant; no engine that reads fp_quant was asked"


def write(contents: Contents, out: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the folder and return its files; `config.json` is the last of them.

    Raises:
        OSError: the folder cannot be written.
    """
    there = open_source(contents.source).entries
    size = _size(contents, {name: entry.shape for name, entry in there.items()})

    def packed(stage: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rest, integers = split_stage(stage, contents)
        for name in integers:
            matrix = shared_matrices.take(rest, name)
            parts = pack(stage, name, contents.scheme.weight, matrix, size)
            rest |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        return rest

    declared = {
        "quant_method": "fp_quant",
        "forward_dtype": contents.scheme.weight.kind,
        "forward_method": "abs_max",
        "backward_dtype": "bf16",
        "hadamard_group_size": size,
        "modules_to_not_convert": left_alone(contents),
        "pseudoquantization": False,
        "store_master_weights": False,
        "transform_init": "identity",
    }
    card = shared_matrices.write_card(contents, out, CARD)
    return [card, *write_folder(contents, out, map(packed, contents.stages()), declared, shard_bytes=shard_bytes)]


def pack(
    stage: Mapping[str, Tensor], name: str, weight: NumberFormat, matrix: Tensor | None, size: int
) -> dict[str, Tensor]:
    """The `PARTS` of one linear from its stage; `matrix` [b, b] repeated to [size, size], the identity where there is none."""
    import torch

    unit, input_unit = (stage.get(f"{name}.{part}", torch.tensor(one)) for part, one in _UNITS.items())
    parts = float_packed.pack(stage[f"{name}.codes"], stage[f"{name}.scale"], weight, unit if weight.has_unit else None)
    matrix = torch.eye(size) if matrix is None else torch.block_diag(*[matrix] * (size // len(matrix)))
    return {
        "qweight": parts["weight_packed"],
        "scales": parts["weight_scale"].view(torch.uint8),
        "weight_global_scale": 1 / unit.reshape(1),
        "act_global_scale": 1 / input_unit.reshape(1),
        "forward_hadamard_matrix": matrix.bfloat16(),
    }


def unpack(parts: Mapping[str, Tensor], kind: str) -> Tensor:
    """The weights float32 [N, K] that the `PARTS` stand for, their matrix taken into them: those of x as it comes."""
    import torch

    from affinequant.numbers import grid_of
    from affinequant.numbers.weights import dequantize

    weight = Scheme.parse(kind).weight
    scale = parts["scales"].view(torch.float8_e4m3fn) if weight.has_unit else parts["scales"]
    tensors = {
        "weight_packed": parts["qweight"],
        "weight_scale": scale,
        "weight_global_scale": parts["weight_global_scale"],
    }
    codes, scale = float_packed.unpack(tensors, weight)
    value = dequantize(codes, scale, torch.zeros_like(scale), grid_of(weight))
    matrix = parts["forward_hadamard_matrix"].float()
    return (value.unflatten(1, (-1, len(matrix))) @ matrix.T).flatten(1)


def _size(contents: Contents, shapes: Shapes) -> int:
    """Features of the blocks of all linears: of the largest matrix, and no fewer than share a scale."""
    widths = shared_matrices.widths(contents, shapes).values()
    return max([FLOAT_BLOCKS[contents.scheme.weight.kind], *widths])

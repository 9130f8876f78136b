"""gptq: the first version of the GPTQ layout, as AutoGPTQ, GPTQModel, exllama and vLLM read it.

Per linear `P` of weights [N, K] in G groups: `P.qweight` int32 [K/f, N] with f = 32/bits codes of one column in a word,
the first in the lowest bits; `P.qzeros` int32 [G, N/f], packed along N, each zero point *less one*; `P.scales` float16
[G, N]; `P.g_idx` int32 [K], the group of each input. value = (code - (stored zero + 1)) * scale, codes unsigned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.formats import SHARD_BYTES, Contents, Shapes, floats_reason, online_reason, split_stage, without_zeros
from affinequant.formats.dense import write_folder
from affinequant.formats.reading import Dtype, from_tensors
from affinequant.models import Family
from affinequant.models.multimodal import patterns
from affinequant.models.sites import Placement
from affinequant.models.source import open_source
from affinequant.recipe.scheme import Scheme

if TYPE_CHECKING:  # a plan asks `supports`, and must not wait for torch
    from torch import Tensor

ABOUT = "GPTQ v1 layout, weights only; vLLM reads it where they are symmetric"
ROUNDS = "scales to float16 (without loss from 2^-14 on)"
TOLERANCE = 0.001
WEIGHT_ONLY = True
MULTIPLE = 32
"""Sizes that every kernel of this layout takes."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def supports(scheme: Scheme, placements: Mapping[str, Placement], *, clipped: bool = False) -> str | None:
    """None, or why this cannot be written: a plain linear has no place for a transform at run time."""
    if scheme.weight.bits not in (4, 8):
        return (
            f"{scheme.weight.bits}-bit weights, for which few GPTQ engines have a kernel; compressed-tensors holds them"
        )
    return floats_reason(scheme) or online_reason(placements, "no GPTQ engine does")


def mixes(schemes: Sequence[Scheme]) -> str | None:
    """Why not: one scheme for all."""
    return "this layout has one set of numbers for all linears that all its engines read"


def lacks(family: Family, schemes: Sequence[Scheme] = ()) -> str | None:
    """None: every family can be written."""
    return None


def refuses(contents: Contents, shapes: Shapes) -> str | None:
    """None, or which linear has sizes that the kernels of this layout do not take, or stays in 16 bits."""
    if contents.kept:
        return f"{contents.kept[0]} stays in 16 bits, for which this layout has no place that all its engines read"
    for name in contents.linears:
        rows, columns = shapes[f"{name}.weight"]
        if rows % MULTIPLE or columns % MULTIPLE:
            return f"{name} is {rows} x {columns}; this layout's kernels want multiples of {MULTIPLE}"
    group = contents.scheme.weight.group_size
    return f"groups of {group}: this layout's kernels want multiples of {MULTIPLE}" if group and group % 32 else None


def reload(out: Path, dtype: Dtype) -> tuple[Any, str]:
    """The folder unpacked by `unpack`: transformers reads this layout with GPTQModel alone, which wants a GPU."""
    source = open_source(out)
    bits = source.config["quantization_config"]["bits"]
    names = {name.rpartition(".")[0] for name in source.entries if name.endswith(".qweight")}
    tensors = source.read(name for name in source.entries if name.rpartition(".")[0] not in names)
    for name in names:
        parts = source.read(f"{name}.{part}" for part in PARTS)
        tensors[f"{name}.weight"] = unpack(*(parts[f"{name}.{part}"] for part in PARTS), bits=bits)
        if f"{name}.bias" in source.entries:
            tensors |= source.read([f"{name}.bias"])
    return from_tensors(out, tensors, dtype), "unpacked by affinequant; no GPTQ engine was asked"


def write(contents: Contents, out: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the folder and return its files; `config.json` is the last of them.

    Raises:
        AffineQuantError: a zero point that engines read differently, or a scale that float16 does not hold.
        OSError: the folder cannot be written.
    """
    weight = contents.scheme.weight

    def packed(stage: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rest, integers = split_stage(stage, contents)
        for name, (codes, scale, zero) in integers.items():
            parts = pack(codes, scale, zero, bits=weight.bits, where=name)
            rest |= {f"{name}.{part}": tensor for part, tensor in zip(PARTS, parts, strict=True)}
        return rest

    declared = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": weight.bits,
        "group_size": weight.group_size or -1,
        "sym": weight.symmetric,
        "desc_act": False,
        "lm_head": False,
        **({"dynamic": {f"-:{pattern}": {} for pattern in patterns(contents.beside)}} if contents.beside else {}),
    }
    return write_folder(contents, out, map(packed, contents.stages()), declared, shard_bytes=shard_bytes)


def pack(
    codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, where: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(qweight, qzeros, scales, g_idx) of signed codes int8 [N, K], scale [N, G] and zero int8 [N, G] or None.

    Raises:
        AffineQuantError: see `write`; `where` names the linear.
    """
    import torch

    from affinequant.errors import PREFLIGHT, AffineQuantError

    columns, half = codes.shape[1], 2 ** (bits - 1)
    unsigned = torch.full(scale.shape, half) if zero is None else zero.int() + half
    if int(unsigned.min()) < 1:
        # Stored less one it wraps around; some engines add the one after masking it off, others before.
        what = f"{int((unsigned < 1).sum())} groups have the zero point 0, which GPTQ engines read in two ways"
        fix = "export compressed-tensors, which holds it, or quantise with -sym"
        raise AffineQuantError(what, where, fix, exit_code=PREFLIGHT)
    halves = without_zeros(codes, scale, zero).half()
    if not bool(halves.isfinite().all()) or bool((halves == 0).any()):
        what = f"scales from {float(scale.min()):.3g} to {float(scale.max()):.3g} do not fit float16"
        raise AffineQuantError(what, where, "export compressed-tensors, which holds them", exit_code=PREFLIGHT)
    width = columns // scale.shape[1]
    group = torch.arange(columns, dtype=torch.int32) // width
    qweight = _words((codes.int() + half).T, bits)
    qzeros = _words(unsigned.int() - 1, bits).T.contiguous()
    return qweight, qzeros, halves.T.contiguous(), group


def unpack(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, *, bits: int) -> Tensor:
    """The weights float32 [N, K] that the parts stand for."""
    codes = _from_words(qweight, bits).T
    zeros = _from_words(qzeros.T, bits) + 1
    group = g_idx.long()
    return (codes - zeros[:, group]).float() * scales.T.float()[:, group]


def _words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [n, m] to int32 words [n * bits / 32, m], the first code in the lowest bits."""
    import torch

    count = 32 // bits
    parts = codes.long().reshape(len(codes) // count, count, -1)
    words = sum(parts[:, place] << (bits * place) for place in range(count))
    return torch.as_tensor(words).to(torch.int32)  # the cast keeps the low 32 bits


def _from_words(words: Tensor, bits: int) -> Tensor:
    import torch

    shifts = torch.arange(0, 32, bits)
    codes = (words[:, None, :].long() >> shifts[:, None]) & (2**bits - 1)
    return codes.reshape(-1, words.shape[1]).int()

"""Tensors of a GGUF file: their names, the order of their rows, experts stacked; and a mixture read back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.errors import AffineQuantError
from affinequant.formats.gguf_settings import ARCHITECTURES, Architecture
from affinequant.formats.reading import Dtype, from_tensors, skeleton
from affinequant.models import Dims, resolve
from affinequant.models.source import open_source

if TYPE_CHECKING:  # a plan asks `supports`, and must not wait for torch
    from torch import Tensor

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def names_of(architecture: Architecture, dims: Dims) -> Any:
    """The gguf package's table of names."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    return get_tensor_name_map(MODEL_ARCH[architecture.called.upper()], dims.layers)


def found(names: Any, name: str) -> str | None:
    """What the file calls a tensor, all experts of a layer in one; None where it has no name for it."""
    return names.get_name(_EXPERT.sub(".experts.", name), try_suffixes=(".weight", ".bias"))


def mapped(names: Any, name: str) -> str:
    """The same.

    Raises:
        AffineQuantError: there is no name.
    """
    there = found(names, name)
    if there is None:
        raise AffineQuantError(f"GGUF has no tensor for {name}", name, "export another format")
    return there


def number_of(name: str) -> int | None:
    """Which expert a tensor or linear belongs to."""
    number = _EXPERT.search(name)
    return int(number[1]) if number else None


def for_rope(part: Tensor, name: str, architecture: Architecture, dims: Dims) -> Tensor:
    """Rows of q and k in the order of llama.cpp, which may rotate neighbours where transformers rotates halves."""
    heads = _heads(name, architecture, dims)
    return part if heads is None else part.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(part.shape).contiguous()


def unpacked(file: Path, dtype: Dtype) -> tuple[Any, str]:
    """A mixture in the code of transformers, dequantised by the gguf package, and in words what has read it: of some families
    transformers reads no experts."""
    import numpy as np
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize

    source = open_source(file.parent, weights=False)
    family, dims = resolve(source.config, where=str(file.parent))
    architecture, tensors = ARCHITECTURES[family.name], {}
    names, there = names_of(architecture, dims), {one.name: one for one in GGUFReader(file).tensors}
    for name, like in skeleton(source, torch.float32).named_parameters():
        stored = there[mapped(names, name)]
        data, number = stored.data, number_of(name)
        value = dequantize(data if number is None else data[number], stored.tensor_type)
        tensor = torch.from_numpy(np.array(value, dtype=np.float32)).reshape(like.shape)
        if tensor.ndim == 1 and not name.endswith(".bias"):
            tensor -= family.norm_offset
        heads = _heads(name.rpartition(".")[0], architecture, dims)
        if heads is not None:
            tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(like.shape)
        tensors[name] = tensor
    return from_tensors(file.parent, tensors, dtype), "dequantised by the gguf package"


def _heads(name: str, architecture: Architecture, dims: Dims) -> int | None:
    """How many heads a linear has whose rows lie in another order; None of any other."""
    heads = {"q_proj": dims.heads, "k_proj": dims.kv_heads}.get(name.rpartition(".")[2])
    return heads if architecture.neighbours else None

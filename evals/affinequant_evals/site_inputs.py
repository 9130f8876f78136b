"""What the linears of a model read on given tokens, site by site, with one of its blocks in memory at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from affinequant.data.wheels import Say, quiet
from affinequant.models import Dims, Family, resolve
from affinequant.models.decoder import open_decoder, run_block, slices
from affinequant.models.device import check_device, compute_device, compute_dtype
from affinequant.models.source import Source, check_tensors, open_source, settle
from affinequant.progress import Steps
from affinequant.recipe.recipe import Device, Dtype

BATCH = 4
"""Windows that a block reads at once."""
Keep = Callable[[Float[Tensor, "batch tokens width"]], Tensor]
"""What is kept of a batch that a site's linears read: a row each, on the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A model folder whose blocks can be read one at a time."""

    source: Source
    family: Family
    dims: Dims


def open_reader(folder: Path) -> Reader:
    """See that the folder holds a full-precision model of a family that is known here; no weight is read.

    Raises:
        AffineQuantError: it does not (exit 2 or 3).
    """
    source = open_source(folder)
    family, dims = resolve(source.config, where=str(folder / "config.json"))
    source, dims = settle(source, family, dims)
    check_tensors(source, family, dims)
    return Reader(source=source, family=family, dims=dims)


def placed(device: Device, dtype: Dtype) -> tuple[torch.device, torch.dtype]:
    """Where, and in what, `site_inputs` computes.

    Raises:
        AffineQuantError: that device cannot be used (exit 3).
    """
    check_device(device)
    target = compute_device(device)
    return target, compute_dtype(dtype, target)


@torch.no_grad()
def site_inputs(
    reader: Reader,
    ids: Int64[Tensor, "windows tokens"],
    keep: Keep,
    *,
    device: Device = "auto",
    dtype: Dtype = "auto",
    say: Say = quiet,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Block by block, in the order of the forward pass: its index and, by site, what is kept of all windows.

    In memory are the embedding, one block, the hidden states of all windows, and what is kept of one block.

    Raises:
        AffineQuantError: that device cannot be used (exit 3).
    """
    target, kind = placed(device, dtype)
    source, family, dims = reader.source, reader.family, reader.dims
    decoder = open_decoder(source, family, dims, target, kind)
    hidden, given = decoder.embed(ids, source.read(f"{module}.weight" for module in family.entries))
    unknown = set(decoder.unknown(source.entries))
    for index in Steps(say, "blocks", dims.layers).each(range(dims.layers)):
        prefix = f"{family.blocks}.{index}"
        read = source.read(name for name in source.names_under(prefix) if name not in unknown)
        tensors = {name[len(prefix) + 1 :]: tensor.to(target, kind) for name, tensor in read.items()}
        kept: dict[str, list[Tensor]] = {}

        def see(site: str, x: Tensor, kept: dict[str, list[Tensor]] = kept) -> Tensor:
            kept.setdefault(site, []).append(keep(x))
            return x

        block, made_of = decoder.block(index), family.at(dims, index)
        for part in slices(len(hidden), BATCH):
            hidden[part] = run_block(block, made_of, tensors, hidden[part], given[index], see)
        yield index, {site: torch.cat(parts) for site, parts in kept.items()}

"""A model's linears by their full names, with what binds them to others."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from affinequant.models.dims import Dims
from affinequant.models.family import Family
from affinequant.models.sites import named


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """`read`: the tensor that a linear reads, of all experts of a layer one; `fused`: what engines make one layer of it with.
    Each is the same for all that share it, and names the block."""

    read: str
    fused: str


def bound(family: Family, dims: Dims) -> dict[str, Bound]:
    """Every linear that can be rounded. Engines fuse those of a module that read one tensor, such as q, k and v, and run all
    experts of a layer as one."""
    found = dict[str, Bound]()
    for index, block in enumerate(family.each_block(dims)):
        prefix, experts = f"{family.blocks}.{index}.", block.expert()
        for site, members in block.input_groups():
            inside = {name for name in members if experts and name.startswith(f"{experts}.")}
            for name in members:
                fused = experts if name in inside else f"{name.rpartition('.')[0]} at {site}"
                found[prefix + name] = Bound(read=prefix + (experts if inside else site), fused=prefix + fused)
    return found


def shapes_of(family: Family, dims: Dims) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every linear that can be rounded, kept or not."""
    whole = replace(family, kept={})
    return {
        f"{family.blocks}.{index}.{linear.name}": linear.shape(dims)
        for index, block in enumerate(whole.each_block(dims))
        for linear in block.linears
    }


def keeping(family: Family, names: Iterable[str]) -> Family:
    """The family with these linears in 16 bits."""
    kept = dict[int, set[str]]()
    for name in names:
        index, _, inside = name.removeprefix(f"{family.blocks}.").partition(".")
        kept.setdefault(int(index), set()).add(inside)
    return replace(family, kept={index: frozenset(inside) for index, inside in kept.items()}) if kept else family


def sites_read(family: Family, dims: Dims) -> frozenset[str]:
    """The sites, by the names that a recipe has for them, at which any block has a linear that is rounded."""
    return frozenset(named(site) for block in family.each_block(dims) for site, _ in block.input_groups())

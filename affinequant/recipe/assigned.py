"""Which numbers each linear gets: the scheme's, or none, where it stays in 16 bits. Decided here and nowhere else."""

from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from affinequant.errors import AffineQuantError, unknown_name
from affinequant.recipe.recipe import Recipe
from affinequant.recipe.scheme import Scheme

Schemes = Mapping[str, Scheme | None]
"""By full name of each linear of the blocks, its numbers; None where it stays in 16 bits."""
KEPT = "16 bits"
"""What those are called where others have the name of a scheme."""


def assign(recipe: Recipe, fused: Mapping[str, str], alone: Iterable[str]) -> Schemes:
    """The numbers of each linear.

    Args:
        fused: linears that can be rounded, by their full names, and for each what engines make one layer of it with.
        alone: linears that stay in 16 bits whatever is asked for.

    Raises:
        AffineQuantError: a pattern that no linear matches, one that takes only a part of what engines fuse, or nothing left
            to round.
    """
    alone, kept = list(alone), set[str]()
    for pattern in recipe.keep:
        found = _matching(pattern, fused)
        if not found and not _matching(pattern, alone):
            raise unknown_name("linear or pattern", pattern, _patterns(fused), where="--keep")
        kept.update(found)
    _check_whole(kept, fused)
    if kept and len(kept) == len(fused):
        what = "every linear would stay in 16 bits: nothing is left to quantise"
        raise AffineQuantError(what, "--keep", "keep fewer, or use the model as it is")
    scheme = recipe.parsed_scheme
    return {name: None if name in kept else scheme for name in fused}


def differing(schemes: Schemes, scheme: str) -> dict[str, str]:
    """The linears whose numbers are not those of the recipe's `scheme`, and what theirs are called."""
    names = {name: one.name if one else KEPT for name, one in schemes.items()}
    return {name: called for name, called in names.items() if called != scheme}


def counted(linears: Mapping[str, str]) -> str:
    """`differing` in words: `2 linears in 16 bits`; "" where there are none."""
    parts = [f"{count} in {called}" for called, count in Counter(linears.values()).items()]
    return f"linears that differ: {', '.join(parts)}" if parts else ""


def placed(name: str) -> tuple[int, str]:
    """Which block a linear is in and what it is called there: (3, `mlp.down_proj`) of `model.layers.3.mlp.down_proj`."""
    parts = name.split(".")
    place = next(place for place, part in enumerate(parts) if part.isdigit())
    return int(parts[place]), ".".join(parts[place + 1 :])


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if fnmatchcase(name, pattern)]


def _check_whole(kept: set[str], fused: Mapping[str, str]) -> None:
    """Engines make one layer of q, k and v, of gate and up, and of experts, and refuse one whose parts differ. Siblings do
    not follow by themselves: what was not named is not changed."""
    members = dict[str, list[str]]()
    for name, layer in fused.items():
        members.setdefault(layer, []).append(name)
    missing = [name for layer in members.values() if kept & {*layer} for name in layer if name not in kept]
    if not missing:
        return
    taken = next(name for name in members[fused[missing[0]]] if name in kept)
    blocks = {placed(name)[0] for name in missing}
    words = dict.fromkeys(f"*.{placed(name)[1]}" if len(blocks) > 1 else name for name in missing)
    few = " ".join(f"--keep {word!r}" for word in list(words)[:4]) + (" ..." if len(words) > 4 else "")
    raise AffineQuantError(
        f"{taken} would stay in 16 bits and {missing[0]} would not: engines make one layer of both",
        "--keep",
        f"keep its siblings too: {few}",
    )


def _patterns(names: Iterable[str]) -> list[str]:
    """Patterns that match something: each linear in all blocks, and each block."""
    pairs = [(name, placed(name)[1]) for name in names]
    blocks = (f"{name.removesuffix(inside)}*" for name, inside in pairs)
    return list(dict.fromkeys((*(f"*.{inside}" for _, inside in pairs), *blocks)))

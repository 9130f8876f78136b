"""Which numbers each linear gets: the scheme's, those that a pattern sets, or none: it stays in 16 bits. Decided here alone."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

from affinequant.errors import AffineQuantError, unknown_name
from affinequant.recipe.recipe import Recipe
from affinequant.recipe.scheme import Scheme

Schemes = Mapping[str, Scheme | None]
"""By full name of each linear of the blocks, its numbers; None where it stays in 16 bits."""
KEPT = "16 bits"
"""What those are called where others have the name of a scheme."""


def assign(recipe: Recipe, fused: Mapping[str, str], read: Mapping[str, str], alone: Iterable[str]) -> Schemes:
    """The numbers of each linear. One that is kept is kept, whatever another pattern sets.

    Args:
        fused: linears that can be rounded, by their full names, and for each what engines make one layer of it with.
        read: for each what it reads: the numbers of an input are those of all who read it.
        alone: linears that stay in 16 bits whatever is asked for.

    Raises:
        AffineQuantError: a pattern that no linear matches, one that takes only a part of what engines fuse or of what reads
            one input, or nothing left to round, or to round as the scheme says.
    """
    alone, kept = list(alone), set[str]()
    for pattern in recipe.keep:
        found = matching(pattern, fused)
        if not found and not matching(pattern, alone):
            raise unknown_name("linear or pattern", pattern, _patterns(fused), where="--keep")
        kept.update(found)
    scheme, chosen = recipe.parsed_scheme, dict[str, Scheme]()
    _check_whole("--keep", {name: KEPT if name in kept else scheme.name for name in fused}, scheme.name, fused)
    if kept and len(kept) == len(fused):
        what = "every linear would stay in 16 bits: nothing is left to quantise"
        raise AffineQuantError(what, "--keep", "keep fewer, or use the model as it is")
    for pattern, text in recipe.set.items():
        found, other = matching(pattern, fused), Scheme.parse(text)
        if not found:
            raise unknown_name("linear or pattern", pattern, _patterns(fused), where="--set")
        same = (other.weight, other.activation) == (scheme.weight, scheme.activation)
        chosen |= dict.fromkeys(found, scheme if same else other)
    result = {name: None if name in kept else chosen.get(name, scheme) for name in fused}
    _check_whole("--set", {name: one.name for name, one in result.items() if one}, scheme.name, read)
    if scheme not in result.values():  # readers take it for what most linears have
        first = next(one.name for one in result.values() if one)
        what = f"every linear is set to another scheme: nothing has {scheme.name}"
        raise AffineQuantError(what, "--set", f"use one of them, such as --scheme {first}, and set the others")
    return result


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


def matching(pattern: str, names: Collection[str]) -> list[str]:
    """The linears that a pattern of `--keep` or `--set` means, of these."""
    if pattern in names:  # a recipe may name all linears one by one
        return [pattern]
    return [name for name in names if fnmatchcase(name, pattern)]


def _check_whole(option: str, called: Mapping[str, str], default: str, shared: Mapping[str, str]) -> None:
    """Engines make one layer of q, k and v, of gate and up, and of experts, and refuse one whose parts differ; and what is
    read is rounded once. Siblings do not follow by themselves: what was not named is not changed.

    Args:
        called: by linear, what its numbers are called; `default` where nothing was asked for.
        shared: by linear, what it must have in common with others.
    """
    members = dict[str, list[str]]()
    for name in called:
        members.setdefault(shared[name], []).append(name)
    missing = dict[str, str]()
    for layer in members.values():
        taken = next((name for name in layer if called[name] != default), layer[0])
        missing |= {name: taken for name in layer if called[name] != called[taken]}
    if not missing:
        return
    first, taken = next(iter(missing.items()))
    blocks = {placed(name)[0] for name in missing}
    ends = {name: f"={called[one]}" if option == "--set" else "" for name, one in missing.items()}
    words = dict.fromkeys((f"*.{placed(name)[1]}" if len(blocks) > 1 else name) + end for name, end in ends.items())
    few = " ".join(f"{option} {word!r}" for word in list(words)[:4]) + (" ..." if len(words) > 4 else "")
    what = f"{taken} would be in {called[taken]}, and {first}, which goes together with it, in {called[first]}"
    raise AffineQuantError(what, option, f"name its siblings too: {few}")


def _patterns(names: Iterable[str]) -> list[str]:
    """Patterns that match something: each linear in all blocks, and each block."""
    pairs = [(name, placed(name)[1]) for name in names]
    blocks = (f"{name.removesuffix(inside)}*" for name, inside in pairs)
    return list(dict.fromkeys((*(f"*.{inside}" for _, inside in pairs), *blocks)))

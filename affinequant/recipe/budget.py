"""Bits per weight on average: what a budget lets linears choose from, and whether it can be met."""

from collections.abc import Collection, Mapping
from math import ceil, floor

from affinequant.errors import AffineQuantError
from affinequant.recipe.assigned import Schemes, matching
from affinequant.recipe.recipe import Recipe
from affinequant.recipe.scheme import Scheme

WIDTHS = (2, 3, 4, 8)
"""Bits of weights beside 16-bit activations."""


def choices_of(scheme: Scheme) -> tuple[Scheme, ...]:
    """What linears choose from under a budget, by rising bits: the scheme and its relatives. Weights alone come in every width,
    in groups and as symmetric as the scheme's. Where activations are rounded too, W8A8 is the wider one: eight bits of
    activations beside four of weights would cost no stored bit, so that nothing would be left of four."""
    weight, activation = scheme.weight, scheme.activation
    if activation is None and weight.kind == "int":
        group = f"-g{weight.group_size}" if weight.group_size else ""
        found = [Scheme.parse(f"w{bits}a16{group}-{'sym' if weight.symmetric else 'asym'}") for bits in WIDTHS]
        return tuple(scheme if one.weight == weight else one for one in found)
    if activation is None:
        return scheme, Scheme.parse("w8a16-sym")
    if weight.bits == 8:
        return Scheme.parse("w4a8-sym" if weight.symmetric else "w4a8"), scheme
    return scheme, Scheme.parse("w8a8")


def undecided(recipe: Recipe, schemes: Schemes) -> tuple[str, ...]:
    """The linears whose numbers a budget decides: those that no pattern has decided."""
    if not recipe.avg_bits:
        return ()
    decided = {name for pattern in recipe.set for name in matching(pattern, schemes)}
    return tuple(name for name, one in schemes.items() if one and name not in decided)


def check_budget(
    recipe: Recipe, schemes: Schemes, shapes: Mapping[str, tuple[int, int]], choice: Collection[Scheme]
) -> None:
    """Whether linears can have so many bits per weight on average.

    Args:
        shapes: rows and columns of each.
        choice: what those have that the budget decides.

    Raises:
        AffineQuantError: with what they can have.
    """
    free = {*undecided(recipe, schemes)}
    if not free:
        return
    least = most = 0.0
    for name, (rows, columns) in shapes.items():
        fixed = schemes[name]
        mine = choice if name in free else (fixed,)
        bits = [16.0 if one is None else one.bits_per_weight(columns) for one in mine]
        least, most = least + rows * columns * min(bits), most + rows * columns * max(bits)
    weights = sum(rows * columns for rows, columns in shapes.values())
    if not least <= recipe.avg_bits * weights <= most:
        names = ", ".join(one.name for one in choice)
        what = f"{recipe.avg_bits:g} bits per weight on average cannot be had of {names}"
        raise AffineQuantError(
            what, "--avg-bits", f"use {ceil(1e3 * least / weights) / 1e3} to {floor(1e3 * most / weights) / 1e3}"
        )

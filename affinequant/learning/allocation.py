"""Bits where they count: linears get numbers by what rounding them costs, under a budget of stored bits.

Each group of linears that must share its numbers is rounded alone by each candidate, and what that costs is taken to add up over
groups. Then which candidate each takes is a knapsack with one choice per group, solved exactly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from affinequant.costs import linear_bits
from affinequant.data.tokens import Tokens
from affinequant.errors import AffineQuantError
from affinequant.formats import holdable
from affinequant.learning.sensitivity import Part, Sensitivity, sensitivities
from affinequant.models.decoder import Decoder
from affinequant.models.linears import bound, shapes_of
from affinequant.plan import Plan
from affinequant.recipe.budget import choices_of, undecided
from affinequant.recipe.recipe import Recipe
from affinequant.rounding.job import BlockJob

FEW = 16
"""Linears of a group that are named one by one; more, as experts are, by the beginning of their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a group of linears could have: by scheme, the stored bits of all of it and what rounding it alone costs in nats per
    token. `linears` by their full names."""

    linears: tuple[str, ...]
    bits: Mapping[str, float]
    kl: Mapping[str, float]


def allocated(
    made: Plan, decoder: Decoder, tokens: Tokens, say: Callable[[str], None] = lambda text: None
) -> tuple[Recipe, tuple[Choice, ...]]:
    """The recipe with the schemes of all linears set, as many bits on average as it asks for at most; and what each group
    had to choose from.

    Args:
        made: a plan whose recipe has a budget, and linears that no pattern has decided.
        tokens: on which the cost is measured.
    """
    recipe = made.recipe
    schemes = holdable(recipe.format, choices_of(recipe.parsed_scheme), made.placements, made.family)
    free, ties = undecided(recipe, made.schemes), bound(made.family, made.dims)
    groups = dict[str, list[str]]()
    for name in free:
        groups.setdefault(ties[name].read, []).append(name)
    found = sensitivities(made, decoder, tokens, say, lambda job: _parts(job, groups), schemes)
    shapes, measured = shapes_of(made.family, made.dims), dict[str, list[Sensitivity]]()
    for one in found:
        measured.setdefault(f"{made.family.blocks}.{one.block}.{one.site}", []).append(one)
    choices = tuple(
        Choice(
            linears=tuple(groups[key]),
            bits={
                one.name: linear_bits(dict.fromkeys(groups[key], one), _of(shapes, groups[key]))[1] for one in schemes
            },
            kl={one.scheme: one.kl for one in costs},
        )
        for key, costs in measured.items()
    )
    weights, _ = linear_bits(made.schemes, shapes)
    _, fixed = linear_bits(made.schemes, _of(shapes, [name for name in shapes if name not in {*free}]))
    taken = choose(choices, recipe.avg_bits * weights - fixed, recipe.parsed_scheme.name)
    wide, exact = dict[str, str](), dict[str, str]()
    for choice, scheme in zip(choices, taken, strict=True):
        many = len(choice.linears) > FEW
        names = (f"{_common(choice.linears)}.*",) if many else choice.linears
        (wide if many else exact).update(dict.fromkeys(names, scheme))
    # Of several patterns the last counts: a wide one may match what has others of its own.
    return replace(recipe, set=wide | exact | recipe.set), choices


def choose(choices: Sequence[Choice], most: float, usual: str) -> list[str]:
    """A scheme for each group: the least sum of costs whose bits are `most` at most, with the `usual` scheme somewhere.

    Raises:
        AffineQuantError: no choice has so few bits.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    pairs = [(group, scheme) for group, choice in enumerate(choices) for scheme in choice.bits]
    cost = np.array([max(0.0, choices[group].kl[scheme]) for group, scheme in pairs])
    bits = np.array([choices[group].bits[scheme] for group, scheme in pairs])
    one = np.array([[group == row for group, _ in pairs] for row in range(len(choices))], dtype=float)
    rules = [
        LinearConstraint(one, 1, 1),
        LinearConstraint(bits / most, 0, 1),
        LinearConstraint(np.array([float(scheme == usual) for _, scheme in pairs]), 1, np.inf),
    ]
    found = milp(
        cost / max(cost.max(), 1e-30),
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=rules,
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        what = "no choice of schemes has so few bits on average and leaves any linear as the scheme says"
        raise AffineQuantError(what, "--avg-bits", "allow more bits, or choose a scheme of fewer")
    return [scheme for (_, scheme), taken in zip(pairs, found.x, strict=True) if taken > 0.5]


def _parts(job: BlockJob, groups: Mapping[str, Sequence[str]]) -> list[Part]:
    """The groups of one block, by what they read."""
    prefix = f"{job.family.blocks}.{job.index}."
    inside = {
        key.removeprefix(prefix): tuple(name.removeprefix(prefix) for name in names)
        for key, names in groups.items()
        if key.startswith(prefix)
    }
    sites = {member: site for site, members in job.family.input_groups() for member in members}
    return [
        Part(name=key, sites=frozenset(sites[one] for one in names), linears=names) for key, names in inside.items()
    ]


def _common(names: Sequence[str]) -> str:
    """The module that all of them lie in."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(each[0] for each in takewhile(lambda each: len({*each}) == 1, parts))


def _of(shapes: Mapping[str, tuple[int, int]], names: Sequence[str]) -> dict[str, tuple[int, int]]:
    return {name: shapes[name] for name in names}

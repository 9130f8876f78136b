"""What becomes of the transforms that a recipe asks for: folded, online at a cost, or refused with the reason."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from affinequant.errors import PREFLIGHT, AffineQuantError, unknown_name
from affinequant.models import Dims, Family
from affinequant.models.sites import READ, Kind, Placement, Site, named, online_numbers, place
from affinequant.recipe.presets import PRESETS
from affinequant.recipe.recipe import AUTO, CHOICE_SITES, EVERY, Recipe
from affinequant.transforms import LEARNED_ROTATIONS, names_at, split_parts, structures_of

CANDIDATES: Mapping[Kind, tuple[str, ...]] = {
    "norm": ("none", "diagonal", "hadamard", "diagonal+hadamard", "diagonal+block", "diagonal+kronecker"),
    "heads": ("none", "diagonal", "hadamard", "block", "kronecker"),
    "gated": ("none", "diagonal", "kronecker", "diagonal+kronecker"),
    "linear": ("none", "diagonal", "hadamard", "diagonal+hadamard", "diagonal+block", "diagonal+kronecker"),
}
"""What a block chooses from, the simplest first: transforms with a closed-form start, and none as large as a layer."""


def shared_alone(names: Iterable[str]) -> bool:
    """Whether all that stays online of these transforms is one matrix for all blocks, which stock engines of floats hold."""
    return all(name.rpartition("+")[2].startswith("shared-") for name in names)


def block_flops(family: Family, dims: Dims) -> int:
    """Floating-point operations per token of one block's linears, where blocks differ of the largest, of experts those that
    a token goes to: what an online transform is held against."""
    whole = replace(family, kept={})
    return max(2 * (_weights(block, dims) - (dims.idle if block.branch else 0)) for block in whole.each_block(dims))


def block_weights(family: Family, dims: Dims) -> int:
    """Weights of one block's linears, where blocks differ of the largest."""
    return max(_weights(block, dims) for block in replace(family, kept={}).each_block(dims))


def _weights(block: Family, dims: Dims) -> int:
    return sum(math.prod(linear.shape(dims)) for linear in block.linears)


def flops_of(name: str, site: Site) -> int:
    """Operations per token of the parts of `name` that stay online."""
    return 0 if name == "none" else sum(place(site, one).flops for one in structures_of(name, where="--transform"))


def cost_at(name: str, transform: str, sites: Mapping[str, Site]) -> int:
    """Operations per token of what stays online at the sites that a recipe calls `name`: of experts as many as a token goes
    to, and where some blocks have none, the more."""
    costs = {site.name: flops_of(transform, site) * site.share for site in sites.values() if named(site.name) == name}
    alone = costs.pop(name, 0)
    return round(max(alone, sum(costs.values())))


def candidates(site: Site, recipe: Recipe, block: int) -> tuple[str, ...]:
    """What `auto` chooses from at a site: what its tier and its cost budget allow. `block`: operations of a block."""
    most = block * recipe.cost_budget / 100 if recipe.tier == "online" else 0
    return tuple(name for name in CANDIDATES.get(site.kind, ()) if flops_of(name, site) <= most)


def choosing(recipe: Recipe, family: Family) -> Recipe:
    """The recipe with the family's own sites in the place of all that can choose, where it asks for those."""
    if recipe.transforms.get(EVERY) != AUTO:
        return recipe
    own = list(dict.fromkeys(named(site) for site, _ in family.input_groups()))
    asked = recipe.transforms | {site: AUTO for site in own if site not in recipe.transforms}
    gone = {EVERY, *(site for site in CHOICE_SITES if site not in own)}
    return replace(
        recipe, transforms={site: name for site, name in asked.items() if site not in gone and name != "none"}
    )


def fitted(recipe: Recipe, sites: Mapping[str, Site], read: Collection[str]) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe without what its preset asks for and these sites refuse, with what the preset has for sites that take a
    shift, and a note of each: a preset is for all families. What was named beside it stays, to be refused by name. Nothing
    is left at sites that are not `read` by any linear that is rounded."""
    first, preset = first_of(sites), PRESETS[recipe.preset]
    base = preset.fields(recipe.tier, recipe.parsed_scheme).get("transforms", {})
    kept, notes = dict(recipe.transforms), list[str]()
    for name, chosen in recipe.transforms.items():
        if name in first and first[name].kind in READ and name not in read:
            del kept[name]
            notes.append(f"{name}={chosen} is left out: every linear that reads it stays in 16 bits")
            continue
        if base.get(name) != chosen or chosen == AUTO:
            continue
        parts = [place(first[name], one) for one in structures_of(chosen, where="--preset")] if name in first else []
        reason = next(
            (part.reason for part in parts if part.how == "refused"), "" if parts else "there is no such site"
        )
        if reason:
            del kept[name]
            notes.append(f"{recipe.preset}'s {name}={chosen} is left out: {reason}")
        elif name in preset.shifted and place(first[name], "translation").how == "folded":
            kept[name] = preset.shifted[name]
            notes.append(f"{recipe.preset}'s {name}={chosen} is {kept[name]} here: biases take the shift up")
    return replace(recipe, transforms=kept), tuple(notes)


def first_of(sites: Mapping[str, Site]) -> dict[str, Site]:
    """By the name that a recipe has for it, one site for all that share the name: the widest."""
    found: dict[str, Site] = {}
    for name, site in sites.items():
        if named(name) not in found or site.width > found[named(name)].width:
            found[named(name)] = site
    return found


def place_all(recipe: Recipe, sites: Mapping[str, Site], block: int) -> dict[str, Placement]:
    """Site by site, by the names that a recipe has for them, what becomes of its transform, the cost being that of all its
    online parts; of one that each block chooses, the most that any could cost; of one in every expert, that of each.

    Args:
        block: operations per token of a block's linears (`block_flops`).

    Raises:
        AffineQuantError: an unknown site or transform, one that is refused there, or one that stays online in the merged
            tier.
    """
    first = first_of(sites)
    for name in recipe.transforms:
        if name not in first:
            raise unknown_name("site", name, first, where="--transform")
    placements = {}
    for name, site in first.items():
        chosen = recipe.transforms.get(name)
        if chosen is None:
            placements[name] = Placement(how="folded", reason="nothing to fold")
            continue
        if chosen == AUTO:
            placements[name] = _open(recipe, site, sites, block)
            continue
        _, online = split_parts(chosen, site)
        parts = [place(site, structure) for structure in structures_of(chosen, where="--transform")]
        cost = cost_at(name, chosen, sites)
        if site.kind == "residual":
            _check_rotation(recipe, name, chosen)
        if online and site.kind == "rope" and recipe.parsed_scheme.kv is None:
            raise AffineQuantError(
                f"{online} at {name} acts between RoPE and attention, where only a quantised K cache needs it",
                "--transform",
                f"use a scheme that quantises the cache, such as w4a4kv4, or a transform that folds there: "
                f"{names_at(site, 'folded')}",
                exit_code=PREFLIGHT,
            )
        if online and recipe.tier == "merged":
            raise AffineQuantError(
                f"{online} at {name} stays online ({cost:,} operations per token): {parts[-1].reason}",
                "--transform",
                f"use --tier online, or a transform that folds at {name}: {names_at(site, 'folded')}",
            )
        reason = "; ".join(dict.fromkeys(part.reason for part in parts))
        placements[name] = Placement(how="online" if online else "folded", reason=reason, flops=cost)
    return placements


def _check_rotation(recipe: Recipe, name: str, chosen: str) -> None:
    """What the residual stream takes: one rotation, and something to learn it from."""
    fixed = f"use {name}=hadamard"
    if "+" in chosen:
        raise AffineQuantError(
            f"one rotation acts on the residual stream, not {chosen} in turn",
            "--transform",
            f"{fixed}, which learned ones start from, or {name}={LEARNED_ROTATIONS[0]}",
            exit_code=PREFLIGHT,
        )
    if chosen in LEARNED_ROTATIONS and recipe.parsed_scheme.activation is None:
        raise AffineQuantError(
            f"{chosen} at {name} is learned from rounded activations, and {recipe.scheme} rounds none",
            "--transform",
            fixed,
            exit_code=PREFLIGHT,
        )


def _open(recipe: Recipe, site: Site, sites: Mapping[str, Site], block: int) -> Placement:
    """The placement of a transform that each block chooses."""
    names = candidates(site, recipe, block)
    if not names:
        raise AffineQuantError(
            f"auto does not choose at {site.name}: only where linears read quantised inputs",
            "--transform",
            f"name one, or {site.name}=none",
        )
    cost = max(cost_at(named(site.name), name, sites) for name in names)
    reason = f"each block takes one of {', '.join(names)}"
    if cost:
        reason += f"; with its other choices at most {recipe.cost_budget:g} % of the block"
    return Placement(how="online" if cost else "folded", reason=reason, flops=cost)


def settled(
    placements: Mapping[str, Placement], sites: Mapping[str, Site], blocks: Sequence[Mapping[str, Any]]
) -> dict[str, Placement]:
    """The placements as they came out, from the reports of the blocks: of a chosen transform the most that any block
    took."""
    result = dict(placements)
    chosen = [(named(site), one["transform"]) for block in blocks for site, one in block.get("transforms", {}).items()]
    for name in dict(chosen):
        taken = {transform for site, transform in chosen if site == name}
        cost = max(cost_at(name, one, sites) for one in taken)
        reason = f"chosen block by block: {', '.join(sorted(taken))}"
        result[name] = Placement(how="online" if cost else "folded", reason=reason, flops=cost)
    return result


def online_bytes(recipe: Recipe, family: Family, sites: Mapping[str, Site]) -> int:
    """What a block of this family keeps of the transforms that act at run time: in float32, beside every linear that
    reads them, or beside the attention. At a site whose transform each block chooses nothing is counted: see
    `choice_bytes`."""
    after_rope = [(spec.name, (family.attention,)) for spec in family.sites if spec.kind == "rope"]
    readers = (*family.input_groups(), *after_rope)
    groups = [(name, members) for name, members in readers if recipe.transforms.get(named(name), AUTO) != AUTO]
    return sum(len(members) * _numbers(recipe.transforms[named(name)], sites[name]) * 4 for name, members in groups)


def choice_bytes(recipe: Recipe, family: Family, block: int, sites: Mapping[str, Site]) -> int:
    """The most that a block of this family can keep beyond `online_bytes` where it chooses. `block`: `block_flops`."""
    total = 0
    for name, members in family.input_groups():
        if recipe.transforms.get(named(name)) == AUTO:
            sizes = [_numbers(one, sites[name]) for one in candidates(sites[name], recipe, block)]
            total += 4 * len(members) * max(sizes)
    return total


def _numbers(name: str, site: Site) -> int:
    """What one linear keeps of the online parts of a transform."""
    online = split_parts(name, site)[1] if name != "none" else ""
    structures = structures_of(online, where="--transform") if online else ()
    return sum(online_numbers(site, structure) for structure in structures)

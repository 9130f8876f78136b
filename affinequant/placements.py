"""What becomes of the transforms that a recipe asks for: folded, online at a cost, or refused with the reason."""

from collections.abc import Mapping

from affinequant.errors import PREFLIGHT, AffineQuantError, unknown_name
from affinequant.models import Family
from affinequant.recipe import Recipe
from affinequant.sites import Placement, Site, online_numbers, place
from affinequant.transforms import LEARNED_ROTATIONS, names_at, split_parts, structures_of


def place_all(recipe: Recipe, sites: Mapping[str, Site]) -> dict[str, Placement]:
    """Site by site what becomes of its transform, the cost being that of all its online parts.

    Raises:
        AffineQuantError: an unknown site or transform, one that is refused there, or one that stays online in the merged
            tier.
    """
    for name in recipe.transforms:
        if name not in sites:
            raise unknown_name("site", name, sites, where="--transform")
    placements = {}
    for name, site in sites.items():
        chosen = recipe.transforms.get(name)
        if chosen is None:
            placements[name] = Placement(how="folded", reason="nothing to fold")
            continue
        _, online = split_parts(chosen, site)
        parts = [place(site, structure) for structure in structures_of(chosen, where="--transform")]
        cost = sum(part.flops for part in parts)
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


def online_bytes(recipe: Recipe, family: Family, sites: Mapping[str, Site]) -> int:
    """What one block keeps of the transforms that act at run time: in float32, beside every linear that reads them, or
    beside the attention."""
    total = 0
    after_rope = [(name, (family.attention,)) for name, site in sites.items() if site.kind == "rope"]
    for name, members in (*family.input_groups(), *after_rope):
        online = split_parts(recipe.transforms[name], sites[name])[1] if name in recipe.transforms else ""
        structures = structures_of(online, where="--transform") if online else ()
        total += 4 * len(members) * sum(online_numbers(sites[name], structure) for structure in structures)
    return total

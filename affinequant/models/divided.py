"""Whether sizes divide as a recipe asks for: among ranks, and into groups of inputs. No tensors, no torch."""

import math

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.models.dims import Dims
from affinequant.models.family import Family
from affinequant.models.linears import shapes_of
from affinequant.recipe.assigned import Schemes
from affinequant.recipe.recipe import Recipe
from affinequant.recipe.scheme import FLOAT_BLOCKS, Scheme


def check_slices(recipe: Recipe, dims: Dims) -> None:
    """Whether `tp` ranks can share the model: whole heads, whole groups, whole words of packed zero points.

    Raises:
        AffineQuantError: with the numbers of ranks that can (exit 3).
    """
    group = math.lcm(*(size for scheme in recipe.schemes for size in _groups(scheme).values()))

    def fits(tp: int) -> bool:
        whole = dims.heads % tp == 0 and dims.mlp % tp == 0 and (dims.kv_heads % tp == 0 or tp % dims.kv_heads == 0)
        whole = whole and dims.delta_heads % tp == 0 and dims.delta_key_heads % tp == 0
        rows = (dims.query // tp, dims.mlp // tp, dims.delta // tp, max(dims.value // tp, dims.head_dim))
        return whole and all(size % 8 == 0 for size in rows) and all(size % group == 0 for size in rows[:2])

    if recipe.tp > 1 and not fits(recipe.tp):
        possible = [tp for tp in range(1, dims.heads + 1) if fits(tp)]
        delta = f", in gated-delta layers {dims.delta_heads} and {dims.delta_key_heads}" if dims.delta_heads else ""
        raise AffineQuantError(
            f"{dims.heads} heads ({dims.kv_heads} of keys and values{delta}) and {dims.mlp} features between up and down do "
            f"not divide among {recipe.tp} ranks",
            "--tp",
            f"use one of {', '.join(map(str, possible))}",
            exit_code=PREFLIGHT,
        )


def _groups(scheme: Scheme) -> dict[str, int]:
    """A scheme's sizes of groups by the words that ask for them: where weights and activations have some, of one size."""
    sizes = {"-g": scheme.weight.group_size, "-ag": scheme.activation.group_size if scheme.activation else None}
    return {word: size for word, size in sizes.items() if size}


def check_groups(recipe: Recipe, schemes: Schemes, family: Family, dims: Dims) -> None:
    """Whether the schemes' groups divide the inputs of all their linears, and packed storage the widths of these.

    Raises:
        AffineQuantError: with the nearest group that does, or experts in 4-bit floats (exit 3).
    """
    shapes = shapes_of(family, dims)
    for scheme in dict.fromkeys(one for one in schemes.values() if one is not None):
        mine = [shape for name, shape in shapes.items() if schemes[name] == scheme]
        _check(scheme, mine, "--scheme" if scheme == recipe.parsed_scheme else "--set", family, dims)


def _check(scheme: Scheme, shapes: list[tuple[int, int]], where: str, family: Family, dims: Dims) -> None:
    groups = _groups(scheme)
    if dims.experts and scheme.weight.kind != "int":
        what = f"experts are not rounded to 4-bit floats as yet, and {family.name} has some"
        raise AffineQuantError(what, where, "use a scheme of integers, such as w4a16-g32", exit_code=PREFLIGHT)
    rows, widths = (sorted(set(sizes)) for sizes in zip(*shapes, strict=True))
    group = next(iter(groups.values()), None)
    if group and any(width % group for width in widths):
        common = math.gcd(*widths)
        fits = [size for size in range(8, common + 1, 8) if common % size == 0]
        if "-ag" in groups:  # whose sums are quick, and on a GPU possible, in these sizes alone
            fits = [size for size in fits if size in (32, 64) or size % 128 == 0]
        near = min(fits, key=lambda size: abs(math.log(size / group)), default=None)
        wrong = ", ".join(str(width) for width in widths if width % group)
        fix = scheme.name
        for word in groups:
            fix = fix.replace(f"{word}{group}", f"{word}{near}" if near else "")
        fix = f"use {fix!r}" + (f": {near} is the nearest that divides all of {widths}" if near else ", without groups")
        if scheme.weight.kind != "int":  # their groups are what hardware has
            other = next((name for name, size in FLOAT_BLOCKS.items() if common % size == 0), "w4a4")
            fix = f"use {other!r}"
        what = f"groups of {group} do not divide {wrong} inputs"
        raise AffineQuantError(what, where, fix, exit_code=PREFLIGHT)
    if any(width % 8 for width in widths + rows):
        raise AffineQuantError(
            f"widths {sorted({*widths, *rows})} are not all multiples of 8, which packed storage needs",
            "MODEL",
            "this model cannot be packed",
            exit_code=PREFLIGHT,
        )

"""How many bits each part of a checkpoint has, and how many bytes it takes: all of it, not the linears alone."""

import math
from collections.abc import Mapping, Sequence

from affinequant.errors import AffineQuantError
from affinequant.report.figure import Axis, Figure, Series
from affinequant.report.page import Table
from affinequant.report.reading import Object
from affinequant.report.words import Words, fixed, number, numeric, stored

KEPT_BITS = 16
"""Of whatever is no linear of a block."""


def parts_of(report: Object, linears: Sequence[Mapping[str, tuple[int, int]]]) -> list[tuple[str, int, float, float]]:
    """(part, weights, bits of one with its share of the scales, bytes), the rest of the files as the last part."""
    from affinequant.recipe.assigned import KEPT, placed
    from affinequant.recipe.scheme import Scheme
    from affinequant.report.blocks import short_name

    plan = report.get("plan") or {}
    dims = plan.get("dims") or {}
    if not linears or not numeric(report.get("weight_bytes")) or plan.get("format") not in (None, "auto", *_PACKED):
        return []
    try:
        called = {placed(name): str(scheme) for name, scheme in (plan.get("linears") or {}).items()}
        schemes = {one: Scheme.parse(one) for one in {str(report["scheme"]), *called.values()} - {KEPT}}
    except AffineQuantError:  # of another version
        return []
    found = dict[str, list[float]]()
    for index, block in enumerate(linears):
        for name, (rows, columns) in block.items():
            scheme = schemes.get(called.get((index, name), str(report["scheme"])))
            one = found.setdefault(short_name(name), [0, 0.0])
            one[0] += rows * columns
            one[1] += rows * columns * (scheme.bits_per_weight(columns) if scheme else KEPT_BITS) / 8
    table = dims["vocab"] * dims["hidden"]
    parts = [(name, int(count), 8 * size / count, size) for name, (count, size) in found.items()]
    parts.append(("embeddings", table, KEPT_BITS, table * KEPT_BITS / 8))
    if not dims["tied"] or plan.get("untied_bytes"):
        parts.append(("head", table, KEPT_BITS, table * KEPT_BITS / 8))
    return parts


_PACKED = ("compressed-tensors", "affinequant", "native")
"""Formats whose linears have the scheme's bits in the file."""


def size_table(report: Object, linears: Sequence[Mapping[str, tuple[int, int]]]) -> list[Table | Figure]:
    """The parts as a table and as bars."""
    parts = parts_of(report, linears)
    if not parts:
        return []
    total = report["weight_bytes"]
    rest = total - math.fsum(size for *_, size in parts)
    rows: list[tuple[Words, ...]] = [
        (name, number(count), fixed(bits, 2), stored(size), _share(size, total)) for name, count, bits, size in parts
    ]
    rows.append(("norms, transforms, headers", "", "", stored(rest), _share(rest, total)))
    weights = sum(count for _, count, _, _ in parts)
    rows.append(
        ("all files of weights", number(weights), fixed(8 * total / weights, 2), stored(total), _share(total, total))
    )
    columns = ("part", "weights", "bits per weight", "bytes", "of all")
    caption = (
        "Over all blocks, scales and zeros included. What is no linear of a block keeps 16 bits, so a small model with "
    )
    caption += "many words shrinks less than its linears do."
    table = Table(columns=columns, rows=tuple(rows), right=(1, 2, 3, 4), caption=caption, beside=True)
    bars = Figure(
        kind="bars",
        title="Where the bytes are",
        series=(Series(y=tuple(size / 2**20 for size in (*(size for *_, size in parts), rest))),),
        x=Axis(label="size", unit="MB"),
        y=Axis(names=(*(name for name, *_ in parts), "all else")),
        caption="Of the files of weights, over all blocks.",
        key="bytes",
    )
    return [bars, table]


def _share(size: float, total: float) -> Words:
    return (fixed(100 * size / total, 1), " %")

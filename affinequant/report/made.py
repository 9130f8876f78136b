"""What a page says of a run as a whole: what it cost, what it stores, what runs, where it comes from, how to run it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from affinequant.report.figure import Axis, Figure, Series
from affinequant.report.page import Section, Table, Text, Tile, section
from affinequant.report.reading import Object
from affinequant.report.words import Words, fixed, joined, lasting, number, numeric, stored

if TYPE_CHECKING:
    from affinequant.models import Dims, Family


def name_of(report: Object) -> str:
    """The model and the scheme; of a local folder its name alone."""
    from affinequant.formats.card import base_name

    return f"{base_name(str(report.get('model', '?')), short=True)} at {str(report.get('scheme', '?')).upper()}"


def calibration_sentence(report: Object) -> Words | None:
    """Perplexity on calibration text, said as such."""
    found = report.get("calibration_perplexity") or {}
    if not (numeric(found.get("full")) and numeric(found.get("quantized"))):
        return None
    pair: Words = (number(found["full"]), " to ", number(found["quantized"]))
    return joined(("perplexity on the text that it was fitted to goes from ", pair), "")


def export_sentence(report: Object) -> Words | None:
    """What an export was, and how far from its source it computes."""
    found = (report.get("verified") or {}).get("divergence")
    if "exported_from" not in report or not numeric(found):
        return None
    near: Words = (number(found, 2), f" nats per token from {report['verified'].get('reference', 'its source')}")
    return joined((f"exported as {report.get('format', '?')}, nothing retrained: ", near), "")


def smaller_sentence(report: Object) -> Words | None:
    """`257 MB become 107 MB`."""
    before, after = (report.get("plan") or {}).get("source_bytes"), report.get("bytes")
    if before is None or after is None:
        return None
    return (stored(before), " become ", stored(after))


def tiles(report: Object) -> tuple[Tile, ...]:
    """Size, bits and time."""
    found = []
    before = (report.get("plan") or {}).get("source_bytes")
    if numeric(report.get("bytes")):
        found.append(
            Tile(label="size", words=stored(report["bytes"]), about=("from ", stored(before)) if before else "")
        )
    if numeric(report.get("bits_per_weight")):
        about = "in the blocks' linears, scales included"
        found.append(Tile(label="bits per weight", words=fixed(report["bits_per_weight"], 2), about=about))
    if numeric(report.get("seconds")):
        peak = report.get("peak_bytes")
        about = (stored(peak), " of memory at most") if peak else ""
        found.append(Tile(label="time to quantise", words=lasting(report["seconds"]), about=about))
    return tuple(found)


def calibration_section(report: Object) -> tuple[Section, ...]:
    """Where nobody has scored it yet: what the run itself has measured."""
    found = report.get("calibration_perplexity") or {}
    if not (numeric(found.get("full")) and numeric(found.get("quantized"))):
        return ()
    row: tuple[Words, ...] = (
        "perplexity on calibration text",
        number(found["full"]),
        number(found["quantized"]),
        number(found["tokens"]) if numeric(found.get("tokens")) else "",
    )
    table = Table(columns=("metric", "full precision", "quantised", "tokens"), rows=(row,), right=(1, 2, 3))
    about = (
        "This text is what the checkpoint was fitted to, so the figure is in sample: affinequant eval measures on text "
    )
    return section("Before and after", table, about=about + "that it has not seen.")


def placement_section(report: Object) -> tuple[Section, ...]:
    """What is folded, what stays online, and what that costs."""
    sites = [one for one in (report.get("plan") or {}).get("sites", ()) if isinstance(one, Mapping)]
    used = [one for one in sites if one.get("transform")]
    rows = tuple(
        (
            str(one.get("site", "")),
            str(one["transform"]),
            str(one.get("placement", "")),
            number(one["flops_per_token"]) if numeric(one.get("flops_per_token")) else "",
            str(one.get("reason", "")),
        )
        for one in used
    )
    columns = ("site", "transform", "placement", "FLOPs per token", "why")
    table = Table(columns=columns, rows=rows, right=(3,)) if rows else None
    return section(
        "What is folded, what stays online",
        table,
        _cost(report),
        about="Folded transforms are part of the weights and cost nothing. Online ones are small matrices at run time.",
    )


def online_cost(report: Object) -> tuple[int, int] | None:
    """Floating-point operations per token of one block: of its online transforms (where blocks choose, on average), and of
    its linears; None where the report is too old to say."""
    from affinequant.transforms.placements import block_flops

    network = _network(report)
    plan, blocks = report.get("plan") or {}, report.get("blocks") or []
    if not (network and blocks and plan.get("sites")):
        return None
    chosen = [{site: one["flops"] for site, one in found.get("transforms", {}).items()} for found in blocks]
    fixed_ones = sum(one["flops_per_token"] for one in plan["sites"] if not any(one["site"] in row for row in chosen))
    online = fixed_ones + round(sum(sum(row.values()) for row in chosen) / len(chosen))
    family, dims = network
    return online, block_flops(family, dims)


def _cost(report: Object) -> Text | None:
    found = online_cost(report)
    if found is None:
        return None
    online, block = found
    share: Words = (fixed(100 * online / block, 2), " % of the block's linears, ", number(block), ".")
    return Text(words=joined((("Online in a block: ", number(online), " operations per token, "), share), ""))


def _network(report: Object) -> "tuple[Family, Dims] | None":
    """The family and the sizes that the plan names."""
    from affinequant.models import FAMILIES, Dims

    plan = report.get("plan") or {}
    if plan.get("family") not in FAMILIES or not isinstance(plan.get("dims"), Mapping):
        return None
    try:
        dims = Dims(**plan["dims"])
    except TypeError:  # of a version that knew other sizes
        return None
    return FAMILIES[plan["family"]].sized(dims), dims


def _linears(report: Object) -> list[dict[str, tuple[int, int]]]:
    """Linear -> rows and columns, for each block."""
    if (network := _network(report)) is None:
        return []
    family, dims = network
    return [{linear.name: linear.shape(dims) for linear in block.linears} for block in family.each_block(dims)]


def size_section(report: Object) -> tuple[Section, ...]:
    """Which part has how many bits, and takes how many bytes."""
    from affinequant.report.sizes import size_table

    return section("Bits and bytes", *size_table(report, _linears(report)))


def cost_section(report: Object) -> tuple[Section, ...]:
    """Time and memory by phase, or by block where the report knows no phases."""
    phases = [one for one in report.get("phases") or () if isinstance(one, Mapping) and numeric(one.get("seconds"))]
    if phases:
        names = tuple(str(one.get("name", "?")) for one in phases)
        figures = [_phase_figure(phases, names, "seconds", 1.0, "time", "s")]
        if all(numeric(one.get("peak_bytes")) for one in phases):
            figures.append(_phase_figure(phases, names, "peak_bytes", 2**30, "peak memory", "GB"))
        return section("Time and memory", *figures)
    blocks = report.get("blocks") or []
    if not any(numeric(block.get("seconds")) for block in blocks):
        return ()
    y = tuple(block["seconds"] if numeric(block.get("seconds")) else None for block in blocks)
    figure = Figure(
        kind="line",
        title="Time of each block",
        series=(Series(x=tuple(range(len(y))), y=y),),
        x=Axis(label="block"),
        y=Axis(label="time", unit="s", better="lower"),
        caption="Loading, learning and rounding of a block together.",
        key="seconds-blocks",
    )
    return section("Time and memory", figure)


def _phase_figure(
    phases: Sequence[Object], names: tuple[str, ...], key: str, unit_size: float, label: str, unit: str
) -> Figure:
    return Figure(
        kind="bars",
        title=f"{label[0].upper()}{label[1:]} of each phase",
        series=(Series(y=tuple(one[key] / unit_size for one in phases)),),
        x=Axis(label=label, unit=unit, better="lower"),
        y=Axis(names=names),
        caption="In the order in which they were done."
        if key == "seconds"
        else "Of the whole process while it was in it.",
        key=f"phases-{key.replace('_', '-')}",
    )

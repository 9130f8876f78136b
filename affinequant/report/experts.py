"""What a page says of experts: how many tokens each has seen, and which of them too few."""

import re
from collections.abc import Mapping, Sequence

from affinequant.report.figure import Axis, Figure, Series
from affinequant.report.page import Section, Text, section
from affinequant.report.reading import Object
from affinequant.report.words import Words, number, numeric


def expert_section(blocks: Sequence[Object]) -> tuple[Section, ...]:
    """Tokens of calibration text by block and expert, and how many experts are starved."""
    seen = {index: tokens for index, block in enumerate(blocks) if (tokens := _tokens(block))}
    if not seen:
        return ()
    few = {index: _starved(blocks[index]) for index in seen}
    experts = max(map(len, seen.values()))
    rows = {index: (*tokens, *[None] * (experts - len(tokens))) for index, tokens in seen.items()}
    marked = tuple(
        tuple(value if place in few[index] else None for place, value in enumerate(row)) for index, row in rows.items()
    )
    series = (Series(cells=tuple(rows.values())), Series(name="starved", cells=marked))
    figure = Figure(
        kind="heat",
        title="Tokens that came to each expert",
        series=series if any(few.values()) else series[:1],
        x=Axis(names=tuple(map(str, range(experts)))),
        y=Axis(label="block", names=tuple(map(str, rows))),
        value=Axis(label="tokens", log=True),
        caption="By number of the expert, on a logarithmic scale. Orange, the stronger the fewer there were: "
        "experts with a linear of more inputs than tokens came, which GPTQ alone has too little for.",
        key="experts",
    )
    count, total = sum(map(len, few.values())), sum(map(len, seen.values()))
    words: Words = (
        number(count),
        " of ",
        number(total),
        " experts saw fewer tokens than a linear of theirs has inputs.",
    )
    more = " More --samples give them more." if count else ""
    return section("Experts", figure, Text(words=(*words, more)))


def _tokens(block: Object) -> tuple[int, ...]:
    found = block.get("experts")
    tokens = found.get("tokens") if isinstance(found, Mapping) else None
    return tuple(tokens) if isinstance(tokens, list | tuple) and tokens and all(map(numeric, tokens)) else ()


def _starved(block: Object) -> set[int]:
    """The numbers of experts of which a linear was left to nearest."""
    named = (re.search(r"experts\.(\d+)\.", str(name)) for name in block["experts"].get("starved") or ())
    return {int(found[1]) for found in named if found}

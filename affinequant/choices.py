"""What was chosen block by block, counted: for the screen, the report and `inspect`. Reads reports, computes nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

KINDS = {"transforms": "transform", "roundings": "rounding"}
"""Key of a block's report to what it says was chosen, site by site."""


def tally(blocks: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """`transform at mlp_mid` or `rounding at mlp_mid` -> what was chosen -> in how many blocks, the most frequent first;
    nothing where nothing was left to choose."""
    counts: dict[str, dict[str, int]] = {}
    for block in blocks:
        for key, kind in KINDS.items():
            for site, one in block.get(key, {}).items():
                row = counts.setdefault(f"{kind} at {site}", {})
                row[one[kind]] = row.get(one[kind], 0) + 1
    return {what: dict(sorted(row.items(), key=lambda pair: -pair[1])) for what, row in counts.items()}


def lines(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tally as lines of text: `transform at mlp_mid: diagonal+kronecker x 22, diagonal x 8`."""
    return [
        f"{what}: " + ", ".join(f"{name} x {count}" for name, count in row.items())
        for what, row in tally(blocks).items()
    ]


def short(block: Mapping[str, Any]) -> str:
    """One block's choices in a few characters, parts of transforms by their first letters; "" where there were none."""
    parts = []
    for key, kind in KINDS.items():
        for site, one in block.get(key, {}).items():
            words = one[kind].split(" ")[0].split("+")
            parts.append(f"{site}:" + "+".join(word if len(words) == 1 else word[:4] for word in words))
    return " ".join(parts)

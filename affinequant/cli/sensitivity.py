"""What `affinequant plan --sensitivity` measures and shows: where a model suffers when it is rounded."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.cli.output import Screen

if TYPE_CHECKING:
    from affinequant.plan import Plan

WORST = 8
"""Places that the page lists by name."""


def measure(made: "Plan", screen: Screen) -> dict[str, Any]:
    """What rounding each site of each block alone costs, as plain JSON values that a page can be made of.

    Raises:
        AffineQuantError: no weights, no text, or a model that cannot be run.
    """
    from affinequant.learning.sensitivity import looked_at, sensitivities
    from affinequant.pipeline import decoder_of, tokens_of
    from affinequant.plan import with_weights

    began = time.perf_counter()
    made = looked_at(with_weights(made))
    tokens = tokens_of(made, screen.listener())
    found = [asdict(one) for one in sensitivities(made, decoder_of(made), tokens, screen.say)]
    worst = sorted(found, key=lambda one: -one["kl"])[:WORST]
    samples, length = tokens.ids.shape
    about = f"{samples} samples of {length} tokens of {made.recipe.data}"
    return {
        "title": f"Sensitivity of {Path(made.recipe.model).name} to {made.recipe.scheme}",
        "subtitle": "each site of each block rounded alone, to nearest, without transforms",
        "verdict": f"Block {worst[0]['block']} suffers most, at {worst[0]['site']}: {worst[0]['kl']:.3g} nats per token.",
        "sites": found,
        "seconds": time.perf_counter() - began,
        "facts": {"model": made.recipe.model, "scheme": made.recipe.scheme, "tokens": about, "seed": made.recipe.seed},
        "tables": [
            {
                "title": "What suffers most",
                "columns": ["block", "site", "KL [nats per token]", "linears"],
                "rows": [[one["block"], one["site"], one["kl"], ", ".join(one["linears"][:4])] for one in worst],
            }
        ],
        "figures": [_map(found)],
    }


def print_sensitivity(found: Mapping[str, Any], screen: Screen) -> None:
    """Blocks x sites, and the worst in a sentence."""
    rows = _rows(found["sites"])
    names = list(dict.fromkeys(site for row in rows.values() for site in row))
    cells = [
        [str(block), *(f"{row[site]:.2g}" if site in row else "-" for site in names)] for block, row in rows.items()
    ]
    title = f"nats per token by which predictions diverge when a site alone is rounded ({found['facts']['tokens']})"
    screen.print()
    screen.table(["block", *names], cells, right=range(1 + len(names)), title=title)
    screen.print(found["verdict"])


def write_page(found: Mapping[str, Any], out: str, screen: Screen) -> None:
    """The page of what was measured.

    Raises:
        AffineQuantError: see `write_report`.
    """
    from affinequant.report.reading import Sources
    from affinequant.report.writing import write_report

    screen.print(f"report: {write_report(Sources(place=Path(), research=found), out).html}")


def _rows(sites: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for one in sites:
        rows.setdefault(one["block"], {})[one["site"]] = one["kl"]
    return rows


def _map(sites: list[dict[str, Any]]) -> dict[str, Any]:
    from affinequant.report.blocks import heat
    from affinequant.report.figure import Axis

    rows = [{site: kl for site, kl in row.items() if kl > 0} for row in _rows(sites).values()]
    axis = Axis(label="KL", unit="nats per token", log=True, better="lower")
    caption = "What has most colour loses most: candidates for more bits, or for a transform of their own."
    figure = heat(rows, lambda row: row, axis, "What rounding each site alone costs", "sensitivity", caption)
    return figure.to_json() if figure else {}

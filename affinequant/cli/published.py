"""Published figures on the screen: beside ours after an evaluation, or by themselves."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from affinequant.cli.output import Screen

if TYPE_CHECKING:
    from affinequant_evals.harness import Scorecard
    from affinequant_evals.published import Published
    from affinequant_evals.reproduction import Reproduced

COLUMNS = ("table", "method", "measured", "published")


def as_published(suite: str | None) -> bool:
    """Whether a suite measures as papers do, on whole texts and all questions."""
    from affinequant_evals.suites import SUITES

    return suite is not None and SUITES[suite].windows is None


def beside_published(card: "Scorecard", *, whole: bool, screen: Screen) -> "Scorecard":
    """Print what was published of the scored model, with ours beside it, and put it into the scorecard.

    Args:
        whole: all windows were scored.
    """
    from affinequant_evals.reproduction import made_of, reproduction

    from affinequant.models.source import locate

    # The demo's model has a folder of its own, and no paper knows it.
    made = None if card.subject == "demo" else made_of(locate(card.subject), card.subject)
    rows = reproduction(card, made, whole=whole)
    screen.print()
    if rows:
        print_reproduction(rows, screen)
    else:
        screen.print(f"no figures are published of {made.model if made else card.subject}, as far as is known here")
    return replace(card, more={**card.more, "published": [row.to_json() for row in rows]})


def print_reproduction(rows: "Sequence[Reproduced]", screen: Screen) -> None:
    """Each row with ours and the verdict; then, once each, why there is none, what differs and where figures are from."""
    from affinequant_evals.reproduction import summary

    shown = [[*cells(one.row), "" if one.ours is None else f"{one.ours:.2f}", one.verdict] for one in rows]
    screen.table([*COLUMNS, "ours", "verdict"], shown, right=(3, 4), title="published figures of this model")
    screen.print()
    screen.print(f"published: {summary(rows)}")
    for (verdict, reason), count in Counter((one.verdict, one.reason) for one in rows if one.reason).items():
        screen.print(f"{count} {verdict}: {reason}")
    for table, differs in {one.row.table: one.differs for one in rows if one.differs}.items():
        screen.print(f"{table}, nonetheless: {'; '.join(differs)}")
    for line in sources([one.row for one in rows]):
        screen.print(line)


def cells(row: "Published") -> list[str]:
    """A row as it stands in tables."""
    return [row.table, row.method, row.measured, f"{row.value:.2f}{' ' * bool(row.unit)}{row.unit}"]


def sources(rows: "Sequence[Published]") -> list[str]:
    """Where each table is from and how it was measured there."""
    tables = {row.table: row for row in rows if not row.full} | {row.table: row for row in rows if row.full}
    return [f"{name}: {row.source}; there {row.protocol}" for name, row in tables.items()]

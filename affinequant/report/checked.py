"""What a page says of checks: limits that were set, greedy text, figures that others published."""

from collections.abc import Mapping, Sequence

from affinequant.report.intervals import FULL, SHORT, gather, interval_of, shown_with
from affinequant.report.page import Table, Text
from affinequant.report.reading import Object
from affinequant.report.words import Words, number, numeric


def failures(scores: Sequence[Object]) -> list[str]:
    """What was checked and failed, in words: gates, metrics."""
    broken = [one for one in _rows(scores, "gates") if not one.get("passed")]
    failed = [str(one.get("said") or f"{one.get('metric', '?')} is over its limit") for one in broken]
    return failed + [f"{name} could not be measured" for name, one in gather(scores).items() if one.get("error")]


def doubts(scores: Sequence[Object]) -> list[str]:
    """What no limit was set on, and looks wrong."""
    found, bad = _rows(scores, "samples"), len(_broken(scores))
    return [f"{bad} of {len(found)} greedy texts look{'s' * (bad == 1)} broken"] if bad else []


def _broken(scores: Sequence[Object]) -> list[Object]:
    """The greedy texts that look broken where the baseline's do not."""
    return [one for one in _rows(scores, "samples") if one.get("suspicious") and not one.get("baseline_suspicious")]


def _rows(scores: Sequence[Object], name: str) -> list[Object]:
    """The rows of a part of all scores, each once."""
    found: list[Object] = []
    for card in scores:
        rows = card.get(name)
        found += (
            [one for one in rows if isinstance(one, Mapping) and one not in found] if isinstance(rows, list) else []
        )
    return found


def gates(scores: Sequence[Object]) -> Table | None:
    """What the command was told to hold, and whether it did."""
    rows: list[tuple[Words, ...]] = []
    for gate in _rows(scores, "gates"):
        value, ends = gate.get("value"), gate.get("interval")
        found = shown_with(value, interval_of(value, None, None, ends)) if numeric(value) else "not measured"
        limit = number(gate["limit"]) if numeric(gate.get("limit")) else ""
        name, kind = str(gate.get("metric", "")), str(gate.get("kind", ""))
        rows.append((name, kind, found, limit, "pass" if gate.get("passed") else "FAIL"))
    return Table(columns=("metric", "", "value", "limit", ""), rows=tuple(rows), right=(2, 3)) if rows else None


def samples(scores: Sequence[Object]) -> list[Table | Text]:
    """Greedy texts side by side, and a warning of those that look broken."""
    found = _rows(scores, "samples")
    if not found:
        return []
    rows = tuple(
        (str(one.get("prompt", "")), str(one.get("baseline") or ""), str(one.get("text", ""))) for one in found
    )
    bad = [f"{one.get('prompt', '')} ({one['suspicious']})" for one in _broken(scores)]
    warning = [Text(words=f"Looks broken after: {'; '.join(bad)}.", warns=True)] if bad else []
    return [*warning, Table(columns=("prompt", FULL, SHORT), rows=rows)]


def published(scores: Sequence[Object]) -> list[Table]:
    """The reproduction table: what others published, beside what was measured here."""
    rows = tuple(
        (
            str(one.get("method", "")),
            str(one.get("scheme", "")),
            str(one.get("measured", "")),
            number(one["value"]) if numeric(one.get("value")) else "",
            number(one["ours"]) if numeric(one.get("ours")) else "",
            str(one.get("verdict", "")),
            str(one.get("reason") or "; ".join(map(str, one.get("differs") or ()))),
            str(one.get("source", "")),
        )
        for one in _rows(scores, "published")
    )
    columns = ("method", "numbers", "measured", "published", "here", "", "why", "source")
    return [Table(columns=columns, rows=rows, right=(3, 4))] if rows else []

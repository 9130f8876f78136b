"""From what was read to a page: a verdict, a few numbers, and the sections that there is something to say in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.report import blocks, checked, experts, made, measured, origin, transforms
from affinequant.report.compared import comparison_page
from affinequant.report.figure import Figure
from affinequant.report.intervals import gather
from affinequant.report.page import Page, Table, section
from affinequant.report.reading import Made, Object, Sources
from affinequant.report.words import Words, joined, number, numeric, pieces


def build_page(sources: Sources) -> Page:
    """The page of what was read.

    Raises:
        AffineQuantError: values that are not what a report has there, or figures that cannot be drawn.
    """
    try:
        return _page(sources)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
        what = f"a value is not what a report has there: {type(problem).__name__}: {problem}"
        fix = "write the JSON again, with this version; if that is what it is from, report it with the traceback of -v"
        raise AffineQuantError(what, str(sources.place), fix, exit_code=PREFLIGHT) from problem


def _page(sources: Sources) -> Page:
    if sources.made:
        return run_page(sources.made, sources.scores)
    if sources.comparison:
        return comparison_page(sources.comparison)
    if sources.research:
        return research_page(sources.research)
    return score_page(sources.scores)


def run_page(run: Made, scores: Sequence[Object]) -> Page:
    """A run, with its scores where there are any."""
    report = run.report
    steps = [block for block in report.get("blocks") or () if isinstance(block, Mapping)]
    metrics = gather(scores)
    failed = checked.failures(scores) + (["it did not pass its verification"] if run.failed else [])
    doubts = checked.doubts(scores)
    tier, preset = report.get("tier"), report.get("preset")
    return Page(
        title=made.name_of(report),
        subtitle=", ".join(f"{name} {value}" for name, value in (("preset", preset), ("tier", tier)) if value),
        verdict=_verdict(
            failed,
            *doubts,
            measured.sentence(metrics) or made.calibration_sentence(report) or made.export_sentence(report),
            made.smaller_sentence(report),
        ),
        bad=bool(failed or doubts),
        tiles=(*measured.tiles(metrics), *made.tiles(report)),
        sections=(
            *(measured.score_sections(scores) if metrics else made.calibration_section(report)),
            *blocks.error_section(steps),
            *experts.expert_section(steps),
            *blocks.learning_section(report, steps),
            *transforms.transform_section(steps),
            *transforms.value_section(steps),
            *made.placement_section(report),
            *made.size_section(report),
            *made.cost_section(report),
            *section("Figures of its own", *_figures(report)),
            *origin.run_section(run),
            *origin.origin_section(run),
        ),
        version=str((report.get("env") or {}).get("affinequant", "")),
    )


def score_page(scores: Sequence[Object]) -> Page:
    """Scores alone."""
    failed, doubts, env = checked.failures(scores), checked.doubts(scores), scores[-1].get("env") or {}
    names = dict.fromkeys(Path(str(card["checkpoint"])).name for card in scores)
    baseline = (scores[0].get("baseline") or {}).get("checkpoint")
    return Page(
        title=f"Scores of {', '.join(names)}",
        subtitle=f"next to {Path(str(baseline)).name}" if baseline else "without a baseline",
        verdict=_verdict(failed, *doubts, measured.sentence(gather(scores))),
        bad=bool(failed or doubts),
        tiles=measured.tiles(gather(scores)),
        sections=(
            *measured.score_sections(scores),
            *section("Where it comes from", origin.facts({"env": env})),
        ),
        version=str(env.get("affinequant", "")),
    )


def research_page(report: Object) -> Page:
    """Whatever a method of research says of itself: `title`, `verdict`, `facts`, `tables`, `figures`."""
    tables = [_table(one) for one in report.get("tables") or ()]
    facts = report.get("facts") or {}
    pairs = facts.items() if isinstance(facts, Mapping) else [tuple(pair) for pair in facts]
    rows = tuple((str(name), _cell(value)) for name, value in pairs)
    env = report.get("env") or {}
    return Page(
        title=str(report["title"]),
        subtitle=str(report.get("subtitle", "")),
        verdict=str(report.get("verdict", "")),
        bad=report.get("passed") is False,
        sections=(
            *section("Findings", *tables, *_figures(report)),
            *section("Facts", Table(columns=("", ""), rows=rows) if rows else None),
            *section("Where it comes from", origin.facts({"env": env})),
        ),
        version=str(env.get("affinequant", "")),
    )


def _verdict(failed: Sequence[str], *parts: Words | None) -> Words:
    """One sentence: what failed first, then what else is known: what it cost in quality, and what it saves."""
    said: list[Words] = [f"FAILED: {'; '.join(failed)}"] if failed else []
    said += [words for words in parts if words]
    return _begin(joined((joined(said or ["Nothing was measured"], "; "), "."), ""))


def _begin(words: Words) -> Words:
    """With a capital letter, but for a metric's name."""
    first, *rest = pieces(words)
    if isinstance(first, str) and first and not set("@,") & set(first.split(" ")[0]):
        return (first[0].upper() + first[1:], *rest)
    return (first, *rest)


def _figures(report: Object) -> list[Figure]:
    found = report.get("figures") or ()
    if not isinstance(found, list | tuple):
        raise AffineQuantError("its figures are no list", "figures", "see affinequant.report.figure")
    return [Figure.from_json(one) for one in found]


def _table(value: Any) -> Table:
    """A table of a report: `title`, `columns`, `rows`, `caption`."""
    try:
        columns = tuple(str(name) for name in value["columns"])
        rows = tuple(tuple(_cell(cell) for cell in row) for row in value["rows"])
        right = tuple(n for n in range(len(columns)) if any(numeric(row[n]) for row in value["rows"]))
        title, caption = str(value.get("title", "")), str(value.get("caption", ""))
    except (KeyError, TypeError, IndexError, AttributeError) as problem:
        fix = "give columns, and rows as long as they"
        raise AffineQuantError(f"a table cannot be read: {problem!r}", "tables", fix) from None
    return Table(title=title, columns=columns, rows=rows, right=right, caption=caption)


def _cell(value: Any) -> Words:
    return number(value) if numeric(value) else "" if value is None else str(value)

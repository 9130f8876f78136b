"""What a page says of scores: before and after, with intervals, and whether a difference is more than chance."""

from collections.abc import Mapping, Sequence
from typing import Any

from affinequant.report import checked, drifted
from affinequant.report.figure import Axis, Figure
from affinequant.report.intervals import (
    FULL,
    LEVEL,
    SHORT,
    baseline_interval,
    delta_interval,
    gather,
    is_perplexity,
    own_interval,
    series_of,
    shown_with,
)
from affinequant.report.page import Section, Table, Text, Tile, section
from affinequant.report.reading import Object
from affinequant.report.words import Value, Words, between, fixed, joined, number, numeric

_ABOUT_INTERVALS = (
    "Intervals hold 95 % by Student's t. That of a difference is of pairs, the same windows and questions for both models, "
    "and so far narrower than those of the two values: where it leaves out zero, the difference is more than chance."
)


def leading(metrics: Mapping[str, Object]) -> tuple[str, Object] | None:
    """The metric that a sentence is about: the first perplexity that has a baseline, else the first that has one."""
    known = [(name, one) for name, one in metrics.items() if numeric(one.get("value")) and numeric(one.get("baseline"))]
    return next((pair for pair in known if is_perplexity(pair[0])), known[0] if known else None)


def sentence(metrics: Mapping[str, Object]) -> Words | None:
    """`perplexity on demo rises 1.18 times, from 18.37 to 21.70 (95 % of the difference: +2.1 to +4.5)`."""
    found = leading(metrics)
    if found is None:
        return None
    name, one = found
    text = (one.get("about") or {}).get("text")
    what = f"perplexity on {text}" if is_perplexity(name) and text else name
    value, before, ends = one["value"], one["baseline"], delta_interval(one)
    if value == before:
        return (f"{what} is the same, ", number(value))
    pair: Words = (" from ", number(before), " to ", number(value))
    surely: Words = (
        joined((f" ({LEVEL:.0%} of the difference: ".replace("%", " %"), _signed(ends), ")"), "") if ends else ""
    )
    if ends and ends[0] <= 0 <= ends[1]:
        return joined((f"{what} goes", pair, ", which may be chance", surely), "")
    verb = "rises" if value > before else "falls"
    times: Words = (" ", fixed(value / before, 2), " times,") if before > 0 and is_perplexity(name) else ""
    return joined((f"{what} {verb}", times, pair, surely), "")


def tiles(metrics: Mapping[str, Object]) -> tuple[Tile, ...]:
    """The few numbers of scores that stand on top."""
    shown = []
    if found := leading(metrics):
        name, one = found
        label = "perplexity" if is_perplexity(name) else name
        about = joined((("from ", number(one["baseline"]), " in full precision"), _times(one)), ", ")
        shown.append(Tile(label=label, words=number(one["value"]), about=about))
    for start, label, about in (
        ("kl", "KL divergence", "nats per token from full precision"),
        ("agreement", "same next token", "of full precision's choices"),
        ("mean", "mean of tasks", "over the suite"),
    ):
        one = next(
            (one for name, one in metrics.items() if name.startswith(f"{start}@") and numeric(one["value"])), None
        )
        if one:
            words = number(one["value"], 3) if start == "kl" else Value(one["value"], f"{100 * one['value']:.1f} %")
            shown.append(Tile(label=label, words=words, about=about))
    return tuple(shown)


def score_sections(scores: Sequence[Object]) -> tuple[Section, ...]:
    """Before and after; drift; gates; greedy text; what was published."""
    metrics = gather(scores)
    return (
        *section(
            "Before and after",
            _table({name: one for name, one in metrics.items() if not drifted.is_drift(name)}),
            _pairs(metrics, "perplexity", is_perplexity, Axis(label="perplexity")),
            _pairs(metrics, "tasks", _is_task, Axis(label="score")),
            _differences(metrics),
            *(Text(words=words) for words in _how(scores)),
            about=_ABOUT_INTERVALS,
        ),
        *drifted.drift_section(metrics),
        *section("Gates", checked.gates(scores), about="What the command was told to hold."),
        *section(
            "Does it still speak?", *checked.samples(scores), about="The most likely next token, again and again."
        ),
        *section("Against what was published", *checked.published(scores)),
    )


def _table(metrics: Mapping[str, Object]) -> Table | None:
    rows = []
    for name, one in metrics.items():
        if not numeric(one.get("value")):
            rows.append((name, "", f"failed: {one.get('error', '?')}", "", "", ""))
            continue
        delta = one.get("delta") or {}
        better = {"lower": "lower is better", "higher": "higher is better"}.get(str(one.get("better")), "")
        rows.append(
            (
                name,
                shown_with(one["baseline"], baseline_interval(name, one)) if numeric(one.get("baseline")) else "",
                shown_with(one["value"], own_interval(name, one)),
                shown_with(delta["value"], delta_interval(one), sign=True) if numeric(delta.get("value")) else "",
                number(one["n"]) if numeric(one.get("n")) else "",
                better,
            )
        )
    columns = ("metric", FULL, SHORT, "difference", "n", "")
    return Table(columns=columns, rows=tuple(rows), right=(1, 2, 3, 4)) if rows else None


def _signed(ends: tuple[float, float]) -> Words:
    return between(*ends, sign=True)


def _times(one: Object) -> Words:
    return (fixed(one["value"] / one["baseline"], 2), " times") if one["baseline"] > 0 else ""


def _is_task(name: str) -> bool:
    return ("@" not in name.split(",")[0] and not name.endswith(",flips")) or name.startswith("mean@")


def _pairs(metrics: Mapping[str, Object], what: str, belongs: Any, axis: Axis) -> Figure | None:
    """A row for each metric of a kind: both models' values and intervals."""
    names = [n for n, one in metrics.items() if belongs(n) and numeric(one.get("value"))]
    if not names or not any(numeric(metrics[name].get("baseline")) for name in names):
        return None
    before = series_of(FULL, [(metrics[n].get("baseline"), baseline_interval(n, metrics[n])) for n in names])
    after = series_of(SHORT, [(metrics[n]["value"], own_interval(n, metrics[n])) for n in names])
    return Figure(
        kind="interval",
        title=f"{what[0].upper()}{what[1:]}, {FULL} and {SHORT}",
        series=(before, after),
        x=axis,
        y=Axis(names=tuple(name.removeprefix("perplexity@") for name in names)),
        caption="The closer the two points of a row, the less was lost. Bars hold 95 % each; they may overlap where the "
        "paired difference is beyond doubt.",
        key=f"scores-{what}",
    )


def _differences(metrics: Mapping[str, Object]) -> Figure | None:
    names = [n for n, one in metrics.items() if _is_task(n) and numeric((one.get("delta") or {}).get("value"))]
    if len(names) < 2:
        return None
    return Figure(
        kind="interval",
        title=f"Tasks, {SHORT} minus {FULL}",
        series=(series_of("", [(metrics[n]["delta"]["value"], delta_interval(metrics[n])) for n in names]),),
        x=Axis(label="difference of the score"),
        y=Axis(names=tuple(names)),
        caption="Over the same questions. A bar that crosses the line at zero may be chance.",
        key="scores-differences",
    )


def _how(scores: Sequence[Object]) -> list[Words]:
    """How each perplexity was measured, once for all that were measured alike."""
    said: list[Words] = []
    for name, one in gather(scores).items():
        about = one.get("about") or {}
        if is_perplexity(name) and {"windows", "seq_len", "text"} <= set(about):
            words: Words = (
                f"{name}: ",
                number(about["windows"]),
                " windows of ",
                number(about["seq_len"]),
                f" tokens of {about['text']}, BOS: {about.get('bos', '?')}.",
            )
            said.append(words)
    return said + [f"{note[0].upper()}{note[1:]}." for card in scores for note in card.get("notes") or () if note]

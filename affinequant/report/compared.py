"""What a page says of presets side by side, out of compare.json."""

from collections.abc import Mapping
from typing import Any

from affinequant.report.figure import Axis, Figure
from affinequant.report.measured import interval_of, series_of
from affinequant.report.origin import facts
from affinequant.report.page import Page, Section, Table, Text, section
from affinequant.report.reading import Object
from affinequant.report.words import Words, fixed, joined, lasting, number, numeric, stored


def comparison_page(found: Object) -> Page:
    """A row for each preset, beside full precision and beside what was published."""
    presets = [one for one in found["presets"] if isinstance(one, Mapping)]
    failed = [str(one.get("preset", "?")) for one in presets if one.get("error")]
    return Page(
        title=f"Presets on {str(found.get('model', '?')).rstrip('/').rpartition('/')[2]}",
        subtitle=str(found.get("scheme", "")),
        verdict=_verdict(found, presets, failed),
        bad=bool(failed),
        sections=(
            *section("Presets", _table(found, presets), _intervals(found, presets), *_about(found)),
            *_noise(found),
            *section("What failed", *(_failure(one) for one in presets if one.get("error"))),
            *section("Where it comes from", facts({"env": found.get("env") or {}})),
        ),
        version=str((found.get("env") or {}).get("affinequant", "")),
    )


def _verdict(found: Object, presets: list[Object], failed: list[str]) -> Words:
    known = [one for one in presets if numeric(one.get("perplexity"))]
    said: list[Words] = []
    if known:
        best, full = min(known, key=lambda one: one["perplexity"]), found["full_precision"].get("perplexity")
        said.append((f"Lowest perplexity: {best.get('preset', '?')} with ", number(best["perplexity"])))
        if numeric(full):
            said.append(("full precision has ", number(full)))
    if failed:
        said.append(f"failed: {', '.join(failed)}")
    return joined((joined(said or ["Nothing could be scored"], "; "), "."), "")


def _table(found: Object, presets: list[Object]) -> Table:
    full = found["full_precision"]
    rows: list[tuple[Words, ...]] = [
        ("full precision", "", _scored(full), "", "", "", "", ""),
        *(
            (
                str(one.get("preset", "?")),
                str(one.get("tier", "")),
                "failed" if one.get("error") else _scored(one),
                _if(one, "ratio", lambda value: fixed(value, 3)),
                _if(one, "minutes", lambda value: lasting(60 * value)),
                _if(one, "peak_bytes", stored),
                _if(one, "percent_of_block", lambda value: (fixed(value, 2), " %")),
                _if(one, "bytes", stored),
            )
            for one in presets
        ),
    ]
    columns = ("preset", "tier", "perplexity", "x full precision", "time", "peak memory", "online cost", "size")
    return Table(columns=columns, rows=tuple(rows), right=(2, 3, 4, 5, 6, 7))


def _scored(one: Object) -> Words:
    if not numeric(one.get("perplexity")):
        return ""
    error = one.get("stderr")
    shown: Words = (" +- ", number(error, 2)) if numeric(error) else ""
    return joined((number(one["perplexity"]), shown), "")


def _if(one: Object, key: str, shown: Any) -> Words:
    return shown(one[key]) if numeric(one.get(key)) else ""


def _intervals(found: Object, presets: list[Object]) -> Figure | None:
    rows = [("full precision", found["full_precision"]), *((str(one.get("preset", "?")), one) for one in presets)]
    known = [(name, one) for name, one in rows if numeric(one.get("perplexity"))]
    if len(known) < 2:
        return None
    values = [
        (one["perplexity"], interval_of(one["perplexity"], one.get("stderr"), one.get("dof"))) for _, one in known
    ]
    lows = [ends[0] if ends else value for value, ends in values]
    far = max(value for value, _ in values) > 5 * min(value for value, _ in values) and min(lows) > 0
    return Figure(
        kind="interval",
        title="Perplexity of each preset",
        series=(series_of("", values),),
        x=Axis(label="perplexity", log=far, better="lower"),
        y=Axis(names=tuple(name for name, _ in known)),
        caption="With 95 % intervals. All were scored on the same windows, so that differences between presets are known "
        "better than the intervals of the values let it seem.",
        key="presets",
    )


def _about(found: Object) -> list[Text]:
    about = found.get("text")
    if not isinstance(about, Mapping) or not numeric(about.get("windows")) or not numeric(about.get("seq_len")):
        return []
    windows: Words = (
        number(about["windows"]),
        " windows of ",
        number(about["seq_len"]),
        f" tokens of {about.get('text')}",
    )
    return [Text(words=joined((windows, f", BOS: {about.get('bos')}; +- is one standard error."), ""))]


def _noise(found: Object) -> tuple[Section, ...]:
    """Presets repeated over draws of calibration text, and how far apart the same preset lies."""
    rows: list[tuple[Words, ...]] = []
    for one in found["presets"]:
        for seed in one.get("seeds") or ():
            if isinstance(seed, Mapping):
                shown = [_if(seed, key, number) for key in ("seed", "perplexity", "ratio")]
                rows.append((str(one.get("preset", "?")), *shown))
    table = Table(columns=("preset", "seed", "perplexity", "x full precision"), rows=tuple(rows), right=(1, 2, 3))
    noise = found.get("noise")
    said = (
        [(str(key).replace("_", " "), _words(value)) for key, value in noise.items()]
        if isinstance(noise, Mapping)
        else []
    )
    floor = Table(title="Noise floor", columns=("", ""), rows=tuple(said)) if said else None
    about = "The same preset over several draws of calibration text: differences below this floor say nothing."
    return section("Seeds", floor, table if rows else None, about=about)


def _words(value: Any) -> Words:
    if numeric(value):
        return number(value)
    if isinstance(value, list) and all(map(numeric, value)):
        return joined(map(number, value), ", ")
    return "" if value is None else str(value)


def _failure(one: Object) -> Text:
    error = one["error"] if isinstance(one["error"], Mapping) else {"what": one["error"]}
    said = "; ".join(str(error[part]) for part in ("what", "where", "fix") if error.get(part))
    return Text(words=f"{one.get('preset', '?')}: {said}", warns=True)

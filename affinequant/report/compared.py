"""What a page says of presets side by side, out of compare.json."""

from collections.abc import Mapping
from typing import Any

from affinequant.report.figure import Axis, Figure, Series
from affinequant.report.intervals import interval_of, series_of
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
        ("full precision", "", _scored(full), "", "", "", "", "", ""),
        *(
            (
                str(one.get("preset", "?")),
                str(one.get("tier", "")),
                "failed" if one.get("error") else _scored(one),
                _if(one, "ratio", lambda value: fixed(value, 3)),
                _if(one, "kl", lambda value: number(value, 3)),
                _if(one, "minutes", lambda value: lasting(60 * value)),
                _if(one, "peak_bytes", stored),
                _if(one, "percent_of_block", lambda value: (fixed(value, 2), " %")),
                _if(one, "bytes", stored),
            )
            for one in presets
        ),
    ]
    columns = ("preset", "tier", "perplexity", "x full precision", "KL", "time", "peak memory", "online cost", "size")
    return Table(columns=columns, rows=tuple(rows), right=tuple(range(2, 9)))


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
        (one["perplexity"], interval_of(one["perplexity"], one.get("stderr"), one.get("dof"), ratio=True))
        for _, one in known
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
    """Presets repeated over draws of calibration text: what each draw gave, and how far apart draws of a preset lie."""
    noise = found.get("noise")
    kinds = {kind: one for kind, one in noise.items() if isinstance(one, Mapping)} if isinstance(noise, Mapping) else {}
    return section(
        "Seeds",
        _each_seed(found),
        *(_floor(kind, one) for kind, one in kinds.items()),
        about="The same preset on several draws of calibration text: a difference of presets below the floor says nothing.",
    )


def _each_seed(found: Object) -> Figure | None:
    presets = [one for one in found["presets"] if isinstance(one.get("seeds"), list)]
    by_seed: dict[Any, dict[str, float]] = {}
    for one in presets:
        for seed in one["seeds"]:
            if numeric(seed.get("ratio")):
                by_seed.setdefault(seed.get("seed"), {})[str(one.get("preset"))] = seed["ratio"]
    names = tuple(str(one.get("preset")) for one in presets)
    series = tuple(
        Series(name=f"seed {seed}", y=tuple(row.get(name) for name in names)) for seed, row in by_seed.items()
    )
    if not series:
        return None
    return Figure(
        kind="interval",
        title="Each preset on each draw",
        series=series,
        x=Axis(label="perplexity, times full precision", better="lower"),
        y=Axis(names=names),
        caption="The spread of a row is what chance alone makes of a preset.",
        key="seeds",
    )


def _floor(kind: str, noise: Object) -> Table:
    """One kind of number: mean and deviation of each preset over seeds, and what sets it apart from the first."""
    verdicts = noise.get("verdicts") or {}
    rows: list[tuple[Words, ...]] = []
    for preset, spread in (noise.get("spreads") or {}).items():
        verdict = verdicts.get(preset) or {}
        cells = [_if(spread, "mean", number), _if(spread, "deviation", lambda value: number(value, 2))]
        cells += [_if(verdict, "difference", _plus), _if(verdict, "floor", lambda value: number(value, 2))]
        rows.append((str(preset), *cells, str(verdict.get("said") or "")))
    columns = ("preset", "mean", "deviation over seeds", f"from {noise.get('reference', 'the first')}", "floor", "")
    title = {"ratio": "Perplexity, times full precision", "kl": "KL divergence [nats per token]"}.get(kind, kind)
    return Table(title=title, columns=columns, rows=tuple(rows), right=(1, 2, 3, 4))


def _plus(value: float) -> Words:
    return number(value, 3, sign=True)


def _failure(one: Object) -> Text:
    error = one["error"] if isinstance(one["error"], Mapping) else {"what": one["error"]}
    said = "; ".join(str(error[part]) for part in ("what", "where", "fix") if error.get(part))
    return Text(words=f"{one.get('preset', '?')}: {said}", warns=True)

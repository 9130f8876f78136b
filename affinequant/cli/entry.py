"""One preset of a comparison: the report of its run, its scores; or several of its runs, by seed, as one."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.report.made import online_cost as online_cost

if TYPE_CHECKING:
    from affinequant_evals.scores import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One preset.

    Attributes:
        report: of its run.
        score: its perplexity.
        kl: its divergence from full precision, where that was measured.
        error: what went wrong (`what`, `where`, `fix`).
        seed: of the recipe, where a preset is made with several.
        seeds: the entries that this one is the mean of; empty where it is a run of its own.
    """

    preset: str
    tier: str
    path: Path
    report: Mapping[str, Any] = field(default_factory=dict)
    score: "Score | None" = None
    kl: "Score | None" = None
    error: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    seeds: "tuple[Entry, ...]" = ()

    @property
    def name(self) -> str:
        """As messages call it."""
        return self.preset if self.seed is None else f"{self.preset} with seed {self.seed}"

    @property
    def failures(self) -> "list[Entry]":
        """The runs in which something went wrong."""
        return [entry for entry in self.seeds or (self,) if entry.error]


def over_seeds(entries: Sequence[Entry]) -> Entry:
    """A preset's entries by seed as one: mean scores on the same windows, mean time, the highest peak of memory. Its error
    is that of the first run, where no run has a score."""
    first = next((entry for entry in entries if entry.report), entries[0])
    made = [entry.report for entry in entries if entry.report]
    report: Mapping[str, Any] = first.report
    if made:
        report = {
            **first.report,
            "seconds": statistics.fmean(one["seconds"] for one in made),
            "peak_bytes": max(one["peak_bytes"] for one in made),
        }
    score = _mean([entry.score for entry in entries if entry.score])
    return Entry(
        preset=first.preset,
        tier=first.tier,
        path=first.path,
        report=report,
        score=score,
        kl=_mean([entry.kl for entry in entries if entry.kl]),
        error={} if score else entries[0].error,
        seeds=tuple(entries),
    )


def ratio(mine: "Score", full: "Score") -> tuple[float, float | None]:
    """mine / full and its standard error, by the delta method over pairs of the same windows."""
    value = mine.value / full.value
    if mine.key != full.key or not len(mine.parts) == len(full.parts) > 1:
        return value, None
    parts = [value * (a / mine.value - b / full.value) for a, b in zip(mine.parts, full.parts, strict=True)]
    return value, statistics.stdev(parts) / len(parts) ** 0.5


def report_json(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a run took and made, as plain JSON values; null where there is no report."""
    cost = online_cost(report) if report else None
    return {
        "minutes": report["seconds"] / 60 if report else None,
        "peak_bytes": report["peak_bytes"] if report else None,
        "online_flops_per_token": cost[0] if cost else None,
        "percent_of_block": 100 * cost[0] / cost[1] if cost else None,
        "bytes": report.get("bytes"),
        "bits_per_weight": report.get("bits_per_weight"),
    }


def _mean(scores: "Sequence[Score]") -> "Score | None":
    """The mean of scores of the same windows; its standard error is still that over windows."""
    if len(scores) < 2:
        return scores[0] if scores else None
    parts = tuple(map(statistics.fmean, zip(*(score.parts for score in scores), strict=True)))
    stderr = statistics.stdev(parts) / len(parts) ** 0.5 if len(parts) > 1 else None
    return replace(scores[0], value=statistics.fmean(score.value for score in scores), parts=parts, stderr=stderr)

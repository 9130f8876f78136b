"""What a comparison of presets found: a row each, beside full precision and beside what was published."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.cli.output import freedom, minutes, size, with_error
from affinequant.models import FAMILIES, Dims
from affinequant.recipe.presets import PRESETS

if TYPE_CHECKING:
    from affinequant_evals.scores import Score

SCHEMES = ("w4a4", "w4a4-sym")
"""What the published figures are for."""
_TEXTS = {"wikitext2": "wikitext2", "c4": "c4-old"}
"""Texts that can be scored here -> what published figures call them."""
_WINDOW = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One preset: the report of its run, its perplexity, or what went wrong (`what`, `where`, `fix`)."""

    preset: str
    tier: str
    path: Path
    report: Mapping[str, Any] = field(default_factory=dict)
    score: "Score | None" = None
    error: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All presets on one model. `full` is the full-precision model's perplexity; `error` says why there is none.
    `all_windows`: the whole text was scored, as published figures are."""

    model: str
    scheme: str
    entries: Sequence[Entry]
    full: "Score | None"
    error: Mapping[str, str] = field(default_factory=dict)
    all_windows: bool = False
    env: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether anything that was asked for is missing."""
        return bool(self.error) or any(entry.error for entry in self.entries)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Column names and rows, full precision first."""
        columns = ["preset", "tier", "perplexity", "x full precision", "time", "peak memory"]
        columns += ["online FLOPs/token", "of the block", "size"]
        sizes = [entry.report["plan"]["source_bytes"] for entry in self.entries if entry.report]
        full = with_error(self.full.value, self.full.stderr) if self.full else "failed"
        rows = [["full precision", "", full, "1" if self.full else "", "", "", "", "", size(sizes[0]) if sizes else ""]]
        rows += [self._row(entry) for entry in self.entries]
        beside = [self.published(entry) for entry in self.entries]
        if any(beside):
            columns.append("published")
            rows = [[*row, _verdict(one)] for row, one in zip(rows, [None, *beside], strict=True)]
        return columns, rows

    def notes(self) -> list[str]:
        """What the table needs to be read rightly: what was scored, what failed, where published figures are from."""
        lines = []
        about = self.full.about if self.full else next((e.score.about for e in self.entries if e.score), {})
        if about:
            lines.append(
                f"perplexity: {about['windows']} windows of {about['seq_len']} tokens of {about['text']}, BOS: "
                f"{about['bos']}; {freedom(about['windows'] - 1)}, of pairs of windows in the ratio"
            )
        if self.error:
            lines.append(f"full precision failed: {_sentence(self.error)}")
        lines += [f"{entry.preset} failed: {_sentence(entry.error)}" for entry in self.entries if entry.error]
        for entry in self.entries:
            if found := self.published(entry):
                figures = ", ".join(f"{text} {value:.2f}" for text, value in found["figures"].items())
                why = (
                    f"not compared: {found['reason']}"
                    if found["reason"]
                    else f"pass up to {found['limit']:.2f} at {found['text']}"
                )
                lines.append(
                    f"{entry.preset}, published: {figures}; {why}; {found['source']}; there {found['protocol']}"
                )
        return lines

    def markdown(self) -> str:
        """The table and its notes as a Markdown page."""
        columns, rows = self.table()
        lines = [f"# {self.model} at {self.scheme}", "", _cells(columns), _cells(["---"] * len(columns))]
        lines += [_cells(row) for row in rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes())]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema": 1,
            "model": self.model,
            "scheme": self.scheme,
            "full_precision": _score_json(self.full) | ({"error": dict(self.error)} if self.error else {}),
            "presets": [self._entry_json(entry) for entry in self.entries],
            "text": dict(self.full.about) if self.full else None,
            "env": dict(self.env),
        }

    def published(self, entry: Entry) -> dict[str, Any] | None:
        """What was published for this method on this model, and whether the preset reaches it; None where nothing was.

        `passed` is None where the figures cannot be held against what was measured; `reason` then says why.
        """
        preset = PRESETS[entry.preset]
        figures = preset.published(self.model)
        if not figures:
            return None
        reason, text = self._incomparable(figures, entry.score)
        target = None if reason else figures[text]
        limit = target * (1 + preset.expect["tolerance"]) if target else None
        return {
            "figures": dict(figures),
            "text": text or None,
            "target": target,
            "limit": limit,
            "passed": entry.score.value <= limit if entry.score and limit else None,
            "reason": reason,
            "source": preset.expect["source"],
            "protocol": preset.expect["protocol"],
        }

    def _incomparable(self, figures: Mapping[str, float], score: "Score | None") -> tuple[str, str]:
        """Why a measured perplexity cannot be held against figures ("" if it can), and the name of its text there."""
        if score is None:
            return "there is no perplexity", ""
        about = score.about
        text = _TEXTS.get(str(about["text"]), "")
        if text not in figures:
            return f"the figures are for {' and '.join(figures)}", ""
        if self.scheme not in SCHEMES:
            return "the figures are for w4a4", ""
        if about["seq_len"] != _WINDOW or not self.all_windows:
            return f"the figures are for all windows of {_WINDOW} tokens", ""
        return ("the figures are with --bos first", "") if about["bos"] == "each window" else ("", text)

    def _row(self, entry: Entry) -> list[str]:
        report, ratio = entry.report, self._ratio(entry)
        cost = online_cost(report) if report else None
        return [
            entry.preset,
            entry.tier,
            with_error(entry.score.value, entry.score.stderr) if entry.score else "failed" if entry.error else "",
            with_error(*ratio) if ratio else "",
            minutes(report["seconds"] / 60) if report else "",
            size(report["peak_bytes"]) if report else "",
            f"{cost[0]:,}" if cost else "",
            f"{100 * cost[0] / cost[1]:.1f} %" if cost else "",
            size(report["bytes"]) if report else "",
        ]

    def _entry_json(self, entry: Entry) -> dict[str, Any]:
        report, ratio = entry.report, self._ratio(entry)
        cost = online_cost(report) if report else None
        return {
            "preset": entry.preset,
            "tier": entry.tier,
            "path": str(entry.path),
            **_score_json(entry.score),
            "ratio": ratio[0] if ratio else None,
            "ratio_stderr": ratio[1] if ratio else None,
            "minutes": report["seconds"] / 60 if report else None,
            "peak_bytes": report["peak_bytes"] if report else None,
            "online_flops_per_token": cost[0] if cost else None,
            "percent_of_block": 100 * cost[0] / cost[1] if cost else None,
            "bytes": report.get("bytes"),
            "bits_per_weight": report.get("bits_per_weight"),
            "published": self.published(entry),
            "error": dict(entry.error) or None,
        }

    def _ratio(self, entry: Entry) -> tuple[float, float | None] | None:
        return ratio(entry.score, self.full) if entry.score and self.full else None


def ratio(mine: "Score", full: "Score") -> tuple[float, float | None]:
    """mine / full and its standard error, by the delta method over pairs of the same windows."""
    value = mine.value / full.value
    if mine.key != full.key or not len(mine.parts) == len(full.parts) > 1:
        return value, None
    parts = [value * (a / mine.value - b / full.value) for a, b in zip(mine.parts, full.parts, strict=True)]
    return value, statistics.stdev(parts) / len(parts) ** 0.5


def online_cost(report: Mapping[str, Any]) -> tuple[int, int]:
    """Floating-point operations per token of one block: of its online transforms (where blocks choose, on
    average), and of its linears."""
    plan = report["plan"]
    from affinequant.transforms.placements import block_flops

    block = block_flops(FAMILIES[plan["family"]], Dims(**plan["dims"]))
    chosen = [{site: one["flops"] for site, one in found.get("transforms", {}).items()} for found in report["blocks"]]
    fixed = sum(site["flops_per_token"] for site in plan["sites"] if not any(site["site"] in row for row in chosen))
    return fixed + round(statistics.mean(sum(row.values()) for row in chosen)), block


def _verdict(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["target"] is None:
        return " / ".join(f"{value:.2f}" for value in found["figures"].values())
    return f"{found['target']:.2f} {'pass' if found['passed'] else 'FAIL'}"


def _score_json(score: "Score | None") -> dict[str, Any]:
    error = {"stderr": score and score.stderr, "dof": score and score.dof}
    return {"perplexity": score and score.value, **error, "n": score.n if score else 0}


def _sentence(error: Mapping[str, str]) -> str:
    return f"{error['what']} ({error['where']}); {error['fix']}"


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

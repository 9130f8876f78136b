"""What a comparison of presets found: a row each, beside full precision and beside what was published."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from affinequant.cli.entry import Entry as Entry
from affinequant.cli.entry import online_cost as online_cost
from affinequant.cli.entry import ratio as ratio
from affinequant.cli.entry import report_json
from affinequant.cli.output import freedom, minutes, size, with_error

if TYPE_CHECKING:
    from affinequant_evals.noise import Noise
    from affinequant_evals.scores import Score

KINDS = {"ratio": ("x full precision", "x"), "kl": ("KL", "nats")}
"""What presets are compared by: the column's name, and the unit."""
RIGHT = ("online FLOPs/token", "of the block", "size")
"""Columns that are set flush right."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All presets on one model.

    Attributes:
        full: the full-precision model's perplexity; `error` says why there is none.
        all_windows: the whole text was scored, as published figures are.
        seeds: with which each preset was made; empty where each was made once, with the recipe's own.
    """

    model: str
    scheme: str
    entries: Sequence[Entry]
    full: "Score | None"
    error: Mapping[str, str] = field(default_factory=dict)
    all_windows: bool = False
    env: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = ()

    @property
    def failed(self) -> bool:
        """Whether anything that was asked for is missing."""
        return bool(self.error) or any(entry.failures for entry in self.entries)

    @cached_property
    def noise(self) -> "dict[str, Noise]":
        """By what presets are compared -> how far that moves from seed to seed; nothing where there are no seeds."""
        from affinequant_evals.noise import noise_floor

        found: dict[str, Noise] = {}
        for kind in KINDS:
            values = {entry.preset: [*map(float, self._values(entry, kind))] for entry in self.entries}
            values = {name: known for name, known in values.items() if known}
            if values and self.seeds:
                found[kind] = noise_floor(values)
        return found

    def floor(self) -> list[str]:
        """What stands above the table: how far a preset's result moves from seed to seed, and which differences are more."""
        lines: list[str] = []
        for kind, noise in self.noise.items():
            name, unit = KINDS[kind]
            if noise.deviation is None:
                still = len(self.seeds) > 1
                why = (
                    "no preset moves from seed to seed" if still else "one seed shows none; name more, e.g. --seeds 0-2"
                )
                lines.append(f"noise floor of {name}: {why}")
                continue
            moved = [preset for preset, one in noise.spreads.items() if one.deviation]
            lines.append(
                f"noise floor of {name}, seeds {', '.join(map(str, self.seeds))}: a preset moves by {noise.deviation:.2g} "
                f"{unit} (standard deviation over seeds, of {', '.join(moved)}; {noise.dof} "
                f"degree{'s' * (noise.dof != 1)} of freedom)"
            )
            floors = [f"{name} {one.floor:.2g} {unit}" for name, one in noise.verdicts.items() if one.floor is not None]
            if floors:
                lines.append(
                    f"smallest difference from {noise.reference} that is told apart (Student's t by Welch, 95 % for all): "
                    f"{', '.join(floors)}"
                )
        return lines

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Column names and rows, full precision first."""
        sizes = [entry.report["plan"]["source_bytes"] for entry in self.entries if entry.report]
        full = {
            "preset": "full precision",
            "perplexity": _scored(self.full) or "failed",
            "x full precision": "1" if self.full else "",
            "size": size(sizes[0]) if sizes else "",
        }
        rows = [full, *map(self._row, self.entries)]
        columns = list(rows[-1])
        beside = [self.published(entry) for entry in self.entries]
        if any(beside):
            columns.append("published")
            rows = [row | {"published": _verdict(one)} for row, one in zip(rows, [None, *beside], strict=True)]
        return columns, [[row.get(column, "") for column in columns] for row in rows]

    def notes(self) -> list[str]:
        """What the table needs to be read rightly: what was scored, what failed, where published figures are from."""
        lines = []
        about = self.full.about if self.full else next((e.score.about for e in self.entries if e.score), {})
        if about:
            lines.append(
                f"perplexity: {about['windows']} windows of {about['seq_len']} tokens of {about['text']}, BOS: "
                f"{about['bos']}; {freedom(about['windows'] - 1)}, of pairs of windows in the ratio"
                + ("; each is the mean over seeds" if self.seeds else "")
            )
        lines += self._disagreements()
        if self.error:
            lines.append(f"full precision failed: {_sentence(self.error)}")
        failures = [one for entry in self.entries for one in entry.failures]
        lines += [f"{one.name} failed: {_sentence(one.error)}" for one in failures]
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
        """The noise, the table and its notes as a Markdown page."""
        columns, rows = self.table()
        lines = [f"# {self.model} at {self.scheme}", "", *(f"{line}  " for line in self.floor())]
        lines += [""] * bool(self.noise) + [_cells(columns), _cells(["---"] * len(columns))]
        lines += [_cells(row) for row in rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes())]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        noise = {kind: one.to_json() for kind, one in self.noise.items()}
        return {
            "schema": 1,
            "model": self.model,
            "scheme": self.scheme,
            "full_precision": _score_json(self.full) | ({"error": dict(self.error)} if self.error else {}),
            "presets": [self._entry_json(entry) for entry in self.entries],
            "text": dict(self.full.about) if self.full else None,
            "env": dict(self.env),
            "noise": {"seeds": list(self.seeds), **noise} if self.seeds else None,
        }

    def published(self, entry: Entry) -> dict[str, Any] | None:
        """What was published for this method on this model, and whether the preset reaches it; None where nothing was.

        `passed` is None where the figures cannot be held against what was measured; `reason` then says why.
        """
        from affinequant_evals.reproduction import TEXTS, incomparable, of_preset

        rows = {row.measured: row for row in of_preset(self.model, entry.preset, self.scheme)}
        if not rows:
            return None
        about = entry.score.about if entry.score else None
        row = rows.get(TEXTS.get(str(about["text"]), "")) if about else None
        if about is None:
            reason = "there is no perplexity"
        elif row is None:
            reason = f"the figures are for {' and '.join(rows)}"
        else:
            reason = incomparable(row, about, self.scheme, whole=self.all_windows)
        target = None if reason or row is None else row.value
        first = next(iter(rows.values()))
        limit = target * (1 + first.tolerance) if target else None
        return {
            "figures": {text: one.value for text, one in rows.items()},
            "text": row.measured if row and not reason else None,
            "target": target,
            "limit": limit,
            "passed": entry.score.value <= limit if entry.score and limit else None,
            "reason": reason,
            "source": first.source,
            "protocol": first.protocol,
        }

    def _disagreements(self) -> list[str]:
        """Where perplexity and divergence point in opposite directions."""
        if len(self.noise) < len(KINDS):
            return []
        pairs = [
            (name, one.said, self.noise["kl"].verdicts.get(name)) for name, one in self.noise["ratio"].verdicts.items()
        ]
        reference = self.noise["ratio"].reference
        return [
            f"{name}: {first} than {reference} by perplexity, {second.said} by KL: the two disagree"
            for name, first, second in pairs
            if second and {first, second.said} == {"better", "worse"}
        ]

    def _row(self, entry: Entry) -> dict[str, str]:
        report, ratio = entry.report, self._ratio(entry)
        cost = online_cost(report) if report else None
        row = {
            "preset": entry.preset,
            "tier": entry.tier,
            "perplexity": _scored(entry.score) or ("failed" if entry.error else ""),
            "x full precision": with_error(*ratio) if ratio else "",
            **self._judged(entry, "ratio"),
        }
        if any(one.kl for one in self.entries):
            row |= {"KL": _scored(entry.kl), **self._judged(entry, "kl")}
        return row | {
            "time": minutes(report["seconds"] / 60) if report else "",
            "peak memory": size(report["peak_bytes"]) if report else "",
            "online FLOPs/token": f"{cost[0]:,}" if cost else "",
            "of the block": f"{100 * cost[0] / cost[1]:.1f} %" if cost else "",
            "size": size(report["bytes"]) if report else "",
        }

    def _judged(self, entry: Entry, kind: str) -> dict[str, str]:
        """The columns of one kind that there are with seeds."""
        noise = self.noise.get(kind)
        if noise is None:
            return {}
        by = "" if kind == "ratio" else " by KL"
        spread = noise.spreads.get(entry.preset)
        moves = f"{spread.deviation:.2g}" if spread and spread.deviation is not None else ""
        return {f"sd over seeds{by}": moves, f"verdict{by}": noise.words(entry.preset, KINDS[kind][1])}

    def _entry_json(self, entry: Entry) -> dict[str, Any]:
        ratio, noise = self._ratio(entry), self.noise.get("ratio")
        known = {
            "preset": entry.preset,
            "tier": entry.tier,
            "path": str(entry.path),
            **_score_json(entry.score),
            "ratio": ratio[0] if ratio else None,
            "ratio_stderr": ratio[1] if ratio else None,
            "kl": entry.kl and entry.kl.value,
            "kl_stderr": entry.kl and entry.kl.stderr,
            **report_json(entry.report),
            "published": self.published(entry),
            "error": dict(entry.error) or None,
        }
        if entry.seed is not None:
            return {"seed": entry.seed} | known
        if not entry.seeds:
            return known
        verdicts = {kind: one.words(entry.preset, KINDS[kind][1]) or None for kind, one in self.noise.items()}
        spread = noise.spreads.get(entry.preset) if noise else None
        return known | {
            "spread": spread and spread.deviation,
            "verdicts": verdicts,
            "seeds": [self._entry_json(one) for one in entry.seeds],
        }

    def _values(self, entry: Entry, kind: str) -> Iterator[float]:
        """What each seed of a preset gave."""
        for one in entry.seeds:
            ratio = self._ratio(one)
            if kind == "ratio" and ratio:
                yield ratio[0]
            elif kind == "kl" and one.kl:
                yield one.kl.value

    def _ratio(self, entry: Entry) -> tuple[float, float | None] | None:
        return ratio(entry.score, self.full) if entry.score and self.full else None


def _verdict(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["target"] is None:
        return " / ".join(f"{value:.2f}" for value in found["figures"].values())
    return f"{found['target']:.2f} {'pass' if found['passed'] else 'FAIL'}"


def _scored(score: "Score | None") -> str:
    return with_error(score.value, score.stderr) if score else ""


def _score_json(score: "Score | None") -> dict[str, Any]:
    error = {"stderr": score and score.stderr, "dof": score and score.dof}
    return {"perplexity": score and score.value, **error, "n": score.n if score else 0}


def _sentence(error: Mapping[str, str]) -> str:
    return f"{error['what']} ({error['where']}); {error['fix']}"


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

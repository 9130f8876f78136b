"""Gates: how much worse than its baseline a checkpoint may be. What cannot be judged has not passed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from affinequant.errors import PREFLIGHT, QUALITY, USAGE, AffineQuantError
from affinequant_evals.harness import Row, Scorecard
from affinequant_evals.scores import Interval, Score, exp_mean_score

PERPLEXITY, KL = "perplexity@", "kl@"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a checkpoint may lose; None is no limit.

    Attributes:
        increase: of each text's perplexity over the baseline's; with `relative` as a share of it.
        kl: of each text's next-token distributions from the baseline's, in nats per token.
    """

    increase: float | None = None
    relative: bool = False
    kl: float | None = None

    @staticmethod
    def read(increase: str | None, kl: str | None) -> "Limits":
        """From the words of a command line: `0.5`, `5%`.

        Raises:
            AffineQuantError: neither a number nor a share, or below 0.
        """
        relative = increase is not None and increase.strip().endswith("%")
        bound = (
            None if increase is None else _number(increase.strip().removesuffix("%"), increase, "--max-ppl-increase")
        )
        return Limits(
            increase=bound / 100 if bound is not None and relative else bound,
            relative=relative,
            kl=None if kl is None else _number(kl, kl, "--max-kl"),
        )

    def check(self, *, texts: bool, baseline: bool, kl: bool, why: str = "") -> None:
        """Refuse what could not be judged once it has been measured.

        Args:
            texts: whether any is scored.
            baseline: whether there is one.
            kl: whether next-token distributions are compared.
            why: what is said of why they are not, or of why there is no baseline.

        Raises:
            AffineQuantError: that (exit 2 or 3).
        """
        flags = ["--max-ppl-increase"] * (self.increase is not None) + ["--max-kl"] * (self.kl is not None)
        where = ", ".join(flags)
        if not texts:
            raise AffineQuantError(f"{where} is about text, and none is scored", where, "add --text or --suite")
        if not baseline:
            what = f"{where} compares with a baseline, and there is none ({why})"
            raise AffineQuantError(what, where, "give --baseline MODEL", exit_code=PREFLIGHT)
        if self.kl is not None and not kl:
            what = f"--max-kl is about next-token distributions, and they are not compared ({why or '--no-kl'})"
            raise AffineQuantError(what, "--max-kl", "leave out what prevents it, or the limit", exit_code=PREFLIGHT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One limit held against one metric. The value decides, and `interval` says how well it is known.

    Attributes:
        kind: `increase`, `relative increase` or `kl`.
        value: None where it could not be judged, and `why` not.
    """

    metric: str
    kind: str
    limit: float
    value: float | None = None
    interval: Interval | None = None
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether there is a value, and it is within the limit."""
        return self.value is not None and self.value <= self.limit

    @property
    def said(self) -> str:
        """In words: what was found, and the limit."""
        if self.value is None:
            return f"{self.metric}: its {self.kind} cannot be judged, {self.why}"
        known = (
            f" [{_shown(self.interval[0], self.kind)}, {_shown(self.interval[1], self.kind)}]" if self.interval else ""
        )
        over = f", over by {_shown(self.value - self.limit, self.kind, sign=False)}" if not self.passed else ""
        value, limit = _shown(self.value, self.kind), _shown(self.limit, self.kind, sign=False)
        return f"{self.metric}: {self.kind} {value}{known}, limit {limit}{over}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "metric": self.metric,
            "kind": self.kind,
            "value": self.value,
            "interval": self.interval and list(self.interval),
            "limit": self.limit,
            "passed": self.passed,
            "said": self.said,
        }


def judge(card: Scorecard, limits: Limits) -> tuple[Gate, ...]:
    """Each limit on each text that was scored; a limit without any is a gate that has not passed."""
    gates: list[Gate] = []
    if limits.increase is not None:
        kind = "relative increase" if limits.relative else "increase"
        rows = [row for row in card.rows if row.name.startswith(PERPLEXITY)]
        gates += [_increase(card, row, kind, limits.increase) for row in rows]
        if not rows:
            gates.append(Gate(metric="perplexity", kind=kind, limit=limits.increase, why="no text was scored"))
    if limits.kl is not None:
        rows = [row for row in card.rows if row.name.startswith(KL)]
        for row in rows:
            score = row.score
            gate = Gate(metric=row.name, kind="kl", limit=limits.kl, why=row.error or "no score")
            gates.append(replace(gate, value=score.value, interval=score.interval, why="") if score else gate)
        if not rows:
            why = next((row.error for row in card.rows if row.name.startswith(PERPLEXITY) and row.error), None)
            gates.append(Gate(metric="kl", kind="kl", limit=limits.kl, why=why or "it was not measured"))
    return tuple(gates)


def failure(gates: Sequence[Mapping[str, Any]], where: str) -> AffineQuantError:
    """What failed of these gates, as JSON has them, by how much, and what to do."""
    failed = [gate for gate in gates if not gate["passed"]]
    if any(gate["value"] is None for gate in failed):
        fix = "see what failed above; the checkpoint is kept"
    else:
        fix = "try a better --preset, more bits or more --samples, or a wider limit; the checkpoint is kept"
    what = "quality gate failed: " + "; ".join(gate["said"] for gate in failed)
    return AffineQuantError(what, where, fix, exit_code=QUALITY)


def _increase(card: Scorecard, row: Row, kind: str, limit: float) -> Gate:
    mine, other = row.score, card.baseline.score(row.name) if card.baseline else None
    if mine is None or other is None:
        failed = [one.error for one in card.baseline.failed if one.name == row.name] if card.baseline else []
        why = row.error or (f"the baseline's failed: {failed[0]}" if failed else "there is no baseline")
        return Gate(metric=row.name, kind=kind, limit=limit, why=why)
    if kind == "increase":
        delta = card.compare(card.baseline)[row.name] if card.baseline else None
        interval = delta.interval if delta else None
        return Gate(metric=row.name, kind=kind, limit=limit, value=mine.value - other.value, interval=interval)
    return Gate(
        metric=row.name, kind=kind, limit=limit, value=mine.value / other.value - 1, interval=_ratio(mine, other)
    )


def _ratio(mine: Score, other: Score) -> Interval | None:
    """Of the ratio of two exps of means less 1, over pairs: exp of the interval of the mean difference."""
    if not (mine.log and other.log and mine.key and mine.key == other.key and len(mine.parts) == len(other.parts) > 1):
        return None
    pairs = zip(mine.parts, other.parts, strict=True)
    inside = exp_mean_score([left / mine.value - right / other.value for left, right in pairs]).interval
    return inside and (inside[0] - 1, inside[1] - 1)


def _number(text: str, typed: str, flag: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        example = "0.5, or 5% of the baseline's" if flag == "--max-ppl-increase" else "0.1"
        raise AffineQuantError(
            f"{typed!r} is no limit", flag, f"give a number from 0 on, e.g. {example}", exit_code=USAGE
        )
    return value


def _shown(value: float, kind: str, *, sign: bool = True) -> str:
    plus = "+" if sign and kind != "kl" else ""
    return f"{100 * value:{plus}.3g} %" if kind == "relative increase" else f"{value:{plus}.3g}"

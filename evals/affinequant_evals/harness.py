"""The one evaluation harness: ordered metrics on a subject, failures kept apart, differences with standard errors.

Nothing here knows language models: a subject is whatever a suite's metrics take.
"""

import datetime
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from affinequant.data.wheels import Say, quiet
from affinequant.errors import AffineQuantError
from affinequant_evals.derived import Derived, flipped
from affinequant_evals.environment import environment, fixed_seeds
from affinequant_evals.environment import package_version as package_version
from affinequant_evals.part import Part
from affinequant_evals.scores import Better, Delta, Score, difference

if TYPE_CHECKING:
    from affinequant.run.run import Run

S = TypeVar("S")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric(Generic[S]):
    """One number of a subject.

    Attributes:
        resumes: the function takes a `Part` after the subject, and notes in it how far it is.
        fingerprint: all that decides the number beside the subject and the versions of packages (the data's hash, the
            protocol, what else is read, such as a reference), as plain JSON: scores are kept under it. Empty where that
            is not known: then they are measured each time.
    """

    name: str
    better: Better
    function: Callable[..., Score]
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    resumes: bool = False

    def __call__(self, subject: S, part: Part | None = None) -> Score:
        """Measure."""
        return self.function(subject, part or Part()) if self.resumes else self.function(subject)


@dataclass(frozen=True, slots=True, kw_only=True)
class Battery(Generic[S]):
    """Several numbers that come out of one pass over a subject, each with the direction that is better; `fingerprint`
    and `resumes` as a `Metric`'s."""

    name: str
    function: Callable[..., Mapping[str, tuple[Better, Score]]]
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    resumes: bool = False

    def __call__(self, subject: S, part: Part | None = None) -> Mapping[str, tuple[Better, Score]]:
        """Measure."""
        return self.function(subject, part or Part()) if self.resumes else self.function(subject)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite(Generic[S]):
    """Metrics in the order in which they run, and what is made of their scores then."""

    name: str
    metrics: tuple[Metric[S] | Battery[S], ...]
    derived: tuple[Derived, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a scorecard: a score, or why there is none. `kept`: when it was measured, where that was not now."""

    name: str
    better: Better | None
    score: Score | None
    error: str | None = None
    kept: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorecard:
    """What one subject scored on a suite, and the baseline's scorecard on the same suite where there is one.

    Attributes:
        more: what else was found out, as plain JSON values; each key stands beside `metrics` in the JSON.
    """

    subject: str
    rows: tuple[Row, ...]
    env: Mapping[str, Any]
    seconds: float
    baseline: "Scorecard | None" = None
    notes: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that have an error in place of a score."""
        return tuple(row for row in self.rows if row.score is None)

    def score(self, name: str) -> Score | None:
        """The score of that name, if it was measured."""
        return next((row.score for row in self.rows if row.name == name), None)

    def compare(self, baseline: "Scorecard") -> dict[str, Delta]:
        """This scorecard minus `baseline`, for every metric that both have."""
        pairs = {row.name: (row.score, baseline.score(row.name)) for row in self.rows}
        return {name: difference(mine, other) for name, (mine, other) in pairs.items() if mine and other}

    def beside(self, other: "Scorecard") -> "Scorecard":
        """This scorecard with the rows of another after its own: of other metrics, measured elsewhere."""
        env, seconds = {**other.env, **self.env}, round(self.seconds + other.seconds, 1)
        return replace(self, rows=(*self.rows, *other.rows), env=env, seconds=seconds)

    def against(self, baseline: "Scorecard") -> "Scorecard":
        """This scorecard with `baseline` inside, and rows `TASK,flips` of the answers that one of the two alone has right."""
        mine, other = _scores(self.rows), _scores(baseline.rows)
        new = [Row(name=name, better="lower", score=score) for name, score in flipped(mine, other).items()]
        return replace(self, rows=(*self.rows, *(row for row in new if row.name not in mine)), baseline=baseline)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `baseline` is null where there is none."""
        deltas = self.compare(self.baseline) if self.baseline else {}
        return {
            "schema": 1,
            "checkpoint": self.subject,
            "baseline": {"checkpoint": self.baseline.subject, "seconds": self.baseline.seconds}
            if self.baseline
            else None,
            "metrics": {row.name: self._entry(row, deltas.get(row.name)) for row in self.rows},
            "env": dict(self.env),
            "notes": list(self.notes),
            "seconds": self.seconds,
        } | dict(self.more)

    def _entry(self, row: Row, delta: Delta | None) -> dict[str, Any]:
        score = row.score
        other = self.baseline.score(row.name) if self.baseline else None
        entry: dict[str, Any] = {
            "value": score.value if score else None,
            "stderr": score.stderr if score else None,
            "dof": score.dof if score else None,
            "interval": list(score.interval) if score and score.interval else None,
            "n": score.n if score else 0,
            "better": row.better,
            "baseline": other.value if other else None,
            "baseline_stderr": other.stderr if other else None,
            "baseline_interval": list(other.interval) if other and other.interval else None,
            "delta": delta.to_json() if delta else None,
            "about": dict(score.about) if score else {},
            "kept": row.kept or None,
        }
        return entry | ({"error": row.error} if row.error else {})


def evaluate(
    subject: S, suite: Suite[S], *, run: "Run | None" = None, nameless: bool = True, say: Say = quiet
) -> Scorecard:
    """Measure every metric of a suite; one that fails becomes a row with its error, and the rest still run.

    Args:
        subject: what the metrics take; its `name`, if it has one, stands in the scorecard.
        run: keeps each metric's rows as they are done, so that the same evaluation started again goes on from there. A
            disk that cannot take them costs no score.
        nameless: keep also the metrics whose `fingerprint` is empty, since the run's own says what they are measured on.
        say: told what is being measured.
    """
    rows: list[Row] = []
    seconds = 0.0
    for index, metric in enumerate(suite.metrics, start=1):
        place = run if run and (nameless or metric.fingerprint) else None
        new, took = recalled(metric, place) or ([], 0.0)
        if not new:
            say(f"{index}/{len(suite.metrics)} {metric.name}")
            started = time.monotonic()
            new = _measure(metric, subject, Part(place, stage_of(metric)))
            took = round(time.monotonic() - started, 3)  # as it is kept: told again, the sum is the same
            _keep(metric, new, took, place, say)
        rows += new
        seconds += took
    name = str(getattr(subject, "name", type(subject).__name__))
    return Scorecard(subject=name, rows=_with_derived(rows, suite), env=environment(), seconds=round(seconds, 1))


def recall(name: str, suite: Suite[Any], run: "Run") -> Scorecard | None:
    """The scorecard that `evaluate` would give without measuring anything; None where it would measure."""
    found = [recalled(metric, run) for metric in suite.metrics]
    known = [one for one in found if one]
    if len(known) < len(found):
        return None
    rows = _with_derived([row for rows, _ in known for row in rows], suite)
    return Scorecard(subject=name, rows=rows, env=environment(), seconds=round(sum(took for _, took in known), 1))


def _with_derived(rows: Sequence[Row], suite: Suite[Any]) -> tuple[Row, ...]:
    scores = _scores(rows)
    made = [
        _tried(one.name, one.better, lambda one=one: {one.name: (one.better, one.function(scores))})
        for one in suite.derived
    ]
    return (*rows, *(row for each in made for row in each))


def _scores(rows: Sequence[Row]) -> dict[str, Score]:
    return {row.name: row.score for row in rows if row.score}


def recalled(metric: Metric[Any] | Battery[Any], run: "Run | None") -> tuple[list[Row], float] | None:
    """A metric's rows as they are kept, and the seconds that they took; None where they are not, or cannot be read."""
    stage = stage_of(metric)
    if not run or not run.committed(stage):
        return None
    try:
        report = run.report(stage)
        return [_row_from_json(entry, report.get("measured", "")) for entry in report["rows"]], report.get(
            "seconds", 0.0
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stage_of(metric: Metric[Any] | Battery[Any]) -> str:
    """The name under which a run keeps it: one name measured in two ways is two stages."""
    name = f"score.{re.sub(r'[^A-Za-z0-9._-]+', '_', metric.name)}"
    if not metric.fingerprint:
        return name
    return f"{name[:100]}.{fingerprint_hash({'name': metric.name, **metric.fingerprint})[:16]}"


def fingerprint_hash(fields: Mapping[str, Any]) -> str:
    """Of plain JSON values, in any order."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def _keep(metric: Metric[Any] | Battery[Any], rows: list[Row], seconds: float, run: "Run | None", say: Say) -> None:
    if not run or any(row.error for row in rows):
        return
    measured = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        run.forget(stage_of(metric))  # what was there could not be read
        run.commit(
            stage_of(metric),
            report={"rows": [asdict(row) for row in rows], "measured": measured, "seconds": seconds},
        )
    except OSError as problem:
        say(f"{metric.name} could not be kept: {problem}")


def _measure(metric: Metric[S] | Battery[S], subject: S, part: Part) -> list[Row]:
    def scores() -> Mapping[str, tuple[Better, Score]]:
        with fixed_seeds(), part.saved():
            if isinstance(metric, Metric):
                return {metric.name: (metric.better, metric(subject, part))}
            return metric(subject, part)

    return _tried(metric.name, getattr(metric, "better", None), scores)


def _tried(name: str, better: Better | None, measure: Callable[[], Mapping[str, tuple[Better, Score]]]) -> list[Row]:
    """A row for each score, or one that says why there is none."""
    try:
        return [_row(one, way, score) for one, (way, score) in measure().items()]
    except AffineQuantError as problem:
        reason = f"{problem.what}; {problem.fix}"
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}"
    return [Row(name=name, better=better, score=None, error=reason)]


def _row(name: str, better: Better, score: Score) -> Row:
    if not math.isfinite(score.value):
        return Row(name=name, better=better, score=None, error=f"the value is {score.value}")
    return Row(name=name, better=better, score=score)


def _row_from_json(entry: dict[str, Any], measured: str) -> Row:
    value = entry["score"]
    score = Score(**value | {name: tuple(value.get(name, ())) for name in ("parts", "groups")})
    return Row(name=entry["name"], better=entry["better"], score=score, kept=measured)

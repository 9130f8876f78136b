"""The one evaluation harness: ordered metrics on a subject, failures kept apart, differences with standard errors.

Nothing here knows language models: a subject is whatever a suite's metrics take.
"""

import importlib.metadata
import math
import os
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from affinequant.data.wheels import Say, quiet
from affinequant.errors import AffineQuantError
from affinequant_evals.scores import Better, Delta, Score, difference

if TYPE_CHECKING:
    from affinequant.run.run import Run

S = TypeVar("S")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric(Generic[S]):
    """One number of a subject.

    Attributes:
        fingerprint: all that decides the number beside the subject and the versions of packages (the data's hash, the
            protocol, what else is read, such as a reference), as plain JSON: scores are kept under it. Empty where that
            is not known: then they are measured each time.
    """

    name: str
    better: Better
    function: Callable[[S], Score]
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, subject: S) -> Score:
        """Measure."""
        return self.function(subject)


@dataclass(frozen=True, slots=True, kw_only=True)
class Battery(Generic[S]):
    """Several numbers that come out of one pass over a subject, each with the direction that is better; `fingerprint` as
    a `Metric`'s."""

    name: str
    function: Callable[[S], Mapping[str, tuple[Better, Score]]]
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, subject: S) -> Mapping[str, tuple[Better, Score]]:
        """Measure."""
        return self.function(subject)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite(Generic[S]):
    """Metrics in the order in which they run."""

    name: str
    metrics: tuple[Metric[S] | Battery[S], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a scorecard: a score, or why there is none."""

    name: str
    better: Better | None
    score: Score | None
    error: str | None = None


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

    def against(self, baseline: "Scorecard") -> "Scorecard":
        """This scorecard with `baseline` inside."""
        return replace(self, baseline=baseline)

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
            "delta": delta.to_json() if delta else None,
            "about": dict(score.about) if score else {},
        }
        return entry | ({"error": row.error} if row.error else {})


def evaluate(subject: S, suite: Suite[S], *, run: "Run | None" = None, say: Say = quiet) -> Scorecard:
    """Measure every metric of a suite; one that fails becomes a row with its error, and the rest still run.

    Args:
        subject: what the metrics take; its `name`, if it has one, stands in the scorecard.
        run: keeps each metric's rows as they are done, so that the same evaluation started again goes on from there.
        say: told what is being measured.
    """
    started = time.monotonic()
    rows: list[Row] = []
    for index, metric in enumerate(suite.metrics, start=1):
        stage = f"score.{re.sub(r'[^A-Za-z0-9._-]+', '_', metric.name)}"
        if run and run.committed(stage):
            rows += [_row_from_json(entry) for entry in run.report(stage)["rows"]]
            continue
        say(f"{index}/{len(suite.metrics)} {metric.name}")
        new = _measure(metric, subject)
        if run and not any(row.error for row in new):
            run.commit(stage, report={"rows": [asdict(row) for row in new]})
        rows += new
    return Scorecard(
        subject=str(getattr(subject, "name", type(subject).__name__)),
        rows=tuple(rows),
        env=environment(),
        seconds=round(time.monotonic() - started, 1),
    )


def environment() -> dict[str, Any]:
    """Versions and machine, as they belong to every result."""
    packages = ("affinequant", "torch", "transformers", "compressed-tensors", "datasets", "lm_eval")
    versions = {name: version for name in packages if (version := package_version(name))}
    return versions | {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
    }


def _measure(metric: Metric[S] | Battery[S], subject: S) -> list[Row]:
    try:
        with _fixed_seeds():
            if isinstance(metric, Metric):
                return [_row(metric.name, metric.better, metric(subject))]
            return [_row(name, better, score) for name, (better, score) in metric(subject).items()]
    except AffineQuantError as problem:
        reason = f"{problem.what}; {problem.fix}"
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}"
    return [Row(name=metric.name, better=getattr(metric, "better", None), score=None, error=reason)]


def _row(name: str, better: Better, score: Score) -> Row:
    if not math.isfinite(score.value):
        return Row(name=name, better=better, score=None, error=f"the value is {score.value}")
    return Row(name=name, better=better, score=score)


def _row_from_json(entry: dict[str, Any]) -> Row:
    score = Score(**entry["score"] | {"parts": tuple(entry["score"]["parts"])})
    return Row(name=entry["name"], better=entry["better"], score=score)


def package_version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def _fixed_seeds(seed: int = 0) -> Iterator[None]:
    """Every metric starts from the same random state, and leaves the caller's as it was."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    state = random.getstate(), numpy and numpy.random.get_state(), torch and torch.random.get_rng_state()
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed)
    if torch:
        torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state[0])
        if numpy:
            numpy.random.set_state(state[1])
        if torch:
            torch.random.set_rng_state(state[2])

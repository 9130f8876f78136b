"""What a method of research consists of: experiments with named settings, trials, and what is claimed of them.

Nothing here imports torch, so that methods can be listed at once.
"""

import dataclasses
import importlib
import operator
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from affinequant.errors import AffineQuantError, unknown_name
from affinequant.stages import Stage

if TYPE_CHECKING:
    from affinequant_evals import Score, Suite

    from affinequant.learning.phases import Phase
    from affinequant.learning.training import FitReport
    from affinequant.report.figure import Figure

Op = Literal["<=", ">="]
Series = tuple[Sequence[float], Sequence[float]]
"""Updates, and what was measured after them."""
Picture = Sequence[Sequence[float]]
"""A matrix to look at, the first row on top."""
OPS = {"<=": operator.le, ">=": operator.ge}
PRESETS = ("smoke", "ci", "bench", "paper")
"""Seconds; a minute or two; what the acceptance figures are for; the settings of the authors."""
TRIAL = "affinequant_research.running:trial_stage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """`metric op factor * than`, which holds on as many seeds as are asked for or does not.

    Attributes:
        metric: `STAGE/NAME` of a measured metric.
        than: a number, or another metric's name.
        source: where it is claimed: `paper`, `measured` (by a prototype, on what), `derived`.
        share: of the seeds, rounded up to whole ones, on which it has to hold: above 0, at most 1.
    """

    metric: str
    op: Op
    than: float | str
    factor: float = 1.0
    source: str
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"a claim on a share of {self.share} of the seeds says nothing")

    def __str__(self) -> str:
        factor = f"{self.factor:g} x " if self.factor != 1 else ""
        share = f" on {self.share:.0%} of seeds" if self.share < 1 else ""
        return f"{self.metric} {self.op} {factor}{self.than}{share}"

    def limit(self, values: Mapping[str, float]) -> float | None:
        """What the metric is held against; None where that was not measured."""
        found = values.get(self.than) if isinstance(self.than, str) else self.than
        return None if found is None else self.factor * found

    def holds(self, values: Mapping[str, float]) -> bool:
        """Whether it does for what one seed measured; what was not measured does not hold."""
        limit, value = self.limit(values), values.get(self.metric)
        return limit is not None and value is not None and OPS[self.op](value, limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One training, and what is measured of the `subject` that it leaves.

    Attributes:
        outcome: what the training itself says, out of its report and its series: how long it took to get somewhere.
        pictures: matrices that figures draw, asked for when it is over.
        tensors: kept with it.
    """

    phase: "Phase"
    subject: Any
    suite: "Suite[Any]"
    outcome: "Callable[[FitReport, Mapping[str, Series]], Mapping[str, Score]]" = lambda fitted, series: {}
    pictures: Callable[[], Mapping[str, Picture]] = dict
    tensors: Callable[[], Mapping[str, Any]] = dict


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the seeds of one experiment have given: per seed `STAGE/NAME` -> score, series, picture."""

    config: Any
    seeds: tuple[int, ...]
    scores: tuple[Mapping[str, "Score"], ...]
    series: tuple[Mapping[str, Series], ...]
    pictures: tuple[Mapping[str, Picture], ...] = ()

    def values(self, name: str) -> list[float]:
        """A metric's value of each seed that has it."""
        return [scores[name].value for scores in self.scores if name in scores]

    def mean(self, name: str) -> float | None:
        """The mean of those; None where no seed has it."""
        values = self.values(name)
        return fmean(values) if values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One experiment of a method.

    Attributes:
        source: the paper and the place in it.
        presets: name -> settings, frozen dataclasses of one class.
        stages: the durable steps that settings ask for, in order; see `arms` for independent trainings.
        build: (settings, seed, stage name) -> the trial of a stage that `running.trial_stage` does.
        claims: preset -> what is expected of it.
        figures: what to draw of all seeds.
        shown: names of metrics (without their stage) in the order of the table's columns; empty for all.
    """

    name: str
    about: str
    source: str
    presets: Mapping[str, Any]
    stages: Callable[[Any], Sequence[Stage]]
    build: Callable[[Any, int, str], Trial] | None = None
    claims: Mapping[str, tuple[Claim, ...]] = field(default_factory=dict)
    figures: "Callable[[Found], Sequence[Figure]]" = lambda found: ()
    shown: tuple[str, ...] = ()

    def settings(self, preset: str, changed: Mapping[str, str]) -> Any:
        """A preset's settings with those changed that were typed, `key -> text`.

        Raises:
            AffineQuantError: no such preset or setting, or a text that is no value of its type (exit 2).
        """
        if preset not in self.presets:
            raise unknown_name("preset", preset, self.presets, where="--preset")
        config = self.presets[preset]
        known = {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}
        typed = {}
        for key, text in changed.items():
            if key not in known:
                raise unknown_name("setting", key, known, where="--set")
            typed[key] = _typed(key, text, known[key])
        return dataclasses.replace(config, **typed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A paper's method: experiments on the quantiser's own harness."""

    name: str
    about: str
    source: str
    experiments: tuple[Experiment, ...]


METHODS: dict[str, str] = {
    "rotations": "affinequant_research.rotations:METHOD",
    "grokalign": "affinequant_research.grokalign:METHOD",
    "alrnn": "affinequant_research.alrnn:METHOD",
    "schrodinger": "affinequant_research.schrodinger:METHOD",
}
"""Name -> `module:attribute` of a `Method`. A new method is a folder and a line here."""


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        AffineQuantError: there is none, with the nearest spelling.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS, where="METHOD")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def find_experiments(name: str) -> tuple[Method, tuple[Experiment, ...]]:
    """`rotations`: the method and all its experiments; `rotations.sanity`: and that one.

    Raises:
        AffineQuantError: unknown, with the nearest spelling.
    """
    head, _, tail = name.partition(".")
    method = find_method(head)
    known = {one.name: one for one in method.experiments}
    if tail and tail not in known:
        raise unknown_name("experiment", tail, known, where=f"METHOD {head}")
    return method, (known[tail],) if tail else method.experiments


def arms(names: Sequence[str], known: Iterable[str] = ()) -> tuple[Stage, ...]:
    """A stage for each of several trials that do not depend on one another.

    Raises:
        AffineQuantError: one that is not among the `known`, where these are given.
    """
    known = tuple(known)
    for name in names:
        if known and name not in known:
            raise unknown_name("arm", name, known, where="--set arms")
    return tuple(Stage(name=name, does=TRIAL) for name in names)


def _typed(key: str, text: str, now: Any) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if isinstance(now, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(now, tuple):
        value = tuple(value) if isinstance(value, list) else tuple(str(value).split(","))
    if type(value) is not type(now):
        raise AffineQuantError(
            f"{key} is {text!r}, which is no {type(now).__name__}", "--set", f"write it like {key}={now}"
        )
    return value

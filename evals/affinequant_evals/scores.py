"""A measured value and how well it is known: standard errors, degrees of freedom, differences over pairs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A measured value, its standard error, and over how many observations.

    Attributes:
        stderr: None where one observation, or the kind of metric, allows no estimate.
        parts: each observation's part in the value, linearised about it, so that `stderr` is their standard deviation
            over sqrt(n), and the differences of two scores' parts give the error of the difference.
        key: names the observations; two scores are paired only where it is the same.
        about: how it was measured, as plain JSON values.
    """

    value: float
    stderr: float | None
    n: int
    parts: tuple[float, ...] = ()
    key: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dof(self) -> int | None:
        """Degrees of freedom of `stderr`: how well it is known itself (Student's t; 95 % lie within 2.57 of it at 5)."""
        return None if self.stderr is None else self.n - 1


def mean_score(values: Sequence[float], *, key: str = "", about: Mapping[str, Any] | None = None) -> Score:
    """The mean of the values, e.g. an accuracy over documents."""
    values = tuple(float(value) for value in values)
    mean = math.fsum(values) / len(values)
    return Score(value=mean, stderr=_stderr(values), n=len(values), parts=values, key=key, about=about or {})


def exp_mean_score(values: Sequence[float], *, key: str = "", about: Mapping[str, Any] | None = None) -> Score:
    """exp(mean of the values), e.g. a perplexity from losses; its error by the delta method."""
    value = math.exp(math.fsum(values) / len(values))
    parts = tuple(value * float(item) for item in values)
    return Score(value=value, stderr=_stderr(parts), n=len(parts), parts=parts, key=key, about=about or {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A score minus the baseline's. `paired`: both saw the same observations, and the error is that of the pairs; else
    `dof` is that of the score that is known less well."""

    value: float
    stderr: float | None
    paired: bool
    dof: int | None = None


def difference(mine: Score, other: Score) -> Delta:
    """`mine` minus `other`, over pairs where both saw the same observations."""
    value = mine.value - other.value
    if mine.key and mine.key == other.key and len(mine.parts) == len(other.parts) > 0:
        parts = [left - right for left, right in zip(mine.parts, other.parts, strict=True)]
        stderr = _stderr(parts)
        return Delta(value=value, stderr=stderr, paired=True, dof=None if stderr is None else len(parts) - 1)
    if mine.stderr is None or other.stderr is None:
        return Delta(value=value, stderr=None, paired=False)
    stderr = math.hypot(mine.stderr, other.stderr)
    return Delta(value=value, stderr=stderr, paired=False, dof=min(mine.n, other.n) - 1)


def _stderr(parts: Sequence[float]) -> float | None:
    count = len(parts)
    if count < 2:
        return None
    mean = math.fsum(parts) / count
    return math.sqrt(math.fsum((part - mean) ** 2 for part in parts) / (count - 1) / count)

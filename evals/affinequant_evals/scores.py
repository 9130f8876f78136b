"""A measured value and how well it is known: standard errors, degrees of freedom, intervals, differences over pairs."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Better = Literal["lower", "higher"]
Interval = tuple[float, float]
LEVEL = 0.95
"""How often an interval holds the value that endlessly many observations would give."""
FEW_ALIKE = 6
"""From so many pairs on, differences that are all the same tell a direction: fewer agree by chance more often than once in
twenty (the sign test, 2 / 2^n), whatever their standard error of 0 says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A measured value, its standard error, and over how many observations.

    Attributes:
        stderr: None where one observation, or the kind of metric, allows no estimate.
        parts: each observation's part in the value, linearised about it, so that `stderr` is their standard deviation
            over sqrt(n), and the differences of two scores' parts give the error of the difference.
        key: names the observations; two scores are paired only where it is the same.
        about: how it was measured, as plain JSON values.
        log: the value is exp of a mean, and its interval that of the mean.
        groups: where the observations are drawn apart (a suite's tasks), how many of the parts lie in each group, in order;
            the value is then the sum of the groups' means.
    """

    value: float
    stderr: float | None
    n: int
    parts: tuple[float, ...] = ()
    key: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    log: bool = False
    groups: tuple[int, ...] = ()

    @property
    def dof(self) -> float | None:
        """Degrees of freedom of `stderr`: how well it is known itself (Student's t; 95 % lie within 2.57 of it at 5). Of
        several groups Satterthwaite's, which is no whole number."""
        if self.stderr is None or not self.groups:
            return None if self.stderr is None else self.n - 1
        return _spread(self.parts, self.groups)[1]

    @property
    def interval(self) -> Interval | None:
        """95 % by Student's t. Of exp(mean) it is exp of the mean's: a mean of losses is nearer to normal than its exp, and
        of few windows value - t stderr may lie below 0, where no perplexity is."""
        if not self.log:
            return _interval(self.value, self.stderr, self.dof)
        inside = _interval(math.log(self.value), None if self.stderr is None else self.stderr / self.value, self.dof)
        return inside and (math.exp(inside[0]), math.exp(inside[1]))


def mean_score(values: Sequence[float], *, key: str = "", about: Mapping[str, Any] | None = None) -> Score:
    """The mean of the values, e.g. an accuracy over documents."""
    values = tuple(float(value) for value in values)
    mean = math.fsum(values) / len(values)
    return Score(value=mean, stderr=_stderr(values), n=len(values), parts=values, key=key, about=about or {})


def exp_mean_score(values: Sequence[float], *, key: str = "", about: Mapping[str, Any] | None = None) -> Score:
    """exp(mean of the values), e.g. a perplexity from losses; its error by the delta method."""
    value = math.exp(math.fsum(values) / len(values))
    parts = tuple(value * float(item) for item in values)
    return Score(value=value, stderr=_stderr(parts), n=len(parts), parts=parts, key=key, about=about or {}, log=True)


def mean_of(scores: Sequence[Score], *, about: Mapping[str, Any] | None = None) -> Score:
    """The mean of scores of different observations, e.g. of a suite's tasks; its error adds theirs in squares."""
    value = math.fsum(score.value for score in scores) / len(scores)
    parts = tuple(part / len(scores) for score in scores for part in score.parts)
    groups = tuple(len(score.parts) for score in scores)
    stderr = _spread(parts, groups)[0] if all(groups) else None
    known = stderr is not None and all(score.key for score in scores)
    return Score(
        value=value,
        stderr=stderr,
        n=sum(score.n for score in scores),
        parts=parts if stderr is not None else (),
        key=" ".join(score.key for score in scores) if known else "",
        about=about or {},
        groups=groups if stderr is not None else (),
    )


def flips(mine: Score, other: Score) -> Score | None:
    """The share of observations, each right (1) or wrong (0), that exactly one of the two has right: two scores can be
    equal over very different answers. None where they are no pairs of such."""
    if (
        not mine.key
        or mine.key != other.key
        or not mine.parts
        or mine.groups
        or not {*mine.parts, *other.parts} <= {0, 1}
    ):
        return None
    pairs = list(zip(mine.parts, other.parts, strict=True))
    about = {"lost": sum(left < right for left, right in pairs), "won": sum(left > right for left, right in pairs)}
    return mean_score([abs(left - right) for left, right in pairs], key=mine.key, about=about)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A score minus the baseline's.

    Attributes:
        paired: both saw the same observations, `n` of them, and the error is that of the pairs.
        dof: of `stderr`: pairs less one, or Welch's and Satterthwaite's, which is no whole number.
    """

    value: float
    stderr: float | None
    paired: bool
    dof: float | None = None
    n: int = 0

    @property
    def interval(self) -> Interval | None:
        """95 % by Student's t; None where there is no standard error."""
        return _interval(self.value, self.stderr, self.dof)

    def verdict(self, better: Better) -> str:
        """`worse` or `better` where the pairs' interval excludes 0, `no difference seen` where it does not, which is not
        to say that there is none; nothing where nothing is paired."""
        if not self.paired or self.interval is None:
            return ""
        low, high = self.interval
        if low <= 0 <= high or (low == high and self.n < FEW_ALIKE):
            return "no difference seen"
        return "better" if (low > 0) == (better == "higher") else "worse"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "value": self.value,
            "stderr": self.stderr,
            "paired": self.paired,
            "dof": self.dof,
            "interval": self.interval and list(self.interval),
        }


def difference(mine: Score, other: Score) -> Delta:
    """`mine` minus `other`, over pairs where both saw the same observations."""
    value = mine.value - other.value
    if mine.key and mine.key == other.key and len(mine.parts) == len(other.parts) > 0:
        parts = [left - right for left, right in zip(mine.parts, other.parts, strict=True)]
        stderr, dof = _spread(parts, mine.groups)
        return Delta(value=value, stderr=stderr, paired=True, dof=dof, n=len(parts))
    if mine.stderr is None or other.stderr is None:
        return Delta(value=value, stderr=None, paired=False)
    stderr = math.hypot(mine.stderr, other.stderr)
    return Delta(value=value, stderr=stderr, paired=False, dof=_welch(mine, other))


def _welch(mine: Score, other: Score) -> float:
    """Degrees of freedom of a difference of two means whose variances differ (Welch 1947; scipy's `ttest_ind` has it only
    together with the observations, which a score need not hold)."""
    squares = [((score.stderr or 0.0) ** 2, score.dof or score.n - 1) for score in (mine, other)]
    below = sum(square**2 / dof for square, dof in squares)
    return sum(square for square, _ in squares) ** 2 / below if below > 0 else mine.n + other.n - 2


def _interval(value: float, stderr: float | None, dof: float | None) -> Interval | None:
    if stderr is None or dof is None or dof <= 0:
        return None
    reach = t_quantile(dof, (1 + LEVEL) / 2) * stderr
    return value - reach, value + reach


def t_quantile(dof: float, probability: float) -> float:
    """What Student's t lies below with that probability."""
    from scipy.special import stdtrit  # what scipy.stats.t calls, without the second that its import takes

    return float(stdtrit(dof, probability))


def _stderr(parts: Sequence[float]) -> float | None:
    count = len(parts)
    if count < 2:
        return None
    mean = math.fsum(parts) / count
    return math.sqrt(math.fsum((part - mean) ** 2 for part in parts) / (count - 1) / count)


def _spread(parts: Sequence[float], groups: Sequence[int]) -> tuple[float | None, float | None]:
    """Standard error of the sum of the groups' means, and its degrees of freedom (Satterthwaite 1946)."""
    if len(groups) < 2:
        stderr = _stderr(parts)
        return stderr, None if stderr is None else len(parts) - 1
    ends = list(itertools.accumulate(groups))
    errors = [_stderr(parts[end - count : end]) for end, count in zip(ends, groups, strict=True)]
    if any(error is None for error in errors):
        return None, None
    squares = [(error or 0.0) ** 2 for error in errors]
    below = sum(square**2 / (count - 1) for square, count in zip(squares, groups, strict=True))
    return math.sqrt(sum(squares)), sum(squares) ** 2 / below if below > 0 else len(parts) - len(groups)

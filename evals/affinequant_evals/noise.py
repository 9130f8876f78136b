"""How far a result moves from one seed to the next, and which differences of methods are larger than that."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from affinequant.errors import AffineQuantError
from affinequant_evals.scores import LEVEL, Better, Score, difference, t_quantile

NOT_APART = "not told apart"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A method's mean over seeds, and the standard deviation of one seed's value about it (None of a single seed)."""

    mean: float
    deviation: float | None
    n: int

    @property
    def score(self) -> Score:
        """The mean with its standard error."""
        stderr = None if self.deviation is None else self.deviation / math.sqrt(self.n)
        return Score(value=self.mean, stderr=stderr, n=self.n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A method against the reference.

    Attributes:
        difference: its mean minus the reference's.
        floor: the smallest absolute difference that is told apart; None where one of the two has a single seed.
        dof: degrees of freedom of the difference's error, by Welch and Satterthwaite.
        said: `better`, `worse` or `not told apart`; "" where there is no floor.
    """

    difference: float
    floor: float | None
    dof: float | None
    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """What `noise_floor` found.

    Attributes:
        reference: the method that the others are held against.
        deviation: the standard deviation over seeds within a method, pooled over the methods that vary at all; None
            where none does, or none has two seeds.
        dof: of `deviation`.
        spreads: method -> its spread.
        verdicts: method -> its verdict; the reference has none.
    """

    reference: str
    deviation: float | None
    dof: int
    spreads: Mapping[str, Spread]
    verdicts: Mapping[str, Verdict]

    def words(self, method: str, unit: str = "") -> str:
        """A method's verdict in words, `better than fast by 0.05 x`; "" for the reference and without a floor.

        Args:
            unit: what stands behind the number.
        """
        found = self.verdicts.get(method)
        if found is None or not found.said:
            return ""
        if found.said == NOT_APART:
            return f"{NOT_APART} from {self.reference}"
        return f"{found.said} than {self.reference} by {abs(found.difference):.2g} {unit}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"level": LEVEL}


def noise_floor(values: Mapping[str, Sequence[float]], *, better: Better = "lower") -> Noise:
    """The noise over seeds, and each method's difference to the first one, in words where it exceeds the noise.

    Each method is compared with the reference by Welch's t-test over seeds, at 95 % for all of the comparisons together
    (Bonferroni). So the floor of a comparison is t x sqrt(s1^2 / n1 + s2^2 / n2), with the two methods' own spreads.

    Why so, of what was tried (`tests/test_evals_noise.py` simulates it):
    a floor from one spread that is pooled over all methods finds differences that are not there in up to 15 % of the
    tables, because the spreads of methods differ by far more than their number makes up for (over seeds, the ratio of a
    4-bit model without transforms moves by 8 %, of a good one by 1 %). Pairs by seed are as safe as Welch's test, and find
    more only where the same draw of text helps or harms both methods alike, which needs the same number of samples in both;
    at three seeds they leave two degrees of freedom, and of differences of five standard deviations they find 85 % where
    Welch's test finds 97 % (two methods) and 38 % where it finds 68 % (five). A draw that does help both only makes Welch's
    test more careful. The reference is the first method, not the best: the best of several is partly the luckiest.

    Args:
        values: method -> the value of each of its seeds. A value that is no number (a run that diverged) is left out by
            whoever calls.
        better: the direction that is better.

    Raises:
        AffineQuantError: no method, a method without values, or a value that is not finite.
    """
    _check(values)
    spreads = {name: _spread(found) for name, found in values.items()}
    reference, *others = spreads
    varying = [one for one in spreads.values() if one.deviation]
    dof = sum(one.n - 1 for one in varying)
    pooled = math.sqrt(sum((one.n - 1) * (one.deviation or 0) ** 2 for one in varying) / dof) if dof else None
    verdicts = {name: _verdict(spreads[name], spreads[reference], len(others), better) for name in others}
    return Noise(reference=reference, deviation=pooled, dof=dof, spreads=spreads, verdicts=verdicts)


def _check(values: Mapping[str, Sequence[float]]) -> None:
    if not values or not all(map(len, values.values())):
        raise AffineQuantError("a method has no values", "noise_floor", "give each method's value of each seed")
    for name, found in values.items():
        for value in found:
            if not math.isfinite(value):
                raise AffineQuantError(f"a value of {name} is {value}", "noise_floor", "leave that seed out")


def _spread(values: Sequence[float]) -> Spread:
    # Equal values, of a method that draws nothing, must give 0 and not the rounding of their mean.
    if len(set(values)) == 1:
        return Spread(mean=values[0], deviation=0.0 if len(values) > 1 else None, n=len(values))
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return Spread(mean=mean, deviation=deviation, n=len(values))


def _verdict(mine: Spread, other: Spread, comparisons: int, better: Better) -> Verdict:
    found = difference(mine.score, other.score)
    if found.stderr is None or found.dof is None:
        return Verdict(difference=found.value, floor=None, dof=None, said="")
    floor = t_quantile(found.dof, 1 - (1 - LEVEL) / 2 / comparisons) * found.stderr
    said = "better" if (found.value < 0) == (better == "lower") else "worse"
    said = said if abs(found.value) > floor else NOT_APART
    return Verdict(difference=found.value, floor=floor, dof=found.dof, said=said)

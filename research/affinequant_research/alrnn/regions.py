"""What the regions of an AL-RNN hold: fixed points and cycles, solved for and not searched for, since each map is affine.

In region Omega the step is z -> (diag(A) + W D) z + h, where D leaves out the ReLU units that are off. Along a sequence of
regions the steps make one affine map, and a cycle through these is its fixed point. It is *real* where it does lie in those
regions, one after the other, else *virtual*: then it still shapes how trajectories move in them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from affinequant_research.alrnn.codes import Codes, region_codes, written
from affinequant_research.alrnn.measures import Floats
from affinequant_research.alrnn.model import AlmostLinear

SINGULAR = 1e12
"""Condition from which the equations of a cycle have no one solution."""
TRIES = 10
"""Sequences of regions that are tried for one cycle."""
SAME = 1e-6
"""Distance of points that are one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cycle:
    """A fixed point or a cycle.

    Attributes:
        codes: the regions it goes through, one for each of its steps.
        points: [steps, M].
        real: whether its points lie in these regions.
        multipliers: eigenvalues of a whole round, [M] complex, the largest first.
    """

    codes: tuple[int, ...]
    points: Floats
    real: bool
    multipliers: NDArray[np.complexfloating]

    @property
    def radius(self) -> float:
        """The largest multiplier's size: above 1 it is unstable. That of a whole round."""
        return float(np.abs(self.multipliers[0]))

    @property
    def spirals(self) -> bool:
        """Whether what is near turns about it."""
        return bool(abs(self.multipliers[0].imag) > 1e-12)

    def told(self, bent: int) -> dict[str, object]:
        """Plain values: `regions`, `real`, `radius`, `spirals`."""
        regions = [written(code, bent) for code in self.codes]
        return {"regions": regions, "real": self.real, "radius": self.radius, "spirals": self.spirals}


def jacobian(model: AlmostLinear, code: int) -> Floats:
    """[M, M]: the derivative of a step anywhere in the region of that code."""
    on = np.ones(model.M)
    on[model.M - model.P :] = [code >> place & 1 for place in range(model.P)]
    return np.diag(model.A).astype(np.float64) + model.W * on


def cycle_through(model: AlmostLinear, codes: Sequence[int]) -> Cycle | None:
    """The cycle through these regions, real or virtual; None where there is none, or more than one."""
    maps = {code: affine(model, code) for code in set(codes)}
    whole = np.eye(model.M + 1)
    for code, steps in groupby(codes):
        whole = np.linalg.matrix_power(maps[code], len(list(steps))) @ whole
    equations = np.eye(model.M) - whole[:-1, :-1]
    if not np.isfinite(whole).all() or np.linalg.cond(equations) > SINGULAR:
        return None
    points = [np.append(np.linalg.solve(equations, whole[:-1, -1]), 1.0)]
    for code in codes[:-1]:
        points.append(maps[code] @ points[-1])
    found, points = np.linalg.eigvals(whole[:-1, :-1]).astype(complex), np.array(points)[:, :-1]
    return Cycle(
        codes=tuple(codes),
        points=points,
        real=region_codes(points, model.P).tolist() == list(codes),
        multipliers=found[np.argsort(-np.abs(found), kind="stable")],
    )


def affine(model: AlmostLinear, code: int) -> Floats:
    """[M + 1, M + 1]: the step in the region of that code, for states with a 1 behind them."""
    whole = np.eye(model.M + 1)
    whole[:-1, :-1], whole[:-1, -1] = jacobian(model, code), model.h
    return whole


def fixed_points(model: AlmostLinear, codes: Iterable[int]) -> dict[int, Cycle]:
    """The fixed point of each of these regions that has one."""
    found = {int(code): cycle_through(model, [int(code)]) for code in codes}
    return {code: one for code, one in found.items() if one is not None}


def cycles_near(model: AlmostLinear, latent: Floats, longest: int, most: int = 100) -> list[Cycle]:
    """Real cycles of two to `longest` steps, through two regions or more, that a trajectory comes near to, the shortest first.

    Where it nearly returns, the regions that it went through on the way are those of a candidate. One that turns out virtual
    missed a border by a step or so: the regions that its points lie in are tried next. A model of a flow has few: a cycle
    closes only where its period is a whole number of steps.

    Args:
        most: of such returns that are tried, the nearest.
    """
    codes, returns = region_codes(latent, model.P), []
    changes = np.append(0, np.cumsum(codes[1:] != codes[:-1]))
    for lag in range(2, min(longest, len(latent) - 3) + 1):
        apart = np.linalg.norm(latent[lag:] - latent[:-lag], axis=1)
        inner = apart[1:-1]
        least = 1 + np.flatnonzero((inner <= apart[:-2]) & (inner < apart[2:]))
        least = least[changes[least + lag - 1] > changes[least]]
        returns += [(float(apart[start]), int(start), lag) for start in least]
    found: list[Cycle] = []
    for _, start, lag in sorted(returns)[:most]:
        one = _settled(model, codes[start : start + lag])
        if one is not None and _is_shortest(one) and not any(_same(one, other) for other in found):
            found.append(one)
    return sorted(found, key=lambda one: len(one.codes))


def _settled(model: AlmostLinear, word: Codes) -> Cycle | None:
    for _ in range(TRIES):
        one = cycle_through(model, word.tolist()) if len(np.unique(word)) > 1 else None
        if one is None or one.real:
            return one
        word = region_codes(one.points, model.P)
    return None


def _is_shortest(one: Cycle) -> bool:
    """Whether it is not a shorter one, gone round more than once."""
    length, points = len(one.codes), one.points
    near = SAME * (1 + np.abs(points).max())
    return all(np.abs(points[part] - points[0]).max() > near for part in range(1, length) if length % part == 0)


def _same(one: Cycle, other: Cycle) -> bool:
    """Whether they are one orbit: it may begin elsewhere, or go round more than once."""
    apart = np.linalg.norm(one.points[:, None] - other.points[None], axis=2)
    return bool(apart.min(1).max() < SAME * (1 + np.abs(other.points).max()))

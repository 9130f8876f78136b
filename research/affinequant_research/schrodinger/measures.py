"""How far two clouds of particles are apart: Wasserstein distances by POT, maximum mean discrepancy, and their floor.

Few samples of the same law are not at distance 0. What is measured is to be read beside the oracle: fresh samples of the
truth against the same held-out ones.
"""

from collections.abc import Mapping, Sequence

import torch
from affinequant_evals import Score
from torch import Tensor

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant_research.schrodinger.systems import Snapshots, System

ROUNDS = 10_000_000
"""Of the network simplex, far beyond what a thousand particles take."""


def w2(a: Tensor, b: Tensor) -> float:
    """The 2-Wasserstein distance of two samples [n, d], [m, d], each particle with the same weight: the root of the least
    mean of squared distances. It is what TrajectoryNet and its successors print as earth mover's distance.

    Raises:
        AffineQuantError: a sample that is empty or not finite, or POT is not installed (exit 3).
    """
    return max(_transport(a, b, 2), 0.0) ** 0.5


def w1(a: Tensor, b: Tensor) -> float:
    """The 1-Wasserstein distance: the least mean of distances. Arguments and errors as `w2`."""
    return max(_transport(a, b, 1), 0.0)


def mmd_rbf(a: Tensor, b: Tensor, bandwidth: float | None = None) -> float:
    """The root of the squared maximum mean discrepancy of two samples under exp(-|x - y|^2 / (2 bandwidth^2)), all pairs
    counted (the V-statistic, which is never negative and 0 of a sample to itself).

    Args:
        bandwidth: None for the median of the distances between different particles of both.

    Raises:
        AffineQuantError: a sample that is empty or not finite.
    """
    a, b = _sound(a, b)
    both = torch.cat([a, b])
    squared = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist").square()
    width = bandwidth or float(torch.pdist(both).median()) or 1.0  # 1: most of them at one place, where any width tells
    kernel = (-squared / (2 * width**2)).exp()
    n = len(a)
    found = float(kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean())
    return max(found, 0.0) ** 0.5


DISTANCES = {"w2": w2, "w1": w1, "mmd_rbf": mmd_rbf}
"""Name of the metric -> distance of two samples."""


def apart(made: Sequence[Tensor], seen: Snapshots, names: Sequence[str] = tuple(DISTANCES)) -> dict[str, Score]:
    """Each distance between what was made and what was seen: `w2@t1`, `w2@t3`, ..., and `w2`, their mean over times.

    Args:
        made: particles for each of the times of `seen`.
    """
    found: dict[str, Score] = {}
    for name in names:
        pairs = zip(made, seen.samples, strict=True)
        values = [DISTANCES[name](mine, theirs) for mine, theirs in pairs]
        found[name] = Score(value=sum(values) / len(values), stderr=None, n=len(values))
        counts = [len(one) for one in seen.samples]
        for time, value, n in zip(seen.times, values, counts, strict=True):
            found[f"{name}@t{time:g}"] = Score(value=value, stderr=None, n=n)
    return found


def oracle(
    system: System, seen: Snapshots, seed: int, particles: int = 0, names: Sequence[str] = tuple(DISTANCES)
) -> Mapping[str, Score]:
    """The floor: as `apart`, of fresh particles of the truth. `particles`: 0 for as many as the system has."""
    return apart(system.snapshots(seed, "oracle", seen.times, particles).samples, seen, names)


def _transport(a: Tensor, b: Tensor, power: int) -> float:
    a, b = _sound(a, b)
    try:
        from ot import emd2  # takes seconds, once
    except ImportError:
        raise AffineQuantError(
            "POT, which solves optimal transport here, is not installed",
            "schrodinger",
            "pip install pot",
            exit_code=PREFLIGHT,
        ) from None
    costs = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** power
    cost, log = emd2([], [], costs.numpy(), numItermax=ROUNDS, log=True)
    if log["warning"]:
        raise RuntimeError(f"optimal transport was not solved: {log['warning']}")
    return float(cost)


def _sound(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if any(one.ndim != 2 or not len(one) for one in (a, b)) or a.shape[1] != b.shape[1]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise AffineQuantError(
            f"particles of the shapes {shapes} cannot be compared", "distance", "give [n, d] and [m, d]"
        )
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        fix = "if a bridge made them it has diverged: a finer step or a greater ridge may hold it"
        raise AffineQuantError("particles that are compared are not finite", "distance", fix)
    return a.detach().double(), b.detach().double()

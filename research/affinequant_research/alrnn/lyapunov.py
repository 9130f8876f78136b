"""Lyapunov exponents: how fast what is near parts, by the exact derivatives along a trajectory."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from affinequant_research.alrnn.codes import Codes, region_codes
from affinequant_research.alrnn.measures import Floats
from affinequant_research.alrnn.model import AlmostLinear
from affinequant_research.alrnn.regions import jacobian

FORGOTTEN = 200
"""Steps in which the directions turn to where they belong, before anything is counted."""


def exponents(jacobians: Iterable[Floats], dimensions: int, count: int, forgotten: int = FORGOTTEN) -> Floats:
    """The `count` largest exponents in nats a step, the largest first, as far as the trajectory tells.

    A frame of directions is carried along and made orthogonal again at every step (Benettin et al., 1980): what its sides
    have grown by on the way are the exponents.

    Args:
        jacobians: of each step, [dimensions, dimensions], in order.

    Raises:
        ValueError: there are no more steps than are forgotten.
    """
    frame = np.eye(dimensions)[:, :count]
    steps, grown = iter(jacobians), np.zeros(count)
    for one in islice(steps, forgotten):
        frame, _ = np.linalg.qr(one @ frame)
    counted = 0
    for one in steps:
        frame, sides = np.linalg.qr(one @ frame)
        # A direction that is gone for good, as where a unit has no way on, has shrunk by all that float64 can say.
        grown += np.log(np.maximum(np.abs(np.diagonal(sides)), np.finfo(float).tiny))
        counted += 1
    if not counted:
        raise ValueError(f"an exponent needs more than {forgotten} steps")
    return np.sort(grown / counted)[::-1]


def spectrum(model: AlmostLinear, latent: Floats, count: int = 0, per_time: float = 1.0) -> Floats:
    """The exponents of a model along its own trajectory [steps, M].

    Args:
        count: of exponents, the largest; 0 for all M.
        per_time: steps in a unit of time, 1 / dt: exponents are per step else.
    """
    codes = region_codes(latent, model.P)
    return per_time * exponents(along_regions(model, codes), model.M, count or model.M)


def along_regions(model: AlmostLinear, codes: Codes) -> Iterator[Floats]:
    """The derivative of each step: one matrix for all steps of a region."""
    known = {int(code): jacobian(model, int(code)) for code in np.unique(codes)}
    for code in codes:
        yield known[int(code)]

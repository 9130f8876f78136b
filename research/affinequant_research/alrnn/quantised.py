"""An AL-RNN in few bits: chaos about fixed points whose largest multiplier is a thousandth above 1 is exacting to round."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from affinequant_research.alrnn.freerun import Scores, at_bits
from affinequant_research.alrnn.model import AlmostLinear, Floats
from affinequant_research.rounded import rounded_weight

BITS = (12, 10, 8, 6, 5, 4, 3)
PARTS = {"w": ("W",), "wah": ("W", "A", "h")}
"""What is rounded, by the letters in a metric's name. L makes the start alone, which the attractor does not know."""


def rounded_model(model: AlmostLinear, bits: int, parts: Sequence[str] = PARTS["w"]) -> AlmostLinear:
    """The network with those weights to nearest on the quantiser's grid: a scale for each row of W, one for all A, all h."""
    return dataclasses.replace(model, **{name: _rounded(getattr(model, name), bits) for name in parts})


def by_bits(model: AlmostLinear, bits: Sequence[int], truth: Floats, steps: int, step: float) -> Scores:
    """What `at_bits` measures of W in so many bits (`@w4`) and of W, A and h (`@wah4`)."""
    lent = [
        (f"{letters}{count}", rounded_model(model, count, parts)) for letters, parts in PARTS.items() for count in bits
    ]
    return at_bits(lent, truth, steps, step)


def _rounded(weight: Floats, bits: int) -> Floats:
    rows = torch.from_numpy(np.atleast_2d(weight).astype(np.float32))
    return rounded_weight(rows, bits).double().numpy().reshape(weight.shape)

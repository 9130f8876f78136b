"""Which rounding a group of linears gets: ways to choose codes on the inputs it will read, and how far outputs are off."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.numbers import Grid
from affinequant.numbers.weights import codes_of, dequantize
from affinequant.rounding.gptq import GPTQFailure, follow_target, gptq, refine
from affinequant.rounding.moments import Inputs, Moments

Kind = Literal["nearest", "gptq", "gptaq"]
PULLS = (10, 100)
"""How much more than GPTQ's Hessian that of a target from full-precision inputs is damped: a little and a lot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How to round: to nearest, by GPTQ, or by GPTQ towards what the full-precision inputs give. That target is pulled
    back to the weights themselves by a damping of its own. GPTQ's codes are refined in so many `sweeps`."""

    kind: Kind
    damping: float = 0.0
    pull: float = 0.0
    sweeps: int = 0

    def __str__(self) -> str:
        return {"nearest": "nearest", "gptq": f"gptq {self.damping:g}", "gptaq": f"gptaq {self.pull:g}"}[self.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """How far outputs are off: over each token's own power, and all of it over the power of all.

    Neither is enough alone. The first forgets the one token in hundreds whose massive activation every later block
    leans on (judged by it, SmolLM2-135M at W4A4 chose itself from 1.29 to 1.48 times full precision); the second sees
    nothing else in a block that makes or unmakes that token.
    """

    relative: Float[Tensor, " tokens"]
    total: float

    @property
    def error(self) -> float:
        """The mean of both."""
        return (float(self.relative.mean()) + self.total) / 2


def output_error(given: Float[Tensor, "tokens rows"], wanted: Float[Tensor, "tokens rows"]) -> OutputError:
    """Held-out outputs against those of full precision."""
    return error_of((given - wanted).square().sum(-1), wanted.square().sum(-1))


def error_of(wrong: Float[Tensor, " tokens"], power: Float[Tensor, " tokens"]) -> OutputError:
    """From the squares of what is wrong and of what is wanted, summed over outputs."""
    tiny = torch.finfo(power.dtype).tiny
    return OutputError(relative=wrong / power.clamp_min(tiny), total=float(wrong.sum() / power.sum().clamp_min(tiny)))


def round_by(
    way: Way,
    weight: Float[Tensor, "rows n"],
    moments: Moments | None,
    scale: Float[Tensor, "rows groups"],
    zero: Float[Tensor, "rows groups"],
    grid: Grid,
) -> Float[Tensor, "rows n"]:
    """Codes on this grid.

    Raises:
        GPTQFailure: the Hessian cannot be factored at any damping.
    """
    if way.kind == "nearest":
        return codes_of(weight, scale, zero, grid)
    assert moments is not None
    if way.kind == "gptaq":
        assert moments.drift is not None
        weight = follow_target(weight, moments.hessian, moments.drift, damping=way.pull)
    codes = gptq(weight, moments.hessian, scale, zero, grid, damping=way.damping)
    return refine(codes, weight, moments.hessian, scale, zero, grid, damping=way.damping, sweeps=way.sweeps)


def choose(
    weight: Float[Tensor, "rows n"],
    inputs: Inputs,
    scale: Float[Tensor, "rows groups"],
    zero: Float[Tensor, "rows groups"],
    grid: Grid,
    damping: float,
    sweeps: int = 0,
) -> tuple[Way, Mapping[str, float]]:
    """The way with the least error on the held-out rows, and by name the error of each that could be tried: of x V^T,
    with V rounded on the other samples, against t W^T."""
    assert inputs.held is not None
    x, target = inputs.held
    wanted = target @ weight.mT
    errors: dict[str, float] = {}
    best = Way(kind="nearest")
    for way in ways(damping, sweeps):
        try:
            codes = round_by(way, weight, inputs.fitted, scale, zero, grid)
        except GPTQFailure:
            continue
        errors[str(way)] = output_error(x @ dequantize(codes, scale, zero, grid).mT, wanted).error
        if errors[str(way)] < errors[str(best)]:
            best = way
    return best, errors


def ways(damping: float, sweeps: int = 0) -> tuple[Way, ...]:
    """What `auto` tries: nearest; GPTQ at the recipe's damping and at ten times as much; and targets from full-precision
    inputs, which a few thousand tokens determine badly, pulled back a little and a lot."""
    least, more = (min(1.0, max(damping, 1e-4) * factor) for factor in (1, 10))
    plain = (Way(kind="gptq", damping=step, sweeps=sweeps) for step in (least, more))
    drawn = (Way(kind="gptaq", damping=least, pull=pulled(least, factor), sweeps=sweeps) for factor in PULLS)
    return (Way(kind="nearest"), *plain, *drawn)


def pulled(damping: float, factor: float = PULLS[-1]) -> float:
    """The damping of a target, by GPTQ's own."""
    return min(10.0, damping * factor)

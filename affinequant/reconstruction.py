"""Which rounding a group of linears gets: ways to choose codes on the inputs that it will read, and a judge of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.block import BlockJob
from affinequant.gptq import GPTQFailure, follow_target, gptq, refine
from affinequant.quantizer import codes_of, dequantize, fake_quantize_activation
from affinequant.replay import Replay
from affinequant.scheme import NumberFormat
from affinequant.stream import spread

HELD_OUT = 8
"""One sample in so many judges, the last ones, and at least one."""
HELD_TOKENS = 2048
"""Tokens of them on which errors are measured, at most about."""
Kind = Literal["nearest", "gptq", "gptaq"]


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
class Moments:
    """Means over tokens, x being quantised inputs and t those of the full-precision model: x^T x and (t - x)^T x."""

    hessian: Float[Tensor, "n n"]
    drift: Float[Tensor, "n n"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the linears of a site read. `fitted`: without the samples that are held out; `held`: some rows (x, t) of
    these."""

    every: Moments
    fitted: Moments
    held: tuple[Float[Tensor, "tokens n"], Float[Tensor, "tokens n"]] | None


@dataclass(slots=True)
class _Sums:
    """Sums behind `Moments`; those of a batch are added whole, as ever in the same order."""

    tokens: int = 0
    values: list[Tensor | None] = field(default_factory=lambda: [None, None])

    def add(self, x: Tensor, target: Tensor | None) -> None:
        if not len(x):
            return
        self.tokens += len(x)
        for index, left in enumerate((x, None if target is None else target - x)):
            if left is not None:
                value, total = left.mT @ x, self.values[index]
                self.values[index] = value if total is None else total.add_(value)

    def means(self, *others: "_Sums") -> Moments:
        every = (self, *others)
        tokens = sum(sums.tokens for sums in every)
        hessian, drift = (
            [sums.values[index] for sums in every if sums.values[index] is not None] for index in range(2)
        )
        return Moments(hessian=_sum(hessian) / tokens, drift=_sum(drift) / tokens if drift else None)


def _sum(parts: list[Any]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
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


def judge(given: Float[Tensor, "tokens rows"], wanted: Float[Tensor, "tokens rows"]) -> Judged:
    """Held-out outputs against those of full precision."""
    wrong, power = (given - wanted).square().sum(-1), wanted.square().sum(-1)
    tiny = torch.finfo(wanted.dtype).tiny
    return Judged(relative=wrong / power.clamp_min(tiny), total=float(wrong.sum() / power.sum().clamp_min(tiny)))


def gather(job: BlockJob, passing: Replay, full: Replay | None, clip: float) -> Inputs:
    """The inputs that `passing` has reached, rounded with the ratio `clip`.

    Args:
        full: the full-precision pass at the same site; with rounding `auto` or `gptaq`.
    """
    fmt, slices, (samples, tokens, _) = job.scheme.activation, job.sites[passing.site].slices, passing.x.shape
    held = max(1, samples // HELD_OUT) if job.recipe.rounding == "auto" else 0
    chosen = spread(held, tokens, HELD_TOKENS, job.seed(f"{passing.site}/held")).flatten().to(job.decoder.device)
    fitted, rest, rows = _Sums(), _Sums(), list[tuple[Tensor, Tensor]]()
    for (part, value), other in zip(passing.values(), full.values() if full else repeat(None), strict=False):
        x = value.flatten(0, -2).float()
        x = x if fmt is None else fake_quantize_activation(x, fmt, clip, slices)
        target = None if other is None else other[1].flatten(0, -2).float()
        cut = max(0, samples - held - part.start) * tokens
        fitted.add(x[:cut], None if target is None else target[:cut])
        if cut < len(x):
            assert target is not None
            rest.add(x[cut:], target[cut:])
            first, chosen = chosen[: len(x) - cut], chosen[len(x) - cut :]
            rows.append((x[cut:][first], target[cut:][first]))
    if not held:
        means = fitted.means()
        return Inputs(every=means, fitted=means, held=None)
    together = (torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows]))
    return Inputs(every=fitted.means(rest), fitted=fitted.means(), held=together)


def round_by(
    way: Way,
    weight: Float[Tensor, "rows n"],
    moments: Moments | None,
    scale: Float[Tensor, "rows groups"],
    zero: Float[Tensor, "rows groups"],
    fmt: NumberFormat,
) -> Float[Tensor, "rows n"]:
    """Codes on this grid.

    Raises:
        GPTQFailure: the Hessian cannot be factored at any damping.
    """
    if way.kind == "nearest":
        return codes_of(weight, scale, zero, fmt)
    assert moments is not None
    if way.kind == "gptaq":
        assert moments.drift is not None
        weight = follow_target(weight, moments.hessian, moments.drift, damping=way.pull)
    codes = gptq(weight, moments.hessian, scale, zero, fmt, damping=way.damping)
    return refine(codes, weight, moments.hessian, scale, zero, fmt, damping=way.damping, sweeps=way.sweeps)


def choose(
    weight: Float[Tensor, "rows n"],
    inputs: Inputs,
    scale: Float[Tensor, "rows groups"],
    zero: Float[Tensor, "rows groups"],
    fmt: NumberFormat,
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
            codes = round_by(way, weight, inputs.fitted, scale, zero, fmt)
        except GPTQFailure:
            continue
        errors[str(way)] = judge(x @ dequantize(codes, scale, zero, fmt).mT, wanted).error
        if errors[str(way)] < errors[str(best)]:
            best = way
    return best, errors


def ways(damping: float, sweeps: int = 0) -> tuple[Way, ...]:
    """What `auto` tries: nearest; GPTQ at the recipe's damping and at ten times as much; and targets from full-precision
    inputs, which a few thousand tokens determine badly, pulled back a little and a lot."""
    least, more = (min(1.0, max(damping, 1e-4) * factor) for factor in (1, 10))
    plain = (Way(kind="gptq", damping=step, sweeps=sweeps) for step in (least, more))
    pulls = (min(10.0, least * factor) for factor in (10, 100))
    drawn = (Way(kind="gptaq", damping=least, pull=pull, sweeps=sweeps) for pull in pulls)
    return (Way(kind="nearest"), *plain, *drawn)

"""Moments of what a group of linears will read, rounded, gathered in one pass over the samples; and rows that judge."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.models.decoder import spread
from affinequant.rounding.job import HELD_OUT, BlockJob
from affinequant.rounding.replay import Replay

HELD_TOKENS = 2048
"""Tokens of them on which errors are measured, at most about."""


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


def gather(
    job: BlockJob, passing: Replay, full: Replay | None, site: str, clip: float, expert: int | None = None
) -> Inputs:
    """The inputs of a site that `passing` has reached, rounded with the ratio `clip`; those of one expert are of the tokens
    that come to it.

    Args:
        full: the full-precision pass at the same site; with rounding `auto` or `gptaq`.
    """
    site_input, (samples, tokens, _) = job.site_input(site, clip=clip), passing.x.shape
    held = max(1, samples // HELD_OUT) if job.recipe.rounding == "auto" else 0
    dims = job.decoder.dims
    if expert is None:
        chosen = spread(held, tokens, HELD_TOKENS, job.seed(f"{site}/held")).flatten().to(job.decoder.device)
    else:  # as if all came by, of whom so many are looked at
        share = -(-held * tokens * dims.routed // (dims.experts * HELD_TOKENS))
        chosen = (torch.arange(held * tokens, device=job.decoder.device) % max(1, share)) == 0
    values = values_of(passing, site, expert)
    targets = values_of(full, site, expert) if full else repeat(None)
    fitted, rest, rows = _Sums(), _Sums(), list[tuple[Tensor, Tensor]]()
    for (part, value), other in zip(values, targets, strict=False):
        x = site_input.rounded(value.flatten(0, -2).float())
        target = None if other is None else other[1].flatten(0, -2).float()
        cut = max(0, samples - held - part.start) * tokens
        fitted.add(x[:cut], None if target is None else target[:cut])
        if cut < len(x):
            assert target is not None
            rest.add(x[cut:], target[cut:])
            first, chosen = chosen[: len(x) - cut], chosen[len(x) - cut :]
            rows.append((x[cut:][first], target[cut:][first]))
    together = (torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])) if rows else None
    if not fitted.tokens or together is None or not len(together[0]):  # an expert may be asked by few samples alone
        means = fitted.means(rest)
        return Inputs(every=means, fitted=means, held=None)
    return Inputs(every=fitted.means(rest), fitted=fitted.means(), held=together)


def shrunk(job: BlockJob, passing: Replay, site: str, clip: float, own: Inputs | None, expert: int) -> Inputs:
    """The moments of what an expert reads that few tokens come to, `own` (None where none come), drawn towards those of all
    tokens, which count as many as there are inputs."""
    every, site_input = _Sums(), job.site_input(site, clip=clip)
    for given, _ in passing.routed:
        every.add(site_input.rounded(given.float()), None)
    hessian = every.means().hessian
    if own is not None:
        tokens = sum(int((index == expert).any(-1).sum()) for _, index in passing.routed)
        hessian = (tokens * own.every.hessian + len(hessian) * hessian) / (tokens + len(hessian))
    moments = Moments(hessian=hessian, drift=None)
    return Inputs(every=moments, fitted=moments, held=None)


def values_of(passing: Replay, site: str, expert: int | None) -> Iterator[tuple[slice, Tensor]]:
    """(which samples, what the linears of a site read before it is rounded): of one expert, the tokens that come to it."""
    return passing.values() if expert is None else passing.of_expert(site, expert)

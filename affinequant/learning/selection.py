"""`auto`: each block takes, site by site, the transform whose linears err least on held-out tokens within a cost budget."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from affinequant.learning.starts import Seen, build_transforms
from affinequant.models.on_demand import Stacked
from affinequant.models.sites import named
from affinequant.numbers.weights import fake_quantize, weight_range
from affinequant.recipe.recipe import AUTO
from affinequant.rounding.job import HELD_OUT, BlockJob
from affinequant.rounding.ways import OutputError, error_of
from affinequant.transforms.placements import block_flops, candidates, cost_at, first_of, flops_of

CLIPS = (1.0, 0.9, 0.8)
"""Ratios of activation clipping under which a candidate is judged, where the recipe clips at all."""
CERTAIN = 2.0
"""Standard errors by which a dearer candidate must be better to be worth its cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A candidate: operations per token that stay online, and how far its outputs are off on held-out tokens."""

    name: str
    flops: int
    off: OutputError

    @property
    def error(self) -> float:
        """What counts."""
        return self.off.error


def select(job: BlockJob, tensors: Mapping[str, Tensor], seen: Mapping[str, Seen]) -> tuple[BlockJob, dict[str, Any]]:
    """The job with names in the place of every `auto`, and by site what was chosen, its operations per token and the
    error of each candidate.

    Candidates start in closed form on seven eighths of the tokens; weights are rounded to nearest. A dearer candidate
    counts only where it is better by more than chance. Of all combinations within the budget the one with the least sum
    of errors is taken.

    Args:
        seen: by site, what reaches it in full precision.
    """
    wanted = [name for name, chosen in job.recipe.transforms.items() if chosen == AUTO]
    if not wanted:
        return job, {}
    block = block_flops(job.decoder.family, job.decoder.dims)
    read = {name: site for name, site in job.sites.items() if site.readers}
    here = {name: site for name, site in first_of(read).items() if name in wanted}
    measured = {
        name: [_at_all(job, tensors, one, name, seen) for one in candidates(site, job.recipe, block)]
        for name, site in here.items()
    }
    most = block * job.recipe.cost_budget / 100
    best = cheapest_best({name: frontier(options) for name, options in measured.items()}, most)
    taken = {name: option.name for name, option in best.items() if option.name != "none"}
    kept = {name: chosen for name, chosen in job.recipe.transforms.items() if name not in wanted}
    report = {
        name: {
            "transform": best[name].name,
            "flops": best[name].flops,
            "errors": {option.name: option.error for option in measured[name]},
        }
        for name in measured
    }
    return replace(job, recipe=replace(job.recipe, transforms=kept | taken)), report


def frontier(options: list[Option]) -> list[Option]:
    """The options worth having, by rising cost: each is better than those before it by more than chance. Of equal cost
    the better one is left, or the first within chance."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: one.flops):
        if kept and not _better(option, kept[-1]):
            continue
        if kept and option.flops == kept[-1].flops:
            kept.pop()
        kept.append(option)
    return kept


def cheapest_best(frontiers: Mapping[str, list[Option]], most: float) -> dict[str, Option]:
    """One option for each site: the least sum of errors among combinations that cost at most `most`, the cheaper and
    then the first of equals. The first option of every site must be free, so that there always is one."""
    allowed = (chosen for chosen in product(*frontiers.values()) if sum(option.flops for option in chosen) <= most)
    best = min(allowed, key=lambda chosen: (sum(one.error for one in chosen), sum(one.flops for one in chosen)))
    return dict(zip(frontiers, best, strict=True))


def _better(option: Option, other: Option) -> bool:
    # Chance is that of the relative errors: what the total hangs on may be one token, which has no spread.
    gain = (other.off.relative - option.off.relative).double()
    chance = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    return other.error - option.error > CERTAIN * chance


def _at_all(job: BlockJob, tensors: Mapping[str, Tensor], one: str, name: str, seen: Mapping[str, Seen]) -> Option:
    """A candidate at a site; at those of experts, which take the same, over the tokens of all that have seen enough, and at
    the cost of as many as a token goes to."""
    known = {site for site in seen if len(seen[site].rows) > 1}
    sites = [site for site in job.sites if named(site) == name and site in known and job.sites[site].readers]
    options = {site: _measure(job, tensors, one, site, seen[site]) for site in sites}
    if len(options) == 1:
        return options[sites[0]]
    flops = cost_at(name, one, job.sites)
    if not options:
        return Option(name=one, flops=flops, off=OutputError(relative=torch.zeros(1), total=0.0))
    off = OutputError(
        relative=torch.cat([option.off.relative for option in options.values()]),
        total=sum(option.off.total for option in options.values()) / len(options),
    )
    return Option(name=one, flops=flops, off=off)


@torch.no_grad()
def _measure(job: BlockJob, tensors: Mapping[str, Tensor], name: str, at: str, seen: Seen) -> Option:
    """A candidate started on the first tokens and judged on the last: x V^T, for the rounded input x and the rounded
    weights V of the site's linears, against what they give in full precision."""
    site, count = job.sites[at], max(1, len(seen.rows) // HELD_OUT)
    x, start = seen.rows[-count:], Seen.of(seen.rows[:-count])
    exact, acting = x, list[Any]()
    if name != "none":
        recipe = replace(job.recipe, transforms={named(at): name})
        alone = replace(job, recipe=recipe, sites={at: site})
        for built in build_transforms(alone, tensors, {at: start}):
            acting += built.values()
    copies, grid = site.sinks[0].copies, job.weight_grid(at)
    for transform in acting:
        x = transform.on_activations(x, copies)
    inputs = _rounded(job, at, x)
    wrong, power = [x.new_zeros(len(x)) for _ in inputs], x.new_zeros(len(x))
    for w in Stacked(tensors, site.readers):
        y = exact @ w.mT
        power += y.square().sum(-1)
        for transform in acting:
            w = transform.on_weights(w, copies)
        v = fake_quantize(w, *weight_range(w, grid), grid, job.store)
        for total, rounded in zip(wrong, inputs, strict=True):
            total += (rounded @ v.mT - y).square().sum(-1)
    best = min((error_of(total, power) for total in wrong), key=lambda one: one.error)
    return Option(name=name, flops=flops_of(name, site), off=best)


def _rounded(job: BlockJob, at: str, x: Tensor) -> list[Tensor]:
    clips = job.activation_grid(at) is not None and job.clipping(at) != "none"
    return [job.site_input(at, clip=ratio).rounded(x) for ratio in (CLIPS if clips else CLIPS[:1])]

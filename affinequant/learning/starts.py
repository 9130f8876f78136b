"""Where the transforms of a block start: in closed form, from what reaches its sites in one pass over its inputs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.models.decoder import spread
from affinequant.models.on_demand import Stacked
from affinequant.models.sites import (
    SHARED,
    Site,
    Structure,
    block_width,
    in_expert,
    kronecker_factors,
    named,
    shared_width,
)
from affinequant.recipe.recipe import AUTO
from affinequant.rounding.job import BlockJob
from affinequant.transforms import SHIFT, OnlineTransform, Transform, build, split_parts, structures_of
from affinequant.transforms.linalg import orthogonal_factors
from affinequant.transforms.wush import balance, block_moments, wush, wush_blocks, wush_kronecker_rows

ROWS = 4096
"""Tokens from which a closed form is computed, about."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What reaches a site: the least and the largest value of each feature, and some tokens."""

    low: Float[Tensor, " width"]
    high: Float[Tensor, " width"]
    rows: Float[Tensor, "tokens width"]

    @property
    def largest(self) -> Float[Tensor, " width"]:
        """The largest magnitude of each feature."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def shifted(self, by: Float[Tensor, " width"]) -> "Seen":
        """The same, less `by`."""
        return Seen(self.low - by, self.high - by, self.rows - by)

    @staticmethod
    def of(rows: Float[Tensor, "tokens width"]) -> "Seen":
        """These tokens, and no more."""
        return Seen(rows.amin(0), rows.amax(0), rows)


class Watch:
    """An `OnInput` that changes nothing and remembers what closed forms need of one pass over all samples in order."""

    def __init__(self, samples: int, tokens: int, seed: int, rows: int = ROWS) -> None:
        """Args:
        samples: how many will come by, each of so many `tokens`.
        seed: decides which of their tokens are kept: about `rows`.
        """
        self.chosen = spread(samples, tokens, rows, seed)
        self.most, self.strides = rows // 4, dict[str, int]()
        self.passed: dict[str, int] = {}
        self.ends: dict[str, tuple[Tensor, Tensor]] = {}
        self.rows: dict[str, list[Tensor]] = {}

    def __call__(self, site: str, value: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Look at what reaches a site."""
        low, high = value.detach().flatten(0, -2).aminmax(dim=0)
        if site in self.ends:
            low, high = torch.minimum(self.ends[site][0], low), torch.maximum(self.ends[site][1], high)
        self.ends[site] = low, high
        # As they are: divided by their sizes, tokens gave a worse start (1.74 against 1.50 times full precision).
        start = self.passed.get(site, 0)
        if in_expert(site):
            self._note_routed(site, value.detach().flatten(0, -2), start)
            return value
        self.passed[site] = start + len(value)
        chosen = self.chosen[start : start + len(value)].to(value.device)
        self.rows.setdefault(site, []).append(value.detach()[chosen].float())
        return value

    def _note_routed(self, site: str, rows: Tensor, passed: int) -> None:
        """All that is sent to one expert, then every second of it, and so on: nobody knows before how much there will be,
        and experts are many."""
        self.passed[site], stride = passed + len(rows), self.strides.setdefault(site, 1)
        kept = [*self.rows.get(site, []), rows[-passed % stride :: stride].float()]
        if sum(map(len, kept)) > self.most:
            kept, self.strides[site] = [torch.cat(kept)[::2]], 2 * stride
        self.rows[site] = kept

    def seen(self) -> dict[str, Seen]:
        """By site, what was remembered; an expert that no token was sent to has seen nothing."""
        return {site: Seen(*ends, torch.cat(self.rows[site])) for site, ends in self.ends.items()}


def starved_sites(job: BlockJob, watch: Watch) -> set[str]:
    """The sites in experts that fewer tokens came by than they have features. What is there starts plainly and is not
    trained: it would fit those few."""
    return {name for name, site in job.sites.items() if in_expert(name) and watch.passed.get(name, 0) < site.width}


def looks_at_data(job: BlockJob) -> bool:
    """Whether any transform of the recipe starts from what reaches its site: fixed rotations do not."""
    return AUTO in job.recipe.transforms.values() or bool(sites_that_look(job))


def sites_that_look(job: BlockJob) -> set[str]:
    """The sites whose transform starts from what reaches them."""
    return {name for name, parts in _wanted(job).items() if _looks(job, *parts)}


def build_transforms(
    job: BlockJob, tensors: Mapping[str, Tensor], seen: Mapping[str, Seen]
) -> tuple[dict[str, Transform], dict[str, OnlineTransform]]:
    """The recipe's transforms of one block in the order of its sites: those that fold and those that stay online. The
    residual stream's is the model's own and not among them.

    Args:
        seen: by site, what reaches it in full precision (`Watch`); transforms at a site without start plainly.
    """
    folded, online = {}, {}
    for name, (first, second) in _wanted(job).items():
        site = job.sites[name]
        weights, start, shift = Stacked(tensors, site.readers), None, None
        if name in seen:
            reaching = seen[name]
            if first.split("+")[0] == SHIFT:
                shift = _middle(site, reaching)
                reaching = reaching.shifted(shift.reshape(site.heads, -1).repeat(1, site.sinks[0].copies).reshape(-1))
            if site.kind == "heads" and first in ("block", f"{SHIFT}+block"):
                start = _head_blocks(site, reaching, weights)
            elif second:
                start = _online_balance(site, reaching, weights)
            else:
                start = _diagonal(job, site, reaching, weights)
        if first:
            start = job.starts.get(name, start)
            folded[name] = build(first, site, seed=job.seed(name), alpha=job.recipe.alpha, start=start, shift=shift)
            folded[name].to(job.decoder.device)
        if second:
            if job.recipe.start == "hadamard":
                matrices = _rotations(second, site)
            else:
                matrices = _matrices(second, site, seen.get(name), weights, folded.get(name))
            made = build(second, site, seed=job.seed(f"{name}/online"), alpha=job.recipe.alpha, start=matrices)
            online[name] = made.to(job.decoder.device)
    return folded, online  # pyright: ignore[reportReturnType]


def _wanted(job: BlockJob) -> dict[str, tuple[str, str]]:
    """Site to the names of what folds and what stays online there; nothing where nobody reads what is rounded."""
    return {
        name: split_parts(job.recipe.transforms[named(name)], site)
        for name, site in job.sites.items()
        if named(name) in job.recipe.transforms and site.kind != "residual" and site.readers
    }


def _looks(job: BlockJob, first: str, second: str) -> bool:
    """Whether anything at a site starts from what reaches it: fixed rotations do not."""
    fixed = job.recipe.start == "hadamard" or second.startswith("hadamard")
    return bool(first and not first.startswith("hadamard")) or bool(second and not fixed)


def _middle(site: Site, seen: Seen) -> Tensor:
    """(max + min) / 2 of each feature of the site [width]: the two ends are then equally far from zero (Outlier
    Suppression+, arXiv 2304.09145, eq. 4)."""
    low, high = -_per_head(site, -seen.low.float(), "max"), _per_head(site, seen.high.float(), "max")
    return (low + high) / 2


def _diagonal(job: BlockJob, site: Site, seen: Seen, weights: Stacked) -> Tensor:
    """p = w^(1-b) / a^b [width] with a and w the largest magnitudes per feature (SmoothQuant, arXiv 2211.10438, eq. 4), or
    their root mean squares."""
    if job.recipe.balance_by == "rms":
        a, w = (energy.sqrt().float() for energy in _energies(site, seen, weights))
    else:
        largest = seen.largest, torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        a, w = (_per_head(site, value.float(), "max") for value in largest)
    log_p = (1 - job.recipe.balance) * w.clamp_min(1e-5).log() - job.recipe.balance * a.clamp_min(1e-5).log()
    return (log_p - log_p.mean()).exp()


def _online_balance(site: Site, seen: Seen, weights: Stacked) -> Tensor:
    """The diagonal ahead of an online transform, by energies: what it leaves, the transform levels."""
    return balance(*_energies(site, seen, weights)).float()


def _energies(site: Site, seen: Seen, weights: Stacked) -> tuple[Tensor, Tensor]:
    """Mean squares of each feature of the site [width]: over tokens, and over the rows of what reads it."""
    moment = seen.rows.double().square().mean(0)
    means = [(len(part), part.double().square().mean(0)) for part in weights]
    rows = sum(count for count, _ in means)
    gram = torch.stack([mean * (count / rows) for count, mean in means]).sum(0)
    return _per_head(site, moment, "mean"), _per_head(site, gram, "mean")


@torch.no_grad()
def _head_blocks(site: Site, seen: Seen, weights: Stacked) -> Tensor:
    """A matrix for each KV head, over the query heads that share it: what a rotation does blindly, on what is there."""
    moment, gram = (
        block_moments(value, site.heads, site.sinks[0].copies) / len(value)
        for value in (seen.rows, torch.cat(list(weights)).float())
    )
    return wush(moment, gram)


def _per_head(site: Site, value: Tensor, how: str) -> Tensor:
    """Features as the sinks read them to features of the site: over the heads that share one."""
    parts = value.reshape(site.heads, site.sinks[0].copies, -1)
    return (parts.amax(1) if how == "max" else parts.mean(1)).reshape(-1)


def _rotations(name: str, site: Site) -> Tensor | tuple[Tensor, Tensor] | None:
    """An orthogonal matrix without large entries for each that the first online part starts from, whatever the data."""
    how = _free(name)
    if how == "kronecker":
        first, second = (torch.kron(*orthogonal_factors(size)) for size in kronecker_factors(site))
        return first, second
    if how is None:
        return None
    if how in SHARED:
        return torch.kron(*orthogonal_factors(shared_width(how)))
    width = block_width(site) if how == "block" else site.width
    return torch.kron(*orthogonal_factors(width)).repeat(site.width // width, 1, 1)


def _free(name: str) -> Structure | None:
    """The structure of the first online part where it can start from any matrices: triangular factors cannot, and
    rotations have a start of their own."""
    first = name.split("+")[0]
    structure = structures_of(first, where="")[0]
    return structure if structure in ("kronecker", "block", "dense", *SHARED) and first != "lu" else None


@torch.no_grad()
def _matrices(
    name: str, site: Site, seen: Seen | None, weights: Stacked, folded: Transform | None
) -> Tensor | tuple[Tensor, Tensor] | None:
    """What the first online part starts from, on activations and weights as the folded part leaves them."""
    structure = _free(name)
    if seen is None or structure is None:
        return None
    x, w, copies = seen.rows, weights.each(lambda part: part.float()), site.sinks[0].copies
    if folded is not None:
        x, w = folded.on_activations(x, copies), w.each(lambda part: folded.on_weights(part, copies))
    if structure == "kronecker":
        n1, n2 = kronecker_factors(site)  # of a slice: all slices share them
        return wush_kronecker_rows(x.reshape(-1, n1 * n2), w.each(lambda part: part.reshape(-1, n1 * n2)), n1, n2)
    if structure in SHARED:
        size = shared_width(structure)
        x, w = x.double().reshape(-1, size), w.each(lambda part: part.double().reshape(-1, size))
        return wush(x.mT @ x / len(x), w.moment())
    width = block_width(site) if structure == "block" else x.shape[1]
    return wush_blocks(x.mT @ x / len(x), w.moment(), width)

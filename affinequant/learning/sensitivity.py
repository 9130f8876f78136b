"""Which parts of a network suffer: how far predictions diverge when one block's linears at one site alone are rounded."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.data.tokens import Tokens
from affinequant.learning.divergence import stream_divergence
from affinequant.learning.network import block_job, block_reader, read_outer
from affinequant.models.decoder import Decoder
from affinequant.models.sites import named
from affinequant.numbers.weights import fake_quantize, weight_range
from affinequant.plan import Plan
from affinequant.progress import Steps
from affinequant.recipe.scheme import Scheme
from affinequant.rounding.job import BlockJob
from affinequant.transforms.fold import Tensors

SAMPLES, LENGTH = 2, 512
"""Of how many calibration samples, and of how many of their tokens, the divergence is the mean; fewer where there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What rounding the linears that read `site` in one block costs, with what they read: `kl` in nats per token; by the
    numbers of `scheme`, or the recipe's."""

    block: int
    site: str
    linears: tuple[str, ...]
    weights: int
    kl: float
    scheme: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Linears of a block, named within it, that are rounded together, with what they read at `sites`."""

    name: str
    sites: frozenset[str]
    linears: tuple[str, ...]


Parts = Callable[[BlockJob], Iterable[Part]]


def looked_at(made: Plan) -> Plan:
    """The plan with as few samples as are looked at."""
    recipe = made.recipe
    few = {"samples": min(recipe.samples, SAMPLES), "seq_len": min(recipe.seq_len, LENGTH)}
    return replace(made, recipe=replace(recipe, **few))


def by_site(job: BlockJob) -> list[Part]:
    """The linears of a block by the site that they read; those of all experts together."""
    groups: dict[str, dict[str, tuple[str, ...]]] = {}
    for site, linears in job.family.input_groups():
        groups.setdefault(named(site), {})[site] = linears
    return [
        Part(name=name, sites=frozenset(sites), linears=tuple(chain.from_iterable(sites.values())))
        for name, sites in groups.items()
    ]


@torch.no_grad()
def sensitivities(
    made: Plan,
    decoder: Decoder,
    tokens: Tokens,
    say: Callable[[str], None] = lambda text: None,
    parts: Parts = by_site,
    schemes: Sequence[Scheme] = (),
) -> list[Sensitivity]:
    """Round each part of each block alone, to nearest and without transforms, and let the rest be in full precision.

    One pass over the blocks: behind each of them there is a stream more for each of its parts, and all streams go on
    together, so that weights are read once and one block of them is in memory. Operations grow with the square of the
    number of blocks. `say` is told how far it is.

    Args:
        parts: of a block, what is rounded together.
        schemes: by whose numbers each part is rounded, once by each; without any by those that the plan has for it.
    """
    outer, read = read_outer(made, decoder), block_reader(made, decoder)
    clean, kwargs = decoder.embed(tokens.ids, outer)
    found, streams = list[Sensitivity](), list[Tensor]()
    for index in Steps(say, "blocks", made.dims.layers).each(range(made.dims.layers)):
        job, tensors = block_job(made, decoder, index, kwargs), read(index)
        streams = [job.run_all(tensors, stream) for stream in streams]
        jobs = [replace(job, scheme=scheme, others={}) for scheme in schemes] or [job]
        for part, mine in product(parts(job), jobs):
            streams.append(mine.run_all(_rounded(mine, tensors, part), clean, partial(_round_input, mine, part)))
            weights = sum(tensors[f"{linear}.weight"].numel() for linear in part.linears)
            about = {"block": index, "site": part.name, "linears": part.linears, "weights": weights}
            found.append(Sensitivity(**about, kl=0.0, scheme=mine.scheme.name))
        clean = job.run_all(tensors, clean)
    head = decoder.head(outer)
    ends = Steps(say, "comparing", len(streams)).each(streams)
    pairs = zip(found, ends, strict=True)
    return [replace(one, kl=stream_divergence(decoder, stream, clean, head)) for one, stream in pairs]


def _round_input(job: BlockJob, part: Part, name: str, x: Tensor) -> Tensor:
    return job.site_input(name)(x) if name in part.sites else x


def _rounded(job: BlockJob, tensors: Tensors, part: Part) -> dict[str, Float[Tensor, "rows columns"]]:
    rounded, mine = dict(tensors), {*part.linears}
    for name, linears in job.family.input_groups():
        grid = job.weight_grid(name)
        for linear in (one for one in linears if one in mine):
            weight = tensors[f"{linear}.weight"].float()
            rounded[f"{linear}.weight"] = fake_quantize(weight, *weight_range(weight, grid), grid, job.store)
    return rounded

"""Which parts of a network suffer: how far predictions diverge when one block's linears at one site alone are rounded."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

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
from affinequant.rounding.job import BlockJob
from affinequant.transforms.fold import Tensors

SAMPLES, LENGTH = 2, 512
"""Of how many calibration samples, and of how many of their tokens, the divergence is the mean; fewer where there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What rounding the linears that read `site` in one block costs, with what they read: `kl` in nats per token."""

    block: int
    site: str
    linears: tuple[str, ...]
    weights: int
    kl: float


def looked_at(made: Plan) -> Plan:
    """The plan with as few samples as are looked at."""
    recipe = made.recipe
    few = {"samples": min(recipe.samples, SAMPLES), "seq_len": min(recipe.seq_len, LENGTH)}
    return replace(made, recipe=replace(recipe, **few))


@torch.no_grad()
def sensitivities(
    made: Plan, decoder: Decoder, tokens: Tokens, say: Callable[[str], None] = lambda text: None
) -> list[Sensitivity]:
    """Round each site of each block alone, to nearest and without transforms, and let the rest be in full precision.

    One pass over the blocks: behind each of them there is a stream more for each of its sites, and all streams go on
    together, so that weights are read once and one block of them is in memory. Operations grow with the square of the
    number of blocks. `say` is told how far it is.
    """
    outer, read = read_outer(made, decoder), block_reader(made, decoder)
    clean, kwargs = decoder.embed(tokens.ids, outer)
    found, streams = list[Sensitivity](), list[Tensor]()
    for index in Steps(say, "blocks", made.dims.layers).each(range(made.dims.layers)):
        job, tensors = block_job(made, decoder, index, kwargs), read(index)
        streams = [job.run_all(tensors, stream) for stream in streams]
        for site, linears in _groups(job).items():
            rounding = functools.partial(_round_input, job, site)
            streams.append(job.run_all(_rounded(job, tensors, site), clean, rounding))
            weights = sum(tensors[f"{linear}.weight"].numel() for linear in linears)
            found.append(Sensitivity(block=index, site=site, linears=linears, weights=weights, kl=0.0))
        clean = job.run_all(tensors, clean)
    head = decoder.head(outer)
    ends = Steps(say, "comparing", len(streams)).each(streams)
    pairs = zip(found, ends, strict=True)
    return [replace(one, kl=stream_divergence(decoder, stream, clean, head)) for one, stream in pairs]


def _groups(job: BlockJob) -> dict[str, tuple[str, ...]]:
    """Site -> the linears that read it; of all experts together."""
    groups: dict[str, tuple[str, ...]] = {}
    for name, linears in job.family.input_groups():
        groups[named(name)] = (*groups.get(named(name), ()), *linears)
    return groups


def _round_input(job: BlockJob, site: str, name: str, x: Tensor) -> Tensor:
    return job.site_input(name)(x) if named(name) == site else x


def _rounded(job: BlockJob, tensors: Tensors, site: str) -> dict[str, Float[Tensor, "rows columns"]]:
    rounded = dict(tensors)
    for name, linears in job.family.input_groups():
        grid = job.weight_grid(name)
        for linear in linears if named(name) == site else ():
            weight = tensors[f"{linear}.weight"].float()
            rounded[f"{linear}.weight"] = fake_quantize(weight, *weight_range(weight, grid), grid, job.store)
    return rounded

"""One block from real weights to codes, input group by input group, each on what the rounded part before it gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.models.attention import OnAttention
from affinequant.models.decoder import spread
from affinequant.numbers import in_units, unit_for
from affinequant.numbers.weights import LearnedRange, dequantize, to_integers, weight_range
from affinequant.rounding.gptq import GPTQFailure, search_activation_clip, search_weight_range
from affinequant.rounding.job import BlockJob
from affinequant.rounding.moments import Inputs, gather
from affinequant.rounding.replay import Noted, Replay
from affinequant.rounding.ways import Way, choose, round_by
from affinequant.transforms import OnlineTransform
from affinequant.transforms.fold import Tensors
from affinequant.transforms.online import stored_name

SEARCHED_TOKENS = 1024
"""Tokens on which activation clipping is searched, about: some of every sample."""


class Learned(Protocol):
    """What a block has learned, as rounding takes it."""

    online: dict[str, OnlineTransform]
    """By site, what acts on activations at run time."""
    on_attention: OnAttention | None
    ranges: dict[str, LearnedRange]
    """By linear, the range of its weights."""
    clips: dict[str, nn.Parameter]
    """By site, the logit of its ratio of clipping."""

    def after_rope(self) -> Tensors:
        """The rotation of queries and keys after RoPE."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A rounded block. `stored` goes to disk (codes, scales, zeros, clips, the rest); `tensors` holds the values, `clips`
    and `online` are what acts on each site's activations, and `after` is what the block then gives,
    `roundings` says by site how its linears were rounded."""

    stored: Tensors
    tensors: Tensors
    clips: Mapping[str, float]
    online: Mapping[str, Tensors]
    after: Float[Tensor, "samples tokens hidden"]
    linears: Mapping[str, Mapping[str, float]]
    roundings: Mapping[str, Mapping[str, Any]]
    events: tuple[str, ...] = ()


def round_block(
    job: BlockJob,
    tensors: Tensors,
    x: Float[Tensor, "samples tokens hidden"],
    learned: Learned,
    full: Float[Tensor, "samples tokens hidden"] | None = None,
    told: Callable[[int], None] = lambda linears: None,
    noted: Noted = lambda site, part, x, rounded: None,
) -> Rounded:
    """Quantise the folded block `tensors` on the inputs `x` that it will see.

    Args:
        learned: holds ranges found in training, if any.
        full: what the full-precision block sees; for rounding `auto` and `gptaq`.
        told: hears of each group that is done, how many linears it has.
        noted: hears of what each site's linears read, before and after it is rounded; perhaps more than once.
    """
    units: dict[str, float] = {}
    job = replace(job, units=units)  # filled in as sites are reached
    weights = {f"{linear.name}.weight" for linear in job.family.linears}
    stored = {name: tensor.to(job.store) for name, tensor in tensors.items() if name not in weights}
    work = {name: (tensor if name in weights else stored[name]).float() for name, tensor in tensors.items()}
    clips: dict[str, float] = {}
    online = {site: _plain(module.online()) for site, module in learned.online.items()}
    rotation = learned.after_rope()
    stored |= {stored_name(job.family.attention, part): tensor for part, tensor in rotation.items()}
    real, passing = dict(work), Replay(job, x, online, learned.on_attention, noted=noted)
    beside = None
    if job.recipe.rounding in ("gptaq", "auto"):
        assert full is not None, "a target on full-precision inputs needs them"
        beside = Replay(job, full, online)
    roundings: dict[str, Mapping[str, Any]] = {}
    figures: dict[str, dict[str, float]] = {}
    events: list[str] = []
    for site, members in job.family.input_groups():
        counts = job.scheme.activation is not None and job.scheme.activation.has_unit
        if counts or _needs_hessian(job) or "search" in job.recipe.activation_clip:
            passing.reach(site, work, clips)
        if counts:
            units[site] = _activation_unit(job, passing)
        clips[site] = _activation_clip(job, work, passing, site, members, learned)
        if beside is not None:
            beside.reach(site, real, {})
        inputs = gather(job, passing, beside, clips[site]) if _needs_hessian(job) else None
        rows, unit, roundings[site] = _round_group(job, work, members, inputs, learned, events)
        for member, (codes, scale, zero) in rows.items():
            weight = work[f"{member}.weight"]
            value = dequantize(codes, scale, zero, job.weight_grid)
            figures[member] = {"sqnr": _decibel(weight, value), "clip": clips[site]}
            work[f"{member}.weight"] = value
            stored |= {f"{member}.codes": to_integers(codes), f"{member}.scale": scale}
            if not job.scheme.weight.symmetric:
                stored[f"{member}.zero"] = to_integers(zero)
            if unit is not None:
                stored[f"{member}.weight_unit"] = torch.tensor(unit)
            if job.scheme.activation is not None:
                stored[f"{member}.input_clip"] = torch.tensor(clips[site])
            if site in units:
                stored[f"{member}.input_unit"] = torch.tensor(units[site])
            stored |= {stored_name(member, part): tensor.clone() for part, tensor in online.get(site, {}).items()}
        told(len(members))
    return Rounded(
        stored=stored,
        tensors=work,
        clips=clips,
        online=online,
        after=passing.after(work, clips),
        linears=figures,
        roundings=roundings,
        events=tuple(events),
    )


def _plain(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def _needs_hessian(job: BlockJob) -> bool:
    return job.recipe.rounding != "nearest" or "search" in job.recipe.weight_clip


def _activation_clip(
    job: BlockJob, work: Tensors, passing: Replay, site: str, members: tuple[str, ...], learned: Learned
) -> float:
    if job.activation_grid is None or job.recipe.activation_clip == "none":
        return 1.0
    if job.recipe.activation_clip == "learn":
        return float(learned.clips[site].detach().sigmoid())
    samples, tokens, _ = passing.x.shape
    chosen = spread(samples, tokens, SEARCHED_TOKENS, job.seed(f"{site}/clip")).to(job.decoder.device)
    seen = [value[chosen[part]].float() for part, value in passing.values()]
    weight = torch.cat([work[f"{member}.weight"] for member in members])
    return search_activation_clip(torch.cat(seen), weight, job.site_input(site))


def _activation_unit(job: BlockJob, passing: Replay) -> float:
    """The unit of the activations that have been reached, from the largest of them."""
    assert job.activation_grid is not None
    largest = [float(value.abs().amax()) for _, value in passing.values() if value.numel()]
    unit = unit_for(job.activation_grid, torch.tensor(max(largest, default=0.0)))
    assert unit is not None
    return unit


def _grids(
    job: BlockJob, work: Tensors, members: tuple[str, ...], inputs: Inputs | None, learned: Learned
) -> tuple[Tensor, Tensor, float | None]:
    """(scale, zero, unit) of the linears that read one input, one below the other; engines fuse them, so that they share
    a unit."""
    grid, pairs = job.weight_grid, []
    for member in members:
        weight = work[f"{member}.weight"]
        if "search" in job.recipe.weight_clip:
            assert inputs is not None
            low, high = search_weight_range(weight, inputs.every.hessian, grid, job.store)
        elif job.recipe.weight_clip == "learn":
            with torch.no_grad():
                low, high = learned.ranges[member](weight, grid)
        else:
            low, high = weight_range(weight, grid)
        pairs.append((low, high))
    low, high = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    unit = unit_for(grid, torch.maximum(high, -low))
    return *in_units(grid, unit).params(low, high, job.store), unit


def _round_group(
    job: BlockJob,
    work: Tensors,
    members: tuple[str, ...],
    inputs: Inputs | None,
    learned: Learned,
    events: list[str],
) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], float | None, dict[str, Any]]:
    """Linear to (codes, scale, zero) for those that read one input, which are rounded together; the unit of their scales;
    and how: the name of the way, with `auto` the held-out error of each."""
    grid, damping, sweeps = job.weight_grid, job.recipe.damping, job.recipe.sweeps
    scale, zero, unit = _grids(job, work, members, inputs, learned)
    whole = torch.cat([work[f"{member}.weight"] for member in members])
    errors: Mapping[str, float] = {}
    if job.recipe.rounding == "auto":
        assert inputs is not None
        way, errors = choose(whole, inputs, scale, zero, grid, damping, sweeps)
    else:
        way = Way(kind=job.recipe.rounding, damping=damping, pull=damping, sweeps=sweeps)
    try:
        codes = round_by(way, whole, inputs.every if inputs else None, scale, zero, grid)
    except GPTQFailure as problem:
        events.append(f"{', '.join(members)} rounded to nearest: {problem}")
        way = Way(kind="nearest")
        codes = round_by(way, whole, None, scale, zero, grid)
    sizes = [len(work[f"{member}.weight"]) for member in members]
    rows = zip(codes.split(sizes), scale.split(sizes), zero.split(sizes), strict=True)
    return dict(zip(members, rows, strict=True)), unit, {"rounding": str(way), **({"errors": errors} if errors else {})}


def _decibel(weight: Tensor, value: Tensor) -> float:
    noise = (weight - value).square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return float(10 * torch.log10(weight.square().sum() / noise))

"""One block from real weights to codes, input group by input group, each on what the rounded part before it gives."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.models.decoder import spread
from affinequant.models.on_demand import OnDemand, Stacked
from affinequant.models.sites import in_expert
from affinequant.numbers import Grid, in_units, unit_for
from affinequant.numbers.weights import dequantize, to_integers, weight_range
from affinequant.recipe.scheme import Scheme
from affinequant.rounding.gptq import GPTQFailure, search_activation_clip, search_weight_range
from affinequant.rounding.job import BlockJob
from affinequant.rounding.moments import Inputs, gather, shrunk, values_of
from affinequant.rounding.replay import Noted, Replay
from affinequant.rounding.rounded import Learned, Rounded
from affinequant.rounding.ways import Way, choose, pulled, round_by
from affinequant.transforms.fold import Tensors
from affinequant.transforms.online import stored_name

SEARCHED_TOKENS = 1024
"""Tokens on which activation clipping is searched, about: some of every sample."""


def round_block(
    job: BlockJob,
    tensors: Mapping[str, Tensor],
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

    Of experts whose `tensors` are on demand one at a time is in work, and afterwards its codes alone are there.
    """
    units: dict[str, float] = {}
    job = replace(job, units=units)  # filled in as sites are reached
    weights = {f"{linear.name}.weight" for linear in job.family.linears}
    changed = job.family.changed()
    late = {name for name in tensors.names if name in weights} if isinstance(tensors, OnDemand) else set[str]()
    there = {name: tensors[name] for name in tensors if name not in late}
    stored = {
        name: tensor.to(job.store) if name.rpartition(".")[0] in changed else tensor
        for name, tensor in there.items()
        if name not in weights
    }
    values = {name: (tensor if name in weights else stored[name]).float() for name, tensor in there.items()}
    done = dict[str, tuple[Tensor, Tensor, Tensor, Grid]]()
    work = OnDemand(
        values,
        late,
        lambda name: dequantize(*done[name]) if name in done else tensors[name].float(),
    )
    clips: dict[str, float] = {}
    online = {site: _plain(module.online()) for site, module in learned.online.items()}
    rotation = learned.after_rope()
    stored |= {stored_name(job.family.attention, part): tensor for part, tensor in rotation.items()}
    real = OnDemand(values, late, lambda name: tensors[name].float())
    passing = Replay(job, x, online, learned.on_attention, noted=noted)
    assert full is not None or job.recipe.rounding not in ("gptaq", "auto"), "a target needs full-precision inputs"
    beside = Replay(job, full, online) if full is not None and job.recipe.rounding in ("gptaq", "auto") else None
    groups, routed, starved, drawn = dict(job.family.input_groups()), list[int](), list[str](), list[str]()
    roundings: dict[str, Mapping[str, Any]] = {}
    figures: dict[str, dict[str, float]] = {}
    events: list[str] = []
    for site, expert, members in job.family.by_expert():
        inner, numbers, grid = in_expert(site), job.numbers(site), job.weight_grid(site)
        counts = numbers.activation is not None and numbers.activation.has_unit
        if site not in clips and not inner:
            if counts or _needs_hessian(job) or "search" in job.recipe.activation_clip:
                passing.reach(site, work, clips)
            if counts:
                units[site] = _activation_unit(job, site, passing.values())
            clips[site] = _activation_clip(job, Stacked(work, groups[site]), passing, site, learned)
            if beside is not None:
                beside.reach(site, real, {})
        if expert is not None and not routed:
            routed = passing.route(work, clips)
            if beside is not None:
                beside.route(real, {}, like=passing)
        here = {member: work[f"{member}.weight"] for member in members}
        scarce = expert is not None and routed[expert] < here[members[0]].shape[1]
        starved += members if scarce else ()
        if inner:
            if counts:
                units[site] = _activation_unit(job, site, values_of(passing, site, expert))
            whole = () if scarce else (torch.cat(list(here.values())),)
            clips[site] = _activation_clip(job, whole, passing, site, learned, expert)
        draws = scarce and not inner and job.recipe.rounding != "nearest"
        looks = (_needs_hessian(job) and not scarce) or (draws and routed[expert or 0] > 0)
        inputs = gather(job, passing, beside, site, clips[site], expert) if looks else None
        if draws:
            inputs = shrunk(job, passing, site, clips[site], inputs, expert or 0)
            drawn += members
        group = site if expert is None or inner else f"{site}.{expert}"
        rows, unit, roundings[group] = _round_group(job, grid, here, inputs, learned, events, plainly=scarce)
        for member, (codes, scale, zero) in rows.items():
            value, name = dequantize(codes, scale, zero, grid), f"{member}.weight"
            figures[member] = {"sqnr": _decibel(here.pop(member), value), "clip": clips[site]}
            made = _stored(numbers, codes, scale, zero, unit, clips[site], units.get(site))
            stored |= {f"{member}.{part}": tensor for part, tensor in made.items()}
            stored |= {stored_name(member, part): tensor.clone() for part, tensor in online.get(site, {}).items()}
            if name in late:
                done[name] = (made["codes"], scale, zero, grid)
            else:
                work.there[name] = value
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
        routed=tuple(routed),
        starved=tuple(starved),
        drawn=tuple(drawn),
    )


def _stored(
    numbers: Scheme,
    codes: Float[Tensor, "rows n"],
    scale: Float[Tensor, "rows groups"],
    zero: Float[Tensor, "rows groups"],
    unit: float | None,
    clip: float,
    input_unit: float | None,
) -> Tensors:
    """What goes to disk of a linear, by part: its units and what its inputs are rounded with where its numbers have such."""
    parts: Tensors = {"codes": to_integers(codes), "scale": scale}
    if not numbers.weight.symmetric:
        parts["zero"] = to_integers(zero)
    if numbers.activation is not None:
        parts["input_clip"] = torch.tensor(clip)
    units = {"weight_unit": unit, "input_unit": input_unit}
    return parts | {name: torch.tensor(value) for name, value in units.items() if value is not None}


def _plain(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def _needs_hessian(job: BlockJob) -> bool:
    return job.recipe.rounding != "nearest" or "search" in job.recipe.weight_clip


def _activation_clip(
    job: BlockJob,
    weight: Iterable[Tensor],
    passing: Replay,
    site: str,
    learned: Learned,
    expert: int | None = None,
) -> float:
    """The ratio at a site whose linears have this `weight`; where an expert's has none, since it sees too little, one."""
    scarce = expert is not None and not weight
    if job.activation_grid(site) is None or job.clipping(site) == "none" or scarce:
        return 1.0
    if job.clipping(site) == "learn":
        return float(learned.clips[site].detach().sigmoid())
    samples, tokens, _ = passing.x.shape
    if expert is not None:
        rows = torch.cat([value[0].float() for _, value in passing.of_expert(site, expert)])
        return search_activation_clip(rows[:: max(1, len(rows) // SEARCHED_TOKENS)], weight, job.site_input(site))
    chosen = spread(samples, tokens, SEARCHED_TOKENS, job.seed(f"{site}/clip")).to(job.decoder.device)
    seen = [value[chosen[part]].float() for part, value in passing.values()]
    return search_activation_clip(torch.cat(seen), weight, job.site_input(site))


def _activation_unit(job: BlockJob, site: str, values: Iterable[tuple[slice, Tensor]]) -> float:
    """The unit of the activations at a site, from the largest of them."""
    grid = job.activation_grid(site)
    assert grid is not None
    largest = [float(value.abs().amax()) for _, value in values if value.numel()]
    unit = unit_for(grid, torch.tensor(max(largest, default=0.0)))
    assert unit is not None
    return unit


def _grids(
    job: BlockJob,
    grid: Grid,
    weights: Mapping[str, Tensor],
    inputs: Inputs | None,
    learned: Learned,
    *,
    plainly: bool,
) -> tuple[Tensor, Tensor, float | None]:
    """(scale, zero, unit) of the linears that read one input, one below the other; engines fuse them, so that they share
    a unit."""
    pairs = []
    for member, weight in weights.items():
        if plainly:
            low, high = weight_range(weight, grid)
        elif "search" in job.recipe.weight_clip:
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
    grid: Grid,
    weights: Mapping[str, Tensor],
    inputs: Inputs | None,
    learned: Learned,
    events: list[str],
    *,
    plainly: bool,
) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], float | None, dict[str, Any]]:
    """Linear to (codes, scale, zero) for those that read one input, which are rounded together, by their weights; the unit
    of their scales; and how: the name of the way, with `auto` the held-out error of each. `plainly`: on full
    ranges, to nearest or, with `inputs`, by GPTQ."""
    damping, sweeps = job.recipe.damping, job.recipe.sweeps
    scale, zero, unit = _grids(job, grid, weights, inputs, learned, plainly=plainly)
    whole = torch.cat(list(weights.values()))
    errors: Mapping[str, float] = {}
    way = Way(
        kind=job.recipe.rounding if job.recipe.rounding != "auto" else "gptq",
        damping=damping,
        pull=pulled(damping),
        sweeps=sweeps,
    )
    if plainly:
        way = Way(kind="gptq" if inputs else "nearest", damping=damping, sweeps=sweeps)
    elif job.recipe.rounding == "auto" and inputs is not None and inputs.held is not None:
        way, errors = choose(whole, inputs, scale, zero, grid, damping, sweeps)
    try:
        codes = round_by(way, whole, inputs.every if inputs else None, scale, zero, grid)
    except GPTQFailure as problem:
        events.append(f"{', '.join(weights)} rounded to nearest: {problem}")
        way = Way(kind="nearest")
        codes = round_by(way, whole, None, scale, zero, grid)
    sizes = [len(weight) for weight in weights.values()]
    rows = zip(codes.split(sizes), scale.split(sizes), zero.split(sizes), strict=True)
    return dict(zip(weights, rows, strict=True)), unit, {"rounding": str(way), **({"errors": errors} if errors else {})}


def _decibel(weight: Tensor, value: Tensor) -> float:
    noise = (weight - value).square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return float(10 * torch.log10(weight.square().sum() / noise))

"""One block from real weights to codes, input group by input group, each on what the rounded part before it gives."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.block import BlockJob, BlockObjective
from affinequant.fold import Tensors
from affinequant.gptq import GPTQFailure, gptq, search_activation_clip, search_weight_range
from affinequant.quantizer import codes_of, dequantize, fake_quantize_activation, grid, to_integers, weight_range
from affinequant.stream import StopForward, slices
from affinequant.transforms.online import apply_online, stored_name

SAMPLE_TOKENS = 1024
"""Tokens on which activation clipping is searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A rounded block. `stored` goes to disk (codes, scales, zeros, clips, the rest); `tensors` holds the values, `clips`
    and `online` are what acts on each site's activations."""

    stored: Tensors
    tensors: Tensors
    clips: Mapping[str, float]
    online: Mapping[str, Tensors]
    linears: Mapping[str, Mapping[str, float]]
    events: tuple[str, ...] = ()


def round_block(
    job: BlockJob, tensors: Tensors, x: Float[Tensor, "samples tokens hidden"], learned: BlockObjective
) -> Rounded:
    """Quantise the folded block `tensors` on the inputs `x` that it will see.

    With rounding `nearest` and nothing to search, `x` is not used. `learned` holds ranges found in training, if any.
    """
    weights = {f"{linear.name}.weight" for linear in job.decoder.family.linears}
    stored = {name: tensor.to(job.store) for name, tensor in tensors.items() if name not in weights}
    work = {name: (tensor if name in weights else stored[name]).float() for name, tensor in tensors.items()}
    clips: dict[str, float] = {}
    online = {site: _plain(module.online()) for site, module in learned.online.items()}
    rotation = learned.after_rope()
    stored |= {stored_name(job.decoder.family.attention, part): tensor for part, tensor in rotation.items()}
    figures: dict[str, dict[str, float]] = {}
    events: list[str] = []
    for site, members in job.decoder.family.input_groups():
        clips[site] = _activation_clip(job, work, x, site, members, clips, learned, online)
        hessian = _hessian(job, work, x, site, clips, learned, online) if _needs_hessian(job) else None
        for member, codes, scale, zero in _round_group(job, work, members, hessian, learned, events):
            weight = work[f"{member}.weight"]
            value = dequantize(codes, scale, zero, job.scheme.weight)
            figures[member] = {"sqnr": _decibel(weight, value), "clip": clips[site]}
            work[f"{member}.weight"] = value
            stored |= {f"{member}.codes": to_integers(codes), f"{member}.scale": scale}
            if not job.scheme.weight.symmetric:
                stored[f"{member}.zero"] = to_integers(zero)
            if job.scheme.activation is not None:
                stored[f"{member}.input_clip"] = torch.tensor(clips[site])
            stored |= {stored_name(member, part): tensor.clone() for part, tensor in online.get(site, {}).items()}
    return Rounded(stored=stored, tensors=work, clips=clips, online=online, linears=figures, events=tuple(events))


def quantized_input(job: BlockJob, clips: Mapping[str, float], online: Mapping[str, Tensors]):
    """The `on_input` that transforms activations and rounds them with these clip ratios; a site that has no ratio yet is
    not rounded."""
    fmt = job.scheme.activation

    def on_input(site: str, x: Tensor) -> Tensor:
        if site in online:
            x = apply_online(x, online[site])
        if fmt is None or site not in clips:
            return x
        return fake_quantize_activation(x, fmt, clips[site], job.sites[site].slices)

    return on_input


def _plain(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def _needs_hessian(job: BlockJob) -> bool:
    return job.recipe.rounding == "gptq" or "search" in job.recipe.weight_clip


def _activation_clip(
    job: BlockJob,
    work: Tensors,
    x: Tensor,
    site: str,
    members: tuple[str, ...],
    clips: Mapping[str, float],
    learned: BlockObjective,
    online: Mapping[str, Tensors],
) -> float:
    fmt = job.scheme.activation
    if fmt is None or job.recipe.activation_clip == "none":
        return 1.0
    if job.recipe.activation_clip == "learn":
        return float(learned.clips[site].detach().sigmoid())
    count = max(1, min(len(x), SAMPLE_TOKENS // x.shape[1]))
    seen: list[Tensor] = []
    _visit(job, work, x[:count], site, clips, learned, online, lambda value: seen.append(value.float()))
    sample = torch.cat(seen)[:SAMPLE_TOKENS]
    weight = torch.cat([work[f"{member}.weight"] for member in members])
    return search_activation_clip(sample, weight, fmt, job.sites[site].slices)


def _hessian(
    job: BlockJob,
    work: Tensors,
    x: Tensor,
    site: str,
    clips: Mapping[str, float],
    learned: BlockObjective,
    online: Mapping[str, Tensors],
) -> Tensor:
    """Mean of x^T x over all tokens of the site's quantised input."""
    fmt = job.scheme.activation
    total: Tensor | None = None

    def add(value: Tensor) -> None:
        nonlocal total
        value = value.float()
        if fmt is not None:
            value = fake_quantize_activation(value, fmt, clips[site], job.sites[site].slices)
        square = value.mT @ value
        total = square if total is None else total.add_(square)

    _visit(job, work, x, site, clips, learned, online, add)
    assert total is not None
    return total / (x.shape[0] * x.shape[1])


def _visit(
    job: BlockJob,
    work: Tensors,
    x: Tensor,
    site: str,
    clips: Mapping[str, float],
    learned: BlockObjective,
    online: Mapping[str, Tensors],
    see: Callable[[Tensor], None],
) -> None:
    """Show `see` what reaches the linears of `site` before it is rounded, [tokens, width] a batch; sites before it are
    quantised as they will be."""
    before = {name: clip for name, clip in clips.items() if name != site}
    quantized = quantized_input(job, before, online)

    def on_input(name: str, value: Tensor) -> Tensor:
        value = quantized(name, value)
        if name == site:
            see(value.flatten(0, -2))
            raise StopForward
        return value

    with torch.no_grad():
        for part in slices(len(x), job.recipe.batch_size):
            try:
                job.run(work, x[part].to(job.decoder.device), on_input, learned.on_attention)
            except StopForward:
                continue


def _round_group(
    job: BlockJob,
    work: Tensors,
    members: tuple[str, ...],
    hessian: Tensor | None,
    learned: BlockObjective,
    events: list[str],
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(linear, codes, scale, zero) for the linears that read one input; GPTQ takes them together."""
    fmt = job.scheme.weight
    weights = [work[f"{member}.weight"] for member in members]
    grids = []
    for member, weight in zip(members, weights, strict=True):
        if "search" in job.recipe.weight_clip:
            assert hessian is not None
            low, high = search_weight_range(weight, hessian, fmt, job.store)
        elif job.recipe.weight_clip == "learn":
            with torch.no_grad():
                low, high = learned.ranges[member](weight, fmt)
        else:
            low, high = weight_range(weight, fmt)
        grids.append(grid(low, high, fmt, job.store))
    scale, zero = (torch.cat(parts) for parts in zip(*grids, strict=True))
    whole = torch.cat(weights)
    codes = None
    if job.recipe.rounding == "gptq":
        assert hessian is not None
        try:
            codes = gptq(whole, hessian, scale, zero, fmt, damping=job.recipe.damping)
        except GPTQFailure as problem:
            events.append(f"{', '.join(members)} rounded to nearest: {problem}")
    if codes is None:
        codes = codes_of(whole, scale, zero, fmt)
    sizes = [len(weight) for weight in weights]
    yield from zip(members, codes.split(sizes), scale.split(sizes), zero.split(sizes), strict=True)


def _decibel(weight: Tensor, value: Tensor) -> float:
    noise = (weight - value).square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return float(10 * torch.log10(weight.square().sum() / noise))

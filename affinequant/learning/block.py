"""The stage of one block: load it, go through its phases, round it."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from affinequant.errors import QUALITY, AffineQuantError
from affinequant.learning.fit import fit
from affinequant.learning.network import Laps, block_reader, costs, fit_events
from affinequant.learning.objective import BlockObjective, folded_exactly
from affinequant.learning.phases import Phase
from affinequant.learning.record import ROWS, Bands, Noise, pictured, plain, portrait
from affinequant.learning.selection import select
from affinequant.learning.starts import ROWS as START_ROWS
from affinequant.learning.starts import Seen, Watch, build_transforms, looks_at_data, starved_sites
from affinequant.learning.training import FitConfig, FitReport
from affinequant.learning.work import Work
from affinequant.models.on_demand import each
from affinequant.progress import Steps
from affinequant.rounding.block import round_block
from affinequant.rounding.job import BlockJob
from affinequant.rounding.rounded import Rounded
from affinequant.stages import Carry, Stage
from affinequant.transforms.banded import Banded
from affinequant.transforms.chain import Chain
from affinequant.transforms.fold import rotate_block


class _Made(NamedTuple):
    """A block that has been rounded: the real weights that were, and what was noted on the way."""

    rounded: Rounded
    folded: Mapping[str, Tensor]
    noise: Noise


def block_stage(work: Work, stage: Stage, carry: Carry) -> Carry:
    """Load, learn in one phase after the other, round, commit; hands on both streams after the block."""
    assert stage.block is not None
    began, listen, device = time.perf_counter(), work.listen, work.decoder.device
    laps, drawn = Laps(device, began), pictured(stage.block, work.made.dims.layers)
    carry = carry or work.run.carry(stage.needs[-1])
    full, quantized = carry["full"], carry.get("quantized", carry["full"])
    job, exact, values = _load(work, stage.block)
    laps("loading")
    target, watch = _target(job, values, full, drawn)
    seen, starved = watch.seen(), starved_sites(job, watch)
    start = {site: one for site, one in seen.items() if site not in starved} if looks_at_data(job) else {}
    job, chosen = select(job, values, start)
    objective = BlockObjective(job, values, *build_transforms(job, values, start), untrained=starved)
    bands = Bands(objective) if drawn else None
    told = Steps(listen.say, f"block {job.index + 1}, learning", job.recipe.epochs * len(full))
    fitted = [fit(*phase) for phase in _phases(job, objective, values, full, quantized, target, told, bands)]
    laps("learning")
    told = Steps(listen.say, f"block {job.index + 1}, rounding", len(job.family.linears))
    made = _round(job, exact, quantized, objective, full, told)
    events = [*_scarce(made.rounded), *(event for one in fitted for event in fit_events(one))]
    if any(one.steps for one in fitted) and not bool(made.rounded.after.isfinite().all()):
        events.append("what was learned gave non-finite outputs: the closed-form start was taken instead")
        objective, bands = BlockObjective(job, values, *build_transforms(job, values, start)), None
        made = _round(job, exact, quantized, objective, full)
    if not bool(made.rounded.after.isfinite().all()):
        raise AffineQuantError(
            f"block {job.index} gives non-finite outputs even unlearned",
            stage.name,
            "try --dtype float32, or another calibration text",
            exit_code=QUALITY,
        )
    laps("rounding")
    report = _block_report(objective, fitted, made.rounded, target, events)
    report |= {"transforms": chosen} if chosen else {}
    report |= _seen(work, objective, made, seen if drawn else None, bands)
    laps("recording")
    report |= {"phases": laps.phases, **costs(began, device)}
    prefix, carry = f"{job.family.blocks}.{job.index}.", {"full": target, "quantized": made.rounded.after}
    stored = {prefix + name: tensor for name, tensor in made.rounded.stored.items()}
    work.run.commit(stage.name, tensors=stored, carry=carry, report=report)
    listen.block(job.index, report)
    return carry


def _load(work: Work, index: int) -> tuple[BlockJob, Mapping[str, Tensor], Mapping[str, Tensor]]:
    """What is fixed for the block, and its tensors, named within it, the residual stream rotated where the recipe asks for
    it: in fp64, but for those that stay as they are, and in float32. Those of experts are made on demand from what the
    source has; rotated ones, which every pass would make again, are kept in float32."""
    rotation, starts = work.rotations
    if rotation is not None:
        rotation.to(work.decoder.device)
    job = replace(work.job(index), starts=starts.get(index, {}), judge=work.judge)
    changed, experts = job.family.changed(), job.family.expert()
    found = block_reader(work.made, work.decoder)(index)
    exact = each(found, lambda name, one: one.double() if name.rpartition(".")[0] in changed else one, experts)
    if rotation is None:
        return job, exact, each(found, lambda _, one: one.float(), experts)
    exact = rotate_block(exact, job.family, job.sites["residual"], rotation)
    kept = {name: tensor.float() for name, tensor in exact.items()}
    return job, exact, each(kept, lambda _, one: one, experts)


def _target(job: BlockJob, values: Mapping[str, Tensor], full: Tensor, drawn: bool) -> tuple[Tensor, Watch]:
    """What the full-precision block gives, and what reaches its sites meanwhile: as much as its transforms start from, or
    as is pictured, or how much comes to each expert."""
    looks = looks_at_data(job)
    watch = Watch(full.shape[0], full.shape[1], job.seed("rows"), START_ROWS if looks else ROWS)
    return job.run_all(values, full, watch if looks or drawn or job.family.branch else None), watch


def _scarce(rounded: Rounded) -> list[str]:
    """Which linears of experts saw too little to be rounded on it alone, in words; a few of them by name."""
    plainly = [name for name in rounded.starved if name not in rounded.drawn]
    how = {"to nearest": plainly, "on what all experts read beside their own": list(rounded.drawn)}
    return [
        f"rounded {way}, since their experts see fewer tokens than they have inputs: {', '.join(names[:3])}"
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for way, names in how.items()
        if names
    ]


def _phases(
    job: BlockJob,
    objective: BlockObjective,
    values: Mapping[str, Tensor],
    full: Tensor,
    quantized: Tensor,
    target: Tensor,
    told: Steps,
    bands: Bands | None,
) -> Iterator[Phase]:
    """What is trained, in order: transforms and clips, together. Where there is a judge, on all samples but those that it
    judges by."""
    recipe, judge = job.recipe, job.judge
    train = max(1, len(full) - judge.held) if judge else len(full)
    config = FitConfig(
        epochs=recipe.epochs,
        steps_per_epoch=math.ceil(train / recipe.batch_size),
        schedule=recipe.schedule,
        judge="held-out" if judge else "",
        probe_every=1 if bands and any(bands.modules()) else 0,
    )

    def held_out() -> float:
        assert judge is not None
        with torch.no_grad():
            tensors = objective.quantized()
            after = job.run_all(tensors, quantized[-judge.held :], objective.on_input, objective.on_attention)
        return judge(job.index, after)

    batches = _batches(job, values, full[:train], quantized[:train], target[:train], told)
    probes: dict[str, Callable[[], float]] = {"held-out": held_out} if judge else {}
    yield Phase(objective, batches, config, probes | ({"band": bands} if bands and config.probe_every else {}))


def _batches(job: BlockJob, values: Mapping[str, Tensor], full: Tensor, quantized: Tensor, target: Tensor, told: Steps):
    """epoch -> (inputs, target[, auxiliary target]) in an order that the seed, the block and the epoch decide; `told`
    hears of each sample."""
    recipe = job.recipe
    inputs = quantized if recipe.propagate == "quantized" else full
    auxiliary = [job.run_all(values, inputs)] if recipe.aux_loss and recipe.epochs else []

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        for chosen in job.batches(len(inputs), epoch):
            yield tuple(part[chosen] for part in (inputs, target, *auxiliary))
            told(len(chosen))

    return batches


def _round(
    job: BlockJob,
    exact: Mapping[str, Tensor],
    quantized: Tensor,
    objective: BlockObjective,
    full: Tensor,
    told: Callable[[int], None] = lambda linears: None,
) -> _Made:
    samples, tokens, _ = quantized.shape
    folded, noise = folded_exactly(objective, exact), Noise(samples, tokens, job.seed("noise"))
    return _Made(round_block(job, folded, quantized, objective, full, told, noise), folded, noise)


def _seen(
    work: Work, objective: BlockObjective, made: _Made, seen: Mapping[str, Seen] | None, bands: Bands | None
) -> dict[str, Any]:
    """What quantised activations lost, and of a block that is pictured all that there is to see."""
    job, sqnr = objective.job, made.noise.sqnr()
    rounded = {site: value for site, value in sqnr.items() if job.activation_grid(site)}
    report: dict[str, Any] = {"inputs": {site: {"sqnr": value} for site, value in rounded.items()}}
    if seen is None:
        return report
    prefix = f"{job.family.blocks}.{job.index}."

    def source(name: str) -> Tensor:
        return work.made.source.read([prefix + name])[prefix + name].to(job.decoder.device)

    rows = {site: one.rows for site, one in seen.items()}
    drawn = portrait(job, objective, rows, made.folded, source, work.rotations[0])
    drawn["inputs"] = {site: report["inputs"].get(site, {}) | both for site, both in drawn["inputs"].items()}
    for name, epochs in (bands.epochs() if bands else {}).items():
        drawn["pictures"][name]["epochs"] = epochs
    return drawn


def _block_report(
    objective: BlockObjective, fitted: Sequence[FitReport], rounded: Rounded, target: Tensor, events: list[str]
) -> dict[str, Any]:
    # Sample by sample: whole streams are too large to have a few more.
    pairs = list(zip(rounded.after, target, strict=True))
    noise = sum(float((one.float() - other.float()).square().sum()) for one, other in pairs)
    power = sum(float(other.float().square().sum()) for _, other in pairs)
    conditions = {name: float(module.condition()) for name, module in objective.transforms.items()}
    conditions |= {f"{name} online": float(module.condition()) for name, module in objective.online.items()}
    dominance = {
        name: module.dominance() for name, module in objective.transforms.items() if isinstance(module, Banded | Chain)
    }
    return {
        "loss_first": plain(fitted[0].first) if fitted[0].steps else None,
        "loss_last": plain(fitted[-1].last) if fitted[-1].steps else None,
        **_curves(fitted),
        "steps": sum(one.steps for one in fitted),
        "non_finite": sum(one.non_finite for one in fitted),
        "stopped": fitted[-1].stopped,
        "sqnr": 10 * math.log10(max(power, 1e-30) / max(noise, 1e-30)),
        "condition": max(conditions.values(), default=1.0),
        "conditions": conditions,
        "dominance": dominance,
        "linears": dict(rounded.linears),
        **(
            {"experts": {"tokens": rounded.routed, "starved": rounded.starved, "drawn": rounded.drawn}}
            if rounded.routed
            else {}
        ),
        **({"roundings": dict(rounded.roundings)} if objective.job.recipe.rounding == "auto" else {}),
        "events": [*events, *rounded.events],
    }


def _curves(fitted: Sequence[FitReport]) -> dict[str, Any]:
    """`curve`: mean loss of each epoch; `divergence`: of held-out samples, at the start and after each; in `series` what
    else was logged, terms of the loss where it has more than one."""
    series = dict[str, list[float | None]]()
    for one in fitted:
        for name, values in one.series.items():
            series.setdefault(name, []).extend(map(plain, values))
    found = {key: series.pop(name, []) for key, name in (("curve", "loss"), ("divergence", "held-out"))}
    if "auxiliary" not in series:
        series.pop("block", None)
    return {key: values for key, values in (found | {"series": series}).items() if values}

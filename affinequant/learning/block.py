"""The stage of one block: load it, go through its phases, round it."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from affinequant.errors import QUALITY, AffineQuantError
from affinequant.learning.fit import FitConfig, FitReport, fit
from affinequant.learning.network import block_reader, costs, fit_events
from affinequant.learning.objective import BlockObjective, folded_exactly
from affinequant.learning.phases import Phase
from affinequant.learning.selection import select
from affinequant.learning.starts import Watch, build_transforms, looks_at_data
from affinequant.learning.work import Work
from affinequant.progress import Steps
from affinequant.rounding.block import Rounded, round_block
from affinequant.rounding.job import BlockJob
from affinequant.stages import Carry, Stage
from affinequant.transforms.banded import Banded
from affinequant.transforms.chain import Chain
from affinequant.transforms.fold import Tensors, rotate_block


def block_stage(work: Work, stage: Stage, carry: Carry) -> Carry:
    """Load, learn in one phase after the other, round, commit; hands on both streams after the block."""
    assert stage.block is not None
    began, listen = time.perf_counter(), work.listen
    carry = carry or work.run.carry(stage.needs[-1])
    full, quantized = carry["full"], carry.get("quantized", carry["full"])
    job, exact = _load(work, stage.block)
    values = {name: tensor.float() for name, tensor in exact.items()}
    watch = Watch(full.shape[0], full.shape[1], job.seed("rows"))
    target = job.run_all(values, full, watch if looks_at_data(job) else None)
    job, chosen = select(job, values, watch.seen())
    objective = BlockObjective(job, values, *build_transforms(job, values, watch.seen()))
    told = Steps(listen.say, f"block {job.index + 1}, learning", job.recipe.epochs * len(full))
    fitted = [fit(*phase) for phase in _phases(job, objective, values, full, quantized, target, told)]
    told = Steps(listen.say, f"block {job.index + 1}, rounding", len(job.family.linears))
    rounded = round_block(job, folded_exactly(objective, exact), quantized, objective, full, told)
    events = [event for one in fitted for event in fit_events(one)]
    if any(one.steps for one in fitted) and not bool(rounded.after.isfinite().all()):
        events.append("what was learned gave non-finite outputs: the closed-form start was taken instead")
        objective = BlockObjective(job, values, *build_transforms(job, values, watch.seen()))
        rounded = round_block(job, folded_exactly(objective, exact), quantized, objective, full)
    if not bool(rounded.after.isfinite().all()):
        raise AffineQuantError(
            f"block {job.index} gives non-finite outputs even unlearned",
            stage.name,
            "try --dtype float32, or another calibration text",
            exit_code=QUALITY,
        )
    report = _block_report(objective, fitted, rounded, target, events)
    report |= {"transforms": chosen} if chosen else {}
    report |= costs(began, job.decoder.device)
    prefix, carry = f"{job.family.blocks}.{job.index}.", {"full": target, "quantized": rounded.after}
    stored = {prefix + name: tensor for name, tensor in rounded.stored.items()}
    work.run.commit(stage.name, tensors=stored, carry=carry, report=report)
    listen.block(job.index, report)
    return carry


def _load(work: Work, index: int) -> tuple[BlockJob, Tensors]:
    """What is fixed for the block, and its tensors in fp64, named within it, the residual stream rotated where the recipe
    asks for it."""
    rotation, starts = work.rotations
    if rotation is not None:
        rotation.to(work.decoder.device)
    job = replace(work.job(index), starts=starts.get(index, {}), judge=work.judge)
    tensors = {name: tensor.double() for name, tensor in block_reader(work.made, work.decoder)(index).items()}
    if rotation is not None:
        tensors = rotate_block(tensors, job.family, job.sites["residual"], rotation)
    return job, tensors


def _phases(
    job: BlockJob,
    objective: BlockObjective,
    values: Tensors,
    full: Tensor,
    quantized: Tensor,
    target: Tensor,
    told: Steps,
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
    )

    def held_out() -> float:
        assert judge is not None
        with torch.no_grad():
            tensors = objective.quantized()
            after = job.run_all(tensors, quantized[-judge.held :], objective.on_input, objective.on_attention)
        return judge(job.index, after)

    batches = _batches(job, values, full[:train], quantized[:train], target[:train], told)
    yield Phase(objective, batches, config, {"held-out": held_out} if judge else None)


def _batches(job: BlockJob, values: Tensors, full: Tensor, quantized: Tensor, target: Tensor, told: Steps):
    """epoch -> (inputs, target[, auxiliary target]) in an order that the seed, the block and the epoch decide; `told`
    hears of each sample."""
    recipe = job.recipe
    inputs = quantized if recipe.propagate == "quantized" else full
    auxiliary = [job.run_all(values, inputs)] if recipe.aux_loss and recipe.epochs else []

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(job.seed("order") + 7919 * epoch)
        for chosen in torch.randperm(len(inputs), generator=generator).split(recipe.batch_size):
            yield tuple(part[chosen] for part in (inputs, target, *auxiliary))
            told(len(chosen))

    return batches


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
        "loss_first": fitted[0].first if fitted[0].steps else None,
        "loss_last": fitted[-1].last if fitted[-1].steps else None,
        **({"divergence": judged} if (judged := fitted[-1].series.get("held-out")) else {}),
        "steps": sum(one.steps for one in fitted),
        "non_finite": sum(one.non_finite for one in fitted),
        "stopped": fitted[-1].stopped,
        "sqnr": 10 * math.log10(max(power, 1e-30) / max(noise, 1e-30)),
        "condition": max(conditions.values(), default=1.0),
        "conditions": conditions,
        "dominance": dominance,
        "linears": dict(rounded.linears),
        **({"roundings": dict(rounded.roundings)} if objective.job.recipe.rounding == "auto" else {}),
        "events": [*events, *rounded.events],
    }

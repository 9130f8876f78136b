"""What a run commits: what lies outside the blocks, then one block after the other."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from affinequant.data.tokens import Tokens
from affinequant.errors import QUALITY, AffineQuantError
from affinequant.learning.distill import distill
from affinequant.learning.fit import FitConfig, FitReport, fit
from affinequant.learning.network import (
    DISTILLED,
    block_reader,
    costs,
    fit_events,
    read_outer,
    scored_samples,
    stage_name,
    store_dtype,
    whole_report,
)
from affinequant.learning.objective import BlockObjective, folded_exactly
from affinequant.learning.selection import select
from affinequant.learning.starts import Watch, build_transforms, looks_at_data
from affinequant.models.decoder import Decoder, slices
from affinequant.plan import Plan
from affinequant.progress import Progress, Steps
from affinequant.rounding.block import Rounded, round_block
from affinequant.rounding.job import BlockJob
from affinequant.run.run import Run
from affinequant.transforms import Transform
from affinequant.transforms.banded import Banded
from affinequant.transforms.chain import Chain
from affinequant.transforms.fold import Tensors, rotate_block, rotate_outer

TABLE_ROWS = 4096
"""Rows of the embedding and of the head that are rotated at once."""


def block_stage(
    made: Plan, run: Run, job: BlockJob, rotation: Transform | None, full: Tensor, quantized: Tensor, listen: Progress
) -> tuple[Tensor, Tensor]:
    """Load, fit, fold, round, commit; returns both streams after the block."""
    began = time.perf_counter()
    exact = _load_block(made, job, rotation)
    values = {name: tensor.float() for name, tensor in exact.items()}
    watch = Watch(full.shape[0], full.shape[1], job.seed("rows"))
    target = job.run_all(values, full, watch if looks_at_data(job) else None)
    job, chosen = select(job, values, watch.seen())
    objective = BlockObjective(job, values, *build_transforms(job, values, watch.seen()))
    told = Steps(listen.say, f"block {job.index + 1}, learning", made.recipe.epochs * len(full))
    fitted = _learn(job, objective, values, full, quantized, target, told)
    told = Steps(listen.say, f"block {job.index + 1}, rounding", len(job.family.linears))
    rounded = round_block(job, folded_exactly(objective, exact), quantized, objective, full, told)
    events = fit_events(fitted)
    if fitted.steps and not bool(rounded.after.isfinite().all()):
        events.append("what was learned gave non-finite outputs: the closed-form start was taken instead")
        objective = BlockObjective(job, values, *build_transforms(job, values, watch.seen()))
        rounded = round_block(job, folded_exactly(objective, exact), quantized, objective, full)
    after = rounded.after
    if not bool(after.isfinite().all()):
        raise AffineQuantError(
            f"block {job.index} gives non-finite outputs even unlearned",
            stage_name(job.index),
            "try --dtype float32, or another calibration text",
            exit_code=QUALITY,
        )
    report = _block_report(objective, fitted, rounded, after, target, events)
    report |= {"transforms": chosen} if chosen else {}
    report |= costs(began, job.decoder.device)
    prefix = f"{made.family.blocks}.{job.index}."
    run.commit(
        stage_name(job.index),
        tensors={prefix + name: tensor for name, tensor in rounded.stored.items()},
        carry={"full": target, "quantized": after},
        report=report,
    )
    listen.block(job.index, report)
    return target, after


def distill_stage(made: Plan, run: Run, tokens: Tokens, jobs: Sequence[BlockJob], listen: Progress) -> None:
    """The end-to-end finish over all blocks, committed as a stage of its own."""
    decoder, names = jobs[0].decoder, [stage_name(job.index) for job in jobs]
    began, outer = time.perf_counter(), run.tensors("outer")
    embedded, _ = decoder.embed(tokens.ids, outer)
    full, keep = run.carry(names[-1])["full"], scored_samples(tokens)
    done = distill(jobs, (run.tensors(name) for name in names), outer, embedded, full, keep, listen.say)
    report = whole_report(done.fitted, began, decoder.device)
    run.commit(DISTILLED, tensors=done.tensors, carry={"full": full[:keep], "quantized": done.after}, report=report)


def _load_block(made: Plan, job: BlockJob, rotation: Transform | None) -> Tensors:
    """The block's tensors in fp64, named within it, the residual stream rotated where the recipe asks for it."""
    tensors = {name: tensor.double() for name, tensor in block_reader(made, job.decoder)(job.index).items()}
    if rotation is not None:
        tensors = rotate_block(tensors, job.family, job.sites["residual"], rotation)
    return tensors


def outer_stage(made: Plan, run: Run, tokens: Tokens, decoder: Decoder, rotation: Transform | None) -> None:
    """Embedding, final norm and head: rotated, never quantised. Carries the embedded calibration tokens."""
    began, tensors = time.perf_counter(), read_outer(made, decoder)
    if made.dims.tied:
        tensors.pop(f"{made.family.head}.weight", None)
    if rotation is None:
        store = store_dtype(made)
        stored = {name: tensor.to(store) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    else:
        stored = _rotated(made, tensors, rotation)
    del tensors
    hidden, _ = decoder.embed(tokens.ids, stored)
    run.commit("outer", tensors=stored, carry={"full": hidden}, report=costs(began, decoder.device))


def _rotated(made: Plan, tensors: Tensors, rotation: Transform) -> Tensors:
    """The tensors outside the blocks, rotated in fp64 some rows of the tables at a time, as they are stored."""
    family, store = made.family, store_dtype(made)
    tables = {f"{module}.weight" for module in (family.embedding, family.head)}
    shape = tensors[f"{family.embedding}.weight"].shape
    stored = {name: torch.empty(shape, dtype=store) for name in tables}
    for part in slices(shape[0], TABLE_ROWS):
        rows = {name: (tensor[part] if name in tables else tensor).double() for name, tensor in tensors.items()}
        for name, tensor in rotate_outer(rows, family, made.sites["residual"], rotation).items():
            if name in tables:
                stored[name][part] = tensor
            else:
                stored[name] = tensor.to(store)
    return stored


def _learn(
    job: BlockJob,
    objective: BlockObjective,
    values: Tensors,
    full: Tensor,
    quantized: Tensor,
    target: Tensor,
    told: Steps,
) -> FitReport:
    """Train the objective; where there is a judge, on all samples but those that it judges by."""
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
    return fit(objective, batches, config, {"held-out": held_out} if judge else None)


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
    objective: BlockObjective, fitted: FitReport, rounded: Rounded, after: Tensor, target: Tensor, events: list[str]
) -> dict[str, Any]:
    pairs = list(zip(after, target, strict=True))  # sample by sample: whole streams are too large to have a few more
    noise = sum(float((one.float() - other.float()).square().sum()) for one, other in pairs)
    power = sum(float(other.float().square().sum()) for _, other in pairs)
    conditions = {name: float(module.condition()) for name, module in objective.transforms.items()}
    conditions |= {f"{name} online": float(module.condition()) for name, module in objective.online.items()}
    dominance = {
        name: module.dominance() for name, module in objective.transforms.items() if isinstance(module, Banded | Chain)
    }
    return {
        "loss_first": fitted.first if fitted.steps else None,
        "loss_last": fitted.last if fitted.steps else None,
        **({"divergence": list(fitted.series["held-out"])} if "held-out" in fitted.series else {}),
        "steps": fitted.steps,
        "non_finite": fitted.non_finite,
        "stopped": fitted.stopped,
        "sqnr": 10 * math.log10(max(power, 1e-30) / max(noise, 1e-30)),
        "condition": max(conditions.values(), default=1.0),
        "conditions": conditions,
        "dominance": dominance,
        "linears": dict(rounded.linears),
        **({"roundings": dict(rounded.roundings)} if objective.job.recipe.rounding == "auto" else {}),
        "events": [*events, *rounded.events],
    }

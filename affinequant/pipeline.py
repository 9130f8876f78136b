"""The story: a recipe in, a verified checkpoint out, one block at a time."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import affinequant
from affinequant.block import BlockJob, BlockObjective, build_transforms, folded_exactly, starts
from affinequant.checkpoint import check_finite, locate, open_source
from affinequant.data import Tokens, calibration_tokens
from affinequant.errors import QUALITY, AffineQuantError
from affinequant.finish import finish, peak_bytes, publish, stage_name, store_dtype
from affinequant.fit import FitConfig, FitReport, fit
from affinequant.fold import Tensors, rotate_block, rotate_outer
from affinequant.plan import Plan, check_disk
from affinequant.plan import plan as make_plan
from affinequant.progress import Console, Progress, Silent
from affinequant.recipe import Recipe
from affinequant.recipe import resolve as resolve_recipe
from affinequant.rounding import Rounded, quantized_input, round_block
from affinequant.run import Run
from affinequant.stream import Decoder, open_decoder
from affinequant.transforms import Transform, build
from affinequant.transforms.banded import Banded
from affinequant.transforms.chain import Chain
from affinequant.workspace import open_workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Where the checkpoint is, and its report.json."""

    path: Path
    report: Mapping[str, Any]


def quantize(
    model: Recipe | str,
    *,
    progress: bool | Progress = False,
    overwrite: bool = False,
    resume: bool = False,
    **fields: Any,
) -> Result:
    """Quantise a model and write a checkpoint; a run of the same recipe that was interrupted is taken up.

    Args:
        model: a Recipe, or MODEL with the recipe's other fields as keywords (`scheme="w4a4"`, `out="folder"`, ...).
        progress: True prints to stderr; anything with the methods of `Progress` listens itself.
        overwrite: empty the output folder first, whatever is in it.
        resume: insist on a run to take up.

    Raises:
        AffineQuantError: with what happened, where and what to do; before any long work wherever that is possible.
    """
    listen: Progress = Console() if progress is True else (progress or Silent())
    if isinstance(model, Recipe) and fields:
        model = replace(model, **fields)
    recipe = model if isinstance(model, Recipe) else resolve_recipe({"model": str(model)} | _plain(fields))
    began = time.perf_counter()
    if recipe.model == "demo":
        from affinequant.demo import demo_model

        demo_model(listen.say)
    made = make_plan(recipe)
    with open_workspace(made, overwrite=overwrite, resume=resume) as workspace:
        if workspace.finished:
            recipe_part = made.recipe.fingerprint() | made.source.stamp()
            Run(workspace.run_folder).check_same(recipe_part, all_fields=False)
            listen.say(f"{workspace.out} is finished already")
            return Result(path=workspace.out, report=json.loads((workspace.out / "report.json").read_text()))
        check_disk(made)
        folder = locate(recipe.model)
        made = replace(made, source=open_source(folder))
        tokens = _tokens(made, listen)
        check_finite(made.source)
        run = Run.open(workspace.run_folder, _fingerprint(made, tokens))
        decoder = quantize_blocks(made, run, tokens, listen)
        report = finish(made, run, workspace.out, decoder, tokens, listen)
        report |= {"seconds": time.perf_counter() - began, "peak_bytes": peak_bytes(decoder.device)}
        publish(workspace, run, report)
        return Result(path=workspace.out, report=report)


def quantize_blocks(made: Plan, run: Run, tokens: Tokens, listen: Progress) -> Decoder:
    """Every stage that is not on disk yet: what lies outside the blocks, then the blocks in order."""
    device = torch.device(made.device)
    dtype = compute_dtype(made.recipe, device)
    decoder = open_decoder(
        made.source, made.family, made.dims, device, dtype, trust_remote_code=made.recipe.trust_remote_code
    )
    rotation = _rotation(made)
    if not run.committed("outer"):
        _outer_stage(made, run, tokens, decoder, rotation)
    outer = run.tensors("outer")
    embedding = f"{made.family.embedding}.weight"
    probe, kwargs = decoder.embed(tokens.ids[:1].to(device), {embedding: outer[embedding].to(device, dtype)})
    del outer, probe
    names = [stage_name(index) for index in range(made.dims.layers)]
    pending = run.pending(names)
    listen.begin(len(names), len(names) - len(pending))
    if pending:
        first = names.index(pending[0])
        carry = run.carry(names[first - 1] if first else "outer")
        full, quantized = carry["full"], carry.get("quantized", carry["full"])
        for index in range(first, len(names)):
            job = _job(made, decoder, index, kwargs, run.folder if made.offload == "disk" else None)
            full, quantized = _block_stage(made, run, job, rotation, full, quantized, listen)
    listen.end()
    return decoder


def compute_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The dtype that blocks are computed in."""
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}[recipe.dtype]


def _block_stage(
    made: Plan, run: Run, job: BlockJob, rotation: Transform | None, full: Tensor, quantized: Tensor, listen: Progress
) -> tuple[Tensor, Tensor]:
    """Load, fit, fold, round, commit; returns both streams after the block."""
    began = time.perf_counter()
    exact = _load_block(made, job, rotation)
    values = {name: tensor.float() for name, tensor in exact.items()}
    target = job.run_all(values, full)
    start = starts(job, values, full) if _wants_start(made.recipe) else {}
    objective = BlockObjective(job, values, build_transforms(job, start))
    fitted = fit(objective, _batches(job, values, full, quantized, target), _fit_config(made.recipe))
    rounded, after = _round_and_run(job, objective, exact, quantized)
    events = _fit_events(fitted)
    if fitted.steps and not bool(after.isfinite().all()):
        events.append("what was learned gave non-finite outputs: the closed-form start was taken instead")
        objective = BlockObjective(job, values, build_transforms(job, start))
        rounded, after = _round_and_run(job, objective, exact, quantized)
    if not bool(after.isfinite().all()):
        raise AffineQuantError(
            f"block {job.index} gives non-finite outputs even unlearned",
            stage_name(job.index),
            "try --dtype float32, or another calibration text",
            exit_code=QUALITY,
        )
    report = _block_report(objective, fitted, rounded, after, target, events)
    report["seconds"] = time.perf_counter() - began
    prefix = f"{made.family.blocks}.{job.index}."
    run.commit(
        stage_name(job.index),
        tensors={prefix + name: tensor for name, tensor in rounded.stored.items()},
        carry={"full": target, "quantized": after},
        report=report,
    )
    listen.block(job.index, report)
    return target, after


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords as recipe values: paths become strings, None means not given."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in fields.items() if v is not None}


def _round_and_run(
    job: BlockJob, objective: BlockObjective, exact: Tensors, quantized: Tensor
) -> tuple[Rounded, Tensor]:
    """Fold what the objective holds into the exact tensors, round, and pass the quantised stream through."""
    rounded = round_block(job, folded_exactly(objective, exact), quantized, objective)
    return rounded, job.run_all(rounded.tensors, quantized, quantized_input(job, rounded.clips))


def _load_block(made: Plan, job: BlockJob, rotation: Transform | None) -> Tensors:
    """The block's tensors in fp64, named within it, the residual stream rotated where the recipe asks for it."""
    prefix = f"{made.family.blocks}.{job.index}."
    read = made.source.read(made.source.names_under(prefix[:-1]))
    tensors = {name[len(prefix) :]: tensor.to(job.decoder.device).double() for name, tensor in read.items()}
    if rotation is not None:
        tensors = rotate_block(tensors, made.family, made.sites["residual"], rotation)
    return tensors


def _outer_stage(made: Plan, run: Run, tokens: Tokens, decoder: Decoder, rotation: Transform | None) -> None:
    """Embedding, final norm and head: rotated, never quantised. Carries the embedded calibration tokens."""
    names = [name for name in made.source.entries if not name.startswith(made.family.blocks + ".")]
    tensors = made.source.read(names)
    if made.dims.tied:
        tensors.pop(f"{made.family.head}.weight", None)
    if rotation is not None:
        double = {name: tensor.double() for name, tensor in tensors.items()}
        tensors = rotate_outer(double, made.family, made.sites["residual"], rotation)
    store = store_dtype(made)
    stored = {name: tensor.to(store) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    del tensors
    embedding = f"{made.family.embedding}.weight"
    hidden, _ = decoder.embed(
        tokens.ids.to(decoder.device), {embedding: stored[embedding].to(decoder.device, decoder.dtype)}
    )
    run.commit("outer", tensors=stored, carry={"full": hidden}, report={})


def _rotation(made: Plan) -> Transform | None:
    name = made.recipe.transforms.get("residual")
    if name is None:
        return None
    return build(name, made.sites["residual"], seed=made.recipe.seed, alpha=made.recipe.alpha).double()


def _job(made: Plan, decoder: Decoder, index: int, kwargs: Mapping[str, Any], scratch: Path | None) -> BlockJob:
    return BlockJob(
        decoder=decoder,
        index=index,
        sites=made.sites,
        recipe=made.recipe,
        scheme=made.recipe.parsed_scheme,
        kwargs=kwargs,
        store=store_dtype(made),
        scratch=scratch,
    )


def _wants_start(recipe: Recipe) -> bool:
    return any(site != "residual" and not name.startswith("hadamard") for site, name in recipe.transforms.items())


def _fit_config(recipe: Recipe) -> FitConfig:
    return FitConfig(
        epochs=recipe.epochs,
        steps_per_epoch=math.ceil(recipe.samples / recipe.batch_size),
        schedule=recipe.schedule,
    )


def _batches(job: BlockJob, values: Tensors, full: Tensor, quantized: Tensor, target: Tensor):
    """epoch -> (inputs, target[, auxiliary target]) in an order that the seed, the block and the epoch decide."""
    recipe = job.recipe
    inputs = quantized if recipe.propagate == "quantized" else full
    auxiliary = [job.run_all(values, inputs)] if recipe.aux_loss and recipe.epochs else []

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(job.seed("order") + 7919 * epoch)
        for chosen in torch.randperm(len(inputs), generator=generator).split(recipe.batch_size):
            yield tuple(part[chosen] for part in (inputs, target, *auxiliary))

    return batches


def _block_report(
    objective: BlockObjective, fitted: FitReport, rounded: Rounded, after: Tensor, target: Tensor, events: list[str]
) -> dict[str, Any]:
    noise = (after.float() - target.float()).square().sum((-2, -1))
    power = target.float().square().sum((-2, -1))
    conditions = {name: float(module.condition()) for name, module in objective.transforms.items()}
    dominance = {
        name: module.dominance() for name, module in objective.transforms.items() if isinstance(module, Banded | Chain)
    }
    return {
        "loss_first": fitted.first if fitted.steps else None,
        "loss_last": fitted.last if fitted.steps else None,
        "steps": fitted.steps,
        "non_finite": fitted.non_finite,
        "stopped": fitted.stopped,
        "sqnr": float(10 * torch.log10(power.sum() / noise.sum().clamp_min(1e-30))),
        "condition": max(conditions.values(), default=1.0),
        "conditions": conditions,
        "dominance": dominance,
        "linears": dict(rounded.linears),
        "events": [*events, *rounded.events],
        "peak_bytes": peak_bytes(objective.job.decoder.device),
    }


def _fit_events(fitted: FitReport) -> list[str]:
    if not fitted.non_finite:
        return []
    outcome = "gave up, last finite state kept" if fitted.stopped == "non-finite" else "went on at a lower rate"
    return [f"{fitted.non_finite} non-finite losses: {outcome}"]


def _tokens(made: Plan, listen: Progress) -> Tokens:
    from transformers import AutoTokenizer

    recipe = made.recipe
    tokenizer = AutoTokenizer.from_pretrained(made.source.folder, trust_remote_code=recipe.trust_remote_code)
    tokens = calibration_tokens(
        recipe.data, tokenizer, samples=recipe.samples, seq_len=recipe.seq_len, seed=recipe.seed, say=listen.say
    )
    largest = int(tokens.ids.max())
    if largest >= made.dims.vocab:
        raise AffineQuantError(
            f"the tokenizer gives token {largest}, the model knows {made.dims.vocab}",
            str(made.source.folder),
            "give the model's own tokenizer",
        )
    return tokens


def _fingerprint(made: Plan, tokens: Tokens) -> dict[str, Any]:
    import transformers

    versions = {
        "affinequant": affinequant.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    calibration = {"calibration": tokens.sha256}
    return made.recipe.fingerprint() | made.source.stamp() | calibration | {"versions": versions, "device": made.device}

"""What recipes would make of a network, in memory: blocks are learned and rounded to nearest, one after the other, and nothing
is written. For comparing transforms: recipes share the calibration text, and what full precision makes of it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from affinequant.data.tokens import Tokens
from affinequant.errors import AffineQuantError
from affinequant.learning.divergence import stream_divergence
from affinequant.learning.fit import fit
from affinequant.learning.network import block_job, block_reader, read_outer
from affinequant.learning.objective import BlockObjective
from affinequant.learning.outer import rotated
from affinequant.learning.selection import select
from affinequant.learning.starts import Seen, Watch, build_transforms
from affinequant.learning.training import FitConfig
from affinequant.models.decoder import Decoder
from affinequant.plan import Plan
from affinequant.progress import Steps
from affinequant.rounding.job import BlockJob
from affinequant.transforms import LEARNED_ROTATIONS, Transform, build
from affinequant.transforms.fold import Tensors, rotate_block


@dataclass(kw_only=True)
class _Arm:
    """One recipe on its way through the network: `held` is its stream of held-out text."""

    made: Plan
    rotation: Transform | None
    outer: Tensors
    held: Tensor


def check_trial(made: Plan) -> None:
    """Whether a trial does what the recipe says.

    Raises:
        AffineQuantError: it rounds by more than what lies nearest, searches clips, or trains the whole network.
    """
    recipe = made.recipe
    beyond = {
        "--rounding": recipe.rounding != "nearest",
        "--weight-clip": "search" in recipe.weight_clip,
        "--activation-clip": "search" in recipe.activation_clip,
        "--propagate": bool(recipe.epochs) and recipe.propagate != "full",
        "--judge": recipe.judge != "none",
        "--finish": recipe.distill.loss != "none",
        "--transform": recipe.transforms.get("residual") in LEARNED_ROTATIONS,
    }
    for flag in (flag for flag, wrong in beyond.items() if wrong):
        what = "a trial learns block by block on full-precision inputs and rounds to nearest, and no more"
        raise AffineQuantError(what, flag, "leave it to the preset rtn, or leave --trial out")


def trials(
    plans: Mapping[str, Plan],
    decoder: Decoder,
    tokens: Tokens,
    held: Int[Tensor, "windows tokens"],
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """By name of the plan, in nats per token how far next-token distributions diverge from full precision's on the
    windows `held`. `say` is told how far it is."""
    made = next(iter(plans.values()))
    outer, read = read_outer(made, decoder), block_reader(made, decoder)
    full, kwargs = decoder.embed(tokens.ids, outer)
    clean, held_kwargs = decoder.embed(held, outer)
    arms = [_arm(plan, decoder, outer, held) for plan in plans.values()]
    for index in Steps(say, "blocks", made.dims.layers).each(range(made.dims.layers)):
        tensors, job = read(index), block_job(made, decoder, index, kwargs)
        watch = Watch(full.shape[0], full.shape[1], job.seed("rows"))
        target = job.run_all(tensors, full, watch)
        seen = watch.seen()
        for arm in arms:
            job = block_job(arm.made, decoder, index, kwargs)
            objective = _learned(arm, job, tensors, full, target, seen)
            there = replace(job, kwargs=held_kwargs[index])
            with torch.no_grad():
                arm.held = there.run_all(objective.quantized(), arm.held, objective.on_input, objective.on_attention)
        full, clean = target, block_job(made, decoder, index, held_kwargs).run_all(tensors, clean)
    head, ends = decoder.head(outer), Steps(say, "comparing", len(arms)).each(arms)
    return {
        name: stream_divergence(decoder, arm.held, clean, head, decoder.head(arm.outer))
        for name, arm in zip(plans, ends, strict=True)
    }


def _arm(made: Plan, decoder: Decoder, outer: Tensors, held: Tensor) -> _Arm:
    name, rotation = made.recipe.transforms.get("residual"), None
    if name is not None:
        rotation = build(name, made.sites["residual"], seed=made.recipe.seed, alpha=made.recipe.alpha).double()
        outer = rotated(made, dict(outer), rotation)
        rotation.to(decoder.device)
    return _Arm(made=made, rotation=rotation, outer=outer, held=decoder.embed(held, outer)[0])


def _learned(
    arm: _Arm,
    job: BlockJob,
    tensors: Tensors,
    full: Float[Tensor, "samples tokens hidden"],
    target: Float[Tensor, "samples tokens hidden"],
    seen: Mapping[str, Seen],
) -> BlockObjective:
    """A block with the recipe's transforms, from what full precision makes of calibration text in it."""
    if arm.rotation is not None:
        exact = {name: tensor.double() for name, tensor in tensors.items()}
        tensors = dict(rotate_block(exact, job.family, job.sites["residual"], arm.rotation))
    values = {name: tensor.float() for name, tensor in tensors.items()}
    if arm.rotation is not None:
        full, watch = arm.rotation.on_activations(full), Watch(full.shape[0], full.shape[1], job.seed("rows"))
        target, seen = job.run_all(values, full, watch), watch.seen()
    job, _ = select(job, values, seen)
    objective = BlockObjective(job, values, *build_transforms(job, values, seen))
    steps = math.ceil(len(full) / job.recipe.batch_size)
    config = FitConfig(epochs=job.recipe.epochs, steps_per_epoch=steps, schedule=job.recipe.schedule)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in job.batches(len(full), epoch):
            yield full[chosen], target[chosen]

    fit(objective, batches, config)
    return objective

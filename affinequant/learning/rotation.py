"""The learned rotation of the residual stream, and of the values in each head: one training before any block's own.

The network runs on its own weights with rounded activations, and the rotations follow the divergence of its next-token
distribution from the full-precision one. SpinQuant (arXiv 2405.16406, section 3) does the same with the cross entropy of
the text, and leaves weights in full precision too where GPTQ rounds them later. Rotating the residual stream shows
nowhere but where something is rounded. So no weight is rotated while a rotation is learned: what a norm gives is
rotated, rounded, and rotated back.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from affinequant.learning.divergence import divergence, mean_loss
from affinequant.learning.fit import fit
from affinequant.learning.network import block_job, block_reader, read_outer, whole_report
from affinequant.learning.optimizers import Group
from affinequant.learning.record import Trace
from affinequant.learning.starts import build_transforms, sites_that_look
from affinequant.learning.training import FitConfig, FitReport
from affinequant.learning.work import Work
from affinequant.models.decoder import Decoder
from affinequant.models.sites import named
from affinequant.plan import Plan
from affinequant.progress import Steps
from affinequant.rounding.job import HELD_OUT, BlockJob
from affinequant.stages import Carry, Stage
from affinequant.transforms import LEARNED_ROTATIONS, Transform, build
from affinequant.transforms.fold import Tensors, fold, fuse_gains
from affinequant.transforms.linalg import from_blocks, to_blocks
from affinequant.transforms.orthogonal import Orthogonal

Load = Callable[[int], Tensors]
"""Index of a block -> its full-precision tensors in float32, named within it."""


class RoundedInputs(nn.Module):
    """One block on its own weights, whose inputs are rounded as the rotations leave them.

    A transform that starts from data is made later, on rotated weights: behind a norm it is left out here, elsewhere the
    input stays in full precision.
    """

    def __init__(self, job: BlockJob, load: Load) -> None:
        super().__init__()
        self.job, self.load = job, load
        self.values: Orthogonal | None = None
        self.left: set[str] = set()
        self.fixed: dict[str, list[Transform]] = {}
        looking = sites_that_look(job)
        folded, online = build_transforms(job, load(job.index), {})
        for name, _ in job.family.input_groups():
            if job.recipe.transforms.get(named(name)) in LEARNED_ROTATIONS and job.sites[name].kind == "heads":
                self.values = folded[name]  # pyright: ignore[reportAttributeAccessIssue]
            elif name in looking:
                self.left.add(name)
            else:
                self.fixed[name] = [part[name] for part in (folded, online) if name in part]

    def forward(
        self, x: Float[Tensor, "batch tokens hidden"], rotation: Float[Tensor, "hidden hidden"]
    ) -> Float[Tensor, "batch tokens hidden"]:
        """The block on a batch."""
        family, sites, turn = self.job.family, self.job.sites, rotation.to(x.dtype)
        tensors = fuse_gains(self.load(self.job.index), family.fused_norms(), family.norm_offset)
        for name, parts in self.fixed.items():
            for part in parts if sites[name].kind != "norm" else ():
                tensors = fold(tensors, sites[name], part, norm_offset=family.norm_offset, online=True)

        def on_input(name: str, x: Tensor) -> Tensor:
            if sites[name].kind == "norm":
                return self._round(name, x @ turn) @ turn.mT
            if name in self.left:
                return x
            if name in self.fixed:
                for part in self.fixed[name]:
                    x = part.on_activations(x, sites[name].sinks[0].copies)
                return self._round(name, x)
            return self._round_values(name, x)

        return self.job.run(tensors, x, on_input)

    def _round_values(self, name: str, x: Tensor) -> Tensor:
        assert self.values is not None
        blocks, copies = self.values.blocks().to(x.dtype), self.job.sites[name].sinks[0].copies
        turned = self._round(name, from_blocks(to_blocks(x, len(blocks), copies) @ blocks, x, copies))
        return from_blocks(to_blocks(turned, len(blocks), copies) @ blocks.mT, x, copies)

    def _round(self, name: str, x: Tensor) -> Tensor:
        return self.job.site_input(name).rounded(x, through=True)


class Rotations:
    """The objective: divergence of the network with rounded inputs from the full-precision one."""

    def __init__(self, blocks: Sequence[RoundedInputs], outer: Tensors, residual: Orthogonal, angle: float) -> None:
        """Args:
        outer: tensors outside the blocks, by their full names.
        angle: radians by which a feature turns in the first steps.
        """
        self.blocks, self.residual, self.angle = blocks, residual, angle
        self.decoder = blocks[0].job.decoder
        self.head = self.decoder.head(outer)
        self.trace = Trace()

    def groups(self) -> Sequence[Group]:
        """The residual stream's rotation, and those of the values."""
        chosen = {"residual": [self.residual], "values": [block.values for block in self.blocks if block.values]}
        # The first steps of the optimizer move every parameter by its rate.
        return tuple(
            Group(
                name=name,
                parameters=[module.params for module in modules],
                lr=self.angle / (modules[0].turn * modules[0].params.shape[-1] ** 0.5),
            )
            for name, modules in chosen.items()
            if modules
        )

    def progress(self, t: float) -> Sequence[nn.Parameter]:
        """Nothing is released over training."""
        self.trace.t = t
        return ()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Nats per token. `batch`: embedded tokens, and the full-precision hidden states behind the last block."""
        x, teacher = (part.to(self.decoder.device, self.decoder.dtype) for part in batch)
        rotation = self.residual.on_activations(torch.eye(x.shape[-1], device=x.device))
        for block in self.blocks:
            x = checkpoint(block, x, rotation, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
        loss = divergence(self.decoder, teacher, self.head, x, lambda hidden: self.decoder.logits(hidden, self.head))
        self.trace.note(loss)
        return loss


def problem(work: Work) -> tuple[Rotations, Tensor, Tensor, int]:
    """What the stage learns on: the objective at its start, embedded tokens and full-precision hidden states behind the
    last block in pieces, and how many of these, the last, are held out."""
    made, decoder, recipe = work.made, work.decoder, work.made.recipe
    name, site = recipe.transforms["residual"], made.sites["residual"]
    residual = build(name, site, seed=recipe.seed, alpha=recipe.alpha)
    assert isinstance(residual, Orthogonal)
    outer, read = read_outer(made, decoder), block_reader(made, decoder)
    ids, held = _pieces(work.tokens.ids, made)
    embedded, kwargs = decoder.embed(ids, outer)

    def load(index: int) -> Tensors:
        return {name: tensor.float() for name, tensor in read(index).items()}

    jobs = [block_job(made, decoder, index, kwargs) for index in range(made.dims.layers)]
    full = embedded
    for job in jobs:
        full = job.run_all(load(job.index), full)
    blocks = [RoundedInputs(job, load) for job in jobs]
    objective = Rotations(blocks, outer, residual.to(decoder.device), recipe.rotation.lr)
    return objective, embedded, full, held


def rotation_stage(work: Work, stage: Stage, carry: Carry) -> Carry:
    """Learn the rotations and commit them: the residual stream's as parameters, those of the values as matrices."""
    began, (objective, embedded, full, held) = time.perf_counter(), problem(work)
    made, decoder, recipe, residual = work.made, work.decoder, work.made.recipe, objective.residual
    fitted = learn(objective, embedded, full, held, recipe.rotation.steps, recipe.seed, work.listen.say)
    residual.to(torch.device("cpu"))
    learned = {"residual": residual.params.detach()}
    for block in objective.blocks:
        if block.values:
            site = next(name for name, site in made.sites.items() if site.kind == "heads")
            learned[f"{block.job.index}.{site}"] = block.values.double().blocks().detach()
    work.run.commit(stage.name, tensors=learned, report=_report(fitted, objective.trace, began, decoder))
    return {}


def learn(
    objective: Rotations,
    embedded: Float[Tensor, "pieces tokens hidden"],
    full: Float[Tensor, "pieces tokens hidden"],
    held: int,
    steps: int,
    seed: int,
    say: Callable[[str], None],
) -> FitReport:
    """Train on all but the last `held` pieces, which judge: what left their divergence higher is undone.

    Args:
        embedded: token embeddings.
        full: full-precision hidden states behind the last block.
        steps: of one piece each, drawn in a new random order whenever all have been seen.
    """
    train = max(1, len(full) - held)
    told = Steps(say, "rotation", steps)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed + 7919 * epoch)
        orders = [torch.randperm(train, generator=generator) for _ in range(math.ceil(steps / train))]
        for chosen in told.each(torch.cat(orders)[:steps]):
            yield embedded[chosen][None], full[chosen][None]

    def held_out() -> float:
        mean = mean_loss(objective.loss, embedded[-held:], full[-held:])
        say(f"rotation  divergence with rounded inputs {mean:.4f} nats per token, on {held} held-out pieces of text")
        return mean

    say(f"learning the rotation of the residual stream: {steps} steps of {full.shape[1]} tokens")
    config = FitConfig(epochs=1, steps_per_epoch=steps, schedule="cosine", probe_every=1, judge="held-out")
    return fit(objective, batches, config, {"held-out": held_out})


def _pieces(ids: Int[Tensor, "samples tokens"], made: Plan) -> tuple[Int[Tensor, "pieces tokens"], int]:
    """The calibration text in pieces as long as a step is: as many as the steps need and then those that are held out,
    whose number comes with them."""
    length = min(ids.shape[1], made.recipe.rotation.len)
    pieces = ids[:, : ids.shape[1] // length * length].reshape(-1, length)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(made.recipe.seed))
    held = max(1, min(made.recipe.rotation.steps // 4, len(pieces) // HELD_OUT))
    train = max(1, min(made.recipe.rotation.steps, len(pieces) - held))
    return pieces[order[torch.arange(train + held).clamp_max(len(pieces) - 1)]], held


def _report(fitted: FitReport, trace: Trace, began: float, decoder: Decoder) -> Mapping[str, object]:
    report = whole_report(fitted, trace.means(), began, decoder.device)
    first, last = report["divergence_first"], report["divergence_last"]
    if not last < first:
        report["events"].append("learning left the held-out divergence no lower: the rotation stays where it starts")
    return report

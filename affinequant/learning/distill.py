"""The end-to-end finish: what stays continuous after rounding is trained on the full-precision model's own logits.

The integer codes and zeros are frozen. Weight scales, norm gains and activation clips follow the divergence of the
quantised model's next-token distribution from the full-precision one, which the blocks' own errors do not see (an
end-to-end stage as in arXiv 2506.04985, restricted to what costs nothing at run time).
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.costs import blocks_kept
from affinequant.learning.continuous import Continuous as Continuous
from affinequant.learning.continuous import kept
from affinequant.learning.divergence import divergence, mean_loss
from affinequant.learning.fit import fit
from affinequant.learning.network import scored_samples, whole_report
from affinequant.learning.optimizers import Group
from affinequant.learning.phases import Phase, fit_durably
from affinequant.learning.record import Trace
from affinequant.learning.training import FitConfig, FitReport
from affinequant.learning.work import Work
from affinequant.models.device import coarse_products
from affinequant.progress import Steps
from affinequant.rounding.job import HELD_OUT, BlockJob
from affinequant.stages import OUTER, Carry, Stage, stage_name
from affinequant.transforms.fold import Tensors
from affinequant.transforms.placements import block_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """`tensors`: what changed, under full names as stages hold them; `after`: the quantised stream behind the blocks, of
    the first samples."""

    tensors: Tensors
    after: Float[Tensor, "samples tokens hidden"]
    fitted: FitReport
    """Its series `held-out`: mean divergence on the held-out samples at the start and after each epoch."""
    trace: Sequence[float | None] = ()
    """Mean loss over equal parts of the training."""


class Divergence:
    """The objective: mean divergence of the quantised model's next-token distribution from the full-precision one."""

    def __init__(self, blocks: Sequence[Continuous], outer: Tensors, lr: float) -> None:
        self.blocks, self.outer, self.lr = blocks, outer, lr
        self.decoder = blocks[0].job.decoder
        self.head = self.decoder.head(outer)
        self.norm = f"{self.decoder.family.norm}.weight"
        self.log_gain = nn.Parameter(torch.zeros(outer[self.norm].shape, device=self.decoder.device))
        self.trace = Trace()

    def groups(self) -> Sequence[Group]:
        """Everything at one rate: every parameter is the logarithm of a factor."""
        parameters = [parameter for block in self.blocks for parameter in block.parameters()]
        return (Group(name="factors", parameters=[*parameters, self.log_gain], lr=self.lr),)

    def progress(self, t: float) -> Sequence[nn.Parameter]:
        """Nothing is released over training."""
        self.trace.t = t
        return ()

    def state(self) -> dict[str, dict[float, float]]:
        """The losses so far."""
        return {"losses": self.trace.losses}

    def load(self, state: Mapping[str, dict[float, float]]) -> None:
        """Go on behind them."""
        self.trace.losses = dict(state.get("losses", {}))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Nats per token. `batch`: embedded tokens, and the full-precision hidden states behind the last block."""
        x, teacher = (part.to(self.decoder.device, self.decoder.dtype) for part in batch)
        for block in self.blocks:
            x = block(x)
        loss = divergence(self.decoder, teacher, self.head, x, self._student, [self.log_gain])
        self.trace.note(loss)
        return loss

    def final_norm(self) -> Tensor:
        """The trained gain of the last norm."""
        offset, start = self.decoder.family.norm_offset, self.outer[self.norm]
        gain = (start.to(self.decoder.device).float() + offset) * self.log_gain.exp() - offset
        return kept(gain, start.dtype)

    def _student(self, hidden: Tensor) -> Tensor:
        gain = self.final_norm().to(self.decoder.dtype)
        return self.decoder.logits(hidden, self.head | {self.norm: gain})


def distill(
    jobs: Sequence[BlockJob],
    stages: Iterator[Tensors],
    outer: Tensors,
    embedded: Float[Tensor, "samples tokens hidden"],
    full: Float[Tensor, "samples tokens hidden"],
    keep: int,
    say: Callable[[str], None],
    train: Callable[[Phase], FitReport] = lambda phase: fit(*phase),
) -> Distilled:
    """Train what is continuous in the rounded blocks `stages`; the epoch with the least held-out divergence stands, and
    the start counts as an epoch.

    Args:
        outer: tensors outside the blocks, by their full names.
        stages: the blocks' committed tensors, in order.
        embedded: calibration tokens before block 0.
        full: full-precision hidden states behind the last block.
        keep: for how many samples `after` is wanted.
        train: does the training.
    """
    recipe = jobs[0].recipe
    dims, device = jobs[0].decoder.dims, jobs[0].decoder.device.type
    again = len(jobs) - blocks_kept(recipe, dims, block_weights(jobs[0].decoder.family, dims), device)[0]
    # The last ones keep: what they kept is gone before the first are computed again.
    blocks = [
        Continuous(job, stored, keeps=index >= again)
        for index, (job, stored) in enumerate(zip(jobs, stages, strict=True))
    ]
    objective = Divergence(blocks, outer, recipe.distill.lr)
    held = max(1, len(full) // HELD_OUT)
    count = max(1, len(full) - held)
    told = Steps(say, "finish", recipe.distill.epochs * count)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(jobs[0].seed("finish") + 7919 * epoch)
        for chosen in told.each(torch.randperm(count, generator=generator)):
            yield embedded[chosen][None], full[chosen][None]

    def held_out() -> float:
        with coarse_products(objective.decoder.device, False):
            mean = mean_loss(objective.loss, embedded[-held:], full[-held:])
        say(f"finish  divergence from full precision {mean:.4f} nats per token, on {held} held-out samples")
        return mean

    config = FitConfig(
        epochs=recipe.distill.epochs,
        steps_per_epoch=count,
        schedule="cosine",
        probe_every=1,
        judge="held-out",
        retreat=True,
    )
    # What training gains by exact products is far below what 4 bits lose; what judges it, and what is kept, has them.
    with coarse_products(objective.decoder.device):
        fitted = train(Phase(objective, batches, config, {"held-out": held_out}))
    tensors = {name: tensor for block in blocks for name, tensor in block.changed().items()}
    tensors[objective.norm] = objective.final_norm().detach().to(outer[objective.norm].dtype)
    after = embedded[:keep]
    for block in blocks:
        after = block.run_all(after)
    return Distilled(tensors=tensors, after=after, fitted=fitted, trace=objective.trace.means())


def distill_stage(work: Work, stage: Stage, carry: Carry) -> Carry:
    """The finish over all blocks, committed; how far it is stands on disk after every epoch."""
    run, decoder, jobs = work.run, work.decoder, work.jobs()
    began, outer = time.perf_counter(), run.tensors(OUTER)
    embedded, _ = decoder.embed(work.tokens.ids, outer)
    carry = carry or run.carry(stage.needs[-1])
    full, keep = carry["full"], scored_samples(work.tokens)
    stages = (run.tensors(stage_name(job.index)) for job in jobs)
    train = functools.partial(fit_durably, run=run, stage=stage.name)
    done = distill(jobs, stages, outer, embedded, full, keep, work.listen.say, train)
    report, carry = (
        whole_report(done.fitted, done.trace, began, decoder.device),
        {"full": full[:keep], "quantized": done.after},
    )
    run.commit(stage.name, tensors=done.tensors, carry=carry, report=report)
    return carry

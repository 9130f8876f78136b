"""What was written, read back from its files and held against the run, in the memory of one block.

Every tensor is compared bit for bit with what the run has committed, which no order of sums can blur. Then each block is
put together as `affinequant.load` does it and given the input that the run's own block gets. Both start from the same
numbers every time, so that roundings which flip do not add up over the blocks, and most tokens of a block have none: the
median over tokens tells another computation from the order of a sum. Of many experts most have few tokens or none, and the
median would not see them: once more each is given an equal share of the tokens, whatever the router says.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor, nn

from affinequant.errors import AffineQuantError
from affinequant.formats import Contents, split_stage
from affinequant.formats.compressed_tensors import checkpoint_config, our_config
from affinequant.formats.dense import dense_stage
from affinequant.formats.float_packed import UNITS
from affinequant.formats.linear_tensors import read_units, unpack_linear
from affinequant.learning.continuous import Continuous
from affinequant.models.caps import capped_logits
from affinequant.models.experts import Experts
from affinequant.models.source import by_block, open_source, unquantized
from affinequant.rounding.job import BlockJob
from affinequant.runtime.load import fill, open_empty
from affinequant.transforms.fold import Tensors

TOKENS = 512
"""Tokens whose hidden states are compared: of whole samples, or of the first where samples are longer."""
TOLERANCE = 0.01
"""By how much a block's output may differ at the median token, relative to what the block adds to the stream. In float32
the order of sums gives about 1e-6 where no rounding flips and 5e-4 where one does; a clip that is left out, a transform
that is missing or a zero point of the wrong sign give more than 5e-2 at every token."""
LOGITS = 64
"""Tokens whose logits are held at once."""
PARTS = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", *UNITS.values())
"""Names in a file of what a quantised linear is packed into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What the run has: the tensors outside the blocks, those of block `index`, and one by one what the source has and
    nothing here knows; all by their full names."""

    outer: Tensors
    block: Callable[[int], Tensors]
    copied: Iterable[Tensors]


def verify(
    out: Path,
    contents: Contents,
    committed: Committed,
    jobs: Sequence[BlockJob],
    ids: Int[Tensor, "samples tokens"],
    advance: Callable[[], None],
    *,
    dense: bool,
) -> dict[str, Any]:
    """Read a written folder back and compare.

    Args:
        contents: what its config must say.
        jobs: one per block, as the run had them.
        ids: calibration tokens.
        advance: called after each block.
        dense: weights are 16-bit values, and activations are left as they are.

    Returns:
        `passed`; `tensors`, how many were compared; `wrong`, in words what differs; `hidden`, the largest difference
        behind a block (at the median token) with its `worst_block` and the `tolerance`; `nats` and `stderr`, by how much
        the loss differs where only the last block and the head were read back; `tokens`, on how many.
    """
    reader = _Reader(contents, committed, jobs, ids, dense=dense)
    try:
        reader.run(out, advance)
    except (AffineQuantError, SafetensorError) as problem:
        reader.wrong.append(str(problem))
    return reader.summary()


class _Reader:
    """Goes through a folder once, from the embedding to the head, and notes what is wrong."""

    def __init__(
        self, contents: Contents, committed: Committed, jobs: Sequence[BlockJob], ids: Tensor, *, dense: bool
    ) -> None:
        self.contents, self.committed, self.dense = contents, committed, dense
        self.ids = ids[: max(1, TOKENS // ids.shape[1]), :TOKENS]
        self.decoder = replace(jobs[0].decoder, dtype=torch.float32)
        self.embedded, kwargs = self.decoder.embed(self.ids, committed.outer)
        self.jobs = [replace(job, decoder=self.decoder, kwargs=kwargs[job.index], judge=None) for job in jobs]
        self.compared = 0
        self.wrong: list[str] = []
        self.hidden: list[float] = []
        self.losses: list[Tensor] = []

    @torch.no_grad()
    def run(self, out: Path, advance: Callable[[], None]) -> None:
        """Everything there is to compare."""
        self.source = open_source(out)
        self.unseen, self.of = set(self.source.entries), by_block(self.source)
        self._compare_configs()
        self._compare_tensors(self.committed.outer)
        for stage in self.committed.copied:
            self._compare_tensors(stage)
        model, family = open_empty(self.source, self.decoder.device, torch.float32), self.decoder.family
        kwargs = self._compare_embedding(model)
        if not self.contents.tied:  # the table is as large as all that follows
            model.set_submodule(family.embedding, nn.Identity())
        x = y = self.embedded
        for job in self.jobs:
            stage, name = self.committed.block(job.index), f"{family.blocks}.{job.index}"
            self._compare_tensors(stage)
            self._fill(model, f"{name}.")
            block = model.get_submodule(name)
            y, expected, off = self._both(block, kwargs[job.index], job, stage, x)
            self.hidden.append(_median(off))
            if not self.hidden[-1] <= TOLERANCE:
                self.wrong.append(f"block {job.index} computes something else: {self.hidden[-1]:.2g} off")
            self._compare_experts(block, kwargs[job.index], job, stage, x)
            model.set_submodule(name, nn.Identity())
            x = expected
            advance()
        self._compare_heads(model, y, x)
        if self.unseen:
            self.wrong.append(f"{len(self.unseen)} tensors are not the run's, among them {min(self.unseen)}")

    def summary(self) -> dict[str, Any]:
        """What `verify` returns."""
        losses = torch.cat(self.losses).double() if self.losses else torch.full((1,), torch.nan)
        worst = max(range(len(self.hidden)), key=self.hidden.__getitem__, default=None)
        return {
            "passed": not self.wrong,
            "wrong": self.wrong,
            "tensors": self.compared,
            "hidden": None if worst is None else self.hidden[worst],
            "worst_block": worst,
            "tolerance": TOLERANCE,
            "nats": float(losses.mean()),
            "stderr": float(losses.std() / len(losses) ** 0.5) if len(losses) > 1 else 0.0,
            "tokens": len(losses),
            "compared": True,
            "device": str(self.decoder.device),
        }

    def _compare_configs(self) -> None:
        """config.json says what the run knows; what it says of single linears is compared with their tensors."""
        pairs = [("", unquantized(self.source.config), checkpoint_config(self.contents))]
        if not self.dense:
            pairs.append(("affinequant.", self._ours(), our_config(self.contents, {})))
        for prefix, there, wanted in pairs:
            wanted = json.loads(json.dumps(wanted))
            names = [name for name in wanted if there.get(name) != wanted[name]]
            self.wrong += [f"{prefix}{name} in config.json is {there.get(name)!r}" for name in names]

    def _ours(self) -> dict[str, Any]:
        return (self.source.config.get("quantization_config") or {}).get("affinequant") or {}

    def _compare_tensors(self, stage: Tensors) -> None:
        """Every tensor of a stage is in the files, with the same bits."""
        rest, integers = (self._dense(stage), {}) if self.dense else split_stage(stage, self.contents)
        for name, tensor in rest.items():
            self._compare(name, tensor, self.of(name).read([name])[name] if name in self.unseen else None)
            self.unseen.discard(name)
        for name, parts in integers.items():
            read = unpack_linear(self.of(name), name, self.contents.numbers(name).weight)
            self.unseen -= {f"{name}.{part}" for part in PARTS}
            units, wanted = read_units(self.of(name), name), [stage.get(f"{name}.{unit}") for unit in UNITS]
            pairs = zip((*parts, *wanted), (*read, *map(units.get, UNITS)), strict=True)
            for part, (committed, there) in zip(("codes", "scale", "zero", *UNITS), pairs, strict=True):
                if committed is not None:
                    self._compare(f"{name}.{part}", committed, there)
            if self.contents.numbers(name).activation is not None:
                clip = self._ours().get("input_clip", {}).get(name)
                there = None if clip is None else torch.tensor(float(clip))
                self._compare(f"{name}.input_clip", stage[f"{name}.input_clip"], there)

    def _compare(self, name: str, committed: Tensor, there: Tensor | None) -> None:
        self.compared += 1
        if there is None:
            self.wrong.append(f"{name} is missing")
        elif not _same_bits(committed, there):
            self.wrong.append(f"{name} is not what the run has")

    def _dense(self, stage: Tensors) -> Tensors:
        """A stage as the dense format writes it."""
        rest, values = dense_stage(stage, self.contents)
        return rest | {name: value.to(getattr(torch, self.contents.dtype)) for name, value in values.items()}

    def _fill(self, model: Any, under: str) -> None:
        fill(self.source, model, under, self.decoder.device, torch.float32)

    def _as_committed(self, job: BlockJob, stage: Tensors, x: Tensor) -> Tensor:
        """What the run's own block gives, from what it has committed."""
        if not self.dense:
            return Continuous(job, stage)(x)
        prefix = f"{self.decoder.family.blocks}.{job.index}."
        return job.run({name.removeprefix(prefix): tensor for name, tensor in self._dense(stage).items()}, x)

    def _both(
        self, block: nn.Module, kwargs: dict[str, Any], job: BlockJob, stage: Tensors, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the block that was read gives, what the run's own gives, and by token how far one is from the other, relative
        to what the block adds to the stream."""
        y = block(x, **kwargs)
        y = y[0] if isinstance(y, tuple) else y
        expected = self._as_committed(job, stage, x)
        return y, expected, (y - expected).norm(dim=-1) / _positive((expected - x).norm(dim=-1))

    def _compare_experts(
        self, block: nn.Module, kwargs: dict[str, Any], job: BlockJob, stage: Tensors, x: Tensor
    ) -> None:
        """The same with each expert on an equal share of the tokens."""
        own = self.decoder.block(job.index)
        found = [one for each in (block, own) for one in each.modules() if isinstance(one, Experts)]
        if not found:
            return
        handles = [one.register_forward_pre_hook(_in_turn) for one in found]
        try:
            off = self._both(block, kwargs, job, stage, x)[2].flatten()
        finally:
            for handle in handles:
                handle.remove()
        turns = _turns(len(off), len(found[0]))
        for expert in range(len(found[0])):
            one = _median(off[(turns == expert).any(1)])
            if not one <= TOLERANCE:
                self.wrong.append(f"expert {expert} of block {job.index} computes something else: {one:.2g} off")

    def _compare_embedding(self, model: Any) -> Sequence[dict[str, Any]]:
        """What is embedded; returns what the model that was read gives each of its blocks beside it."""
        names = self.decoder.family.entries
        for name in names:
            self._fill(model, f"{name}.")
        model.tie_weights()  # a head of its own is read after the blocks
        weights = {f"{name}.weight": model.get_submodule(name).weight for name in names}
        embedded, kwargs = replace(self.decoder, model=model).embed(self.ids, weights)
        if not torch.equal(embedded, self.embedded):
            self.wrong.append("tokens are embedded as something else")
        return kwargs

    def _compare_heads(self, model: Any, y: Tensor, x: Tensor) -> None:
        """Final norm and head on the same hidden states; and the losses where the last block has been read back too."""
        family = self.decoder.family
        for name in (family.norm, family.head):
            self._fill(model, f"{name}.")
        norm, head = model.get_submodule(family.norm), model.get_submodule(family.head)
        own, off = self.decoder.head(self.committed.outer), []
        for read, run, ids in zip(y, x, self.ids.to(y.device), strict=True):
            for part in torch.arange(len(ids) - 1, device=ids.device).split(LOGITS):
                logits = self.decoder.logits(run[part], own)
                again, other = (capped_logits(head(norm(rows[part])), model.config) for rows in (run, read))
                off.append((again - logits).norm(dim=-1) / logits.norm(dim=-1))
                differs = _losses(other, ids[part + 1]) - _losses(logits, ids[part + 1])
                self.losses.append(differs.cpu())
        if not float(torch.cat(off).max()) <= TOLERANCE:
            self.wrong.append("the final norm or the head computes something else")


def _median(off: Tensor) -> float:
    """Infinity where a number is not finite."""
    return float(off.median()) if bool(off.isfinite().all()) else float("inf")


def _positive(scale: Tensor) -> Tensor:
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)


def _turns(tokens: int, experts: int) -> Int[Tensor, "tokens each"]:
    """To which experts each token is sent in turn; to several where there are more experts than tokens."""
    each = -(-experts // tokens)
    return torch.arange(tokens * each).reshape(tokens, each) % experts


def _in_turn(experts: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A hook before `Experts`: what the router says is left aside."""
    assert isinstance(experts, Experts)
    hidden, _, weights = given
    turns = _turns(len(hidden), len(experts)).to(hidden.device)
    return hidden, turns, torch.ones_like(turns, dtype=weights.dtype)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in dtype, shape and every bit: -0.0 is not 0.0 here."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))

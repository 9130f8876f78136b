"""A block's pass over all samples, stopped at the input of one site after another while the weights behind them change."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.costs import KEPT_BYTES, replay_bytes
from affinequant.models.attention import OnAttention
from affinequant.models.decoder import StopForward, like_on_disk, slices
from affinequant.models.sites import in_expert
from affinequant.rounding.job import BlockJob
from affinequant.transforms.fold import Tensors
from affinequant.transforms.online import acting

Noted = Callable[[str, slice, Tensor, Tensor], None]
"""(site, which samples, what reaches its linears, the same rounded)."""


class Replay:
    """Where a pass stands. Between two sites a decoder block hands on what the linears of the first give, and the
    residual stream. So the input of the last site and the outputs of linears that write to the stream are kept, and no
    linear is computed twice. Results are the same without room to keep them, bit for bit.
    """

    def __init__(
        self,
        job: BlockJob,
        x: Float[Tensor, "samples tokens hidden"],
        online: Mapping[str, Tensors],
        on_attention: OnAttention | None = None,
        room: int = KEPT_BYTES,
        noted: Noted = lambda site, part, x, rounded: None,
    ) -> None:
        """Args:
        online: by site, the matrices that act on activations before they are rounded.
        on_attention: what acts on queries, keys and values.
        room: in bytes.
        noted: hears of what the linears of a site read, before and after it is rounded, whenever that is computed.
        """
        self.job, self.x, self.on_attention, self.noted = job, x, on_attention, noted
        self.online = {site: acting(parts) for site, parts in online.items()}
        self.groups = dict(job.family.input_groups())
        self.writers = job.family.writers()
        dims = job.decoder.dims
        self.keeps = replay_bytes(x.shape[0] * x.shape[1], dims) <= room
        self.branch = job.family.branch
        self.site = self.kept = ""
        self.routed: list[tuple[Tensor, Tensor]] = []
        self.input: Tensor | None = None
        self.outputs: dict[str, Tensor] = {}

    def reach(self, site: str, tensors: Mapping[str, Tensor], clips: Mapping[str, float]) -> None:
        """Go on to `site`, with these weights and clip ratios for everything before it; a site without a ratio is not
        rounded. Sites are taken in the order of the forward pass."""
        self._set(tensors, clips)
        if self.keeps and not (
            self.branch and self.kept == self.branch
        ):  # experts, and what stands beside them, start there
            passed: dict[str, list[Tensor]] = {}
            found: Tensor | None = None
            for part, value in self._run(site, passed):
                found = _into(found, part, value, len(self.x))
                for name, (output,) in passed.items():
                    self.outputs[name] = _into(self.outputs.get(name), part, output, len(self.x))
                passed.clear()
            self.input, self.kept = found, site
        self.site = site

    def route(
        self, tensors: Mapping[str, Tensor], clips: Mapping[str, float], like: "Replay | None" = None
    ) -> list[int]:
        """Go on to the experts: what all of them are given is kept, with where each token goes. Returns how many tokens
        come to each.

        Args:
            like: a pass whose tokens go the same ways here, so that both give each expert the same.
        """
        self._set(tensors, clips)
        self.routed = []
        for part in slices(len(self.x), self.job.recipe.batch_size):
            given, index = self._parted(part)
            self.routed += zip(given, index, strict=True)
        if like is not None:
            self.routed = [(given, index) for (given, _), (_, index) in zip(self.routed, like.routed, strict=True)]
        every = torch.cat([index.flatten() for _, index in self.routed])
        return torch.bincount(every, minlength=self.job.decoder.dims.experts).tolist()

    def values(self) -> Iterator[tuple[slice, Float[Tensor, "batch tokens width"]]]:
        """(which samples, what reaches the site's linears before it is rounded), a batch at a time."""
        if self.input is None or self.site != self.kept:
            yield from self._run(self.site, {})
            return
        for part in slices(len(self.x), self.job.recipe.batch_size):
            yield part, self.input[part]

    def of_expert(self, site: str, number: int) -> Iterator[tuple[slice, Float[Tensor, "1 routed width"]]]:
        """As `values`, of the tokens that go to one expert, sample by sample: what all experts read at `site`, or what lies
        between up and down in this one, on inputs that are rounded."""
        where = self.job.family.expert(number)
        expert: Any = self.job.decoder.block(self.job.index).get_submodule(where)
        inner = expert.names[:2] if site != self.branch and self.routed else ()
        weights = [self.tensors[f"{where}.{name}.weight"].to(self.routed[0][0]) for name in inner]
        for sample, (given, index) in enumerate(self.routed):
            rows = given[(index == number).any(-1)]
            if weights:
                read = self.inputs[self.branch].rounded(rows)
                gate, up = (torch.nn.functional.linear(read, weight) for weight in weights)
                rows = self.inputs[site].transformed(expert.act(gate) * up)
            yield slice(sample, sample + 1), rows[None]

    def after(
        self, tensors: Mapping[str, Tensor], clips: Mapping[str, float]
    ) -> Float[Tensor, "samples tokens hidden"]:
        """What the block gives with these weights, where `x` lies."""
        self._set(tensors, clips)
        result = like_on_disk(self.x, self.job.scratch)
        for part, value in self._run("", {}):
            result[part] = value.to(result)
        return result

    def _set(self, tensors: Mapping[str, Tensor], clips: Mapping[str, float]) -> None:
        self.tensors = tensors
        self.inputs = {name: self.job.site_input(name, self.online.get(name), clips.get(name)) for name in self.groups}

    def _run(self, site: str, passed: dict[str, list[Tensor]]) -> Iterator[tuple[slice, Tensor]]:
        """The inputs of `site`, or the block's outputs where it is "", a batch at a time. What the last site's linears
        write to the residual stream is added to `passed`."""
        for part in slices(len(self.x), self.job.recipe.batch_size):
            yield part, self._batch(site, part, passed)

    @torch.no_grad()
    def _batch(self, site: str, part: slice, passed: dict[str, list[Tensor]]) -> Tensor:
        reached = list[Tensor]()

        def met(name: str, value: Tensor) -> None:
            if name == site:
                reached.append(value)
                raise StopForward

        block = self.job.decoder.block(self.job.index)
        watched = self.groups.get(self.kept, ()) if site and self.input is not None else ()

        def note(member: str, output: Any) -> None:
            passed.setdefault(member, []).append(output)

        handles = [
            block.get_submodule(member).register_forward_hook(
                lambda _m, _a, output, member=member: note(member, output)
            )
            for member in watched
            if member in self.writers
        ]
        try:
            return self._compute(part, met)
        except StopForward:
            return reached[0]
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _parted(self, part: slice) -> tuple[Tensor, Tensor]:
        """What all experts are given of a batch before it is rounded, [samples, tokens, hidden], and the numbers of those
        that each token goes to, [samples, tokens, k]."""
        given, index, experts = list[Tensor](), list[Tensor](), self.job.family.expert()

        def met(name: str, value: Tensor) -> None:
            if name == self.branch:
                given.append(value)
            elif in_expert(name):
                raise StopForward

        block = self.job.decoder.block(self.job.index)
        handle = block.get_submodule(experts).register_forward_pre_hook(lambda _, args: index.append(args[1]))
        try:
            self._compute(part, met)
        except StopForward:
            pass
        finally:
            handle.remove()
        return given[0], index[0].view(*given[0].shape[:2], -1)

    def _compute(self, part: slice, met: Callable[[str, Tensor], None]) -> Tensor:
        """The block on a batch from where the pass stands; `met` hears of what reaches each site, and may end it."""
        before = list(self.groups)[: list(self.groups).index(self.kept)] if self.input is not None else []

        def on_input(name: str, value: Tensor) -> Tensor:
            if name in before:
                return value
            kept = self.input[part] if name == self.kept and self.input is not None else None
            value = self.inputs[name].transformed(value) if kept is None else kept
            met(name, value)
            rounded = self.inputs[name].rounded(value)
            self.noted(name, part, value, rounded)
            return rounded

        x = self.x[part].to(self.job.decoder.device)
        known = {member: self._known(member, part, x) for name in before for member in self.groups[name]}
        return self.job.run(self.tensors, x, on_input, self.on_attention, known)

    def _known(self, member: str, part: slice, x: Tensor) -> Tensor:
        """What a linear before the last site gave; nothing but its shape where nobody asks for it any more."""
        if member in self.outputs:
            return self.outputs[member][part]
        rows = len(self.tensors[f"{member}.weight"])
        return x.new_zeros(*x.shape[:-1], rows)  # contiguous: attention on an expanded zero takes several times as long


def _into(room: Tensor | None, part: slice, value: Tensor, samples: int) -> Tensor:
    """`value` in its place among all samples, for which room is made at the first of them."""
    if room is None:
        room = value.new_empty(samples, *value.shape[1:])
    room[part] = value
    return room

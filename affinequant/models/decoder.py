"""The network one block at a time: an empty model of the original code, whose tensors are lent to it for each call."""

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from affinequant.data.files import first_line
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.models import Dims, Family
from affinequant.models.attention import Attended, OnAttention, register
from affinequant.models.caps import capped_logits
from affinequant.models.experts import lending, split_experts
from affinequant.models.multimodal import auto_class, beside
from affinequant.models.norms import check_norms
from affinequant.models.sites import in_expert
from affinequant.models.source import Source
from affinequant.models.source_files import broken

OnInput = Callable[[str, Tensor], Tensor]
"""(site, x) -> x: sees, and may replace, what the linears behind a site read."""


class StopForward(Exception):
    """Raised by an `OnInput` that has seen all it needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The model's own code on the meta device; weights are passed to each call and never kept."""

    model: nn.Module
    family: Family
    dims: Dims
    device: torch.device
    dtype: torch.dtype

    def block(self, index: int) -> nn.Module:
        """Block `index`, without weights."""
        return self.model.get_submodule(f"{self.family.blocks}.{index}")

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Those of a checkpoint's tensors for which the model's own code has no place, or one beside the decoder."""
        names = list(names)
        known = self.model.state_dict().keys() - {*beside(self.family, names)}
        return [name for name in names if name not in known]

    def embed(
        self, ids: Int[Tensor, "samples tokens"], outer: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "samples tokens hidden"], tuple[dict[str, Any], ...]]:
        """(hidden states before block 0, for each block the keyword arguments that the model gives it).

        Tokens and embedding may lie anywhere; of `outer`, the tensors outside the blocks, no other is used. Blocks may
        be given different masks or rotary positions, so their arguments are caught at every one of them, on the way of
        one sequence through blocks that compute nothing. They are broadcast over a batch.

        Raises:
            RuntimeError: an argument depends on the batch, which no supported family does.
        """
        names = [f"{module}.weight" for module in self.family.entries]
        lent = {name: outer[name].to(self.device, self.dtype) for name in names}
        hidden, caught = [], list[tuple[Tensor, dict[str, Any]]]()
        for index, row in enumerate(ids.to(self.device), 1):
            caught = self._arguments(lent, row[None], self.dims.layers if index == len(ids) else 1)
            hidden.append(caught[0][0].detach())
        given = tuple({key: value for key, value in one.items() if key != "use_cache"} for _, one in caught)
        for key, value in (pair for one in given for pair in one.items()):
            if isinstance(value, Tensor) and value.ndim and value.shape[0] != 1 and value.shape[0] == len(ids) > 1:
                raise RuntimeError(f"argument {key} depends on the batch")
        return torch.cat(hidden), given

    def _arguments(self, lent: Mapping[str, Tensor], ids: Tensor, count: int) -> list[tuple[Tensor, dict[str, Any]]]:
        """What reaches the first `count` blocks, each of which hands on what it was given."""
        caught: list[tuple[Tensor, dict[str, Any]]] = []

        def catch(x: Tensor, **kwargs: Any) -> Tensor:
            caught.append((x, kwargs))
            if len(caught) == count:
                raise StopForward
            return x

        blocks = [self.block(index) for index in range(count)]
        for block in blocks:
            block.forward = catch
        try:
            with contextlib.suppress(StopForward):
                functional_call(self.model, dict(lent), (ids,), {"use_cache": False}, tie_weights=False)
        finally:
            for block in blocks:
                del block.forward
        return caught

    def head(self, outer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `logits` needs of the tensors outside the blocks, moved here once."""
        own = f"{self.family.head}.weight"
        wanted = (f"{self.family.norm}.", f"{self.family.head}." if own in outer else f"{self.family.embedding}.")
        return {name: t.to(self.device, self.dtype) for name, t in outer.items() if name.startswith(wanted)}

    def logits(
        self, hidden: Float[Tensor, "*batch hidden"], head: Mapping[str, Tensor]
    ) -> Float[Tensor, "*batch vocab"]:
        """Final norm and head on hidden states behind the last block."""
        norm, own = f"{self.family.norm}.", f"{self.family.head}.weight"
        lent = {name.removeprefix(norm): tensor for name, tensor in head.items() if name.startswith(norm)}
        normed = functional_call(self.model.get_submodule(self.family.norm), lent, (hidden,))
        weight = head[own if own in head else f"{self.family.embedding}.weight"]
        logits = nn.functional.linear(normed, weight, head.get(f"{self.family.head}.bias"))
        return capped_logits(logits, self.model.config)


def open_decoder(
    source: Source,
    family: Family,
    dims: Dims,
    device: torch.device,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
) -> Decoder:
    """The original Hugging Face model of `source`, empty but for its buffers.

    Raises:
        AffineQuantError: transformers cannot make it out of its config.json, one of its parameters has no tensor in
            the source, or a norm is none that transforms are folded into (exit 3).
    """
    model = split_experts(_empty_model(source, trust_remote_code), family)
    there = {*source.entries, *([f"{family.head}.weight"] if dims.tied else [])}
    missing = [name for name, _ in model.named_parameters() if source.entries and name not in there]
    if missing:  # transformers would make up what is not there
        raise broken(f"tensor {missing[0]} is missing, which the model's own code asks for", source.folder)
    for name, parameter in model.named_parameters():
        if name in source.entries and source.entries[name].shape != parameter.shape:
            shapes = f"{list(source.entries[name].shape)}, the model's own code asks for {list(parameter.shape)}"
            raise broken(f"tensor {name} has shape {shapes}", source.folder)
    model.eval().requires_grad_(False)
    check_norms(model, family, dims, str(source.folder))
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    return Decoder(model=model, family=family, dims=dims, device=device, dtype=dtype)


def _empty_model(source: Source, trust_remote_code: bool) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, GenerationConfig

    folder = source.folder
    path = folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = auto_class(source.config).from_config(
                config, dtype=torch.float32, attn_implementation=register(), trust_remote_code=trust_remote_code
            )
        path = folder / "generation_config.json"
        if path.exists():  # whoever loads what is written reads it
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as problem:
        what = f"transformers cannot use {path.name}: {first_line(problem)}"
        fix = f"correct that in {path.name}, or download it again"
        raise AffineQuantError(what, str(path), fix, exit_code=PREFLIGHT) from problem
    return model


def run_block(
    block: nn.Module,
    family: Family,
    tensors: Mapping[str, Tensor],
    x: Float[Tensor, "batch tokens hidden"],
    kwargs: Mapping[str, Any],
    on_input: OnInput | None = None,
    on_attention: OnAttention | None = None,
    known: Mapping[str, Tensor] | None = None,
    scales: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "batch tokens hidden"]:
    """One block with `tensors` (named within it) as its weights; `family` is what it is made of.

    `on_input(site, x)` is asked once per site and call, whatever the number of linears that read the site;
    `on_attention` gets queries, keys and values after RoPE. `known` holds what some linears give on this `x`: they are
    not computed. `scales` holds, for some linears, factors of the rows of their weights that are not in these yet. The
    tensors of an expert are asked for when its turn comes.

    Raises:
        RuntimeError: the block's own code kept `on_attention` from its attention.
    """
    handles, passed, experts, every = [], dict(kwargs), family.expert(), tensors
    tensors = {name: every[name] for name in every if not experts or not name.startswith(f"{experts}.")}
    many: Any = block.get_submodule(experts) if experts else None
    for member, output in (known or {}).items():
        tensors |= {name: tensors[name][:0] for name in (f"{member}.weight", f"{member}.bias") if name in tensors}
        hooked = block.get_submodule(member)
        handles.append(hooked.register_forward_hook(lambda *given, output=output: _shaped(output, given[-1])))
    for member, scale in (scales or {}).items():
        if (bias := f"{member}.bias") in tensors:
            tensors[bias] = tensors[bias] / scale
        handles.append(block.get_submodule(member).register_forward_hook(lambda *given, scale=scale: given[-1] * scale))
    asked: list[bool] = []
    if on_attention is not None and family.attention:
        act = on_attention

        def asking(*given: Tensor | None, **more: bool) -> Attended:
            asked.append(True)
            return act(*given, **more)

        passed["on_attention"] = asking
    if on_input is not None:
        for site, modules in family.taps():
            hook = _shared_hook(site, on_input, x)
            handles += [block.get_submodule(module).register_forward_pre_hook(hook) for module in modules]
    try:
        with lending(many, every, experts) if experts else contextlib.nullcontext():
            result = functional_call(block, tensors, (x,), passed)
    finally:
        for handle in handles:
            handle.remove()
    if on_attention is not None and family.attention and not asked:
        raise RuntimeError("the block's attention did not come by")
    return result[0] if isinstance(result, tuple) else result


def _shared_hook(site: str, on_input: OnInput, like: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """`on_input` is given [batch, tokens, features] as `like` has them, whatever a block makes of its tokens; within an
    expert it is one sample of those that were sent there."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not seen or seen[0][0] is not args[0]:
            x = args[0][None] if in_expert(site) else _shaped(args[0], like)
            seen[:] = [(args[0], _shaped(on_input(site, x), args[0]))]
        return (seen[0][1], *args[1:])

    return hook


def _shaped(x: Tensor, like: Tensor) -> Tensor:
    """x with the leading axes of another."""
    return x if x.shape[:-1] == like.shape[:-1] else x.reshape(*like.shape[:-1], -1)


def like_on_disk(x: Tensor, folder: Path | None) -> Tensor:
    """Room for a tensor like `x`: in memory, or backed by a file in `folder` that goes with the tensor."""
    if folder is None:
        return torch.empty_like(x)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        if sys.platform == "linux":  # a full disk is said now, and does not kill the process later
            os.posix_fallocate(file.fileno(), 0, max(x.nbytes, 1))
        else:
            file.truncate(x.nbytes)
        return torch.from_file(file.name, shared=True, size=x.numel(), dtype=x.dtype).view(x.shape)


def spread(samples: int, tokens: int, rows: int, seed: int) -> Bool[Tensor, "samples tokens"]:
    """Which tokens to look at where about `rows` are enough: every sample gives some, and every position is there as
    often as in all samples.

    One token in so many of each sample, from an offset of its own; in turn the samples take every offset once, in an
    order that the seed decides. More than `rows` are taken where samples, or positions, are more. The first token of a
    sample carries massive activations: always taken, it counted the more the more text there was, and drawn by chance
    it would be there or not.
    """
    stride = max(1, min(samples * tokens // max(1, rows), samples, tokens))
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(stride, generator=generator) for _ in range(samples // stride + 1)]
    offsets = torch.cat(rounds)[:samples, None]
    return (torch.arange(tokens) - offsets) % stride == 0


def slices(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` over `count` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))

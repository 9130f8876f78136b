"""One of vLLM's linears on integers: loads the tensors of our checkpoints, computes as `affinequant.load` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from affinequant.formats.packing import unpack, words
from affinequant.recipe.scheme import Scheme
from affinequant.runtime.integer_linear import IntegerLinear
from affinequant.transforms.online import check_online, in_order


class Declared(Protocol):
    """What a checkpoint's config.json says, as its linears ask it."""

    slices: dict[str, int]

    def numbers(self, members: list[str]) -> Scheme:
        """The numbers of linears that make up one layer."""
        ...

    def whole(self, scheme: Scheme) -> bool:
        """Whether codes of these numbers are stored as int8, as they are, instead of packed into words."""
        ...

    def members(self, prefix: str) -> list[str]:
        """The linears of the checkpoint that make up one of vLLM's."""
        ...

    def clip(self, members: list[str]) -> float:
        """The ratio by which the range of their common input is narrowed."""
        ...

    def matrices(self, members: list[str]) -> dict[str, list[int]]:
        """Part to shape, of what acts on their common input."""
        ...


class Shared(BasevLLMParameter):
    """A tensor that every member of a fused layer keeps, each the same; NaN until it is loaded. Of the blocks of a whole
    input, each of `ranks` that sees a slice keeps its share."""

    def __init__(self, data: Tensor, weight_loader: Callable, ranks: int) -> None:
        super().__init__(data=data.fill_(torch.nan), weight_loader=weight_loader)
        self.ranks = ranks

    def load(self, loaded_weight: Tensor, *shard: Any) -> None:
        """One member's tensor, or that of a layer which is fused on disk already: vLLM would cut that by rows."""
        if self.ranks > 1:
            loaded_weight = loaded_weight.chunk(self.ranks)[self.tp_rank]
        if loaded_weight.shape != self.data.shape:
            raise ValueError(
                f"a transform of size {tuple(loaded_weight.shape)} where config.json says {tuple(self.data.shape)}"
            )
        if not bool(self.data.isnan().all()) and not torch.equal(self.data, loaded_weight.to(self.data)):
            raise ValueError("members of a fused layer have different transforms, though they read one input")
        self.data.copy_(loaded_weight)


@dataclass(slots=True)
class Loaded:
    """How often a parameter was given its part of a layer, and whether it was given all of it at once."""

    seen: int = 0
    whole: bool = False


@register_weight_loader_v2_supported_method
class AffineQuantLinear(LinearMethodBase):
    """One of vLLM's linears, fused or not, on integers."""

    def __init__(self, config: Declared, prefix: str) -> None:
        self.config, self.prefix = config, prefix
        self.members = config.members(prefix)
        self.scheme = config.numbers(self.members)
        self.whole = config.whole(self.scheme)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The tensors of the checkpoint, to be loaded.

        Raises:
            ValueError: a size that cannot be loaded, or tensor parallelism that the checkpoint was not made for.
        """
        self.clip, online = self.config.clip(self.members), self.config.matrices(self.members)
        rows, columns, fmt = sum(output_partition_sizes), input_size_per_partition, self.scheme.weight
        ranks = input_size // columns
        self.slices = self.slices_of(ranks, online)
        self.size, self.count = (rows, columns), len(output_partition_sizes)
        self.loaded: dict[str, Loaded] = {}
        self.ready = False
        self.dtype = params_dtype
        load, per_word = extra_weight_attrs["weight_loader"], Fraction(32, fmt.bits)
        groups = fmt.groups(columns)

        def add(name: str, kind: type[BasevLLMParameter], data: Tensor, **settings: Any) -> None:
            layer.register_parameter(name, kind(data=data, weight_loader=self._counted(name, load), **settings))

        by_rows = {"output_dim": 0} | ({"input_dim": 1} if fmt.granularity == "group" else {})
        scale = GroupQuantScaleParameter if fmt.granularity == "group" else ChannelQuantScaleParameter
        # vLLM's default dtype may be float16, which has no room for small scales.
        add("weight_scale", scale, torch.full((rows, groups), torch.nan, dtype=torch.float32), **by_rows)
        if self.whole:
            add("weight", ModelWeightParameter, torch.empty(rows, columns, dtype=torch.int8), output_dim=0, input_dim=1)
        else:
            data = torch.empty(rows, words(columns, fmt.bits), dtype=torch.int32)
            packing = {"output_dim": 0, "input_dim": 1, "packed_dim": 1, "packed_factor": per_word}
            add("weight_packed", PackedvLLMParameter, data, **packing)
            add("weight_shape", BasevLLMParameter, torch.empty(2, dtype=torch.int64))
        if not fmt.symmetric:
            self._check_rows(output_partition_sizes, output_size, per_word)
            kind = PackedvLLMParameter if fmt.granularity == "group" else PackedColumnParameter
            data = torch.zeros(words(rows, fmt.bits), groups, dtype=torch.int32)
            add("weight_zero_point", kind, data, packed_dim=0, packed_factor=per_word, **by_rows)
        self.parts = {part: f"online_{part.replace('.', '_')}" for part in online}
        for part, shape in online.items():
            cut = ranks if len(shape) == 3 and shape[0] > 1 else 1
            matrix, name = torch.empty(shape[0] // cut, *shape[1:]), self.parts[part]
            layer.register_parameter(
                name, Shared(data=matrix, weight_loader=self._counted(name, Shared.load), ranks=cut)
            )

    def slices_of(self, ranks: int, online: Mapping[str, Any]) -> int:
        """Into how many slices each of `ranks` cuts its own part of the input, on which the parts `online` act.

        Raises:
            ValueError: the checkpoint was not made for so many ranks.
        """
        slices = self.config.slices.get(self.members[0], 1)
        if slices % ranks and (self.scheme.activation or online):
            made = f"--tp {slices}" if slices > 1 else "no --tp"
            raise ValueError(
                f"{self.prefix} would see a part of its input on each of {ranks} ranks. The scale of a token and what acts "
                f"on the whole of it come out differently there, and the checkpoint was made with {made}: quantise with "
                f"--tp {ranks}, or serve with a --tensor-parallel-size that divides {slices}"
            )
        return max(1, slices // ranks)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """From the tensors of the checkpoint to the layout of the kernels.

        Raises:
            ValueError: a tensor that was not loaded, values that are not finite, or matrices that define no transform.
        """
        for name, loaded in self.loaded.items():
            if not loaded.whole and loaded.seen != self.count:
                raise ValueError(f"{self.prefix}: the checkpoint lacks {name} of {', '.join(self.members)}")
        fmt, tensors = self.scheme.weight, {name: getattr(layer, name).data for name in self.loaded}
        scale, zero = tensors["weight_scale"], None
        codes = tensors["weight"] if self.whole else unpack(tensors["weight_packed"], fmt.bits, self.size[1])
        if not fmt.symmetric:
            zero = unpack(tensors["weight_zero_point"].T, fmt.bits, len(scale)).T.contiguous()
        online = {part: tensors[name] for part, name in self.parts.items()}
        for name in self.loaded:
            delattr(layer, name)
        try:
            if any(not bool(matrix.isfinite().all()) for matrix in online.values()):
                raise ValueError("a transform holds values that are not finite")
            if online:
                check_online(online, self.size[1], self.slices)
            layer.integers = IntegerLinear(
                codes,
                scale,
                zero,
                None,
                bits=fmt.bits,
                activation=self.scheme.activation,
                clip=self.clip,
                matrices=in_order(online) if online else (),
                slices=self.slices,
                dtype=self.dtype,
            )
            bias: Any = None if getattr(layer, "skip_bias_add", False) else getattr(layer, "bias", None)
            layer.integers.warm(self.dtype, bias)
        except ValueError as problem:
            raise ValueError(f"{self.prefix}: {problem}") from None
        # vLLM's wrapper for adapters (LoRA) asks this for its device, and nothing for anything else.
        layer.register_buffer("weight_packed", torch.empty(0, dtype=torch.int32, device=codes.device), persistent=False)
        self.ready = True

    def _counted(self, name: str, load: Callable[..., None]) -> Callable[..., None]:
        """A weight loader that remembers how many members of the layer it was given."""
        count = self.loaded[name] = Loaded()

        def weight_loader(param: nn.Parameter, loaded: Tensor, *shard: Any) -> None:
            # As vLLM calls it: with the member's id where the layer is fused.
            if self.ready:
                raise ValueError(
                    f"{self.prefix}: weights of an affinequant checkpoint cannot be loaded again into a running engine "
                    "(reload_weights): what belongs to them stands in config.json, which is not read again. This engine "
                    "has lost its weights: start another one on the new folder"
                )
            count.seen += len(shard[0]) if shard and isinstance(shard[0], tuple) else 1  # fused on disk, in part
            count.whole |= not shard or shard[0] is None
            load(param, loaded, *shard)

        return weight_loader

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer on a batch of tokens."""
        return layer.integers(x, bias)  # pyright: ignore[reportCallIssue]

    def _check_rows(self, sizes: list[int], output_size: int, per_word: Fraction) -> None:
        if sizes != [output_size] and any(size % per_word for size in sizes):
            raise ValueError(
                f"{self.prefix}: {sizes} rows per rank, and zero points are packed {per_word} rows to a word: use a "
                "smaller --tensor-parallel-size"
            )

"""A block's tensors of which those of experts are made when they are asked for: with one of them at a time in work, the
others need no room."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.models.sites import TOGETHER


class OnDemand(Mapping[str, Tensor]):
    """Those that are `there`, and those of `names`, which `make` gives whenever one is asked for and nobody keeps."""

    def __init__(self, there: Mapping[str, Tensor], names: Collection[str], make: Callable[[str], Tensor]) -> None:
        self.there, self.names, self.make = dict(there), dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name."""
        return self.make(name) if name in self.names else self.there[name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        yield from self.there
        yield from self.names

    def __len__(self) -> int:
        """How many there are."""
        return len(self.there) + len(self.names)


def each(tensors: Mapping[str, Tensor], act: Callable[[str, Tensor], Tensor], module: str = "") -> Mapping[str, Tensor]:
    """What `act` makes of every tensor; of those on demand, and those under `module`, whenever one is asked for."""
    names = [name for name in tensors if _late(tensors, name, module)]
    there = {name: act(name, tensors[name]) for name in tensors if not _late(tensors, name, module)}
    return OnDemand(there, names, lambda name: act(name, tensors[name])) if names else there


def _late(tensors: Mapping[str, Tensor], name: str, module: str) -> bool:
    asked = isinstance(tensors, OnDemand) and name in tensors.names
    return asked or (bool(module) and name.startswith(f"{module}."))


class Stacked(Iterable[Float[Tensor, "rows columns"]]):
    """The weights of some linears, one below the other: in one matrix, or where some are on demand in as many as keep each
    to `TOGETHER` values. For what is a sum over rows; it may be gone through again."""

    def __init__(
        self, tensors: Mapping[str, Tensor], linears: Iterable[str], *acts: Callable[[Tensor], Tensor]
    ) -> None:
        self.tensors, self.linears, self.acts = tensors, tuple(linears), acts

    def __iter__(self) -> Iterator[Float[Tensor, "rows columns"]]:
        """The matrices, in order."""
        parts, room = list[Tensor](), TOGETHER if isinstance(self.tensors, OnDemand) and self.tensors.names else None
        for linear in self.linears:
            weight = self.tensors[f"{linear}.weight"]
            if room is not None and parts and sum(part.numel() for part in parts) + weight.numel() > room:
                yield self._joined(parts)
            parts.append(weight)
        yield self._joined(parts)

    def each(self, act: Callable[[Tensor], Tensor]) -> "Stacked":
        """What `act` makes of every matrix."""
        return Stacked(self.tensors, self.linears, *self.acts, act)

    def moment(self) -> Float[Tensor, "columns columns"]:
        """The mean of w^T w over rows w."""
        total, rows = None, 0
        for part in self:
            value = part.mT @ part
            total, rows = value if total is None else total + value, rows + len(part)
        assert total is not None
        return total / rows

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """The matrix of these, which are then forgotten."""
        whole = torch.cat(parts)
        parts.clear()
        for act in self.acts:
            whole = act(whole)
        return whole

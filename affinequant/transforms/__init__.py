"""The transforms there are, by name. Each is built for a site and acts as x P on activations and W P^-T on weights."""

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from affinequant.errors import unknown_name
from affinequant.sites import Site, Structure

if TYPE_CHECKING:
    import torch


class Transform(Protocol):
    """An invertible linear map P on the features of a site.

    `copies` repeats each head of P for that many consecutive heads of the tensor (query heads per KV head).
    """

    def parameters(self) -> "Iterator[torch.nn.Parameter]":
        """What is learned."""
        ...

    def to(self, device: "torch.device") -> "Transform":
        """Itself, moved."""
        ...

    def double(self) -> "Transform":
        """Itself, in fp64."""
        ...

    def on_activations(self, x: "torch.Tensor", copies: int = 1) -> "torch.Tensor":
        """x P over the last axis, [..., width * copies]."""
        ...

    def on_weights(self, w: "torch.Tensor", copies: int = 1) -> "torch.Tensor":
        """w P^-T over the last axis, [..., width * copies]."""
        ...

    def progress(self, t: float) -> bool:
        """Told before each step how far training is (0 to 1); True when parameters were released for training."""
        ...

    def condition(self) -> float:
        """Condition number of P (the largest over heads)."""
        ...


TRANSFORMS: dict[str, tuple[str, str, str]] = {
    "diagonal": ("diagonal", "affinequant.transforms.diagonal:Diagonal", "one positive factor per feature"),
    "rope-pair": (
        "rope-pair",
        "affinequant.transforms.rope_pair:RopePair",
        "a scaled rotation per frequency pair",
    ),
    "banded": ("per-head", "affinequant.transforms.banded:Banded", "dense per head under the gradual mask"),
    "hadamard": ("hadamard", "affinequant.transforms.hadamard:Hadamard", "fixed rotation with random signs, any width"),
}
"""name -> (structure, where it is, what it is)."""


def structures_of(name: str, *, where: str) -> tuple[Structure, ...]:
    """The structures of a transform, which decide its placement: one, or one per part of `first+second`."""
    parts = name.split("+")
    for part in parts:
        if part not in TRANSFORMS:
            raise unknown_name("transform", part, TRANSFORMS, where=where, listing="transforms")
    return tuple(TRANSFORMS[part][0] for part in parts)  # pyright: ignore[reportReturnType]


def build(name: str, site: Site, *, seed: int, alpha: float, start: "torch.Tensor | None" = None) -> "Transform":
    """The transform `name` for `site`. `first+second` acts one after the other; the diagonal `start` [width] goes to
    the first, since what follows acts on features that have been mixed or balanced already."""
    parts = []
    for position, part in enumerate(name.split("+")):
        module, _, attribute = TRANSFORMS[part][1].partition(":")
        made = getattr(importlib.import_module(module), attribute)
        parts.append(made(site, seed=seed + position, alpha=alpha, start=None if position else start))
    if len(parts) == 1:
        return parts[0]
    from affinequant.transforms.chain import Chain

    return Chain(parts)

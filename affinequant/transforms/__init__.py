"""The transforms there are, by name. Each is built for a site and acts as x P on activations and W P^-T on weights."""

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from affinequant.errors import AffineQuantError, unknown_name
from affinequant.models.sites import Site, Structure, place

if TYPE_CHECKING:
    import torch

    Start = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Transform(Protocol):
    """An invertible linear map P on the features of a site, or where a shift is part of it an affine one, x P + c.

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
        """x P, or x P + c, over the last axis, [..., width * copies]."""
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


class OnlineTransform(Transform, Protocol):
    """One that can act at run time. It acts on what the sinks read, so its `copies` are always those of the sinks."""

    def online(self) -> "dict[str, torch.Tensor]":
        """The matrices that the run time applies (`transforms/online.py`), detached; fp64 after `double`."""
        ...


_HERE = "affinequant.transforms."
TRANSFORMS: dict[str, tuple[str, str, str]] = {
    "diagonal": ("diagonal", _HERE + "diagonal:Diagonal", "one positive factor per feature"),
    "shift": ("translation", _HERE + "shift:Shift", "features moved about zero; biases take that up: OPT"),
    "rope-pair": ("rope-pair", _HERE + "rope_pair:RopePair", "a scaled rotation per frequency pair"),
    "banded": ("per-head", _HERE + "banded:Banded", "dense per head under the gradual mask"),
    "hadamard": ("hadamard", _HERE + "hadamard:Hadamard", "fixed rotation with random signs, any width"),
    "kronecker": ("kronecker", _HERE + "kronecker:Kronecker", "a product of two small matrices, spectra bounded"),
    "block": ("block", _HERE + "block:Block", "a matrix per head or block of features, spectra bounded"),
    "lu": ("block", _HERE + "lu:LowerUpper", "triangular factors per head or block of features"),
    **{
        f"shared-{width}": (f"shared-{width}", f"{_HERE}shared:shared_{width}", f"one matrix for all blocks of {width}")
        for width in (16, 32, 64, 128)
    },
    "block-hadamard": (
        "orthogonal",
        _HERE + "shared:BlockHadamard",
        "fixed rotation with random signs, per head or block",
    ),
    "dense": ("dense", _HERE + "block:dense", "one matrix of the whole width, for comparison"),
    "orthogonal": (
        "orthogonal",
        _HERE + "orthogonal:Orthogonal",
        "learned rotation per head or block, or whole, by Cayley",
    ),
    "gram-schmidt": ("orthogonal", _HERE + "orthogonal:by_gram_schmidt", "the same by Gram-Schmidt (QR)"),
    "polar": ("orthogonal", _HERE + "orthogonal:by_polar", "the same by the nearest orthogonal matrix (SVD)"),
}
"""name -> (structure, where it is, what it is)."""
SHIFT = "shift"
LEARNED_ROTATIONS = ("orthogonal", "gram-schmidt", "polar")
"""Those that end-to-end training of the residual stream's rotation can move."""


def structures_of(name: str, *, where: str) -> tuple[Structure, ...]:
    """The structures of a transform, which decide its placement: one, or one per part of `first+second`."""
    parts = name.split("+")
    for part in parts:
        if part not in TRANSFORMS:
            known = (*TRANSFORMS, *(("auto", "none") if len(parts) == 1 else ()))
            raise unknown_name("transform", part, known, where=where, listing="transforms")
    return tuple(TRANSFORMS[part][0] for part in parts)  # pyright: ignore[reportReturnType]


def split_parts(name: str, site: Site, *, where: str = "--transform") -> tuple[str, str]:
    """The parts of `first+second+...` that fold at `site` and those that stay online, each a name for `build`; "" where
    there are none. Parts that fold come first: whatever follows an online part would have to pass through it.

    Raises:
        AffineQuantError: a part that is unknown, refused at the site, or folds only after an online one.
    """
    names, how = name.split("+"), []
    for part, structure in zip(names, structures_of(name, where=where), strict=True):
        placement = place(site, structure)
        if placement.how == "refused":
            raise AffineQuantError(f"{part} at {site.name} is refused: {placement.reason}", where, _possible(site))
        if placement.how == "folded" and "online" in how:
            raise AffineQuantError(
                f"{part} at {site.name} folds into the weights, but follows {names[len(how) - 1]}, which stays online",
                where,
                "put the parts that fold first: " + "+".join([part, *(other for other in names if other != part)]),
            )
        how.append(placement.how)
    folded = how.count("folded")
    return "+".join(names[:folded]), "+".join(names[folded:])


def names_at(site: Site, how: str) -> str:
    """The transforms that are `folded` (or `online`, or `refused`) at a site, for a message."""
    return ", ".join(name for name in TRANSFORMS if place(site, structures_of(name, where="")[0]).how == how)


def _possible(site: Site) -> str:
    parts = [f"{how} there: {names}" for how in ("folded", "online") if (names := names_at(site, how))]
    return "choose another (" + "; ".join(parts) + ")" if parts else f"leave it out: {site.name}=none"


def build(
    name: str,
    site: Site,
    *,
    seed: int,
    alpha: float,
    start: "Start | None" = None,
    shift: "torch.Tensor | None" = None,
) -> "Transform":
    """The transform `name` for `site`. `first+second` acts one after the other; `start` goes to the first, since what
    follows acts on features that have been mixed or balanced already, but to the second behind a shift, which does neither.

    Args:
        shift: [width] to a shift that comes first.
        start: a diagonal [width], or where the first part takes them its matrices: a pair of factors for a Kronecker
            product, [count, b, b] for blocks. None for the transform's own start.
    """
    parts, names = [], name.split("+")
    given = {0: shift, 1: start} if names[0] == SHIFT else {0: start}
    for position, part in enumerate(names):
        module, _, attribute = TRANSFORMS[part][1].partition(":")
        made = getattr(importlib.import_module(module), attribute)
        parts.append(made(site, seed=seed + position, alpha=alpha, start=given.get(position)))
    if len(parts) == 1:
        return parts[0]
    from affinequant.transforms.chain import Chain

    return Chain(parts)

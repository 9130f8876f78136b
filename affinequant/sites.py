"""Where a transform may act and whether it can be folded away. Pure data and arithmetic: no tensors, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Side = Literal["gain", "rows", "columns"]
Kind = Literal["residual", "norm", "rope", "heads", "linear"]
Structure = Literal["diagonal", "rope-pair", "per-head", "kronecker", "block", "dense", "hadamard", "orthogonal"]

STRUCTURES: tuple[Structure, ...] = (
    "diagonal",
    "rope-pair",
    "per-head",
    "kronecker",
    "block",
    "dense",
    "hadamard",
    "orthogonal",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """One place where a transform meets a parameter.

    `module` is named relative to its block (`scope="block"`) or to the whole model. `side` says which part of it
    carries the site's features: a norm's gain, a linear's output rows, or its input columns. `copies` is how many
    consecutive heads share one head of the transform (query heads per KV head).
    """

    module: str
    side: Side
    copies: int = 1
    scope: Literal["block", "model"] = "block"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A tensor between its producers and consumers: `width` features in `heads` heads (1 where heads mean nothing).

    A transform P acts as x P on what `sources` produce and as W P^-T on what `sinks` consume.
    """

    name: str
    kind: Kind
    width: int
    heads: int = 1
    sources: tuple[Edge, ...]
    sinks: tuple[Edge, ...]

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.width // self.heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What becomes of a transform at a site: folded, online at `flops` per token, or refused; `reason` says why."""

    how: Literal["folded", "online", "refused"]
    reason: str
    flops: int = 0


_FOLDS: Mapping[Kind, Mapping[Structure, str]] = {
    "residual": {
        "hadamard": "orthogonal maps commute with the norm once its gain is fused",
        "orthogonal": "orthogonal maps commute with the norm once its gain is fused",
    },
    "norm": {"diagonal": "a diagonal goes into the norm's gain"},
    "rope": {"rope-pair": "scaled rotations of a frequency pair commute with RoPE"},
    "heads": {
        "diagonal": "one factor per value feature goes into v and o",
        "per-head": "one matrix per KV head goes into v and o",
        "hadamard": "one rotation per KV head goes into v and o",
        "orthogonal": "one rotation per KV head goes into v and o",
    },
    "linear": {"diagonal": "a diagonal passes the elementwise product into the producer's rows"},
}
_ONLINE: Mapping[Kind, Mapping[Structure, str]] = {
    "norm": dict.fromkeys(
        ("kronecker", "block", "dense", "hadamard", "orthogonal"),
        "does not commute with the norm's gain: a matmul stays",
    ),
    "rope": {"hadamard": "acts on q and k after RoPE"},
    "heads": {"kronecker": "mixes heads, which attention keeps apart: a matmul stays"},
    "linear": dict.fromkeys(
        ("kronecker", "block", "hadamard"), "does not pass the elementwise product: a matmul stays"
    ),
}
_REFUSED: Mapping[Kind, str] = {
    "residual": "only orthogonal maps commute with the norms on the residual stream",
    "norm": "the norm's output has no heads",
    "rope": "not equivalent under RoPE: it does not commute with the rotation of positions",
    "heads": "would act across heads or as a dense matrix as large as the layer itself",
    "linear": "a dense matrix here would cost as much as the layer itself, and heads mean nothing",
}


def place(site: Site, structure: Structure) -> Placement:
    """Whether `structure` at `site` folds into the weights, stays online (with its cost), or is refused.

    The cost is in floating-point operations per token of one block, multiply and add counted separately.
    """
    if structure in _FOLDS[site.kind]:
        return Placement(how="folded", reason=_FOLDS[site.kind][structure])
    if structure in _ONLINE.get(site.kind, {}):
        return Placement(how="online", reason=_ONLINE[site.kind][structure], flops=_cost(site, structure))
    return Placement(how="refused", reason=_REFUSED[site.kind])


def _cost(site: Site, structure: Structure) -> int:
    n, per_head = site.width, site.head_width
    if structure in ("dense", "orthogonal"):
        return 2 * n * n
    if structure == "block":
        return 2 * n * (per_head if site.heads > 1 else _near_square(n)[0])
    if structure == "hadamard" and site.kind == "rope":
        return 2 * n * per_head * (_copies(site.sources) + 1)  # every query head and its KV head
    if site.kind == "heads":
        heads = site.heads * _copies(site.sinks)  # acts on what the output projection reads
        return 2 * heads * per_head * (heads + per_head)
    left, right = _near_square(n)
    return 2 * n * (left + right)


def _copies(edges: tuple[Edge, ...]) -> int:
    return max((edge.copies for edge in edges), default=1)


def _near_square(n: int) -> tuple[int, int]:
    """The factor pair of n with the smallest sum."""
    small = next(f for f in range(int(n**0.5), 0, -1) if n % f == 0)
    return small, n // small

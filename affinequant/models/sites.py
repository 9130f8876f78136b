"""Where a transform may act and whether it can be folded away. Pure data and arithmetic: no tensors, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Side = Literal["gain", "factor", "rows", "columns"]
Kind = Literal["residual", "norm", "rope", "scores", "heads", "gated", "linear"]
READ: tuple[Kind, ...] = ("norm", "heads", "gated", "linear")
"""Kinds of site whose features linears read as their inputs."""
Structure = Literal[
    "diagonal",
    "rope-pair",
    "per-head",
    "kronecker",
    "block",
    "dense",
    "hadamard",
    "orthogonal",
    "translation",
    "shared-16",
    "shared-32",
    "shared-64",
    "shared-128",
]

STRUCTURES: tuple[Structure, ...] = get_args(Structure)
TOGETHER = 2**24
"""Values of the weights of experts behind a site that are put one below the other at once."""
SHARED: tuple[Structure, ...] = STRUCTURES[-4:]
"""One matrix that all blocks of so many features share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """One place where a transform meets a parameter.

    `module` is named relative to its block (`scope="block"`) or to the whole model. `side` says which part of it
    carries the site's features: a norm's gain, the weight of another module that multiplies them as it is (a factor), a
    linear's output rows, or its input columns. `copies` is how many
    consecutive heads share one head of the transform (query heads per KV head). Of a fused linear, `rows` are the first
    of its rows that is meant and the first behind. What is `plain` stays in 16 bits (a router): it reads what its norm
    gives, not what a transform at run time makes of that. Of an affine transform a `bias` takes up what is added.
    """

    module: str
    side: Side
    copies: int = 1
    scope: Literal["block", "model"] = "block"
    rows: tuple[int, int] | None = None
    plain: bool = False
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A tensor between its producers and consumers: `width` features in `heads` heads (1 where heads mean nothing).

    `slices` equal parts of what the sinks read are transformed at run time, and quantised, each by itself: as many as
    there may be ranks of which each sees one. A transform P acts as x P on what `sources` produce and as W P^-T on what
    `sinks` consume.
    """

    name: str
    kind: Kind
    width: int
    heads: int = 1
    slices: int = 1
    sources: tuple[Edge, ...]
    sinks: tuple[Edge, ...]
    share: float = 1.0
    """Of a block's tokens, how many come by: of an expert's site few."""
    closed: str = ""
    """Why nothing may act there, whatever it is."""

    @property
    def readers(self) -> tuple[str, ...]:
        """The linears among its sinks whose inputs are transformed and rounded."""
        return tuple(edge.module for edge in self.sinks if not edge.plain)

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


def online_sites(placements: Mapping[str, Placement]) -> list[str]:
    """The sites whose transform acts at run time."""
    return [site for site, placement in placements.items() if placement.how == "online"]


def named(site: str) -> str:
    """What a recipe calls a site: those of the experts of a layer, `mlp_mid.3` or `mlp_mid.shared`, share a name."""
    return site.partition(".")[0]


def in_expert(site: str) -> bool:
    """Whether tokens come by there only as far as they were sent to one expert."""
    return site.partition(".")[2].isdigit()


_BLOCK = 64
"""Block-diagonal transforms aim at blocks of this width: small enough for one tile of the kernel."""

_FOLDS: Mapping[Kind, Mapping[Structure, str]] = {
    "residual": {
        "hadamard": "orthogonal maps commute with the norm once its gain is fused",
        "orthogonal": "orthogonal maps commute with the norm once its gain is fused",
    },
    "norm": {
        "diagonal": "a diagonal goes into the norm's gain",
        "translation": "a shift goes into the biases of the norm and of the linears behind it",
    },
    "rope": {"rope-pair": "scaled rotations of a frequency pair commute with RoPE"},
    "scores": dict.fromkeys(
        ("diagonal", "rope-pair", "block", "per-head", "hadamard", "orthogonal"),
        "one matrix per KV head goes into q and k",
    ),
    "heads": {
        "diagonal": "one factor per value feature goes into v and o",
        "block": "one matrix per KV head goes into v and o",
        "per-head": "one matrix per KV head goes into v and o",
        "hadamard": "one rotation per KV head goes into v and o",
        "orthogonal": "one rotation per KV head goes into v and o",
        "translation": "attention weights sum to one, so a shift goes into the biases of v and o",
    },
    "gated": {"diagonal": "one factor per feature passes the elementwise gate into the producer"},
    "linear": {"diagonal": "a diagonal passes the elementwise product into the producer's rows"},
}
_ONLINE: Mapping[Kind, Mapping[Structure, str]] = {
    "norm": dict.fromkeys(
        ("kronecker", "block", "dense", "hadamard", "orthogonal", *SHARED),
        "does not commute with the norm's gain: a matmul stays",
    ),
    "rope": {"hadamard": "acts on q and k after RoPE"},
    "heads": {"kronecker": "mixes heads, which attention keeps apart: a matmul stays"},
    "gated": {"kronecker": "does not pass the elementwise gate: a matmul stays"},
    "linear": dict.fromkeys(
        ("kronecker", "block", "hadamard", "orthogonal", *SHARED),
        "does not pass the elementwise product: a matmul stays",
    ),
}
_REFUSED: Mapping[Kind, str] = {
    "residual": "only orthogonal maps commute with the norms on the residual stream",
    "norm": "the norm's output has no heads",
    "rope": "not equivalent under RoPE: it does not commute with the rotation of positions",
    "scores": "would act across heads, which attention keeps apart",
    "heads": "would act across heads or as a dense matrix as large as the layer itself",
    "gated": "a gate multiplies each feature behind the heads: no matrix passes it, and at run time a Kronecker product acts",
    "linear": "a dense matrix here would cost as much as the layer itself, and heads mean nothing",
}

_NO_SHIFT: Mapping[Kind, str] = {
    "residual": "a shift of the residual stream would pass the norms, which divide by what reaches them",
    "rope": "a shift of queries or keys would add to scores what differs from key to key",
    "scores": "a shift of queries or keys would add to scores what differs from key to key",
    "linear": "what stands between the linears there is not linear: no shift passes it",
}


def place(site: Site, structure: Structure) -> Placement:
    """Whether `structure` at `site` folds into the weights, stays online (with its cost), or is refused.

    The cost is in floating-point operations per token of one block, multiply and add counted separately.
    """
    if site.closed:
        return Placement(how="refused", reason=site.closed)
    first = site.sources[0] if site.sources else None
    if first and first.side == "gain" and site.kind == "rope" and structure in _FOLDS["rope"]:
        reason = f"the gain of {first.module} acts between the linear and RoPE: no map passes it"
        return Placement(how="refused", reason=reason)
    if structure == "translation" and (reason := _unshifted(site)):
        return Placement(how="refused", reason=reason)
    if structure in SHARED and site.width // site.slices % shared_width(structure):
        reason = f"blocks of {shared_width(structure)} do not divide {site.width // site.slices} features"
        return Placement(how="refused", reason=reason)
    if structure in _FOLDS[site.kind]:
        return Placement(how="folded", reason=_FOLDS[site.kind][structure])
    if structure in _ONLINE.get(site.kind, {}):
        return Placement(how="online", reason=_ONLINE[site.kind][structure], flops=_cost(site, structure))
    return Placement(how="refused", reason=_REFUSED[site.kind])


def refusal(site: Site) -> str:
    """Why not even what folds at other sites of this kind folds at this one; "" where it does."""
    placed = [place(site, structure) for structure in _FOLDS[site.kind]]
    return "" if any(one.how == "folded" for one in placed) else placed[0].reason


def _unshifted(site: Site) -> str:
    """Why no shift folds at a site; "" where one does."""
    bare = next((edge.module for edge in (*site.sources, *site.sinks) if not edge.bias), "")
    return _NO_SHIFT.get(site.kind) or (f"{bare} has no bias, which would take the shift up" if bare else "")


def kronecker_factors(site: Site) -> tuple[int, int]:
    """Sizes (n1, n2) of the two factors of a Kronecker product on a slice of what the site's sinks read.

    Between heads and within them where there are heads (query heads, since the sinks read those), else the pair with
    the smallest sum, which is the cheapest to apply.
    """
    if site.kind in ("heads", "gated"):
        return site.heads * _copies(site.sinks) // site.slices, site.head_width
    width = site.width // site.slices
    small = next(f for f in range(int(width**0.5), 0, -1) if width % f == 0)
    return small, width // small


def rotation_factors(n: int) -> tuple[int, int]:
    """Sizes (a, b) of the two factors of a Hadamard rotation of n features.

    The odd part of n stays whole, in a: an outlier is spread better by one cosine matrix than by two smaller ones. The
    power of two is cut wherever that is cheapest, since a Hadamard matrix is a product of smaller ones anyway.
    """
    two = n & -n
    b = min((1 << k for k in range(two.bit_length())), key=lambda b: n // b + b)
    return n // b, b


def block_width(site: Site) -> int:
    """Width of one block of a block-diagonal transform: a head where there are heads, else the divisor of the width
    that is nearest to 64 by ratio."""
    if site.kind in ("heads", "gated", "scores", "rope"):
        return site.head_width
    width = site.width // site.slices
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    return min(divisors, key=lambda d: (max(d / _BLOCK, _BLOCK / d), d))


def shared_width(structure: Structure) -> int:
    """Features of a block of one of `SHARED`."""
    return int(structure.removeprefix("shared-"))


def online_numbers(site: Site, structure: Structure) -> int:
    """How many numbers one linear (after RoPE: one block's attention) keeps beside it for `structure` acting online at
    `site`."""
    if site.kind == "rope":  # one matrix for all heads
        return site.head_width**2
    n = site.width * (_copies(site.sinks) if site.kind in ("heads", "gated") else 1)
    if structure in ("kronecker", "hadamard"):
        left, right = rotation_factors(n // site.slices) if structure == "hadamard" else kronecker_factors(site)
        return left * left + right * right
    if structure in SHARED:
        return shared_width(structure) ** 2
    return n * n if structure == "dense" else n * block_width(site)


def _cost(site: Site, structure: Structure) -> int:
    n = site.width
    if structure == "dense":
        return 2 * n * n
    if structure in ("block", "orthogonal", *SHARED):
        return 2 * n * (shared_width(structure) if structure in SHARED else block_width(site))
    if structure == "hadamard" and site.kind == "rope":
        return 2 * n * site.head_width * (_copies(site.sources) + 1)  # every query head and its KV head
    left, right = rotation_factors(n // site.slices) if structure == "hadamard" else kronecker_factors(site)
    return 2 * left * right * (left + right) * site.slices


def _copies(edges: tuple[Edge, ...]) -> int:
    return max((edge.copies for edge in edges), default=1)

"""What a network is, as data: where its blocks, norms and linears are, and the sites between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from affinequant.models.sites import Edge, Kind, Side, Site

Width = Literal["hidden", "mlp", "query", "value"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """Sizes read from a config.json. `query` and `value` are the widths of all query heads and all KV heads."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def query(self) -> int:
        """Features of all query heads."""
        return self.heads * self.head_dim

    @property
    def value(self) -> int:
        """Features of all KV heads."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """A linear of a block: weight [rows, columns], and a bias [rows] where the config's flag `bias` is set."""

    name: str
    rows: Width
    columns: Width
    bias: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSpec:
    """A site before sizes are known. `grouped` modules see each KV head once per query head it serves."""

    name: str
    kind: Kind
    width: Width
    sources: tuple[tuple[str, Side], ...]
    sinks: tuple[tuple[str, Side], ...]
    grouped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of decoder. A relative that differs in a name or a convention is `dataclasses.replace` of another."""

    name: str
    architectures: tuple[str, ...]
    blocks: str
    embedding: str
    norm: str
    head: str
    norm_offset: float
    rope: Literal["half", "interleaved"]
    linears: tuple[LinearSpec, ...]
    sites: tuple[SiteSpec, ...]
    settings: Mapping[str, tuple[Any, ...]]
    """Config keys whose value changes the computation, with the values that this description is right for."""

    def site(self, name: str) -> SiteSpec:
        """The site called `name`."""
        return next(spec for spec in self.sites if spec.name == name)

    @property
    def attention(self) -> str:
        """The module, named within its block, inside which queries meet keys."""
        return next(spec for spec in self.sites if spec.kind == "rope").sources[0][0].rpartition(".")[0]

    def input_groups(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(site, linears) for each tensor that is quantised as an input, in the order of the forward pass."""
        groups: dict[str, list[str]] = {}
        names = {linear.name for linear in self.linears}
        for spec in self.sites:
            if spec.kind in ("norm", "heads", "linear"):
                groups[spec.name] = [module for module, side in spec.sinks if module in names and side == "columns"]
        order = {linear.name: position for position, linear in enumerate(self.linears)}
        return tuple(
            (site, tuple(members)) for site, members in sorted(groups.items(), key=lambda pair: order[pair[1][0]])
        )

    def fused_norms(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(norm, linears that read it) inside a block: where a gain goes before the residual stream is rotated."""
        return tuple(
            (spec.sources[0][0], tuple(module for module, _ in spec.sinks))
            for spec in self.sites
            if spec.kind == "norm"
        )


def resolve_sites(family: Family, dims: Dims, tp: int = 1) -> tuple[Site, ...]:
    """The family's sites with their sizes; with `tp` slices of those whose sinks tensor parallelism cuts by columns."""
    copies = dims.heads // dims.kv_heads

    def edges(pairs: tuple[tuple[str, Side], ...], spec: SiteSpec) -> tuple[Edge, ...]:
        outside = (family.embedding, family.head)
        return tuple(
            Edge(
                module=module,
                side=side,
                copies=copies if module in spec.grouped else 1,
                scope="model" if module in outside else "block",
            )
            for module, side in pairs
        )

    return tuple(
        Site(
            name=spec.name,
            kind=spec.kind,
            width=getattr(dims, spec.width),
            heads=dims.kv_heads if spec.kind in ("rope", "heads") else 1,
            slices=tp if spec.kind in ("heads", "linear") else 1,
            sources=edges(spec.sources, spec),
            sinks=edges(spec.sinks, spec),
        )
        for spec in family.sites
    )

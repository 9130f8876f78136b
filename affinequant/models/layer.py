"""A kind of layer, as data: its linears, its sites, its experts. What a network is made of."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from affinequant.models.dims import Dims, Width
from affinequant.models.sites import Kind, Side

End = tuple[str, Side]
"""A module of a block, or `module:part` of a fused one, and which side of it carries a site's features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """A linear of a block: weight [rows, columns], and a bias [rows] always or where the config's flag of that name is set.

    Where several are fused into one, `rows` has their names and widths in the order in which they lie below each other.
    """

    name: str
    rows: Width | Mapping[str, Width]
    columns: Width
    bias: str | bool = False

    def shape(self, dims: Dims) -> tuple[int, int]:
        """(rows, columns) of the weight."""
        rows = self.rows.values() if isinstance(self.rows, Mapping) else (self.rows,)
        return sum(getattr(dims, width) for width in rows), getattr(dims, self.columns)

    def part(self, name: str, dims: Dims) -> tuple[int, int]:
        """The first row of a part and the first behind it."""
        assert isinstance(self.rows, Mapping), f"{self.name} has no parts"
        start = sum(getattr(dims, self.rows[before]) for before in list(self.rows)[: list(self.rows).index(name)])
        return start, start + getattr(dims, self.rows[name])

    def has_bias(self, config: Mapping[str, Any]) -> bool:
        """Whether a model of this config, as its family reads it, has the bias."""
        return bool(config.get(self.bias)) if isinstance(self.bias, str) else self.bias


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSpec:
    """A site before sizes are known. `grouped` ends see each head of it several times, one after the other: a KV head once
    per query head that it serves. Where its ends have `*`
    for the number of an expert it is one site that all experts share, or with `each_expert` one in every expert."""

    name: str
    kind: Kind
    width: Width
    sources: tuple[End, ...]
    sinks: tuple[End, ...]
    grouped: tuple[str, ...] = ()
    each_expert: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """How files call a layer of experts: the module of router and experts within a block, and gate, up and down of each
    expert N in `MODULE.experts.N`."""

    module: str = "mlp"
    linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A kind of layer: a part of a block that reads the residual stream behind a norm and adds to it.

    Its linears whose rows are `hidden` give what is added, through the norm `post_norm` where there is one. `attention`
    is the module, named within the block, inside which queries meet keys; "" where none do. In a layer of `experts` a `*`
    in the name of a linear, and in an end of a site, stands for the number of each (`for_experts`).
    """

    linears: tuple[LinearSpec, ...]
    sites: tuple[SiteSpec, ...]
    attention: str = ""
    post_norm: str = ""
    experts: ExpertNames | None = None
    kept: tuple[LinearSpec, ...] = ()
    """Those that stay in 16 bits because somebody asked for that; `linears` are the others."""

    def writers(self) -> tuple[str, ...]:
        """The linears that give what is added to the residual stream."""
        return tuple(linear.name for linear in (*self.linears, *self.kept) if linear.rows == "hidden")

    def keeping(self, names: Collection[str]) -> "Layer":
        """The layer with these of its linears in 16 bits."""
        kept = (linear for linear in self.linears if linear.name in names)
        left = (linear for linear in self.linears if linear.name not in names)
        return replace(self, linears=tuple(left), kept=(*self.kept, *kept))

    def with_site(self, name: str, **changes: Any) -> "Layer":
        """The layer whose site `name` differs in these fields."""
        sites = tuple(replace(spec, **changes) if spec.name == name else spec for spec in self.sites)
        return replace(self, sites=sites)

    def for_experts(self, count: int) -> "Layer":
        """The layer with the linears and sites of so many experts, each by its name."""
        if self.experts is None:
            return self

        def ends(given: tuple[End, ...], numbers: Iterable[int]) -> tuple[End, ...]:
            named: Iterator[End] = (
                (name.replace("*", str(number)), side) for number in numbers for name, side in given
            )
            return tuple(dict.fromkeys(named))

        def of(spec: SiteSpec, name: str, numbers: Iterable[int]) -> SiteSpec:
            sources, sinks = (ends(given, numbers) for given in (spec.sources, spec.sinks))
            return replace(spec, name=name, sources=sources, sinks=sinks, each_expert=False)

        single = (linear for linear in self.linears if "*" not in linear.name)
        many = [linear for linear in self.linears if "*" in linear.name]
        each = (replace(one, name=one.name.replace("*", str(number))) for number in range(count) for one in many)
        sites = (
            of(spec, f"{spec.name}.{number}", [number]) if spec.each_expert else of(spec, spec.name, range(count))
            for spec in self.sites
            for number in (range(count) if spec.each_expert else (0,))
        )
        return replace(self, linears=(*single, *each), sites=tuple(sites))

    def with_names(self, names: Mapping[str, str], linears: tuple[LinearSpec, ...]) -> "Layer":
        """The layer with other linears. Ends of its sites are called by `names`, where these have them: a part of a fused
        linear by `module:part`, which reads what the whole reads."""

        def end(name: str, side: Side) -> End:
            named = names.get(name, name)
            return (named.partition(":")[0] if side == "columns" else named, side)

        def ends(given: tuple[End, ...]) -> tuple[End, ...]:
            return tuple(dict.fromkeys(end(*one) for one in given))

        sites = tuple(
            replace(
                spec,
                sources=ends(spec.sources),
                sinks=ends(spec.sinks),
                grouped=tuple(names.get(name, name) for name in spec.grouped),
            )
            for spec in self.sites
        )
        return replace(self, linears=linears, sites=sites)

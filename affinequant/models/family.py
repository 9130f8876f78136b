"""What a network is, as data: where its blocks, norms and linears are, and the sites between them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from affinequant.models.dims import Dims, Width, read_dims
from affinequant.models.sites import Edge, Kind, Side, Site

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
    """A site before sizes are known. `grouped` ends see each KV head once per query head it serves. With `each_expert`
    there is one in every expert, whose edges name parameters [experts, rows, columns]."""

    name: str
    kind: Kind
    width: Width
    sources: tuple[End, ...]
    sinks: tuple[End, ...]
    grouped: tuple[str, ...] = ()
    each_expert: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A kind of layer: a part of a block that reads the residual stream behind a norm and adds to it.

    Its linears whose rows are `hidden` give what is added, through the norm `post_norm` where there is one. `attention`
    is the module, named within the block, inside which queries meet keys; "" where none do.
    """

    linears: tuple[LinearSpec, ...]
    sites: tuple[SiteSpec, ...]
    attention: str = ""
    post_norm: str = ""

    def writers(self) -> tuple[str, ...]:
        """The linears that give what is added to the residual stream."""
        return tuple(linear.name for linear in self.linears if linear.rows == "hidden")

    def with_site(self, name: str, **changes: Any) -> "Layer":
        """The layer whose site `name` differs in these fields."""
        sites = tuple(replace(spec, **changes) if spec.name == name else spec for spec in self.sites)
        return replace(self, sites=sites)

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
    layers: Mapping[str, Layer]
    """The kinds of layer, by name, in the order in which a block runs them."""
    settings: Mapping[str, tuple[Any, ...]]
    """Config keys whose value changes the computation, with the values that this description is right for."""
    positions: str = ""
    """The module that embeds positions, where they are learned."""
    layer_norm: bool = False
    """Whether norms take away the mean and add a bias: rotations of the residual stream do not commute with these."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Config keys that may be absent, with what transformers takes them to be then."""
    dims: Callable[[Mapping[str, Any], str], Dims] = read_dims
    """(config, where it is from) -> the sizes."""
    kinds: Callable[[Mapping[str, Any], int], tuple[str, ...]] | None = None
    """(config, index of a block) -> the kinds of layer that it is made of; None where each has all of them."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json with what it leaves out."""
        return {**self.defaults, **{key: value for key, value in config.items() if value is not None}}

    @property
    def entries(self) -> tuple[str, ...]:
        """The modules that make hidden states of tokens."""
        return (self.embedding, self.positions) if self.positions else (self.embedding,)

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Those of all kinds of layer."""
        return tuple(linear for layer in self.layers.values() for linear in layer.linears)

    @property
    def sites(self) -> tuple[SiteSpec, ...]:
        """The residual stream, and the sites of all kinds of layer."""
        return self._residual(), *(spec for layer in self.layers.values() for spec in layer.sites)

    def site(self, name: str) -> SiteSpec:
        """The site called `name`."""
        return next(spec for spec in self.sites if spec.name == name)

    @property
    def attention(self) -> str:
        """The module, named within its block, inside which queries meet keys; "" where none do."""
        return next((layer.attention for layer in self.layers.values() if layer.attention), "")

    def at(self, dims: Dims, index: int) -> "Family":
        """What block `index` is made of: the family with no other kinds of layer."""
        if not dims.kinds:
            return self
        return replace(self, layers={kind: self.layers[kind] for kind in dims.kinds[index]})

    def each_block(self, dims: Dims) -> Iterator["Family"]:
        """Block by block what it is made of."""
        return (self.at(dims, index) for index in range(dims.layers))

    def input_groups(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(site, linears) for each tensor that is quantised as an input, in the order of the forward pass."""
        groups: dict[str, list[str]] = {}
        order = {linear.name: position for position, linear in enumerate(self.linears)}
        for spec in (spec for layer in self.layers.values() for spec in layer.sites):
            if spec.kind in ("norm", "heads", "linear"):
                groups[spec.name] = [module for module, side in spec.sinks if module in order and side == "columns"]
        return tuple(
            (site, tuple(members)) for site, members in sorted(groups.items(), key=lambda pair: order[pair[1][0]])
        )

    def norms(self) -> tuple[str, ...]:
        """Every norm of a block: those that linears read, and those between a layer and the residual stream."""
        behind = (layer.post_norm for layer in self.layers.values() if layer.post_norm)
        return *(norm for norm, _ in self.fused_norms()), *behind

    def writers(self) -> tuple[str, ...]:
        """The linears whose outputs reach the residual stream, through a norm or not."""
        return tuple(name for layer in self.layers.values() for name in layer.writers())

    def fused_norms(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(norm, linears that read it) inside a block: where a gain goes before the residual stream is rotated."""
        return tuple(
            (spec.sources[0][0], tuple(module for module, _ in spec.sinks))
            for spec in self.sites
            if spec.kind == "norm"
        )

    def left_alone(self, dims: Dims) -> tuple[str, ...]:
        """Full names of linears that stay as they are: the head, and what reads a norm without being in `linears`."""
        names = [self.head]
        for index, block in enumerate(self.each_block(dims)):
            linears = {linear.name for linear in block.linears}
            readers = [reader for _, readers in block.fused_norms() for reader in readers]
            names += [f"{self.blocks}.{index}.{reader}" for reader in readers if reader not in linears]
        return tuple(names)

    def _residual(self) -> SiteSpec:
        sources: list[End] = [(self.embedding, "columns")]
        sinks: list[End] = []
        for layer in self.layers.values():
            if layer.post_norm:
                sources.append((layer.post_norm, "gain"))
            else:
                sources.extend((name, "rows") for name in layer.writers())
            sinks += [end for spec in layer.sites if spec.kind == "norm" for end in spec.sinks]
        sinks.append((self.head, "columns"))
        return SiteSpec(name="residual", kind="residual", width="hidden", sources=tuple(sources), sinks=tuple(sinks))


def resolve_sites(family: Family, dims: Dims, tp: int = 1) -> tuple[Site, ...]:
    """The family's sites with their sizes; with `tp` slices of those whose sinks tensor parallelism cuts by columns."""
    copies = dims.heads // dims.kv_heads
    linears = {linear.name: linear for linear in family.linears}

    def edge(end: End, spec: SiteSpec, expert: int | None) -> Edge:
        module, _, part = end[0].partition(":")
        return Edge(
            module=module,
            side=end[1],
            copies=copies if end[0] in spec.grouped else 1,
            scope="model" if module in (family.embedding, family.head) else "block",
            rows=linears[module].part(part, dims) if part else None,
            expert=expert,
        )

    def site(spec: SiteSpec, expert: int | None) -> Site:
        return Site(
            name=spec.name if expert is None else f"{spec.name}.{expert}",
            kind=spec.kind,
            width=getattr(dims, spec.width),
            heads=dims.kv_heads if spec.kind in ("rope", "scores", "heads") else 1,
            slices=tp if spec.kind in ("heads", "linear") else 1,
            sources=tuple(edge(end, spec, expert) for end in spec.sources),
            sinks=tuple(edge(end, spec, expert) for end in spec.sinks),
            closed=_stream_closed(family) if spec.kind == "residual" else "",
        )

    return tuple(
        site(spec, expert) for spec in family.sites for expert in (range(dims.experts) if spec.each_expert else (None,))
    )


def _stream_closed(family: Family) -> str:
    """Why no map passes the residual stream; "" where rotations do."""
    if family.layer_norm:
        return "its norms take away the mean, which rotations do not leave alone"
    behind = next((layer.post_norm for layer in family.layers.values() if layer.post_norm), "")
    return f"the gain of {behind} acts on what a layer adds: no map passes it" if behind else ""

"""What a network is, as data: where its blocks, norms and linears are, and the sites between them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from affinequant.models.dims import Dims, Width, read_dims
from affinequant.models.sites import Kind, Side, in_expert

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

    def writers(self) -> tuple[str, ...]:
        """The linears that give what is added to the residual stream."""
        return tuple(linear.name for linear in self.linears if linear.rows == "hidden")

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
    bos: bool = False
    """Whether its models make nonsense of a text that does not begin with a BOS, whatever the tokenizer does."""
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

    def sized(self, dims: Dims) -> "Family":
        """The family of a model of this size: its experts by number, and no kind of layer that no block has."""
        used = {kind for kinds in dims.kinds for kind in kinds} or self.layers
        if not dims.experts and len(used) == len(self.layers):
            return self
        layers = {kind: layer.for_experts(dims.experts) for kind, layer in self.layers.items() if kind in used}
        return replace(self, layers=layers)

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
            if spec.kind in ("norm", "heads", "gated", "linear"):
                members = [module for module, side in spec.sinks if module in order and side == "columns"]
                groups.setdefault(spec.name, []).extend(members)
        return tuple(
            (site, tuple(members)) for site, members in sorted(groups.items(), key=lambda pair: order[pair[1][0]])
        )

    def expert(self, number: int | None = None) -> str:
        """The module of one expert, or of all; "" in a block without."""
        names = next((layer.experts for layer in self.layers.values() if layer.experts), None)
        every = f"{names.module}.experts" if names else ""
        return every if number is None else f"{every}.{number}"

    @property
    def branch(self) -> str:
        """The site that all experts of a block read, where the ways of its tokens part; "" in one without experts."""
        return next((site for site, number, _ in self.by_expert() if number is not None), "")

    def by_expert(self) -> tuple[tuple[str, int | None, tuple[str, ...]], ...]:
        """(site, expert, linears) that read the same tokens, in the order of the forward pass: `input_groups` with those of
        each expert apart, None being no expert's."""
        found: dict[tuple[str, int | None], list[str]] = {}
        start = f"{self.expert()}."
        for site, members in self.input_groups():
            for member in members:
                number = int(member.removeprefix(start).partition(".")[0]) if member.startswith(start) else None
                found.setdefault((site, number), []).append(member)
        parted = sorted(found.items(), key=lambda pair: -1 if pair[0][1] is None else pair[0][1])
        return tuple((site, number, tuple(members)) for (site, number), members in parted)

    def taps(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(site, modules that are called with the tensor there): the linears of `input_groups`, and for all experts that
        share an input the module of all, which is given every token once."""
        found: dict[str, list[str]] = {}
        for site, number, members in self.by_expert():
            modules = members if number is None or in_expert(site) else (self.expert(),)
            found.setdefault(site, []).extend(modules)
        return tuple((site, tuple(dict.fromkeys(modules))) for site, modules in found.items())

    def changed(self) -> frozenset[str]:
        """The modules of a block whose tensors are rounded, or take up what folds: the others stay as the source has them."""
        ends = {name.partition(":")[0] for spec in self.sites for name, _ in (*spec.sources, *spec.sinks)}
        return frozenset(ends | {linear.name for linear in self.linears})

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

"""What a network is, as data: where its blocks, norms and linears are, and the sites between them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from affinequant.models.dims import Dims, read_dims
from affinequant.models.layer import End, Layer, LinearSpec, SiteSpec
from affinequant.models.sites import READ, in_expert


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
    inside: bool = False
    """Whether it is one part of a model, whose others put what they see into the residual stream as they have learned to."""
    bos: bool = False
    """Whether its models make nonsense of a text that does not begin with a BOS, whatever the tokenizer does."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Config keys that may be absent, with what transformers takes them to be then."""
    dims: Callable[[Mapping[str, Any], str], Dims] = read_dims
    """(config, where it is from) -> the sizes."""
    kinds: Callable[[Mapping[str, Any], int], tuple[str, ...]] | None = None
    """(config, index of a block) -> the kinds of layer that it is made of; None where each has all of them."""

    kept: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """By block, the linears that stay in 16 bits because somebody asked for that."""

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
        kept = self.kept.get(index, ())
        if not dims.kinds and not kept:
            return self
        layers = {kind: self.layers[kind] for kind in (dims.kinds[index] if dims.kinds else self.layers)}
        return replace(self, layers={kind: layer.keeping(kept) if kept else layer for kind, layer in layers.items()})

    def each_block(self, dims: Dims) -> Iterator["Family"]:
        """Block by block what it is made of."""
        return (self.at(dims, index) for index in range(dims.layers))

    def input_groups(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(site, linears) for each tensor that is quantised as an input, in the order of the forward pass."""
        groups: dict[str, list[str]] = {}
        order = {linear.name: position for position, linear in enumerate(self.linears)}
        for spec in (spec for layer in self.layers.values() for spec in layer.sites if spec.kind in READ):
            if members := [module for module, side in spec.sinks if module in order and side == "columns"]:
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
        """Full names of linears that stay as they are: the head, what reads a norm without being in `linears`, and what is
        kept."""
        names = [self.head]
        for index, block in enumerate(self.each_block(dims)):
            linears = {linear.name for linear in block.linears}
            readers = [reader for _, readers in block.fused_norms() for reader in readers]
            readers += [linear.name for layer in block.layers.values() for linear in layer.kept]
            alone = dict.fromkeys(reader for reader in readers if reader not in linears)
            names += [f"{self.blocks}.{index}.{reader}" for reader in alone]
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

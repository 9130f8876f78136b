"""The sites of a family with their sizes: what transforms are placed at."""

from collections.abc import Collection

from affinequant.models.dims import Dims
from affinequant.models.family import Family
from affinequant.models.layer import End, SiteSpec
from affinequant.models.sites import READ, Edge, Site, in_expert


def resolve_sites(family: Family, dims: Dims, tp: int = 1, beside: Collection[str] = ()) -> tuple[Site, ...]:
    """The family's sites with their sizes; with `tp` slices of those whose sinks tensor parallelism cuts by columns. The
    parts of the model `beside` the decoder stay as they are."""
    rounded = {linear.name for linear in family.linears}
    kept = (linear for layer in family.layers.values() for linear in layer.kept)
    linears = {linear.name: linear for linear in (*family.linears, *kept)}

    def copies(end: End, spec: SiteSpec) -> int:
        if end[0] not in spec.grouped:
            return 1
        read = linears[end[0]].shape(dims)[1] if end[1] == "columns" else 0
        return read // getattr(dims, spec.width) if read else dims.heads // dims.kv_heads

    def edge(end: End, spec: SiteSpec) -> Edge:
        module, _, part = end[0].partition(":")
        return Edge(
            module=module,
            side=end[1],
            copies=copies(end, spec),
            scope="model" if module in (family.embedding, family.head) else "block",
            rows=linears[module].part(part, dims) if part else None,
            bias=family.layer_norm if module not in linears else linears[module].bias in (True, *dims.biases),
            plain=spec.kind in READ and end[1] == "columns" and module not in rounded,
        )

    def site(spec: SiteSpec) -> Site:
        return Site(
            name=spec.name,
            kind=spec.kind,
            width=getattr(dims, spec.width),
            heads=dims.kv_heads if spec.width == "value" else 1,
            slices=tp if spec.kind in ("heads", "gated", "linear") else 1,
            share=dims.routed / dims.experts if in_expert(spec.name) else 1.0,
            sources=tuple(edge(end, spec) for end in spec.sources),
            sinks=tuple(edge(end, spec) for end in spec.sinks),
            closed=_stream_closed(family, beside) if spec.kind == "residual" else "",
        )

    return tuple(site(spec) for spec in family.sites)


def _stream_closed(family: Family, beside: Collection[str]) -> str:
    """Why no map passes the residual stream; "" where rotations do."""
    if family.inside:
        return "parts of the model beside the decoder put features of their own into the stream, which stay as they are"
    if family.layer_norm:
        return "its norms take away the mean, which rotations do not leave alone"
    behind = next((layer.post_norm for layer in family.layers.values() if layer.post_norm), "")
    if behind:
        return f"the gain of {behind} acts on what a layer adds: no map passes it"
    parts = " and ".join(beside)
    return f"{parts} stays as it is, and would meet a stream that is rotated" if parts else ""

"""Transforms into weights. Pure functions: the same code shapes the weights in training and, in fp64, for good."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from affinequant.models import Family
from affinequant.models.on_demand import OnDemand
from affinequant.models.sites import Edge, Site
from affinequant.transforms import Transform
from affinequant.transforms.shift import added, shifts

Tensors = dict[str, Tensor]
Action = Callable[[Tensor, int], Tensor]
"""(x, copies) -> what a transform makes of it, over the last axis."""


def fold(
    tensors: Mapping[str, Tensor],
    site: Site,
    transform: Transform,
    *,
    norm_offset: float = 0.0,
    scope: str = "block",
    online: bool = False,
    partial: bool = False,
) -> Tensors:
    """Let `transform` act at `site` on the tensors of one block (or, with `scope="model"`, on those outside blocks).

    Names are relative to the scope: `self_attn.v_proj.weight` [rows, columns]. Differentiable in the transform's
    parameters; computed in the dtype of the tensors. Edges whose tensors are absent are skipped only when they belong
    to the other scope. With `online`, P acts on activations at run time, so the sources are left as they are, and what
    reads them plainly; between RoPE and attention P and P^-T both do, on queries and keys, so no tensor changes. Of an
    affine x P + c biases take c up. Of a `partial` block what is not there is left aside.

    Raises:
        KeyError: a tensor of this scope is missing, a bias that has something to take up included.
    """
    result = dict(tensors)
    sources = () if online else site.sources
    sinks = () if online and site.kind == "rope" else site.sinks
    for edges, action in ((sources, _linear(transform)), (sinks, transform.on_weights)):
        for edge in edges:
            if partial and f"{edge.module}.weight" not in result:
                continue
            if edge.scope == scope and not (online and edge.plain):
                _act(result, edge, action, norm_offset)
                if shifts(transform):
                    _take_up(result, edge, transform, edges is sources)
    return result


def fold_all(
    tensors: Mapping[str, Tensor],
    sites: Mapping[str, Site],
    folded: Mapping[str, Transform],
    online: Mapping[str, Transform] | None = None,
    *,
    norm_offset: float,
    partial: bool = False,
) -> Tensors:
    """Every block-level transform at its site: those that fold, then what the sinks owe to those that stay online. Of a
    `partial` block what is not there is left aside."""
    result = dict(tensors)
    for transforms, stays in ((folded, False), (online or {}, True)):
        for name, transform in transforms.items():
            result = fold(result, sites[name], transform, norm_offset=norm_offset, online=stays, partial=partial)
    return result


def in_parts(
    tensors: Mapping[str, Tensor], act: Callable[[Mapping[str, Tensor], bool], Tensors]
) -> Mapping[str, Tensor]:
    """What `act(part, partial)` makes of a block: of the whole, or apart of all that is there, and of each tensor on demand
    beside norms and biases, when it is asked for."""
    if not isinstance(tensors, OnDemand):
        return act(tensors, False)
    beside = {name: tensor for name, tensor in tensors.there.items() if tensor.dim() == 1}
    own = act(tensors.there, True)
    return OnDemand(own, tensors.names, lambda name: act(beside | {name: tensors[name]}, True)[name])


def fuse_gains(
    tensors: Mapping[str, Tensor],
    norms: Sequence[tuple[str, Sequence[str]]],
    norm_offset: float,
    *,
    partial: bool = False,
) -> Tensors:
    """Move each norm's gain into the linears that read it, leaving a gain of one: needed before the residual stream is
    rotated, and harmful without a rotation, since it makes weights harder to quantise. Of a `partial` block into those
    that are there.

    Raises:
        ValueError: a norm has a bias. Nothing here knows where that would go.
    """
    result = dict(tensors)
    for norm, readers in norms:
        if f"{norm}.bias" in result:
            raise ValueError(f"{norm} has a bias, which cannot be fused")
        gain = result[f"{norm}.weight"] + norm_offset
        for reader in readers:
            if not partial or f"{reader}.weight" in result:
                result[f"{reader}.weight"] = result[f"{reader}.weight"] * gain
        result[f"{norm}.weight"] = torch.ones_like(gain) - norm_offset
    return result


def rotate_block(
    tensors: Mapping[str, Tensor], family: Family, site: Site, rotation: Transform
) -> Mapping[str, Tensor]:
    """One block's tensors with the residual stream rotated (fp64 in, fp64 out)."""

    def rotated(part: Mapping[str, Tensor], partial: bool) -> Tensors:
        fused = fuse_gains(part, family.fused_norms(), family.norm_offset, partial=partial)
        return fold(fused, site, rotation, partial=partial)

    return in_parts(tensors, rotated)


def rotate_outer(tensors: Mapping[str, Tensor], family: Family, site: Site, rotation: Transform) -> Tensors:
    """Embedding, final norm and head with the residual stream rotated; a tied head gets a matrix of its own."""
    whole = dict(tensors)
    whole.setdefault(f"{family.head}.weight", whole[f"{family.embedding}.weight"])
    fused = fuse_gains(whole, ((family.norm, (family.head,)),), family.norm_offset)
    return fold(fused, site, rotation, scope="model")


def _act(tensors: Tensors, edge: Edge, action: Action, norm_offset: float) -> None:
    weight, bias = f"{edge.module}.weight", f"{edge.module}.bias"
    if edge.side in ("gain", "factor"):
        offset = norm_offset if edge.side == "gain" else 0.0
        tensors[weight] = action(tensors[weight] + offset, edge.copies) - offset
        if bias in tensors:
            tensors[bias] = action(tensors[bias], edge.copies)
    elif edge.side == "rows":
        tensors[weight] = _on_part(tensors[weight], edge, lambda part: action(part.mT, edge.copies).mT)
        if bias in tensors:
            tensors[bias] = _on_part(tensors[bias], edge, lambda part: action(part, edge.copies))
    else:
        tensors[weight] = _on_part(tensors[weight], edge, lambda part: action(part, edge.copies))


def _linear(transform: Transform) -> Action:
    """x P alone, of an affine x P + c."""
    if not shifts(transform):
        return transform.on_activations
    return lambda x, copies: transform.on_activations(x, copies) - added(transform, x, copies)


def _take_up(tensors: Tensors, edge: Edge, transform: Transform, source: bool) -> None:
    """Into its bias what a source's features move by, or out of it what a sink makes of that: b + c, or b - W P^-T c."""
    name, weight = f"{edge.module}.bias", tensors[f"{edge.module}.weight"]
    if source:
        tensors[name] = _on_part(tensors[name], edge, lambda part: part + added(transform, part, edge.copies))
    else:
        tensors[name] = tensors[name] - weight @ added(transform, weight, edge.copies)


def _on_part(tensor: Tensor, edge: Edge, action: Callable[[Tensor], Tensor]) -> Tensor:
    """A linear's tensor with `action` on the rows which the edge means."""
    if edge.rows is not None:
        before, part, behind = tensor.tensor_split(edge.rows)
        return torch.cat([before, action(part), behind])
    return action(tensor)

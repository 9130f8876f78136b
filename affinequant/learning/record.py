"""What a run remembers of itself for its report: activations, weights and transforms as plain JSON values.

Nothing here changes what is learned or rounded, or draws from a generator that anything else draws from. Of a block,
report.json has

| key | what |
|---|---|
| `inputs` | site -> `sqnr` in dB of what its linears read, rounded (`Noise`; absent where activations are not rounded) |
| `curve`, `divergence`, `series` | what every epoch logged (absent where nothing was trained) |
| `phases` | name, seconds and peak memory of each part of the work, in order |

and of one that is `pictured` besides: `before` and `after` its transforms of each of the `inputs` and each linear of
`weights` (`histogram`), and `pictures` (`picture`): by site, or `SITE online` for what stays, then what it is in a chain and
`left` or `right` in a product; of a gradual mask also `epochs` (`Bands`).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from affinequant.learning.objective import BlockObjective
from affinequant.models.decoder import slices, spread
from affinequant.models.sites import in_expert
from affinequant.rounding.job import BlockJob
from affinequant.transforms import Transform
from affinequant.transforms.banded import Banded
from affinequant.transforms.chain import Chain
from affinequant.transforms.diagonal import Diagonal
from affinequant.transforms.rope_pair import RopePair
from affinequant.transforms.shift import Shift

ROWS = 512
"""Tokens that are looked at, about."""
VALUES = 1 << 19
"""Of a weight, in whole rows; about."""
BINS = 60
REACH = 6.0
"""Root mean squares to either side of zero that a histogram covers, where values lie as far out."""
CELLS = 48
"""Rows and columns of a picture, at most."""
FAINT = 1e-6
"""Of the largest magnitude of a matrix: what is below counts as nothing."""
BANDS = 8
"""Epochs of which a band is kept, at most."""
PARTS = 40
"""Points of a training's trace, at most."""
_PART = 1 << 20  # values that are widened to fp64 at once


def pictured(index: int, layers: int) -> bool:
    """Whether block `index` is one of those that are pictured: the first, the middle and the last one."""
    return index in (0, layers // 2, layers - 1)


def histogram(values: Float[Tensor, "rows n"]) -> dict[str, Any]:
    """How values spread: `counts` in `BINS` equal bins from `low` to `high`, and the share that lies `outside`; the largest
    magnitude `absmax`, the root mean square `rms`, `kurtosis` (3 for a normal distribution). `crest` is the mean over rows
    of a row's largest magnitude over its root mean square: what one grid for the row has to span."""
    largest, squares, fourths, crest = 0.0, 0.0, 0.0, 0.0
    for part in _rows(values):
        most, power = part.abs().amax(1), part.square()
        spans = most / _positive(power.mean(1).sqrt())
        sums = torch.stack([most.max(), power.sum(), power.square().sum(), spans.sum()]).tolist()
        largest, squares, fourths, crest = max(largest, sums[0]), squares + sums[1], fourths + sums[2], crest + sums[3]
    rms = math.sqrt(squares / values.numel())
    high = min(largest, REACH * rms) if 0 < largest < math.inf else 1.0
    counts = sum(torch.histc(part, BINS, -high, high).cpu() for part in _rows(values))
    assert isinstance(counts, Tensor)
    return {
        "low": _short(-high),
        "high": _short(high),
        "counts": counts.long().tolist(),
        "outside": _short(1 - float(counts.sum()) / values.numel()),
        "absmax": _short(largest),
        "rms": _short(rms),
        "kurtosis": _short(fourths / values.numel() / rms**4) if rms else None,
        "crest": _short(crest / len(values)),
    }


def evenly(values: Float[Tensor, "rows n"], count: int) -> Float[Tensor, "some n"]:
    """At least `count` of the rows, or all of them; at equal distances."""
    return values[:: max(1, len(values) // max(1, count))]


def picture(matrix: Float[Tensor, "rows columns"]) -> dict[str, Any]:
    """log10 of magnitudes, of the largest in each tile: as many `rows` and `columns` as the matrix has are at most `CELLS`
    of each in `cells`. None where there is nothing."""
    size = matrix.detach().abs().double()
    tile = [max(1, math.ceil(length / CELLS)) for length in size.shape]
    pooled = torch.nn.functional.max_pool2d(size[None], tile, ceil_mode=True)[0]
    seen = pooled.isfinite() & (pooled > FAINT * size.max())
    logs = pooled.where(seen, 1.0).log10()
    cells = [
        [round(value, 2) if there else None for value, there in zip(*row, strict=True)]
        for row in zip(logs.tolist(), seen.tolist(), strict=True)
    ]
    return {"rows": size.shape[0], "columns": size.shape[1], "cells": cells}


def matrices(transform: Transform) -> dict[str, Tensor]:
    """What there is to see of a transform, by name: both factors of a Kronecker product, the first of many heads or blocks,
    a diagonal as one row; of a chain each part's, what it is in front. "" where there is one alone."""
    if isinstance(transform, Chain):
        return {
            f"{kind} {name}".strip(): matrix
            for kind, part in _parts_of(transform)
            for name, matrix in matrices(part).items()
        }
    if isinstance(transform, Diagonal):
        return {"": transform.log_scale.detach().exp().reshape(1, -1)}
    if isinstance(transform, Shift):
        return {"": transform.shift.detach().reshape(1, -1)}
    if isinstance(transform, Banded):
        return {"": transform.matrix()[0].detach()}
    if isinstance(transform, RopePair):
        heads, half = transform.log_scale.shape
        eye = torch.eye(2 * half, 2 * half * heads).to(transform.log_scale)
        return {"": transform.on_activations(eye)[:, : 2 * half].detach()}
    found = transform.online()  # pyright: ignore[reportAttributeAccessIssue]
    return {
        name if name != "blocks" else "": matrix[0] if matrix.ndim == 3 else matrix for name, matrix in found.items()
    }


def pictures(transforms: Mapping[str, Transform]) -> dict[str, dict[str, Any]]:
    """The picture of each matrix, by the name of its transform and its own."""
    return {
        f"{name} {part}".strip(): picture(matrix)
        for name, transform in transforms.items()
        for part, matrix in matrices(transform).items()
    }


class Trace:
    """The loss of every update of a training, for a curve finer than epochs: what is done again counts as it came out."""

    def __init__(self) -> None:
        self.t = 0.0
        self.losses: dict[float, float] = {}

    def note(self, loss: Float[Tensor, ""]) -> None:
        """Of the update at `t`, how far training is; what is only measured does not count."""
        if loss.requires_grad:
            self.losses[self.t] = float(loss.detach())

    def means(self) -> list[float | None]:
        """Over `PARTS` equal parts of the training, or as many as there are updates."""
        losses = [self.losses[t] for t in sorted(self.losses)]
        parts = min(PARTS, len(losses))
        ends = [len(losses) * part // parts for part in range(1, parts + 1)]
        pairs = zip([0, *ends], ends, strict=False)
        return [plain(sum(losses[first:end]) / (end - first)) for first, end in pairs]


class Noise:
    """How far off what each site's linears read is once it is rounded, on some tokens of every sample."""

    def __init__(self, samples: int, tokens: int, seed: int) -> None:
        """Args:
        samples: how many will come by, each of so many `tokens`.
        """
        self.chosen = spread(samples, tokens, ROWS, seed)
        self.passed: dict[str, int] = {}
        self.shares: dict[str, list[Tensor]] = {}

    def __call__(
        self,
        site: str,
        part: slice,
        x: Float[Tensor, "batch tokens width"],
        rounded: Float[Tensor, "batch tokens width"],
    ) -> None:
        """The samples `part` as they reach the linears of `site`; counted once, however often they come by."""
        if part.start < self.passed.get(site, 0):
            return
        self.passed[site] = part.stop
        if in_expert(site):
            stride = round(self.chosen.numel() / int(self.chosen.sum()))
            exact, given = (value.flatten(0, -2)[::stride].double() for value in (x, rounded))
        else:
            chosen = self.chosen[part].to(x.device)
            exact, given = x[chosen].double(), rounded[chosen].double()
        error = (given - exact).square().sum(-1)
        self.shares.setdefault(site, []).append(error / _positive(exact.square().sum(-1)))

    def sqnr(self) -> dict[str, float | None]:
        """Site -> dB, from the mean over tokens of each one's noise over its power: the first token's massive activation
        counts as one token."""
        means = {site: float(torch.cat(shares).mean()) for site, shares in self.shares.items()}
        return {site: plain(-10 * math.log10(max(mean, 1e-30))) for site, mean in means.items()}


class Bands:
    """A probe of `fit`: how wide the widest band is after an epoch, which it pictures on some epochs."""

    def __init__(self, objective: BlockObjective) -> None:
        self.objective = objective
        last = objective.job.recipe.epochs
        count = min(BANDS, last)
        self.wanted = {round(1 + (last - 1) * step / max(1, count - 1)) for step in range(count)}
        self.seen: dict[str, dict[int, dict[str, Any]]] = {}

    def modules(self) -> Iterator[tuple[str, Banded]]:
        """Every band of the block, by the name of its picture."""
        for name, transform in self.objective.transforms.items():
            for kind, part in _parts_of(transform) if isinstance(transform, Chain) else [("", transform)]:
                if isinstance(part, Banded):
                    yield f"{name} {kind}".strip(), part

    def __call__(self) -> float:
        """The width in features, of those to one side of the diagonal and the diagonal itself."""
        last = self.objective.job.recipe.epochs
        epoch, widest = round(self.objective.fraction * (last - 1)) + 1, 0
        for name, module in self.modules():
            widest = max(widest, module.width)
            if epoch in self.wanted:
                cells = picture(module.matrix()[0])["cells"]
                self.seen.setdefault(name, {})[epoch] = {"epoch": epoch, "band": module.width, "cells": cells}
        return float(widest)

    def epochs(self) -> dict[str, list[dict[str, Any]]]:
        """Picture -> what it was after the epochs that were kept, in order."""
        return {name: [seen[epoch] for epoch in sorted(seen)] for name, seen in self.seen.items()}


@torch.no_grad()
def portrait(
    job: BlockJob,
    objective: BlockObjective,
    seen: Mapping[str, Float[Tensor, "tokens width"]],
    folded: Mapping[str, Tensor],
    source: Callable[[str], Tensor],
    rotation: Transform | None,
) -> dict[str, dict[str, Any]]:
    """`inputs` and `weights` before and after the block's transforms, by some rows of each, and `pictures` of these.

    Args:
        objective: with the transforms as they are folded and stay.
        seen: by site, what reaches it in full precision, in the rotated residual stream where there is a rotation.
        folded: the block's tensors with the transforms in them.
        source: a tensor of the source by its name within the block.
        rotation: of the residual stream.
    """
    inputs, offset = dict[str, Any](), job.family.norm_offset
    for name, rows in seen.items():
        site, before = job.sites[name], evenly(rows, ROWS).float()
        after = before
        for acting in (objective.transforms.get(name), objective.online.get(name)):
            after = acting.on_activations(after, site.sinks[0].copies) if acting else after
        if rotation is not None and site.kind == "norm":  # what is rotated has lost its gain to the linears
            gain = source(f"{site.sources[0].module}.weight").to(before) + offset
            before = _rotated_back(before, rotation) * gain
        inputs[name] = {"before": histogram(before), "after": histogram(after)}
    names, weights = [linear.name for linear in job.family.linears], dict[str, Any]()
    for name in names:
        both = {"before": source(f"{name}.weight"), "after": folded[f"{name}.weight"]}
        rows = VALUES // both["after"].shape[1]
        weights[name] = {when: histogram(evenly(weight, rows)) for when, weight in both.items()}
    online = {f"{name} online": module for name, module in objective.online.items()}
    return {"inputs": inputs, "weights": weights, "pictures": pictures({**objective.transforms, **online})}


def _rotated_back(x: Float[Tensor, "tokens width"], rotation: Transform) -> Float[Tensor, "tokens width"]:
    """x P^T = x P^-1, without P as a matrix: the gradient of x P with respect to x is P^T."""
    with torch.enable_grad():
        zero = torch.zeros_like(x).requires_grad_()
        return torch.autograd.grad(rotation.on_activations(zero), zero, x)[0]


def plain(value: float) -> float | None:
    """A number as JSON has it: None for what is not finite."""
    return value if math.isfinite(value) else None


def _parts_of(chain: Chain) -> list[tuple[str, Any]]:
    """Each part and what it is; with its position where others are the same."""
    kinds = [type(part).__name__.lower() for part in chain.parts]
    names = [kind if kinds.count(kind) == 1 else f"{kind} {position}" for position, kind in enumerate(kinds)]
    return list(zip(names, chain.parts, strict=True))


def _short(value: float) -> float | None:
    """Six digits: what is looked at needs no more."""
    return plain(float(f"{value:.6g}"))


def _positive(values: Shaped[Tensor, "*n"]) -> Shaped[Tensor, "*n"]:
    return values.clamp_min(torch.finfo(values.dtype).tiny)


def _rows(values: Tensor) -> Iterator[Tensor]:
    """Some rows at a time, in fp64."""
    for part in slices(len(values), max(1, _PART // values.shape[1])):
        yield values[part].detach().double()

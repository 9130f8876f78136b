"""What a model's free run looks like: pictures kept as numbers when it is over, figures made of those of all seeds.

A trial gives `pictures_of` its `pictures`, an experiment `drawn` its figures. Points are thinned: a page has many of them.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import networkx
import numpy as np

from affinequant.report.figure import Axis, Figure
from affinequant.report.figure import Series as Line
from affinequant_research.alrnn.codes import (
    RARE,
    agreement,
    along,
    region_codes,
    share_distance,
    shares,
    transitions,
    visited,
    written,
)
from affinequant_research.alrnn.measures import Floats, has_diverged, padded, spectra
from affinequant_research.alrnn.model import AlmostLinear
from affinequant_research.alrnn.regions import fixed_points
from affinequant_research.experiment import Found, Picture

POINTS = 900
"""Of a trajectory in a picture."""
SYMBOLS = 1000
"""Steps along the truth whose symbols are kept, to be compared with those of other seeds."""
COLOURED = 3
"""Regions with a colour of their own, the most visited; all others share one."""
NODES = 12
"""Regions of a graph, the most visited."""
FREQUENCIES = 150
"""Of a spectrum, as far apart by their logarithm."""
OTHERS, FIXED = "others", "fixed points"


def pictures_of(
    model: AlmostLinear,
    latent: Floats,
    truth: Floats,
    *,
    interval: int,
    axes: tuple[int, int] = (0, 1),
    smoothing: float = 20.0,
    spectrum_steps: int = 10_000,
) -> dict[str, Picture]:
    """What figures need of a free run [steps, M] and of the truth [steps, N].

    Args:
        interval: after which the model sees the truth, where its symbols along that are asked for.
        axes: the dimensions that are looked at.
    """
    codes = region_codes(latent, model.P)
    known = sorted(visited(codes, RARE), key=lambda code: -shares(codes)[code])[:NODES]
    counts = transitions(codes, known)
    edges = [
        [float(known[i]), float(known[j]), float(counts[i, j] / max(len(codes) - 1, 1))]
        for i, j in zip(*np.nonzero(counts), strict=True)
    ]
    seen = region_codes(along(model, truth[:SYMBOLS], interval), model.P)
    every, beside = (max(len(one) // POINTS, 1) for one in (latent, truth))
    points = np.column_stack([latent[::every, list(axes)].round(3), codes[::every]])
    fixed = [one.points[0, list(axes)] for one in fixed_points(model, known).values() if one.real]
    return {
        "points": points.tolist(),
        "fixed": [point.round(3).tolist() for point in fixed],
        "truth": truth[::beside, list(axes)].round(3).tolist(),
        "edges": edges,
        "symbols": [[float(code) for code in seen]],
        "relus": [[float(model.P)]],
        "spectrum": _spectrum(truth, latent[:, : model.N], smoothing, min(spectrum_steps, len(truth))),
    }


def _spectrum(truth: Floats, generated: Floats, smoothing: float, steps: int) -> list[list[float]]:
    """Cycles a step, the truth's power there and the model's, each the mean over dimensions; 0 where it has none."""
    generated = padded(generated, steps)
    known = spectra(truth[:steps], smoothing).mean(1)
    other = np.zeros_like(known) if has_diverged(generated) else spectra(generated, smoothing).mean(1)
    at = np.unique(np.geomspace(1, len(known) - 1, FREQUENCIES).round().astype(int))
    return [[float(f"{value:.4g}") for value in row] for row in zip(at / steps, known[at], other[at], strict=True)]


def drawn(
    found: Found,
    name: str,
    arms: Sequence[str],
    *,
    step: float = 1.0,
    unit: str = "",
    labels: tuple[str, str] = ("", ""),
) -> list[Figure]:
    """The attractor coloured by region, which region follows which, spectra; with several seeds how far their symbols agree.

    Args:
        step: units of time that a step takes.
        labels: of the dimensions that are looked at.
    """
    kept = [arm for arm in arms if f"{arm}/points" in found.pictures[0]]
    if not kept:
        return []
    made = [_attractor(found, name, kept, labels), _graphs(found, name, kept), _spectra(found, name, kept, step, unit)]
    return [one for one in (*made, _agreements(found, name, kept)) if one]


def _attractor(found: Found, name: str, arms: Sequence[str], labels: tuple[str, str]) -> Figure:
    first = found.pictures[0]
    x, y = np.array(first[f"{arms[0]}/truth"]).T
    lines = [Line(panel="true", x=tuple(x), y=tuple(y))]
    known = np.array([x, y])
    wide = np.ptp(known, axis=1) / 4
    low, high = known.min(1) - wide, known.max(1) + wide
    for arm in arms:
        points = np.array(first[f"{arm}/points"]).reshape(-1, 3)
        lines += by_region(points, region_names(first, arm), arm)
        fixed = [one for one in first[f"{arm}/fixed"] if (low <= one).all() and (one <= high).all()]
        if fixed:
            lines.append(
                Line(name=FIXED, panel=arm, x=tuple(one[0] for one in fixed), y=tuple(one[1] for one in fixed))
            )
    return Figure(
        kind="scatter",
        key=f"{name}_attractor",
        title=f"{name}: the truth, and free runs coloured by region",
        series=tuple(lines),
        x=Axis(label=labels[0]),
        y=Axis(label=labels[1]),
        caption=f"Of seed {found.seeds[0]}. In each colour the model is one affine map. Digits say which units are on; "
        "fixed points are the real ones of regions with a hundredth of the steps.",
    )


def by_region(points: Floats, labelled: Mapping[int, str], panel: str) -> list[Line]:
    """Points (x, y, code) as a series for each region that has any, in the order of their colours."""
    names = np.array([labelled.get(int(code), OTHERS) for code in points[:, 2]])
    inside = {region: points[names == region] for region in dict.fromkeys([*labelled.values(), OTHERS])}
    return [
        Line(name=region, panel=panel, x=tuple(some[:, 0]), y=tuple(some[:, 1]))
        for region, some in inside.items()
        if len(some)
    ]


def region_names(pictures: Mapping[str, Picture], arm: str) -> dict[int, str]:
    """Code -> name of the regions that have a colour of their own in the figures of that arm, in their order."""
    ranked = list(_shares(pictures[f"{arm}/points"]))[:COLOURED]
    bent = int(pictures[f"{arm}/relus"][0][0])
    return dict(sorted(((code, written(code, bent)) for code in ranked), key=lambda pair: pair[1]))


def _graphs(found: Found, name: str, arms: Sequence[str]) -> Figure | None:
    graphs = []
    for seed, pictures in zip(found.seeds, found.pictures, strict=True):
        for arm in arms:
            edges, labelled = pictures.get(f"{arm}/edges", ()), region_names(pictures, arm)
            bent = int(pictures[f"{arm}/relus"][0][0])
            found_codes = {int(code) for source, target, _ in edges for code in (source, target)}
            known = sorted(found_codes, key=lambda code: (code not in labelled, written(code, bent)))
            cells = np.zeros((len(known), len(known)))
            for source, target, share in edges:
                cells[known.index(int(source)), known.index(int(target))] = float(f"{share:.3g}")
            label = f"{arm}, seed {seed}" if len(found.seeds) > 1 else arm
            if known:
                names = tuple(written(code, bent) for code in known)
                x, y = _layout(cells)
                graphs.append(Line(name=label, names=names, cells=tuple(map(tuple, cells.tolist())), x=x, y=y))
    if not graphs:
        return None
    return Figure(
        kind="graph",
        key=f"{name}_graph",
        title=f"{name}: which region follows which",
        series=tuple(graphs),
        value=Axis(label="share of steps"),
        caption="Of regions with a hundredth of the steps. A ring is a step that stays.",
    )


def _layout(cells: Floats) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Places of the nodes by how they hang together."""
    graph = networkx.from_numpy_array((cells + cells.T) > 0)
    found = networkx.kamada_kawai_layout(graph, pos=networkx.circular_layout(graph))
    return tuple(float(found[n][0].round(3)) for n in graph), tuple(float(found[n][1].round(3)) for n in graph)


def _spectra(found: Found, name: str, arms: Sequence[str], step: float, unit: str) -> Figure:
    known = np.array(found.pictures[0][f"{arms[0]}/spectrum"])
    rows = {"true": known[:, 1]} | {arm: np.array(found.pictures[0][f"{arm}/spectrum"])[:, 2] for arm in arms}
    x = tuple(float(f"{value / step:.4g}") for value in known[:, 0])
    lines = [Line(name=label, x=x, y=tuple(v if v > 0 else None for v in y.tolist())) for label, y in rows.items()]
    return Figure(
        kind="line",
        key=f"{name}_spectra",
        title=f"{name}: power of the truth and of free runs",
        series=tuple(one for one in lines if any(one.y)),
        x=Axis(label="frequency", unit=f"1/{unit}" if unit else "per step", log=True),
        y=Axis(label="share of power", log=True),
        caption=f"Of seed {found.seeds[0]}, smoothed as the Hellinger distance has it, mean over dimensions.",
    )


def _agreements(found: Found, name: str, arms: Sequence[str]) -> Figure | None:
    """How far seeds agree: about the symbols of the same steps, each led along the truth, and how often they visit regions."""
    pairs = list(combinations(found.pictures, 2))
    if not pairs:
        return None
    rows = {}
    for arm in arms:
        rows[f"{arm}: same symbol"] = [
            agreement(*(np.array(one[f"{arm}/symbols"][0]) for one in pair)) for pair in pairs
        ]
        rows[f"{arm}: shares alike"] = [
            1 - share_distance(*(_shares(one[f"{arm}/points"]) for one in pair)) for pair in pairs
        ]
    return Figure(
        kind="heat",
        key=f"{name}_agreement",
        title=f"{name}: how far the regions of two seeds agree",
        series=(Line(cells=tuple(tuple(row) for row in rows.values())),),
        x=Axis(label="seeds", names=tuple(f"{a} and {b}" for a, b in combinations(found.seeds, 2))),
        y=Axis(names=tuple(rows)),
        value=Axis(label="1 is the same"),
        caption=f"Same symbol: the share of {SYMBOLS} steps of the truth that both are led along, with the regions of one "
        "renamed, one for one, as suits best; by chance alone as much as the largest has. Shares alike: 1 less Kolmogorov and "
        "Smirnov's distance of the shares of free runs, by rank.",
    )


def _shares(points: Picture) -> dict[int, float]:
    return shares(np.array(points).reshape(-1, 3)[:, 2].astype(np.int64))

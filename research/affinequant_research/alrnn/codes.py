"""What a trajectory says in symbols: the region that each step is in, which one follows which, and how much that leaves open.

A region is where each of the last P units of M is positive or not. Its code is an integer, bit k of which is that of unit
M - P + k, written with the first of these units first: `01` is the region in which the second of two is positive.
"""

from collections.abc import Mapping, Sequence

import networkx
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from affinequant.errors import AffineQuantError
from affinequant_research.alrnn.measures import Floats, has_diverged
from affinequant_research.alrnn.model import AlmostLinear

Codes = NDArray[np.integer]
MOST_BENT = 52
"""Units that a code has bits for."""
RARE = 0.01
"""Share of steps below which a region is left out where it says so: trajectories touch corners."""


def region_codes(latent: Floats, bent: int) -> Codes:
    """The code of each step of a latent trajectory [steps, M], of which the last `bent` units have a ReLU.

    Raises:
        AffineQuantError: they are more than 52, whose codes JSON's numbers do not tell apart (exit 2).
    """
    if bent > MOST_BENT:
        raise AffineQuantError(f"{bent} ReLUs", "codes of regions", f"give at most {MOST_BENT}")
    on = latent[:, latent.shape[1] - bent :] > 0
    return on @ (1 << np.arange(bent, dtype=np.int64))


def written(code: int, bent: int) -> str:
    """`01`: one digit for each of the units with a ReLU, in their order; `-` where there are none."""
    return "".join(str(code >> place & 1) for place in range(bent)) or "-"


def shares(codes: Codes) -> dict[int, float]:
    """Each code that occurs -> the share of steps in it, the largest first."""
    found, counts = np.unique(codes, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {int(found[place]): float(counts[place] / len(codes)) for place in order}


def visited(codes: Codes, least: float = 0.0) -> list[int]:
    """The codes with at least that share of the steps, in their order as numbers."""
    return sorted(code for code, share in shares(codes).items() if share >= least)


def transitions(codes: Codes, known: Sequence[int]) -> NDArray[np.integer]:
    """[known, known]: how often the second was right behind the first. Steps of or to other codes are not counted, nor are
    two codes taken for neighbours since one between them is left out."""
    places = {code: place for place, code in enumerate(known)}
    at = np.array([places.get(int(code), -1) for code in np.unique(codes)], dtype=np.int64)
    index = at[np.searchsorted(np.unique(codes), codes)]
    both = (index[:-1] >= 0) & (index[1:] >= 0)
    counts = np.zeros((len(known), len(known)), dtype=np.int64)
    np.add.at(counts, (index[:-1][both], index[1:][both]), 1)
    return counts


def topological_entropy(counts: Floats | NDArray[np.integer], *, loops: bool = True) -> float:
    """Log of the spectral radius of the graph that has an edge wherever something was counted, in nats a step: the rate at
    which the number of words grows with their length. Without loops a step is a change of region. 0 where nothing repeats.
    """
    edges = np.asarray(counts) > 0
    if not loops:
        edges = edges & ~np.eye(len(edges), dtype=bool)
    radius = np.abs(np.linalg.eigvals(edges.astype(float))).max(initial=0.0)
    return float(np.log(max(radius, 1.0)))


def graph_of(codes: Codes, bent: int, least: float = 0.0) -> "networkx.DiGraph[str]":
    """Regions as nodes (`share` of the steps), transitions as edges (`share` of all steps).

    Args:
        least: share of steps from which a region is there.
    """
    known = visited(codes, least)
    counts, parts = transitions(codes, known), shares(codes)
    graph = networkx.DiGraph()
    graph.add_nodes_from((written(code, bent), {"share": parts[code]}) for code in known)
    for i, j in zip(*np.nonzero(counts), strict=True):
        edge = written(known[i], bent), written(known[j], bent)
        graph.add_edge(*edge, share=float(counts[i, j] / max(len(codes) - 1, 1)))
    return graph


def minimal_graph(codes: Codes, bent: int, least: float = RARE) -> "networkx.DiGraph[str]":
    """What of the graph is topology: the largest part whose regions all lead to one another, of regions that are more than
    touched, without the loops that only say that a step is short."""
    graph = graph_of(codes, bent, least)
    if not graph:
        return graph
    parts = sorted(networkx.strongly_connected_components(graph), key=lambda part: (-len(part), sorted(part)))
    kept = graph.subgraph(parts[0]).copy()
    kept.remove_edges_from([(node, node) for node in kept])
    return kept


def agreement(first: Codes, second: Codes) -> float:
    """Of two runs over the same steps: the share of them that have the same symbol, once the symbols of one are renamed, one
    for one, so that most do. Units have no order of their own, and a unit may as well be its own negative."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} steps cannot be compared one by one")
    a, at = np.unique(first, return_inverse=True)
    b, to = np.unique(second, return_inverse=True)
    table = np.zeros((len(a), len(b)))
    np.add.at(table, (at, to), 1)
    return float(table[linear_sum_assignment(-table)].sum() / len(first))


def share_distance(first: Mapping[int, float], second: Mapping[int, float]) -> float:
    """Of two runs over any steps, by the shares of their codes: Kolmogorov and Smirnov's statistic of the codes ranked by
    share, the largest difference of what the k most visited regions hold together. 0: as many regions, as large."""
    count = max(len(first), len(second))
    ranked = [sorted(one.values(), reverse=True) + [0.0] * (count - len(one)) for one in (first, second)]
    return float(np.abs(np.cumsum(ranked[0]) - np.cumsum(ranked[1])).max(initial=0.0))


def along(model: AlmostLinear, series: Floats, interval: int) -> Floats:
    """Latent states [steps, M] of a model that is led along a series [steps, N]: what it predicts, with what is observed put
    in place of that every `interval` steps, as in its training. Where it diverges, it starts again from there."""
    latent = np.empty((len(series), model.M))
    state = model.start(series[0])
    straight = model.M - model.P
    for step, observed in enumerate(series):
        latent[step] = state
        if step % interval == 0:
            state = np.concatenate([observed, state[model.N :]])
        bent = np.concatenate([state[:straight], np.maximum(state[straight:], 0)])
        state = model.A * state + model.W @ bent + model.h
        if has_diverged(state):
            state = model.start(observed)
    return latent

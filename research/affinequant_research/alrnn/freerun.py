"""What a network does when it is left alone, measured against a trajectory that it was not trained on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from affinequant_evals import Better, Score

from affinequant_research.alrnn.codes import (
    RARE,
    minimal_graph,
    region_codes,
    shares,
    topological_entropy,
    transitions,
    visited,
)
from affinequant_research.alrnn.lyapunov import FORGOTTEN, spectrum
from affinequant_research.alrnn.measures import divergence, of_attractor
from affinequant_research.alrnn.model import AlmostLinear, Floats
from affinequant_research.alrnn.regions import fixed_points
from affinequant_research.series import one_of

Scores = dict[str, tuple[Better, Score]]
TRANSIENT = 1000
"""Steps of a free run that are left out."""
FOLLOWED = 20_000
"""Steps along which exponents in few bits are measured; over so few they are off by some .1 of Lorenz's .9."""


def free_run(model: AlmostLinear, truth: Floats, steps: int) -> Floats:
    """The latent trajectory behind the transient, from where the truth begins: [steps, M], fewer where it diverges."""
    return model.free_run(model.start(truth[0]), TRANSIENT + steps)[TRANSIENT:]


def distance(model: AlmostLinear, truth: Floats, steps: int, **how: Any) -> float:
    """The divergence of states alone: what checkpoints are judged by. `how`: as `divergence` is to take it."""
    return _distance(model, free_run(model, truth, steps), truth, steps, **how)


def simplest(model: AlmostLinear, truth: Floats, steps: int, within: float) -> dict[str, float]:
    """What checkpoints are judged by where the simplest is asked for: the divergence of states (`d_stsp`) and the `rank`."""
    latent = free_run(model, truth, steps)
    found = _distance(model, latent, truth, steps)
    edges = minimal_graph(region_codes(latent, model.P), model.P).number_of_edges()
    return {"d_stsp": found, "rank": rank(found, edges, within)}


def rank(found: float, edges: int, within: float) -> float:
    """The lower, the better: of those `within` that divergence the one whose minimal graph has the fewest edges, of several
    of these the nearest; where none is, the nearest."""
    return found if found > within else -1 / (1 + edges + found / (2 * within))


def _distance(model: AlmostLinear, latent: Floats, truth: Floats, steps: int, **how: Any) -> float:
    ((_, score),) = divergence(truth, latent[:, : model.N], steps=steps, **how).values()
    return score.value


def of_run(model: AlmostLinear, truth: Floats, steps: int, step: float, **how: Any) -> Scores:
    """How far a free run is from the truth, which regions it is in, and how fast what is near parts.

    `regions` are those with a hundredth of the steps; `apart` is the share of transitions between two of these whose codes
    differ in more than one unit; `changes` are the edges of their minimal graph, `about` with the share of all steps of each;
    `entropy` is topological, of their graph with and without the steps that stay; `settled` counts real fixed points of
    theirs that attract, which chaos has none of. Where a run diverges at once, the last of all
    of these are not there.

    Args:
        step: units of time that a step takes; `exponent` is per unit.
        how: what `of_attractor` is to do otherwise than by default.
    """
    latent = free_run(model, truth, steps)
    codes = region_codes(latent, model.P)
    known = visited(codes, RARE)
    counts = transitions(codes, known)
    far = np.array([[(one ^ other).bit_count() > 1 for other in known] for one in known], dtype=bool)
    changes = minimal_graph(codes, model.P).edges(data="share")
    parts = {str(code): share for code, share in shares(codes).items()}
    return {
        **of_attractor(truth, latent[:, : model.N], steps=steps, **how),
        "regions": ("lower", one_of(len(known), **parts)),
        "regions_touched": ("lower", one_of(len(parts))),
        "apart": ("lower", one_of(counts[far].sum() / max(counts.sum(), 1) if known else 0)),
        "changes": ("lower", one_of(len(changes), **{f"{one} to {other}": share for one, other, share in changes})),
        "entropy": ("higher", one_of(topological_entropy(counts))),
        "entropy_of_changes": ("higher", one_of(topological_entropy(counts, loops=False))),
        "settled": ("lower", one_of(_settled(model, known))),
        **_exponent("exponent", model, latent, step),
    }


def at_bits(rounded: Sequence[tuple[str, AlmostLinear]], truth: Floats, steps: int, step: float) -> Scores:
    """Networks by name: `d_stsp@NAME`, `regions@NAME`, `settled@NAME`, `exponent@NAME`, as `of_run` has them."""
    found: Scores = {}
    for name, model in rounded:
        latent = free_run(model, truth, steps)
        ((_, score),) = divergence(truth, latent[:, : model.N], steps=steps).values()
        found[f"d_stsp@{name}"] = ("lower", score)
        known = visited(region_codes(latent, model.P), RARE)
        found[f"regions@{name}"] = ("lower", one_of(len(known)))
        found[f"settled@{name}"] = ("lower", one_of(_settled(model, known)))
        found |= _exponent(f"exponent@{name}", model, latent[:FOLLOWED], step)
    return found


def _settled(model: AlmostLinear, known: Sequence[int]) -> int:
    return sum(one.real and one.radius <= 1 for one in fixed_points(model, known).values())


def _exponent(name: str, model: AlmostLinear, latent: Floats, step: float) -> Scores:
    if len(latent) <= FORGOTTEN:
        return {}
    (found,) = spectrum(model, latent, 1, per_time=1 / step)
    return {name: ("higher", one_of(found))}

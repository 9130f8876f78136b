"""How far a text is from the calibration text, as the model sees both: what its linears read, site by site.

At each site the tokens of a text are a cloud of points. Clouds are compared by 2-Wasserstein distances along `DIRECTIONS`
orthogonal random directions of the site, in units of the calibration tokens' own standard deviation there:

- sliced: the root of the mean over directions of the squared distance between the two one-dimensional clouds,
- Gaussian: the distance of two normal distributions with the means and covariances that the clouds have in the space of
  these directions, over the root of their number.

No two finite samples are at distance 0, not even of one text. So one half of the calibration windows is held against the
other, as many as there are of the text, and the score is a ratio: how many times as far the text is from a half as the
halves are from each other. Windows are drawn whole: the tokens of one passage resemble each other.

The full-precision model reads. What it computes is what calibration works with, whatever is made of it then; a text can be
judged before anything is quantised; and the checkpoints of one model are measured alike.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.data.wheels import Say, quiet
from affinequant.errors import AffineQuantError
from affinequant.recipe.recipe import Device, Dtype
from affinequant_evals.drift_texts import Compared
from affinequant_evals.harness import Battery, Better, Scorecard, Suite, evaluate, stage_of
from affinequant_evals.kept import context_of, open_scores
from affinequant_evals.scores import Score
from affinequant_evals.site_inputs import placed, site_inputs
from affinequant_evals.windows import Windows

ROWS = 64
"""Tokens of a window that are looked at, at equal distances; never the first, whose massive activations are much the same
in every text."""
DIRECTIONS = 64
RIDGE = 1e-5
"""Variance that is added in each direction, in units of the calibration tokens', so that every covariance has a root."""
HALVINGS = 8
"""How often the calibration windows are halved anew."""
ROW = {"sliced": "drift", "gaussian": "drift_gaussian"}
"""Measure -> how its row begins."""
Cloud = Float[Tensor, "tokens directions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A distance of two clouds: `prepare` makes of a cloud what `between` needs of it."""

    prepare: Callable[[Cloud], Any]
    between: Callable[[Any, Any], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Far:
    """How far a text is at one site, by one measure.

    Attributes:
        value: the distance from a half of the calibration windows, the mean over halves.
        floors: that of the two halves from each other, halving by halving.
    """

    value: float
    floors: tuple[float, ...]

    @property
    def floor(self) -> float:
        """The mean over halvings."""
        return sum(self.floors) / len(self.floors)

    @property
    def ratio(self) -> float:
        """How many times as far as the halves."""
        return self.value / self.floor


def _sorted(cloud: Cloud) -> Any:
    return np.sort(np.ascontiguousarray(cloud.numpy().T), axis=1)


def _sliced(mine: Any, other: Any) -> float:
    """Of clouds of equally many points, in which the optimal plan along a direction keeps the order. POT's own
    `wasserstein_1d` gives the same for clouds of any sizes and weights, and takes many times as long."""
    return math.sqrt(float(np.square(mine - other, dtype=np.float64).mean()))


def _moments(cloud: Cloud) -> tuple[Any, Any]:
    values = cloud.double().numpy()
    covariance = np.atleast_2d(np.cov(values, rowvar=False, bias=True))
    return values.mean(0), covariance + RIDGE * np.eye(len(covariance))


def _gaussian(mine: tuple[Any, Any], other: tuple[Any, Any]) -> float:
    from ot.gaussian import bures_wasserstein_distance  # takes seconds to import

    found: Any = bures_wasserstein_distance(mine[0], other[0], mine[1], other[1])
    return float(found) / math.sqrt(len(mine[0]))


MEASURES: Mapping[str, Measure] = {
    "sliced": Measure(prepare=_sorted, between=_sliced),
    "gaussian": Measure(prepare=_moments, between=_gaussian),
}
"""The first one is the score."""


@functools.cache
def directions(width: int) -> Float[Tensor, "width directions"]:
    """Orthogonal unit vectors, the same for each site of that width."""
    drawn = torch.randn(width, min(DIRECTIONS, width), generator=torch.Generator().manual_seed(width))
    return torch.linalg.qr(drawn)[0]


def looked_at(x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch rows directions"]:
    """Some tokens of each window, along the directions of its width."""
    stride = max(1, x.shape[1] // ROWS)
    rows = x[:, max(1, stride // 2) :: stride].float()
    return (rows @ directions(x.shape[2]).to(rows.device)).cpu()


def halvings(windows: int, each: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of disjoint samples of `each` calibration windows, the same at every site."""
    generator = torch.Generator().manual_seed(each)
    drawn = [torch.randperm(windows, generator=generator) for _ in range(HALVINGS)]
    return [(order[:each], order[each : 2 * each]) for order in drawn]


def far(
    calibration: Float[Tensor, "windows rows directions"], texts: Sequence[Float[Tensor, "each rows directions"]]
) -> list[dict[str, Far]]:
    """Each text at one site, by each measure.

    Raises:
        AffineQuantError: all calibration tokens are the same there, so that nothing has a scale.
    """
    scale = float(calibration.flatten(0, 1).double().var(0, correction=0).mean().sqrt())
    if not scale > 0:
        raise AffineQuantError("the calibration text is one token again and again", "--drift", "give other text")
    clouds = [text.flatten(0, 1) / scale for text in texts]
    found: list[dict[str, Far]] = [{} for _ in texts]
    for name, measure in MEASURES.items():
        drawn = {each: _halves(measure, calibration / scale, each) for each in {len(text) for text in texts}}
        for one, text, cloud in zip(found, texts, clouds, strict=True):
            halves, floors = drawn[len(text)]
            if not min(floors) > 0:
                what = "two halves of the calibration text are the same, so that nothing says what is far"
                raise AffineQuantError(what, "--drift", "give --drift-from SOURCE, with text that does not repeat")
            mine = measure.prepare(cloud)
            values = [measure.between(mine, half) for pair in halves for half in pair]
            one[name] = Far(value=sum(values) / len(values), floors=floors)
    return found


def _halves(
    measure: Measure, calibration: Float[Tensor, "windows rows directions"], each: int
) -> tuple[list[tuple[Any, Any]], tuple[float, ...]]:
    """Both halves of each halving as the measure wants them, and how far they are from each other."""
    pairs = [
        (measure.prepare(calibration[first].flatten(0, 1)), measure.prepare(calibration[second].flatten(0, 1)))
        for first, second in halvings(len(calibration), each)
    ]
    return pairs, tuple(measure.between(*pair) for pair in pairs)


def drift(compared: Compared, *, device: Device = "auto", dtype: Dtype = "auto", say: Say = quiet) -> Battery[Compared]:
    """The rows `drift@TEXT,seqN` and `drift_gaussian@TEXT,seqN` of each text, all of one pass: the mean over sites of how
    many times as far it is as the halves are. `about` has each site's, and in words what follows."""
    windows = (compared.calibration, *compared.texts)
    protocol = {"rows": ROWS, "directions": DIRECTIONS, "halvings": HALVINGS, "of": [one.key for one in windows]}

    def measure(subject: Compared) -> dict[str, tuple[Better, Score]]:
        ids, sizes = torch.cat([one.ids for one in windows]), [len(one.ids) for one in windows]
        found: dict[tuple[int, str], list[dict[str, Far]]] = {}
        for index, kept in site_inputs(subject.reader, ids, looked_at, device=device, dtype=dtype, say=say):
            for site, seen in kept.items():
                calibration, *texts = seen.split(sizes)
                found[index, site] = far(calibration, texts)
        rows: dict[str, tuple[Better, Score]] = {}
        for place, text in enumerate(compared.texts):
            for name, begins in ROW.items():
                sites = {where: each[place][name] for where, each in found.items()}
                score = _score(sites, text, compared.calibration)
                rows[f"{begins}@{text.label}"] = ("lower", score)
        return rows

    return Battery(name="drift", function=measure, fingerprint=protocol)


def score_drift(
    compared: Compared,
    tokenizer: Path,
    *,
    device: Device = "auto",
    dtype: Dtype = "auto",
    keep: bool = False,
    again: bool = False,
    say: Say = quiet,
) -> Scorecard:
    """The drift of all texts; with `keep` it is kept, and with `again` measured all the same (as `score_folder` has it).

    Args:
        tokenizer: the folder of the tokenizer that cut the texts.

    Raises:
        AffineQuantError: that device cannot be used (exit 3).
    """
    target, kind = placed(device, dtype)
    metric = drift(compared, device=device, dtype=dtype, say=say)
    suite: Suite[Compared] = Suite(name="drift", metrics=(metric,))
    folder = compared.reader.source.folder
    with contextlib.ExitStack() as stack:
        run = None
        if keep:
            context = context_of(folder, tokenizer, device=device, dtype=dtype, say=say)
            run = stack.enter_context(open_scores(context, say))
        if run and again:
            run.forget(stage_of(metric))
        card = evaluate(compared, suite, run=run, say=say)
    return replace(card, env={**card.env, "device": str(target), "dtype": str(kind).removeprefix("torch.")})


def _score(sites: Mapping[tuple[int, str], Far], text: Windows, calibration: Windows) -> Score:
    ratios = {where: one.ratio for where, one in sites.items()}
    halves = [sum(one.floors[draw] / one.floor for one in sites.values()) / len(sites) for draw in range(HALVINGS)]
    value = sum(ratios.values()) / len(ratios)
    about = {
        "text": text.text,
        "said": _said(value, ratios, text.text, calibration.text, value <= max(halves)),
        "calibration": {"source": calibration.text, "windows": len(calibration.ids), "sha256": calibration.sha256},
        "windows_each": len(text.ids),
        "seq_len": text.ids.shape[1],
        "sha256": text.sha256,
        "halves": [min(halves), max(halves)],
        "sites": [
            {"block": block, "site": site, "value": one.value, "floor": one.floor, "ratio": one.ratio}
            for (block, site), one in sites.items()
        ],
    }
    return Score(value=value, stderr=None, n=len(ratios), key=text.key, about=about)


def _said(value: float, ratios: Mapping[tuple[int, str], float], text: str, source: str, chance: bool) -> str:
    """The verdict in plain words."""
    (block, site), most = max(ratios.items(), key=lambda pair: pair[1])
    far = f"{text} is {value:.2f} times as far from the calibration text ({source}) as two halves of that are from each other"
    known = ", which is no more than chance" if chance else ""
    return f"{far}{known}; the farthest site is {site} of block {block} ({most:.2f} times)"

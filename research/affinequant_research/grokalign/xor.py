"""XOR of two coordinates among thousands of noise: when it generalises, and where its linear regions lie.

One hidden layer without biases. The label is the product of the first two coordinates, which are +-1; all others are
+-`noise`. The training points are many fewer than coordinates, so they are soon learnt by heart.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from affinequant_evals import Score, Suite
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.fit import FitConfig, FitReport, Group
from affinequant.learning.phases import Phase
from affinequant.report.figure import Axis, Figure
from affinequant.report.figure import Series as Line
from affinequant_research.experiment import Claim, Experiment, Found, Op, Picture, Series, Trial, arms
from affinequant_research.grokalign.drawing import over
from affinequant_research.grokalign.training import (
    Aligned,
    Batch,
    Penalty,
    delays,
    dtype_of,
    geometry,
    measured,
    mlp,
)
from affinequant_research.series import value_at

GENERALISED = 0.95
PROBED = 100
"""Training points whose Jacobians are looked at on the way; there the labels fix what their norms and alignments give."""
CELLS, REACH = 72, 2.0
"""The pictured plane: so many cells each way over [-2, 2]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Xor:
    """Settings; every update takes all `train` points.

    Attributes:
        noise: of the coordinates that mean nothing. With `width` it fixes the length of a point.
        jacobian: weight of the penalty in the arm `grokalign`.
        shake: what `noise` is for points that show how much noise the network bears.
    """

    arms: tuple[str, ...] = ("decay", "grokalign")
    width: int = 4000
    hidden: int = 512
    train: int = 400
    test: int = 400
    noise: float = 0.158
    dtype: str = "float32"
    rate: float = 0.1
    decay: float = 0.1
    jacobian: float = 1.0
    shake: float = 0.6
    updates: int = 700
    probe_every: int = 5
    compare_at: int = 150


def points(config: Xor, count: int, generator: torch.Generator) -> Batch:
    """(points [count, width], labels +-1 [count, 1])."""
    signs = torch.randint(0, 2, (count, config.width), generator=generator).to(dtype_of(config.dtype)) * 2 - 1
    labels = signs[:, :1] * signs[:, 1:2]
    signs[:, 2:] *= config.noise
    return signs, labels


def right(network: nn.Module, data: Batch) -> Tensor:
    """1 for each point whose sign is told, else 0."""
    with torch.no_grad():
        return (network(data[0]) * data[1] > 0).float().flatten()


def build(config: Xor, seed: int, arm: str) -> Trial:
    """The training of one arm, from the same weights and points as the others of its seed."""
    generator = torch.Generator().manual_seed(seed)
    train, test = points(config, config.train, generator), points(config, config.test, generator)
    noisy = torch.cat([test[0][:, :2], test[0][:, 2:] * (config.shake / config.noise)], 1), test[1]
    network = mlp([config.width, config.hidden, 1], 1.0, test[0].dtype)
    before = boundaries(network, test[0][0])
    group = Group(name="network", parameters=list(network.parameters()), lr=config.rate, weight_decay=config.decay)
    penalty = Penalty(weight=config.jacobian * (arm == "grokalign"))
    objective = Aligned(network=network, group=group, task=nn.functional.mse_loss, penalty=penalty)
    fit = FitConfig(
        epochs=config.updates,
        steps_per_epoch=1,
        optimizer="sgd",
        probe_every=config.probe_every,
        pause_after=100,
        double_backward=True,
    )
    probes = {
        "train_acc": lambda: float(right(network, train).mean()),
        "test_acc": lambda: float(right(network, test).mean()),
        "noise_acc": lambda: float(right(network, noisy).mean()),
        "row_alignment": lambda: float(geometry(network, train[0][:PROBED])["row_alignment"].mean()),
        "jac_fro": lambda: float(geometry(network, train[0][:PROBED])["jac_fro"].mean()),
    }
    metrics = (
        *(
            measured(name, "higher", lambda subject, data=data: right(subject, data))
            for name, data in (("train_acc", train), ("test_acc", test), ("noise_acc", noisy))
        ),
        measured("jac_fro", "lower", lambda subject: geometry(subject, train[0])["jac_fro"]),
        *(
            measured(name, "higher", lambda subject, data=data: geometry(subject, data[0])["row_alignment"])
            for name, data in (("row_alignment", train), ("row_alignment@test", test))
        ),
    )

    def outcome(fitted: FitReport, series: Mapping[str, Series]) -> dict[str, Score]:
        then = {f"noise_acc@u{config.compare_at}": value_at(series["noise_acc"], config.compare_at)}
        return delays(fitted, series, GENERALISED, 1.0) | then

    return Trial(
        phase=Phase(objective, lambda epoch: [train], fit, probes),
        subject=network,
        suite=Suite(name="xor", metrics=metrics),
        outcome=outcome,
        pictures=lambda: {"before": before, "after": boundaries(network, test[0][0])},
        tensors=lambda: dict(network.state_dict()),
    )


@torch.no_grad()
def boundaries(network: nn.Sequential, point: Float[Tensor, " width"]) -> Picture:
    """Of each cell of the plane of both signals through a point, how much the network's slope changes towards the cells to
    the right and below, in parts of the picture's largest: 0 inside a linear region. A unit that switches there changes
    the slope by its weights, so that one that has shrunk to nothing is not seen."""
    first, last = network[0], network[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    line = torch.linspace(-REACH, REACH, CELLS + 1, dtype=point.dtype)
    plane = torch.cartesian_prod(line.flip(0), line).reshape(CELLS + 1, CELLS + 1, 2)
    on = plane.flip(-1) @ first.weight[:, :2].T + first.weight[:, 2:] @ point[2:] > 0
    switched = (on[:-1, :-1] ^ on[:-1, 1:]) | (on[:-1, :-1] ^ on[1:, :-1])
    change = switched.to(point.dtype) @ (first.weight[:, :2].norm(dim=1) * last.weight[0].abs())
    return [[round(one, 3) for one in row] for row in (change / change.max().clamp_min(1e-30)).tolist()]


def figures(found: Found) -> list[Figure]:
    """Accuracies, the Jacobians on the way, and the linear regions before and after."""
    arms, first = found.config.arms, found.pictures[0]
    shown = {"before training": f"{arms[0]}/before"} | {f"after, {arm}": f"{arm}/after" for arm in arms}
    regions = Figure(
        kind="matrix",
        key="xor_regions",
        title="Boundaries of linear regions on the plane of the two signals",
        series=tuple(
            Line(name=name, cells=tuple(tuple(map(float, row)) for row in first[key])) for name, key in shown.items()
        ),
        value=Axis(label="change of the slope, in parts of each picture's largest"),
        caption="Across both signals from -2 to 2 through a test point; the four kinds of point are at (+-1, +-1). Pale is a "
        "linear region. See how boundaries that lie at random gather to the diagonals that XOR asks for.",
    )
    says = f"All {found.config.train} training points are learnt in the first updates; see when the others follow."
    return [
        over(found, "xor", "test_acc", says),
        over(found, "xor", "test_acc", "The same trainings: an update with the penalty takes longer.", seconds=True),
        over(found, "xor", "noise_acc", "Earlier with the penalty; see whether it stays better to the end."),
        over(found, "xor", "row_alignment", "At training points; 1 is a Jacobian parallel to the input."),
        over(found, "xor", "jac_fro", "With the labels told, a smaller norm is a greater alignment."),
        regions,
    ]


def _claims() -> tuple[Claim, ...]:
    rows: tuple[tuple[str, Op, float], ...] = (
        ("grokalign/updates", "<=", 110.0),
        ("decay/updates", ">=", 140.0),
        ("grokalign/noise_acc@u150", ">=", 0.8),
        ("decay/noise_acc@u150", "<=", 0.65),
        ("grokalign/row_alignment", ">=", 0.45),
        ("decay/row_alignment", "<=", 0.2),
    )
    source = "measured: a prototype of these settings, one seed"
    return tuple(Claim(metric=metric, op=op, than=than, source=source) for metric, op, than in rows)


BENCH = Xor()
EXPERIMENT = Experiment(
    name="xor",
    about="updates until the XOR of two coordinates is found among noise, and its linear regions",
    source="arXiv 2506.12284",
    presets={
        "smoke": dataclasses.replace(BENCH, width=60, hidden=16, train=20, test=20, updates=6, probe_every=2),
        "ci": dataclasses.replace(BENCH, updates=BENCH.compare_at),
        "bench": BENCH,
        "paper": dataclasses.replace(
            BENCH, width=40_000, hidden=2048, noise=0.05, dtype="float64", updates=1000, probe_every=10
        ),
    },
    stages=lambda config: arms(config.arms, BENCH.arms),
    build=build,
    claims={
        "ci": _claims()[:4],  # alignment takes all of the bench's updates
        "bench": _claims(),
    },
    figures=figures,
    shown=("updates", "seconds", "ms_per_update", "updates_to_train", "train_acc", "test_acc", "noise_acc@u150", "noise_acc",
           "jac_fro", "row_alignment", "row_alignment@test"),
)  # fmt: skip

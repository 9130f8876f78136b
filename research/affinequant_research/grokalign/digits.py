"""Delayed generalisation on digits: weight decay alone, with Grokfast, with the Jacobian penalty.

A network that starts at several times its usual scale tells its training digits long before others. The paper's claim is
that a penalty on the norm of its Jacobians shortens that delay, since it makes them align to the inputs. What is left at
the end of each training is also rounded to a few bits: an aligned network of small norm should bear that for longer.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from affinequant_evals import Metric, Score

from affinequant.fit import FitConfig, FitReport, Group
from affinequant.learning.phases import Phase
from affinequant.report.figure import Axis, Figure
from affinequant.report.figure import Series as Line
from affinequant_research.experiment import Claim, Experiment, Found, Series, Trial, arms
from affinequant_research.grokalign.data import digits
from affinequant_research.grokalign.drawing import over
from affinequant_research.grokalign.jacobian import Estimator
from affinequant_research.grokalign.training import (
    Aligned,
    Batch,
    Grokfast,
    Penalty,
    accuracy,
    delays,
    dtype_of,
    geometry_probes,
    hits,
    measured,
    mlp,
    slices_of,
    suite_of,
)
from affinequant_research.rounded import rounded
from affinequant_research.series import value_at

PROTOTYPE = "measured: a prototype on the same digits"
TARGET = "target for this stand-in; the paper's figure, on MNIST, is not comparable"
PROBED = 64
"""Test samples whose Jacobians are looked at on the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDigits:
    """Settings of every training on digits. An epoch is `train / batch` updates.

    Attributes:
        data: a folder with MNIST; empty for scikit-learn's digits. `paper` looks in ./MNIST.
        scale: of the start, in torch's own.
        jacobian: weight of the penalty in the arms that have one; it belongs to the inputs' length and the start's scale.
    """

    arms: tuple[str, ...] = ()
    data: str = ""
    train: int = 512
    test: int = 1285
    hidden: int = 196
    scale: float = 4.0
    dtype: str = "float32"
    jacobian: float = 0.2
    rate: float = 1e-3
    decay: float = 0.01
    batch: int = 256
    epochs: int = 1500
    probe_every: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits(OnDigits):
    """Settings of delayed generalisation.

    Attributes:
        epochs, aligned_epochs: the budgets without and with the penalty.
        reach: test accuracy at which training ends.
        compare_at: the update at which the arms' Jacobians are compared.
    """

    arms: tuple[str, ...] = ("decay", "grokalign", "grokfast")
    estimator: Estimator = "projected"
    count: int = 1
    epochs: int = 7500
    aligned_epochs: int = 1500
    reach: float = 0.85
    compare_at: int = 1400
    bits: tuple[int, ...] = (8, 4, 3, 2)


SMOKE: Mapping[str, Any] = {"train": 64, "test": 64, "hidden": 16, "epochs": 6, "probe_every": 2, "batch": 32}
PAPER: Mapping[str, Any] = {"data": "MNIST", "train": 1024, "test": 1024, "scale": 8.0, "dtype": "float64"}
"""What the presets of all trainings on digits change."""


def network_and_data(config: OnDigits, seed: int) -> tuple[torch.nn.Sequential, Batch, Batch]:
    """The network at its start, and both halves of the data; the start belongs to the generator that the seed has set."""
    dtype = dtype_of(config.dtype)
    train, test = digits(config.data, config.train, config.test, seed, dtype)
    return mlp([train[0].shape[1], *[config.hidden] * 3, 10], config.scale, dtype), train, test


def trial_of(
    name: str,
    config: OnDigits,
    start: tuple[torch.nn.Sequential, Batch, Batch],
    penalty: Penalty,
    *,
    grokfast: bool = False,
    probes: Mapping[str, Callable[[], float]] | None = None,
    more: Sequence[Metric[Any]] = (),
    outcome: Callable[[FitReport, Mapping[str, Series]], dict[str, Score]] = lambda fitted, series: {},
    **fit: Any,
) -> Trial:
    """A training on digits from its start, as `network_and_data` gives it.

    Args:
        probes: beside test accuracy and the geometry of Jacobians at test samples.
        more: metrics of the trained network beside those of `suite_of`.
        fit: what the `FitConfig` has beside what all of them have.
    """
    network, train, test = start
    parameters, batches = list(network.parameters()), slices_of(train, config.batch)
    objective = Aligned(
        network=network,
        group=Group(name="network", parameters=parameters, lr=config.rate, weight_decay=config.decay),
        penalty=penalty,
        grokfast=Grokfast(parameters=parameters) if grokfast else None,
    )
    settings: dict[str, Any] = {
        "epochs": config.epochs,
        "steps_per_epoch": len(batches),
        "probe_every": config.probe_every,
        "pause_after": 10 * config.probe_every,
        "double_backward": True,
    }
    taken = {
        **(probes or {}),
        "test_acc": lambda: accuracy(network, test),
        **geometry_probes(network, test[0][:PROBED]),
    }
    return Trial(
        phase=Phase(objective, lambda epoch: batches, FitConfig(**{**settings, **fit}), taken),
        subject=network,
        suite=suite_of(name, train, test, test[0][:256], more),
        outcome=outcome,
        tensors=lambda: dict(network.state_dict()),
    )


def build(config: Digits, seed: int, arm: str) -> Trial:
    """The training of one arm; every arm of a seed starts from the same weights and sees the same digits."""
    network, train, test = start = network_and_data(config, seed)
    aligned = arm == "grokalign"
    return trial_of(
        "digits",
        config,
        start,
        Penalty(weight=config.jacobian * aligned, estimator=config.estimator, count=config.count),
        grokfast=arm == "grokfast",
        probes={"train_acc": lambda: accuracy(network, train)},
        more=[metric for b in config.bits for metric in at_bits(b, test)],
        outcome=lambda fitted, series: compared(fitted, series, config.reach, config.compare_at),
        epochs=config.aligned_epochs if aligned else config.epochs,
        stop_when=("test_acc", ">", config.reach),
    )


def at_bits(bits: int, test: Batch) -> tuple[Metric[Any], Metric[Any]]:
    """Accuracy with weights of so many bits, and how often the answer stays what it was without rounding."""
    return (
        measured(f"test_acc@w{bits}", "higher", lambda network: hits(rounded(network, bits), test)),
        measured(
            f"agreement@w{bits}",
            "higher",
            lambda network: hits(rounded(network, bits), (test[0], network(test[0]).argmax(-1))),
        ),
    )


def compared(fitted: FitReport, series: Mapping[str, Series], reach: float, compare_at: int) -> dict[str, Score]:
    """How long the training data and the others took, and what the Jacobians were at one update."""
    found = delays(fitted, series, reach + 1e-9)  # `stop_when` asks for more than that
    found["test_acc_at_train"] = value_at(series["test_acc"], found["updates_to_train"].value)
    return found | {f"{name}@u{compare_at}": value_at(series[name], compare_at) for name in ("jac_fro", "centroid_cos")}


def figures(found: Found) -> list[Figure]:
    """Accuracy over both clocks, the Jacobians on the way, accuracy against bits."""
    ends = f"A line ends where its training has reached {found.config.reach:g}, or with its budget."
    smaller = "With the labels told, a smaller norm is a greater alignment; neither shows before test accuracy rises."
    return [
        over(found, "digits", "test_acc", ends),
        over(
            found, "digits", "test_acc", ends + " An update with the penalty takes about twice as long.", seconds=True
        ),
        over(found, "digits", "jac_fro", smaller),
        over(found, "digits", "centroid_cos", "1 is a Jacobian whose rows sum to a multiple of the input."),
        _bits(found),
    ]


def _bits(found: Found) -> Figure:
    keys = {"float": "test_acc"} | {f"{bits} bits": f"test_acc@w{bits}" for bits in found.config.bits}
    bars = []
    for arm in found.config.arms:
        values = [found.values(f"{arm}/{key}") for key in keys.values()]
        bars.append(Line(name=arm, y=tuple(sum(one) / len(one) for one in values)))
    return Figure(
        kind="bars",
        key="digits_bits",
        title="digits: test accuracy of each arm's last network, its weights rounded to nearest",
        series=tuple(bars),
        x=Axis(label="test accuracy, mean over seeds"),
        y=Axis(label="weights", names=tuple(keys)),
        caption="What is to be seen is how much of its own accuracy each network loses, not which is higher.",
    )


def claims(config: Digits, *, faster: float, smaller: float) -> tuple[Claim, ...]:
    """By which factor of updates the penalty gets there before weight decay, and how small its Jacobians are at one update.
    Weight decay that has not come there counts with its budget, which makes the claim harder to hold."""
    norm = f"jac_fro@u{config.compare_at}"
    return (
        Claim(metric="grokalign/test_acc", op=">=", than=config.reach, source=TARGET),
        Claim(metric="decay/test_acc_at_train", op="<=", than=0.45, source=f"{PROTOTYPE}: there is a delay"),
        Claim(metric="grokalign/updates", op="<=", than="decay/updates", factor=1 / faster, source=TARGET),
        Claim(metric=f"grokalign/{norm}", op="<=", than=f"decay/{norm}", factor=smaller, source=PROTOTYPE),
    )


BENCH = Digits()
CI = dataclasses.replace(BENCH, arms=("decay", "grokalign"), epochs=1500, aligned_epochs=750, reach=0.6, compare_at=800)
PRESETS = {
    "smoke": dataclasses.replace(BENCH, **SMOKE, aligned_epochs=6),
    "ci": CI,
    "bench": BENCH,
    "paper": dataclasses.replace(BENCH, **PAPER, jacobian=1e-4, epochs=50_000, aligned_epochs=50_000, probe_every=10),
}
EXPERIMENT = Experiment(
    name="digits",
    about="updates and seconds until digits that were not trained on are told",
    source="arXiv 2506.12284, section 4.3",
    presets=PRESETS,
    stages=lambda config: arms(config.arms, BENCH.arms),
    build=build,
    claims={
        "ci": claims(CI, faster=2.5, smaller=0.6),
        "bench": (
            *claims(BENCH, faster=5, smaller=0.4),
            Claim(
                metric="grokalign/centroid_cos@u1400",
                op=">=",
                than="decay/centroid_cos@u1400",
                factor=3,
                source=PROTOTYPE,
            ),
            Claim(metric="grokalign/seconds", op="<=", than="decay/seconds", factor=1 / 2.5, source=TARGET),
        ),
    },
    figures=figures,
    shown=(
        "updates", "seconds", "ms_per_update", "updates_to_train", "test_acc_at_train", "test_acc", "jac_fro", "jac_pc1",
        "centroid_cos", "row_alignment", *(f"test_acc@w{bits}" for bits in Digits().bits),
    ),
)  # fmt: skip

"""Recordings learnt by almost-linear RNNs (arXiv 2410.14240): an electrocardiogram and fMRI of a person at rest.

The authors' data are not what packages bring. Of the electrocardiogram's stand-in it is claimed what the paper says of
theirs: of four regions that there could be few are visited, and a short one holds the onset of the QRS complex. Of 250
volumes of fMRI nothing is claimed but that the free run neither dies nor blows up; the paper's are another 360.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from affinequant_evals import Score, Suite
from affinequant_evals.harness import Battery
from scipy.signal import find_peaks

from affinequant.fit import FitReport
from affinequant.report.figure import Axis, Figure
from affinequant.report.figure import Series as Line
from affinequant_research.alrnn.attractors import relus_of, way
from affinequant_research.alrnn.codes import (
    Codes,
    along,
    region_codes,
    shares,
    written,
)
from affinequant_research.alrnn.drawing import by_region, drawn, pictures_of, region_names
from affinequant_research.alrnn.freerun import Scores, distance, free_run, of_run
from affinequant_research.alrnn.measures import Floats, n_step_error, padded
from affinequant_research.alrnn.model import AlmostLinear
from affinequant_research.alrnn.recordings import ecg, fmri, rate_of
from affinequant_research.alrnn.regions import cycles_near
from affinequant_research.alrnn.training import Learner, Training, phase_of
from affinequant_research.experiment import Claim, Experiment, Found, Picture, Series, Trial, arms
from affinequant_research.series import one_of

ONSET = 0.05
"""Seconds from the onset of a QRS complex to its R peak."""
SHORTEST = 0.35
"""Seconds between two beats at least."""
SLOWEST = 1.2
"""Seconds of the longest cycle that is looked for."""
CYCLED = 3000
"""Steps of a free run in which they are."""
SHOWN_SECONDS = 3.0
AHEAD = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording(Training):
    """Settings of a recording's experiment.

    Attributes:
        arms: `P2` is the training with two ReLUs.
        source: of the electrocardiogram: `ecgsyn`, `pywt`, or a file; see `recordings.ecg`.
        steps: of the series to learn and of each free run.
        bins, variance: of the divergence of states in up to ten dimensions, and in more.
        smoothing: of spectra.
    """

    arms: tuple[str, ...] = ("P2",)
    source: str = ""
    steps: int = 10_000
    bins: int = 8
    variance: float = 1.0
    smoothing: float = 20.0


def series_of(config: Recording) -> tuple[Floats, Floats]:
    """(to learn, to compare with)."""
    return ecg(config.source, config.steps) if config.source else fmri()


def build(config: Recording, seed: int, arm: str) -> Trial:
    """The training of one arm."""
    (train, truth), rate = series_of(config), rate_of(config.source)
    learner = Learner(config, relus_of(arm), train.shape[1], seed)

    how = {"bins": config.bins, "variance": config.variance}
    metrics = [Battery(name="free run", function=lambda one: of_recording(one.model(), truth, rate, config))]
    if config.source:
        metrics.append(Battery(name="beats", function=lambda one: of_beats(one.model(), truth, rate, config)))
        metrics.append(Battery(name="cycles", function=lambda one: of_cycles(one.model(), truth, rate, config)))
    return Trial(
        phase=phase_of(learner, train, seed, {"d_stsp": lambda: distance(learner.model(), train, config.steps, **how)}),
        subject=learner,
        suite=Suite(name="recording", metrics=tuple(metrics)),
        outcome=outcome,
        pictures=lambda: pictures(learner.model(), truth, rate, config),
        tensors=lambda: {name: getattr(learner, name).detach() for name in "AWhL"},
    )


def outcome(fitted: FitReport, series: Mapping[str, Series]) -> dict[str, Score]:
    """What the checkpoints were, and the mean loss of the last of them, which need not be the one that was kept."""
    found = way(fitted, series, within=0.0)
    return {name: score for name, score in found.items() if name != "within"} | {"loss_last": one_of(fitted.last)}


def of_recording(model: AlmostLinear, truth: Floats, rate: float, config: Recording) -> Scores:
    """What `of_run` measures, exponents per second; beside it what the run's deviation is of the truth's (`spread`),
    the error of what is predicted where the model is led along the truth as in training, and that of many steps ahead from
    what is observed at one."""
    settings = {"bins": config.bins, "variance": config.variance, "smoothing": config.smoothing}
    latent = free_run(model, truth, config.steps)
    led = along(model, truth, config.tau)
    spread = padded(latent[:, : model.N], config.steps).std(0).mean() / truth.std(0).mean()
    return {
        **of_run(model, truth, config.steps, 1 / rate, **settings),
        "spread": ("higher", one_of(float(np.nan_to_num(spread)))),
        f"led_mse@tau{config.tau}": ("lower", one_of(np.square(led[1:, : model.N] - truth[1:]).mean())),
        f"n_step_mse@n{AHEAD}": ("lower", one_of(n_step_error(partial(ahead, model), truth, AHEAD))),
    }


def ahead(model: AlmostLinear, observed: Floats, steps: int) -> Floats:
    """What it predicts so many steps after each of what is observed, [count, N]."""
    state = np.concatenate([observed, observed @ model.L.T], axis=1)
    for _ in range(steps):
        bent = state.copy()
        bent[:, model.M - model.P :] = np.maximum(bent[:, model.M - model.P :], 0)
        state = np.clip(state * model.A + bent @ model.W.T + model.h, -1e5, 1e5)
    return state[:, : model.N]


def of_beats(model: AlmostLinear, truth: Floats, rate: float, config: Recording) -> Scores:
    """Beats a minute of a free run, and the region that tells the onset of the QRS complex from the rest of a beat: the share
    of onsets that are in it, and of all steps. `led`: the same where the model is led along the truth, whose beats are
    known. A run without beats has no such region: 0 of its onsets, all of its steps."""
    height = truth[:, 0].max() / 2
    free = free_run(model, truth, config.steps)
    led = along(model, truth, config.tau)
    found: Scores = {}
    for name, latent, signal in (("", free, free[:, 0]), ("_led", led, truth[:, 0])):
        at = peaks(signal, rate, height)
        code, held, whole = onset_region(region_codes(latent, model.P), at - round(ONSET * rate))
        about = {"region": written(code, model.P), "beats": len(at)}
        found[f"qrs_held{name}"] = ("higher", one_of(held, **about))
        found[f"qrs_region{name}"] = ("lower", one_of(whole, **about))
        found[f"beats_a_minute{name}"] = ("higher", one_of(60 * rate * len(at) / max(len(signal), 1)))
    return found


def of_cycles(model: AlmostLinear, truth: Floats, rate: float, config: Recording) -> Scores:
    """Real cycles no longer than a slow beat that a free run comes near to: how many, each with its steps, the size of its
    largest multiplier, and how often it changes its region."""
    latent = free_run(model, truth, min(config.steps, CYCLED))
    cycles = cycles_near(model, latent, round(SLOWEST * rate))
    told = {
        f"{place}: {len(one.codes)} steps": [one.radius, sum(a != b for a, b in pairwise((*one.codes, one.codes[0])))]
        for place, one in enumerate(cycles)
    }
    return {"cycles": ("higher", one_of(len(cycles), **told))}


def peaks(signal: Floats, rate: float, height: float) -> np.ndarray:
    """The steps of R peaks of at least that height."""
    return find_peaks(signal, height=height, distance=max(round(SHORTEST * rate), 1))[0]


def onset_region(codes: Codes, onsets: np.ndarray) -> tuple[int, float, float]:
    """(code, share of onsets, share of all steps) of the region with the largest difference of the two."""
    inside = codes[onsets[onsets >= 0]]
    if not len(inside):
        return 0, 0.0, 1.0
    every, held = shares(codes), shares(inside)
    best = max(held, key=lambda code: held[code] - every[code])
    return best, held[best], every[best]


def pictures(model: AlmostLinear, truth: Floats, rate: float, config: Recording) -> dict[str, Picture]:
    """Those of every model, and of the electrocardiogram some seconds with their regions: time, signal, code."""
    latent = free_run(model, truth, config.steps)
    kept = pictures_of(
        model,
        latent,
        truth,
        interval=config.tau,
        axes=(0, model.N - 1),
        smoothing=config.smoothing,
        spectrum_steps=config.steps,
    )
    if config.source:
        shown = round(SHOWN_SECONDS * rate)
        led = along(model, truth[:shown], config.tau)
        for name, states, signal in (("led", led, truth[:shown, 0]), ("free", latent[:shown], latent[:shown, 0])):
            codes = region_codes(states, model.P)
            kept[name] = np.column_stack([np.arange(len(signal)) / rate, signal.round(3), codes]).tolist()
    return kept


def figures(found: Found, name: str) -> list[Figure]:
    """Of every model, and for the electrocardiogram where in a beat its regions are."""
    labels = ("now", "seven steps before") if found.config.source else ("first region of interest", "last")
    kept = [_beats(found, name)] if found.config.source else []
    return [
        *kept,
        *drawn(found, name, found.config.arms, step=1 / rate_of(found.config.source), unit="s", labels=labels),
    ]


def _beats(found: Found, name: str) -> Figure:
    lines, first = [], found.pictures[0]
    for arm in found.config.arms:
        labelled = region_names(first, arm)
        for key, panel in (("led", f"{arm}, led along the truth"), ("free", f"{arm}, free")):
            points = np.array(first[f"{arm}/{key}"]).reshape(-1, 3)
            lines.append(Line(panel=panel, x=tuple(points[:, 0]), y=tuple(points[:, 1]), joined=True))
            lines += by_region(points, labelled, panel)
    return Figure(
        kind="scatter",
        key=f"{name}_beats",
        title=f"{name}: the regions of a beat",
        series=tuple(one for one in lines if one.y),
        x=Axis(label="time", unit="s"),
        y=Axis(label="signal", unit="deviations"),
        caption=f"Of seed {found.seeds[0]}. Led along the truth the model is set to it every {found.config.tau} steps.",
    )


ECG = Recording(source="ecgsyn", M=100, T=50, tau=10, noise=0.01, rate=2e-3, last_rate=1e-5, updates=20_000)
FMRI = Recording(M=50, T=72, tau=7, noise=0.0, rate=5e-3, last_rate=1e-5, updates=6000, steps=1000, smoothing=1.0)


def few(arm: str) -> tuple[Claim, ...]:
    """What is claimed of the electrocardiogram."""
    paper = "paper, as others quote it: three of four regions, of other data; what is short is ours to say"
    return (
        Claim(metric=f"{arm}/regions", op="<=", than=4.0, source=paper),
        Claim(metric=f"{arm}/qrs_held", op=">=", than=0.8, source=paper),
        Claim(metric=f"{arm}/qrs_region", op="<=", than=0.25, source=paper),
    )


LEARNS = (Claim(metric="P2/loss_last", op="<=", than=0.8, source="derived: 1 is the mean's"),)
"""What is claimed of short trainings, whose free runs are fixed points still."""


def alive(arm: str) -> tuple[Claim, ...]:
    """What is claimed of fMRI: that the run goes on, about as far as the brain does."""
    return (
        Claim(metric=f"{arm}/spread", op=">=", than=0.2, source="derived: no fixed point"),
        Claim(metric=f"{arm}/spread", op="<=", than=2.0, source="derived: bounded"),
    )


EXPERIMENTS = (
    Experiment(
        name="ecg",
        about="an electrocardiogram in few regions",
        source="arXiv 2410.14240",
        presets={
            "smoke": dataclasses.replace(
                ECG, source="pywt", M=12, T=20, batch=4, updates=20, check_every=10, steps=1000
            ),
            "ci": dataclasses.replace(ECG, M=30, updates=1500),
            "bench": ECG,
            "paper": dataclasses.replace(ECG, updates=200_000, check_every=1250),
        },
        stages=lambda config: arms(config.arms),
        build=build,
        claims={"ci": LEARNS, "bench": few("P2"), "paper": few("P2")},
        figures=lambda found: figures(found, "ecg"),
    ),
    Experiment(
        name="fmri",
        about="fMRI of a person at rest",
        source="arXiv 2410.14240",
        presets={
            "smoke": dataclasses.replace(FMRI, M=32, T=20, batch=4, updates=20, check_every=10, steps=300),
            "ci": dataclasses.replace(FMRI, updates=1000),
            "bench": FMRI,
            "paper": dataclasses.replace(FMRI, updates=100_000, check_every=1250),
        },
        stages=lambda config: arms(config.arms),
        build=build,
        claims={"ci": LEARNS, "bench": alive("P2"), "paper": alive("P2")},
        figures=lambda found: figures(found, "fmri"),
    ),
)

"""Iterative refinement of the reference (arXiv 2408.06277): bridges over a reference, theta by likelihood of them, again.

A new experiment is an entry: a `System` in `systems.py`, the `Family` of that name in `references.FAMILIES`, and

    EXPERIMENT = experiment("ecology", "about", {"ci": Settings(system="lotka-volterra", passes=4), ...}, {"ci": claims})

Its stages are `oracle` (what fresh particles of the truth score), then one for each pass: `vanilla` (over the Brownian
reference), `pass.02`, ..., `refined`; see `passes`. Each pass has these scores:

* `w2`, `w1`, `mmd_rbf` and `w2@t1`, ... at held-out times, of each interval's own paths from both its ends (unchained);
* `w2_chained`: of particles that start at every snapshot and go through all intervals to both ends of time;
  `w2_ahead` of those on their way forward alone;
* `end_forward`, `end_backward`: W2 of half-bridges to the marginal that they should end in, the worst interval's; `end_mean`;
* `theta.NAME` after the pass and `theta_error`, the worst relative error where the truth has parameters of these names;
* `kl` of the bridges to the reference that they were made over, `kl_fitted` to the one fitted to them, `fit_loss`;

and the series `end_forward` and `end_backward` (starts of intervals, W2). `vanilla` and `refined` have the picture `paths`,
`oracle` `seen` and `held`, as `drawing` has them; the last pass has the series `w2` and one for each parameter, over passes.
What goes on to the next pass is theta and the drifts.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from affinequant_evals import Score

from affinequant.errors import AffineQuantError, unknown_name
from affinequant.report.figure import Figure
from affinequant.stages import Carry, Stage
from affinequant_research.experiment import Claim, Experiment, Found, Series
from affinequant_research.running import Work, commit, fit_report
from affinequant_research.schrodinger.bridge import Bridges, Intervals, bridge, refuse_stalled
from affinequant_research.schrodinger.drawing import cloud, distances, lines, parameters, trajectories
from affinequant_research.schrodinger.likelihood import Fit, increments, least_squares, maximise, path_kl
from affinequant_research.schrodinger.loading import load_snapshots
from affinequant_research.schrodinger.measures import oracle
from affinequant_research.schrodinger.references import FAMILIES, Family, Theta, still
from affinequant_research.schrodinger.regression import REGRESSORS, How
from affinequant_research.schrodinger.scoring import about_theta, measured
from affinequant_research.schrodinger.systems import Snapshots, seeded, simulated, system
from affinequant_research.series import one_of

HERE = "affinequant_research.schrodinger.refine:"
ESTIMATORS = ("adam", "least-squares")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of every experiment here.

    Attributes:
        system: of `systems.SYSTEMS`, and of the family in `references.FAMILIES`.
        passes: refinements; the first is the vanilla bridge.
        sweeps, most_sweeps: of proportional fitting in a pass: at least, and at most while a half-bridge is stalled.
        particles: simulated from each snapshot.
        both_ways: whether theta is fitted on backward half-bridges as well as on forward ones. Where the dynamics contract,
            backward paths run away from each other, and what their drift misses is amplified.
        regressor: of `regression.REGRESSORS`. `ridge`: of its affine part.
        centred: whether drifts are regressed as what is added to the reference's.
        estimator: of theta: `adam`, or `least-squares` for a family that is linear in it.
        updates, rate, increments: of Adam in each pass, from the theta before, on so many increments of paths.
        relax: how far theta goes towards what a pass has fitted, 1 for there: refinement is an alternation of projections,
            slow where bridges follow their reference, and below 2 a longer step gets to the same place sooner.
        transport: the share of the distance between snapshots at which a half-bridge may end from its own before the
            refinement is refused.
        data, sigma: a file of snapshots in place of the system's own, as `load_snapshots` takes it, and the noise there.
    """

    system: str
    passes: int = 10
    sweeps: int = 5
    most_sweeps: int = 40
    particles: int = 200
    dt: float = 0.05
    regressor: str = "affine"
    ridge: float = 0.01
    centred: bool = True
    estimator: str = "adam"
    updates: int = 100
    rate: float = 0.05
    increments: int = 6000
    both_ways: bool = True
    relax: float = 1.0
    transport: float = 0.75
    data: str = ""
    sigma: float = 0.1


SMOKE: Mapping[str, Any] = {"passes": 2, "sweeps": 2, "most_sweeps": 20, "particles": 60, "dt": 0.1}
AUTHORS: Mapping[str, Any] = {"sweeps": 10, "regressor": "gp", "centred": False, "updates": 20}
"""What presets `smoke` and `paper` of the experiments have in common."""


def passes(config: Settings) -> tuple[str, ...]:
    """Names of the stages that are passes, in order."""
    between = tuple(f"pass.{index:02d}" for index in range(2, config.passes))
    return ("vanilla", *between, "refined") if config.passes > 1 else ("vanilla",)


def stages(config: Settings) -> tuple[Stage, ...]:
    """The oracle and the passes.

    Raises:
        AffineQuantError: settings that cannot be (exit 2).
    """
    _check(config)
    names = ("oracle", *passes(config))
    return tuple(
        Stage(name=name, does=HERE + ("pass_stage" if before else "oracle_stage"), needs=before)
        for name, before in zip(names, ((), *((one,) for one in names)), strict=False)
    )


def experiment(
    name: str,
    about: str,
    presets: Mapping[str, Settings],
    claims: Mapping[str, tuple[Claim, ...]],
    source: str = "arXiv 2408.06277",
) -> Experiment:
    """An experiment of bridges between a system's snapshots."""
    return Experiment(
        name=name,
        about=about,
        source=source,
        presets=presets,
        stages=stages,
        claims=claims,
        figures=lambda found: drawn_of(found, name),
        shown=("w2", "w2_chained", "end_mean", "kl", "kl_fitted", "theta_error"),
    )


def drawn_of(found: Found, name: str) -> tuple[Figure, ...]:
    """Paths among snapshots, distances by time, parameters over passes."""
    truth, last = system(found.config.system), passes(found.config)[-1]
    panels = {"over the Brownian reference": "vanilla/paths", f"after {found.config.passes} passes": f"{last}/paths"}
    times = [float(key.rpartition("@t")[2]) for key in found.scores[0] if key.startswith("vanilla/w2@t")]
    figures = [
        trajectories(found, name, panels, "oracle/seen", "oracle/held", truth.axes),
        distances(found, name, {"vanilla": "vanilla", "refined": last, "oracle": "oracle"}, times),
    ]
    if any(f"{last}/{key}" in found.series[0] for key in truth.true):
        figures.append(parameters(found, name, last, truth.true))
    return tuple(figures)


def observed(config: Settings, seed: int) -> tuple[Snapshots, Snapshots]:
    """The snapshots to train on, and those held out."""
    if config.data:
        return load_snapshots(config.data, config.sigma, len(system(config.system).axes)).split()
    return simulated(config.system, seed).split()


def oracle_stage(work: Work, stage: Stage, carry: Carry) -> Carry:
    """What fresh particles of the truth score at held-out times, where it is known: no bridge does better but by luck."""
    began, config = time.perf_counter(), work.config
    train, held = observed(config, work.seed)
    # As many as a pass has there: one from either end for each that it simulates.
    scores = {} if config.data else oracle(system(config.system), held, work.seed, 2 * config.particles)
    commit(work, stage, began, scores, pictures={"seen": cloud(train), "held": cloud(held)})
    return {}


def pass_stage(work: Work, stage: Stage, carry: Carry) -> Carry:
    """One pass: bridges over the reference, measured, and the reference refined on them."""
    began, config, names = time.perf_counter(), work.config, passes(work.config)
    index = names.index(stage.name)
    if index and not carry:
        carry = work.run.carry(names[index - 1])
    theta = {name.removeprefix("theta."): value for name, value in carry.items() if name.startswith("theta.")}
    family, (train, held) = FAMILIES[config.system], observed(config, work.seed)
    generator = seeded(work.seed, f"{config.system}/{stage.name}")
    reference = family.at(theta) if theta else still
    bridges = bridge(
        Intervals.between(train.times, config.dt, train.sigma),
        train.samples,
        reference,
        How(name=config.regressor, ridge=config.ridge, sigma=train.sigma, generator=generator),
        sweeps=config.sweeps,
        most_sweeps=config.most_sweeps,
        share=config.transport,
        particles=config.particles,
        centred=config.centred,
        generator=generator,
    )
    refuse_stalled(bridges, config.transport, f"{config.system}, {stage.name}, seed {work.seed}")
    fitted = refined(family, theta, bridges, config, generator)
    scores, series = measured(bridges, train, held, config.particles, generator)
    kls = path_kl(bridges, reference).sum(), path_kl(bridges, family.at(fitted.theta)).sum()
    scores |= {name: one_of(float(value)) for name, value in zip(("kl", "kl_fitted"), kls, strict=True)}
    scores |= {"fit_loss": one_of(fitted.loss)} | about_theta(
        fitted.theta, {} if config.data else system(config.system).true
    )
    if stage.name == names[-1]:
        series |= over_passes(work, names, scores)
    pictures = {"paths": lines(bridges.ahead)} if stage.name in (names[0], names[-1]) else {}
    work.say(f"{stage.name}, seed {work.seed}: W2 {scores['w2'].value:.3f} at times held out")
    carry = {f"theta.{name}": value for name, value in fitted.theta.items()}
    for side, drift in (("forward", bridges.forward), ("backward", bridges.backward)):
        assert drift.fitted is not None
        carry |= {f"{side}.{name}": value for name, value in drift.fitted.tensors().items()}
    how = fit_report(fitted.report, fitted.config) if fitted.report and fitted.config else None
    commit(work, stage, began, scores, carry=carry, fit=how, series=series, pictures=pictures)
    return carry


def refined(family: Family, theta: Theta, bridges: Bridges, config: Settings, generator: torch.Generator) -> Fit:
    """Theta by likelihood of unchained paths, forward from the left marginal of an interval and backward from the right;
    from the second pass on the step to it is taken `relax` times, of logarithms where a parameter is positive."""
    both = (bridges.ahead, bridges.back) if config.both_ways else (bridges.ahead,)
    seen = increments(bridges.forward.intervals, *both)
    if config.estimator == "least-squares":
        found = least_squares(family, seen)
    else:
        some, starts = seen.some(config.increments, generator), () if theta else family.starts
        begin = theta or family.start
        found = maximise(family, begin, some, updates=config.updates, rate=config.rate, starts=starts)
    onward = {
        name: value * (value / theta[name]) ** (config.relax - 1)
        if name in family.positive
        else value + (config.relax - 1) * (value - theta[name])
        for name, value in found.theta.items()
        if theta
    }
    return replace(found, theta=onward or found.theta)


def over_passes(work: Work, names: Sequence[str], last: Mapping[str, Score]) -> dict[str, Series]:
    """W2 and each parameter over passes, by its name."""
    before = [work.run.report(name)["scores"] for name in names[:-1]]
    series = {}
    for key in ("w2", *(key for key in last if key.startswith("theta."))):
        values = [*(scores[key]["value"] for scores in before), last[key].value]
        series[key.removeprefix("theta.")] = (range(1, len(names) + 1), values)
    return {name: (list(x), y) for name, (x, y) in series.items()}


def _check(config: Settings) -> None:
    if config.system not in FAMILIES:
        raise unknown_name("system", config.system, FAMILIES, where="--set system")
    for key, known in (("regressor", REGRESSORS), ("estimator", ESTIMATORS)):
        if getattr(config, key) not in known:
            raise unknown_name(key, getattr(config, key), known, where=f"--set {key}")
    for key in ("passes", "sweeps", "particles", "dt", "updates", "increments", "transport"):
        if not getattr(config, key) > 0:
            raise AffineQuantError(f"{key} is {getattr(config, key)}", f"--set {key}", "give a positive number")
    if not (config.ridge >= 0 and 0 < config.relax < 2):
        raise AffineQuantError(
            f"ridge is {config.ridge}, relax {config.relax}", "--set", "give ridge from 0 on, relax between 0 and 2"
        )
    if config.estimator == "least-squares" and not FAMILIES[config.system].linear:
        raise AffineQuantError(
            f"the drift of {config.system} is not linear in its parameters", "--set estimator", "use estimator=adam"
        )

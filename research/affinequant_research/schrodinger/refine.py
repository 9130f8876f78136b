"""Iterative refinement of the reference (arXiv 2408.06277): bridges over a reference, theta by likelihood of them, again.

A new experiment is an entry: a `System` in `systems.py`, the `Family` of that name in `references.FAMILIES`, and

    EXPERIMENT = experiment("ecology", "about", {"ci": Settings(system="lotka-volterra", passes=4), ...}, {"ci": claims})

Its stages are `oracle` (what fresh particles of the truth score), then one for each pass: `vanilla` (over the Brownian
reference), `pass.02`, ..., `refined`; see `passes`. Each pass has these scores:

* `w2`, `w1`, `mmd_rbf` and `w2@t1`, ... at held-out times, of each interval's own paths from both its ends (unchained);
* `w2_chained`: of particles that start at every snapshot and go through all intervals to both ends of time;
* `end_forward`, `end_backward`: W2 of half-bridges to the marginal that they should end in, the worst interval's; `end_mean`;
* `theta.NAME` after the pass and `theta_error`, the worst relative error where the truth has parameters of these names;
* `kl` of the bridges to the reference that they were made over, `kl_fitted` to the one fitted to them, `fit_loss`;

and the series `end_forward` and `end_backward` (starts of intervals, W2). `vanilla` and `refined` have the picture `paths`,
`oracle` `seen` and `held`, as `drawing` has them; the last pass has the series `w2` and one for each parameter, over passes.
What goes on to the next pass is theta and the drifts.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from affinequant_evals import Score
from torch import Tensor

from affinequant.errors import AffineQuantError, unknown_name
from affinequant.report.figure import Figure
from affinequant.stages import Carry, Stage
from affinequant_research.experiment import Claim, Experiment, Found, Series
from affinequant_research.running import Work, commit, fit_report
from affinequant_research.schrodinger.bridge import Bridges, Intervals, Samples, bridge, drawn, refuse_stalled, simulate
from affinequant_research.schrodinger.drawing import cloud, distances, lines, parameters, trajectories
from affinequant_research.schrodinger.likelihood import Fit, as_numbers, increments, least_squares, maximise, path_kl
from affinequant_research.schrodinger.loading import load_snapshots
from affinequant_research.schrodinger.measures import apart, oracle
from affinequant_research.schrodinger.references import FAMILIES, Family, Theta, still
from affinequant_research.schrodinger.regression import REGRESSORS, How
from affinequant_research.schrodinger.systems import Snapshots, seeded, simulated, system

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
        regressor: of `regression.REGRESSORS`. `ridge`: of its affine part.
        centred: whether drifts are regressed as what is added to the reference's.
        estimator: of theta: `adam`, or `least-squares` for a family that is linear in it.
        updates, rate, increments: of Adam in each pass, from the theta before, on so many increments of paths.
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
    transport: float = 0.75
    data: str = ""
    sigma: float = 0.1


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
    one, last = system(found.config.system), passes(found.config)[-1]
    panels = {"over the Brownian reference": "vanilla/paths", f"after {found.config.passes} passes": f"{last}/paths"}
    times = [float(key.rpartition("@t")[2]) for key in found.scores[0] if key.startswith("vanilla/w2@t")]
    figures = [
        trajectories(found, name, panels, "oracle/seen", "oracle/held", one.axes),
        distances(found, name, {"vanilla": "vanilla", "refined": last, "oracle": "oracle"}, times),
    ]
    if any(f"{last}/{key}" in found.series[0] for key in one.true):
        figures.append(parameters(found, name, last, one.true))
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
    scores = {} if config.data else oracle(system(config.system), held, work.seed)
    commit(work, stage, began, scores, pictures={"seen": cloud(train), "held": cloud(held)})
    return {}


def pass_stage(work: Work, stage: Stage, carry: Carry) -> Carry:
    """One pass: bridges over the reference, measured, and the reference refined on them."""
    began, config, names = time.perf_counter(), work.config, passes(work.config)
    index = names.index(stage.name)
    if index and not carry:
        carry = work.run.carry(names[index - 1])
    theta = {name.removeprefix("theta."): one for name, one in carry.items() if name.startswith("theta.")}
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
    scores, series = measured(bridges, train, held, config, generator)
    kls = path_kl(bridges, reference).sum(), path_kl(bridges, family.at(fitted.theta)).sum()
    scores |= {name: _one(float(value)) for name, value in zip(("kl", "kl_fitted"), kls, strict=True)}
    scores |= {"fit_loss": _one(fitted.loss)} | about_theta(
        fitted.theta, {} if config.data else system(config.system).true
    )
    if stage.name == names[-1]:
        series |= over_passes(work, names, scores)
    pictures = {"paths": lines(bridges.ahead)} if stage.name in (names[0], names[-1]) else {}
    work.say(f"{stage.name}, seed {work.seed}: W2 {scores['w2'].value:.3f} at times held out")
    carry = {f"theta.{name}": one for name, one in fitted.theta.items()}
    for side, drift in (("forward", bridges.forward), ("backward", bridges.backward)):
        assert drift.fitted is not None
        carry |= {f"{side}.{name}": one for name, one in drift.fitted.tensors().items()}
    how = fit_report(fitted.report, fitted.config) if fitted.report and fitted.config else None
    commit(work, stage, began, scores, carry=carry, fit=how, series=series, pictures=pictures)
    return carry


def refined(family: Family, theta: Theta, bridges: Bridges, config: Settings, generator: torch.Generator) -> Fit:
    """Theta by likelihood of unchained paths, forward from the left marginal of an interval and backward from the right."""
    seen = increments(bridges.forward.intervals, bridges.ahead, bridges.back)
    if config.estimator == "least-squares":
        return least_squares(family, seen)
    return maximise(
        family,
        theta or family.start,
        seen.some(config.increments, generator),
        updates=config.updates,
        rate=config.rate,
        starts=() if theta else family.starts,
    )


def measured(
    bridges: Bridges, train: Snapshots, held: Snapshots, config: Settings, generator: torch.Generator
) -> tuple[dict[str, Score], dict[str, Series]]:
    """Scores and series of the bridges of one pass."""
    intervals = bridges.forward.intervals
    scores = apart([torch.cat(_at(bridges, when)) for when in held.times], held)
    chains = chained(bridges, train.samples, config.particles, generator)
    for name, score in apart([chains(when) for when in held.times], held, ("w2",)).items():
        scores[name.replace("w2", "w2_chained")] = score
    ends = [*bridges.ends.forward, *bridges.ends.backward]
    scores["end_mean"] = _one(sum(ends) / len(ends))
    series: dict[str, Series] = {}
    for name, values in bridges.ends._asdict().items():
        scores[f"end_{name}"] = _one(max(values))
        series[f"end_{name}"] = (intervals.start.flatten().tolist(), list(values))
    return scores, series


def _place(intervals: Intervals, when: float) -> tuple[int, int]:
    """(interval, index of its paths) that is nearest to a time."""
    starts = intervals.start.flatten()
    index = max(int((starts <= when + 1e-9).sum()) - 1, 0)
    return index, min(round(float((when - starts[index]) / intervals.dt.flatten()[index])), intervals.steps)


def _at(bridges: Bridges, when: float) -> tuple[Tensor, Tensor]:
    interval, step = _place(bridges.forward.intervals, when)
    return bridges.ahead[step, interval], bridges.back[step, interval]


def chained(
    bridges: Bridges, marginals: Sequence[Samples], particles: int, generator: torch.Generator
) -> Callable[[float], Tensor]:
    """Particles from every snapshot, forward through all later intervals and backward through all earlier ones.

    Returns:
        Time -> all of them that are there, [n, d].
    """
    count = len(marginals) - 1
    ways = []
    for drift, order in ((bridges.forward, range(count)), (bridges.backward, range(count - 1, -1, -1))):
        cloud, paths = marginals[0][:0], dict[int, Tensor]()
        for interval in order:
            new = drawn(marginals[interval + (drift.sign < 0)], particles, generator)
            paths[interval] = simulate(drift.only(interval), torch.cat([cloud, new])[None], generator)[:, 0]
            cloud = paths[interval][-1 if drift.sign > 0 else 0]
        ways.append(paths)

    def at(when: float) -> Tensor:
        interval, step = _place(bridges.forward.intervals, when)
        return torch.cat([paths[interval][step] for paths in ways])

    return at


def over_passes(work: Work, names: Sequence[str], last: Mapping[str, Score]) -> dict[str, Series]:
    """W2 and each parameter over passes, by its name."""
    before = [work.run.report(name)["scores"] for name in names[:-1]]
    series = {}
    for key in ("w2", *(key for key in last if key.startswith("theta."))):
        values = [*(scores[key]["value"] for scores in before), last[key].value]
        series[key.removeprefix("theta.")] = (range(1, len(names) + 1), values)
    return {name: (list(x), y) for name, (x, y) in series.items()}


def about_theta(theta: Theta, true: Mapping[str, float]) -> dict[str, Score]:
    """The parameters that are numbers, and the worst relative error of those that the truth has."""
    values = as_numbers(theta)
    scores = {f"theta.{name}": _one(value) for name, value in values.items()}
    errors = [abs(values[name] / one - 1) for name, one in true.items() if name in values and one]
    return scores | ({"theta_error": _one(max(errors))} if errors else {})


def _one(value: float) -> Score:
    return Score(value=value, stderr=None, n=1)


def _check(config: Settings) -> None:
    if config.system not in FAMILIES:
        raise unknown_name("system", config.system, FAMILIES, where="--set system")
    for key, known in (("regressor", REGRESSORS), ("estimator", ESTIMATORS)):
        if getattr(config, key) not in known:
            raise unknown_name(key, getattr(config, key), known, where=f"--set {key}")
    for key in ("passes", "sweeps", "particles", "dt", "updates", "increments", "transport"):
        if not getattr(config, key) > 0:
            raise AffineQuantError(f"{key} is {getattr(config, key)}", f"--set {key}", "give a positive number")
    if config.estimator == "least-squares" and not FAMILIES[config.system].linear:
        raise AffineQuantError(
            f"the drift of {config.system} is not linear in its parameters", "--set estimator", "use estimator=adam"
        )

"""Runs experiments: a run's folder for each seed, every stage durable, every result in one schema."""

import dataclasses
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from affinequant_evals import Score, evaluate
from torch import Tensor

from affinequant.data.wheels import Say, quiet
from affinequant.learning.phases import Phase, fit_durably
from affinequant.learning.training import FitConfig, FitReport
from affinequant.progress import Steps
from affinequant.run.durable import write_text
from affinequant.run.run import Run
from affinequant.stages import Carry, Stage, run_stages
from affinequant.version import __version__
from affinequant_research.experiment import Experiment, Found, Picture, Series

RESULT = "result.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a stage of research is called with."""

    experiment: Experiment
    config: Any
    seed: int
    run: Run
    say: Say = quiet


def run_experiment(
    method: str, experiment: Experiment, config: Any, seeds: Sequence[int], preset: str, out: Path, say: Say = quiet
) -> list[dict[str, Any]]:
    """Do an experiment for every seed in a folder of its own; what is done already is taken as it is.

    Returns:
        A result for each seed, which is also in `out/seed-N/result.json`.

    Raises:
        AffineQuantError: a folder holds a run of other settings (exit 2).
    """
    results = []
    for seed in seeds:
        fingerprint = {
            "method": method,
            "experiment": experiment.name,
            "config": dataclasses.asdict(config),
            "seed": seed,
            "versions": {"affinequant": __version__, "torch": torch.__version__},
        }
        run = Run.open(out / f"seed-{seed}", fingerprint)
        work = Work(experiment=experiment, config=config, seed=seed, run=run, say=say)
        stages = tuple(experiment.stages(config))
        left = len(run.pending([stage.name for stage in stages]))
        say(f"{method}.{experiment.name}, seed {seed}: {left or 'none'} of {len(stages)} stages to do")
        run_stages(stages, run, work)
        result = _result(fingerprint, preset, experiment, run, stages)
        write_text(run.folder / RESULT, json.dumps(result, indent=1) + "\n")
        results.append(result)
    return results


def trial_stage(work: Work, stage: Stage, carry: Carry) -> Carry:
    """A stage that is one trial: train it, measure what it left, commit. Hands nothing on."""
    assert work.experiment.build is not None, f"{work.experiment.name} builds no trials"
    began = time.perf_counter()
    torch.manual_seed(work.seed)
    trial = work.experiment.build(work.config, work.seed, stage.name)
    told = Steps(work.say, f"{stage.name}, seed {work.seed}", trial.phase.config.epochs)
    fitted = fit_durably(_told(trial.phase, told), work.run, stage.name)
    card = evaluate(trial.subject, trial.suite)
    if card.failed:
        row = card.failed[0]
        raise RuntimeError(f"{stage.name}: {row.name} could not be measured: {row.error}")
    scores = {row.name: row.score for row in card.rows if row.score}
    fit, series = fit_report(fitted, trial.phase.config), series_of(fitted, trial.phase.config)
    scores |= trial.outcome(fitted, series)
    pictures = trial.pictures()
    commit(work, stage, began, scores, tensors=trial.tensors(), fit=fit, series=series, pictures=pictures)
    return {}


def commit(
    work: Work,
    stage: Stage,
    began: float,
    scores: Mapping[str, Score],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    carry: Mapping[str, Tensor] | None = None,
    fit: Mapping[str, Any] | None = None,
    series: Mapping[str, Series] | None = None,
    pictures: Mapping[str, Picture] | None = None,
) -> None:
    """Put a stage on disk with the report that the results are made from. `began`: by `time.perf_counter`."""
    report = {
        "fit": fit,
        "series": series or {},
        "pictures": pictures or {},
        "scores": {name: dataclasses.asdict(score) | {"parts": []} for name, score in scores.items()},
        "seconds": time.perf_counter() - began,
    }
    work.run.commit(stage.name, tensors=tensors, carry=carry, report=report)


def fit_report(fitted: FitReport, config: FitConfig) -> dict[str, Any]:
    """How a training went, in plain values."""
    losses = {name: value for name in ("first", "last") if math.isfinite(value := getattr(fitted, name))}
    how = {"steps": fitted.steps, "seconds": fitted.seconds, "stop": fitted.stopped, "non_finite": fitted.non_finite}
    return how | {"loss": losses, "epochs": config.epochs}


def series_of(fitted: FitReport, config: FitConfig) -> dict[str, Series]:
    """Name -> (updates, values) of everything that was logged: losses after each epoch, probes as often as they were taken,
    what judges from the start."""
    found = {}
    for name, values in fitted.series.items():
        judged, each = name == config.judge, len(values) * max(config.probe_every, 1) <= len(fitted.series["loss"])
        every = config.steps_per_epoch * (config.probe_every if each and config.probe_every and name != "loss" else 1)
        found[name] = ([every * (index + (not judged)) for index in range(len(values))], list(values))
    return found


def found(config: Any, results: Sequence[Mapping[str, Any]]) -> Found:
    """The results of all seeds as the figures read them."""
    return Found(
        config=config,
        seeds=tuple(result["seed"] for result in results),
        scores=tuple({name: Score(**_score(entry)) for name, entry in one["metrics"].items()} for one in results),
        series=tuple({name: (x, y) for name, (x, y) in one["series"].items()} for one in results),
        pictures=tuple(one["pictures"] for one in results),
    )


def _score(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("value", "stderr", "n", "about")}


def _told(phase: Phase, told: Steps) -> Phase:
    """The phase, of which `told` hears at the start of every epoch."""

    def batches(epoch: int) -> Iterator[Any]:
        yield from phase.batches(epoch)
        told()

    return phase._replace(batches=batches)


def _result(
    fingerprint: Mapping[str, Any], preset: str, experiment: Experiment, run: Run, stages: Iterable[Stage]
) -> dict[str, Any]:
    reports = {stage.name: run.report(stage.name) for stage in stages}
    metrics = {f"{name}/{key}": score for name, one in reports.items() for key, score in one["scores"].items()}
    values = {name: score["value"] for name, score in metrics.items()}
    hashed = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    return {
        "schema": 1,
        **{name: fingerprint[name] for name in ("method", "experiment", "config", "seed")},
        "preset": preset,
        "fingerprint": hashed,
        "env": {
            **fingerprint["versions"],
            "python": platform.python_version(),
            "device": fingerprint["config"].get("device", "cpu"),
            "threads": torch.get_num_threads(),
        },
        "fit": [{"stage": name, **one["fit"]} for name, one in reports.items() if one["fit"]],
        "seconds": sum(one["seconds"] for one in reports.values()),
        "series": {f"{name}/{key}": pair for name, one in reports.items() for key, pair in one["series"].items()},
        "pictures": {f"{name}/{key}": cells for name, one in reports.items() for key, cells in one["pictures"].items()},
        "metrics": metrics,
        "expect": [
            {
                "claim": str(claim),
                "metric": claim.metric,
                "op": claim.op,
                "value": values.get(claim.metric),
                "limit": claim.limit(values),
                "source": claim.source,
                "share": claim.share,
                "pass": claim.holds(values),
            }
            for claim in experiment.claims.get(preset, ())
        ],
    }

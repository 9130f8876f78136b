"""Phases: the trainings that a stage goes through, and one that goes on where it was cut short."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from affinequant.learning.fit import fit
from affinequant.learning.training import FitConfig, FitReport, Objective
from affinequant.run.run import Run


class Phase(NamedTuple):
    """One training: `fit(*phase)`."""

    objective: Objective
    batches: Callable[[int], Iterable[Any]]
    config: FitConfig
    probes: Mapping[str, Callable[[], float]] | None = None


def fit_durably(phase: Phase, run: Run, stage: str) -> FitReport:
    """`fit(*phase)` to the same bytes, with how far it is on disk after every epoch (or `config.pause_after` of them) until
    the stage is committed: called again in another process it goes on from there."""
    config = replace(phase.config, pause_after=phase.config.pause_after or 1)
    state = run.kept(stage)
    while True:
        report = fit(*phase._replace(config=config), state=state)
        if report.state is None:
            return report
        state = report.state
        run.keep(stage, state)

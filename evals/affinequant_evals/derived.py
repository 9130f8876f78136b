"""What is made of scores that are there already: the mean of a suite's tasks, and the answers that flip."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from affinequant.errors import AffineQuantError
from affinequant_evals.scores import Better, Score, flips, mean_of

SHOWN = ("acc_norm", "acc")
"""The metric of a task that AffineQuant's and FlatQuant's tables show: the first of these that it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """One number that is made of a subject's other scores, by their names, once those are there."""

    name: str
    better: Better
    function: Callable[[Mapping[str, Score]], Score]


def task_mean(suite: str, tasks: Sequence[str]) -> Derived:
    """The row `mean@SUITE`: the mean over tasks, each by the metric that the papers show, whatever its number of documents."""

    def measure(scores: Mapping[str, Score]) -> Score:
        found = {task: metric for task in tasks if (metric := _shown(task, scores))}
        if missing := [task for task in tasks if task not in found]:
            raise AffineQuantError(f"no score of {', '.join(missing)}", f"mean@{suite}", "see the rows of these tasks")
        names = {task: f"{task},{metric}" for task, metric in found.items()}
        about = {"tasks": found, "documents": {task: scores[name].n for task, name in names.items()}}
        return mean_of([scores[name] for name in names.values()], about=about)

    return Derived(name=f"mean@{suite}", better="higher", function=measure)


def flipped(mine: Mapping[str, Score], other: Mapping[str, Score]) -> dict[str, Score]:
    """Scores `TASK,flips` of two models on the same documents: by the metric that the papers show, else by the first that
    calls an answer right or wrong."""
    rows: dict[str, Score] = {}
    for task in dict.fromkeys(name.partition(",")[0] for name in mine):
        its = [name.partition(",")[2] for name in mine if name.startswith(f"{task},")]
        for metric in sorted(its, key=lambda metric: SHOWN.index(metric) if metric in SHOWN else len(SHOWN)):
            name = f"{task},{metric}"
            if name in other and (score := flips(mine[name], other[name])):
                rows[f"{task},flips"] = replace(score, about={"metric": metric, **score.about})
                break
    return rows


def _shown(task: str, scores: Mapping[str, Score]) -> str | None:
    return next((metric for metric in SHOWN if f"{task},{metric}" in scores), None)

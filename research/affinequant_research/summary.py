"""What the seeds of a method's experiments say together: tables, claims, figures, as the report page reads them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from affinequant_evals import mean_score

from affinequant_research.experiment import Experiment, Method
from affinequant_research.running import found

Results = Sequence[Mapping[str, Any]]
ENOUGH = 4
"""Seeds from which an interval of their mean says something: of two it is 13 times as wide as they are apart."""


def summary(method: Method, preset: str, done: Sequence[tuple[Experiment, Any, Results]]) -> dict[str, Any]:
    """The report of a method's run as plain JSON.

    Args:
        done: each experiment with its settings and the results of its seeds.
    """
    claims = [claim for _, _, results in done for claim in _claims(results)]
    held = sum(claim["pass"] for claim in claims)
    seeds = sorted({result["seed"] for _, _, results in done for result in results})
    on = f"{'every one of seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    some = ", or on the share of them that it names" if any(claim["share"] < 1 for claim in claims) else ""
    said = (
        f"{held} of {len(claims)} claims hold, each on {on}{some}." if claims else "Nothing is claimed of this preset."
    )
    figures = [figure.to_json() for one, config, results in done for figure in one.figures(found(config, results))]
    return {
        "schema": 1,
        "kind": "research",
        "title": f"{method.name}: {method.about}",
        "verdict": said,
        "facts": {
            "method": method.name,
            "source": method.source,
            "preset": preset,
            "time": f"{sum(result['seconds'] for _, _, results in done for result in results):.0f} s",
            **{name: str(value) for name, value in (done[0][2][0]["env"] if done else {}).items()},
        },
        "tables": [table for one, _, results in done for table in _tables(one, results)],
        "figures": figures,
        "claims": claims,
        "passed": held == len(claims),
        "results": [dict(result) for _, _, results in done for result in results],
    }


def _tables(experiment: Experiment, results: Results) -> list[dict[str, Any]]:
    names = {name: tuple(name.rsplit("/", 1)) for result in results for name in result["metrics"]}
    columns = experiment.shown or tuple(dict.fromkeys(column for _, column in names.values()))
    rows = [[stage, *(_shown(results, f"{stage}/{column}") for column in columns)] for stage in _stages(names.values())]
    tables = [{"title": f"{experiment.name}: {experiment.about}", "columns": ["", *columns], "rows": rows}]
    if claims := _claims(results):
        cells = [
            [
                claim["claim"],
                "; ".join(map(_number, claim["values"])),
                claim["source"],
                _outcome(claim),
            ]
            for claim in claims
        ]
        tables.append(
            {"title": f"{experiment.name}: claims", "columns": ["claim", "measured", "source", ""], "rows": cells}
        )
    return tables


def _outcome(claim: Mapping[str, Any]) -> str:
    seeds = f", {claim['held']} of {len(claim['values'])}" if claim["share"] < 1 else ""
    return ("pass" if claim["pass"] else "FAIL") + seeds


def _stages(pairs: Any) -> list[str]:
    return list(dict.fromkeys(stage for stage, _ in pairs))


def _shown(results: Results, name: str) -> str:
    """The mean over seeds and its 95 % interval, which two or three do not give: then the least and the greatest. `>` is
    before what was cut off by the budget on any of them."""
    scores = [result["metrics"][name] for result in results if name in result["metrics"]]
    if not scores:
        return ""
    values = [one["value"] for one in scores]
    score = mean_score(values)
    shown = ("> " if any(one["about"].get("censored") for one in scores) else "") + _number(score.value)
    if 1 < len(values) < ENOUGH:
        return f"{shown} ({_number(min(values))} to {_number(max(values))})"
    return shown + (f" [{_number(score.interval[0])}, {_number(score.interval[1])}]" if score.interval else "")


def _claims(results: Results) -> list[dict[str, Any]]:
    """Each claim with what every seed measured and on how many it holds; it passes where these are enough."""
    merged: dict[str, dict[str, Any]] = {}
    for result in results:
        for claim in result["expect"]:
            kept = ("claim", "metric", "op", "source", "share")
            new = {name: claim[name] for name in kept} | {"values": [], "limits": [], "held": 0}
            one = merged.setdefault(claim["claim"], new)
            one["values"].append(claim["value"])
            one["limits"].append(claim["limit"])
            one["held"] += claim["pass"]
            one["experiment"] = result["experiment"]
    for one in merged.values():
        one["pass"] = one["held"] >= math.ceil(one["share"] * len(one["values"]) - 1e-9)
    return list(merged.values())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

"""`affinequant compare --trial`: recipes compared in memory, by what they do to the predictions on held-out text."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.cli.output import Screen, plain_json
from affinequant.recipe.recipe import Recipe
from affinequant.report.markdown import escaped

if TYPE_CHECKING:
    from affinequant_evals.checkpoint import Ready


def run_trial(recipes: Sequence[tuple[str, Recipe]], ready: "Ready", out: Path, screen: Screen) -> int:
    """Try every recipe with every seed, print what they lose, and write `trial.json` and `trial.md` into `out`.

    Raises:
        AffineQuantError: a recipe that a trial does not do, before anything long; or one that its model refuses.
    """
    import torch

    from affinequant.learning.trial import check_trial, trials
    from affinequant.pipeline import decoder_of, tokens_of
    from affinequant.plan import plan, with_weights

    plans = [(name, with_weights(plan(recipe))) for name, recipe in recipes]
    for _, made in plans:
        check_trial(made)
    began, first = time.perf_counter(), plans[0][1]
    held, decoder = torch.cat([windows.ids for windows in ready.compared]), decoder_of(first)
    found: dict[str, dict[int, float]] = {name: {} for name, _ in plans}
    for seed in dict.fromkeys(made.recipe.seed for _, made in plans):
        here = {name: made for name, made in plans if made.recipe.seed == seed}
        screen.say(f"seed {seed}: {len(here)} recipes")
        tokens = tokens_of(next(iter(here.values())), screen.listener())
        for name, kl in trials(here, decoder, tokens, held, screen.say).items():
            found[name][seed] = kl
    value = {
        "schema": 1,
        "model": first.recipe.model,
        "scheme": first.recipe.scheme,
        "calibration": f"{first.recipe.samples} x {first.recipe.seq_len} tokens of {first.recipe.data}",
        "held_out": f"{held.shape[0]} windows of {held.shape[1]} tokens of {ready.compared[0].text}",
        "seconds": time.perf_counter() - began,
        "threads": torch.get_num_threads(),
        "trials": [_row(name, found[name], next(made for one, made in plans if one == name)) for name in found],
    }
    columns, rows = _table(value["trials"])
    about = f"nats per token from full precision on {value['held_out']}; calibrated on {value['calibration']}"
    (out / "trial.json").write_text(json.dumps(plain_json(value), indent=2) + "\n")
    lines = [columns, ["---"] * len(columns), *rows]
    (out / "trial.md").write_text(
        "\n".join([about, "", *(f"| {' | '.join(map(escaped, line))} |" for line in lines), ""])
    )
    screen.table(columns, rows, right=range(1, len(columns)))
    screen.print(about)
    screen.print(f"written to {out / 'trial.md'} and {out / 'trial.json'}")
    screen.result(value | {"path": out.absolute()})
    return 0


def _row(name: str, by_seed: Mapping[int, float], made: Any) -> dict[str, Any]:
    values = list(by_seed.values())
    flops = sum(placement.flops for placement in made.placements.values() if placement.how == "online")
    return {
        "name": name,
        "kl": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "by_seed": {str(seed): value for seed, value in by_seed.items()},
        "online_flops_per_token": flops,
        "transforms": dict(made.recipe.transforms),
        "epochs": made.recipe.epochs,
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = ["recipe", "KL [nats]", "sd over seeds", "online FLOPs/token of a block"]
    cells = []
    for row in rows:
        spread = "" if row["sd"] is None else f"{row['sd']:.4f}"
        cells.append([row["name"], f"{row['kl']:.4f}", spread, f"{row['online_flops_per_token']:,}"])
    return columns, cells

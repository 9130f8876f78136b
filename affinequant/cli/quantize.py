"""`affinequant quantize`: the header, the run, the table, and what to type next."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.cli.arguments import Parser, Switch, add_recipe, recipe_of
from affinequant.cli.evaluate import DEFAULT_SEQ_LEN, DEFAULT_WINDOWS, print_card, print_samples
from affinequant.cli.gates import add_gates, gate_code, judged, limits_of, print_gates
from affinequant.cli.output import Screen, minutes, size, spoken
from affinequant.cli.plan import fetch_demo, header, model_help, print_plan
from affinequant.cli.report import report_on
from affinequant.recipe.budget import undecided
from affinequant.recipe.presets import PRESETS
from affinequant.recipe.recipe import Recipe
from affinequant.recipe.scheme import Scheme
from affinequant.transforms.placements import shared_alone

if TYPE_CHECKING:
    from affinequant_evals.gates import Limits
    from affinequant_evals.harness import Scorecard

    from affinequant.deliver import Result
    from affinequant.plan import Plan

USAGE = "MODEL [--w4a4 | --scheme NAME] [--preset NAME] [-o DIR] ..."
_WIDTH = max(map(len, PRESETS))
PRESETS_TEXT = "presets:\n" + "\n".join(f"  {name:<{_WIDTH}}  {preset.about}" for name, preset in PRESETS.items())
EPILOG = f"""
{PRESETS_TEXT}
  A preset is named settings for `how`, and how much data; flags win over it. `affinequant list presets` shows them.

examples:
  affinequant quantize meta-llama/Llama-2-7b-hf --w4a4
  affinequant quantize ./my-llama --w4a16-g128 --preset fast --data my-text.jsonl --samples 64 -o my-llama-4bit
  affinequant quantize ./my-llama --w4a4 --dry-run               what it would do and cost
  affinequant quantize --config my-llama-4bit/recipe.toml -o again    the same once more

An output folder that holds a run of the same recipe is resumed: after Ctrl-C or a crash type the same command again.
"""


def add_arguments(parser: Parser) -> None:
    """MODEL, the recipe's flags, and how to treat the output folder."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help=model_help())
    add_recipe(parser)
    add_run(parser)
    add_gates(parser, about=": scores the result as `affinequant eval DIR` does")


def add_run(parser: Parser, *, report: bool = False) -> None:
    """Flags about the run itself; `report`: whether a page is written where nothing is said about it."""
    group = parser.add_argument_group("run")
    group.add_argument("--dry-run", action="store_true", help="print the plan and stop; no weights are loaded")
    group.add_argument("--resume", action="store_true", help="insist on a run to take up in the output folder")
    group.add_argument(
        "--overwrite", action="store_true", help="remove an earlier run or export from the output folder first"
    )
    text = f"write report.html and report.md into the folder (default: {'yes' if report else 'no'})"
    group.add_argument("--report", action=Switch, default=report, help=text)


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Plan, quantise, report; with a limit also score, and 4 where it does not hold."""
    recipe, limits = recipe_of(args), limits_of(args)
    made = prepare(recipe, args, screen)
    if args.dry_run:
        print_plan(made, screen)
        return 0
    scoring = _scoring(made, screen) if limits else {}
    done = quantize(made, args, screen)
    following = next_commands(done)
    screen.facts(outcome(done))
    value = {"schema": 1, "path": done.path.absolute(), "report": done.report, "next": following}
    if not limits:
        if args.report:
            report_on(done.path, screen)
        print_next(following, screen)
        screen.result(value)
        return 0
    card = judged(_score(done.path, recipe, limits, scoring, screen), limits)
    screen.print()
    print_card(card, screen)
    print_samples(card, screen)
    print_gates(card, screen)
    if args.report:
        report_on(done.path, screen, card=card.to_json())
    print_next(following, screen)
    screen.result(value | {"scores": card.to_json(), "gates": card.more["gates"]})
    return gate_code(card, done.path, screen)


def _scoring(made: "Plan", screen: Screen) -> dict[str, Any]:
    """What the result will be scored on, by windows that this model can read; all of it is there.

    Raises:
        AffineQuantError: it is not: said now, and not after hours of work.
    """
    from affinequant_evals.checkpoint import prepare as ready

    from affinequant.models import context_length

    longest = context_length(made.source.config) or DEFAULT_SEQ_LEN
    scoring = {"text": "demo", "windows": DEFAULT_WINDOWS, "seq_len": min(DEFAULT_SEQ_LEN, longest)}
    ready(made.source.folder, **scoring, say=screen.say)
    return scoring


def _score(path: Path, recipe: Recipe, limits: "Limits", scoring: Mapping[str, Any], screen: Screen) -> "Scorecard":
    from affinequant_evals.checkpoint import eval_checkpoint

    machine = {"device": recipe.device, "dtype": recipe.dtype}
    return eval_checkpoint(
        path, baseline=recipe.model, samples=True, limits=limits, keep=True, say=screen.say, **machine, **scoring
    )


def prepare(recipe: Recipe, args: argparse.Namespace, screen: Screen) -> "Plan":
    """The plan, after everything that can be refused without reading a weight has been.

    Raises:
        AffineQuantError: see `affinequant.plan` and `affinequant.run.workspace`.
    """
    from affinequant.plan import plan

    fetch_demo(recipe.model, screen)
    made = plan(recipe)
    from affinequant.run.run import Run
    from affinequant.run.workspace import RUN_FOLDER, check_disk, check_output

    out = recipe.output_folder()
    if made.device == "cuda":
        from affinequant.models.device import check_device

        check_device(made.device)
    check_output(out, made.source.folder, overwrite=args.overwrite, resume=args.resume)
    if Run.exists(out / RUN_FOLDER) and not args.overwrite:
        fields = recipe.fingerprint()
        if undecided(made.recipe, made.schemes):
            fields.pop("set", None)  # what a budget has decided is added to it
        Run(out / RUN_FOLDER).check_same(fields, all_fields=False)
    if args.overwrite or not (out / "report.json").exists():
        check_disk(out, made.disk_bytes)
    return made


def quantize(made: "Plan", args: argparse.Namespace, screen: Screen) -> "Result":
    """The header, and the run with its progress on stderr."""
    for name, value in header(made).items():
        screen.say(f"{name:<8}{value}")
    if screen.verbose:
        screen.say(made.recipe.to_toml())
    import affinequant

    listen = screen.listener()
    try:
        return affinequant.quantize(made.recipe, progress=listen, overwrite=args.overwrite, resume=args.resume)
    finally:
        # An exception must not leave a terminal without its cursor.
        listen.end()


def outcome(done: "Result") -> dict[str, str]:
    """The final table."""
    report = done.report
    losses: Mapping[str, Any] = report["calibration_perplexity"]
    lines = {
        "size": f"{size(report['bytes'])} (from {size(report['plan']['source_bytes'])})",
        "bits per weight": f"{report['bits_per_weight']:.2f}",
        "perplexity": f"{losses['full']:.2f} -> {losses['quantized']:.2f} on calibration text, before and after",
        "time": minutes(report["seconds"] / 60),
        "peak memory": size(report["peak_bytes"]),
        "path": str(done.path),
    }
    if report["events"]:
        lines["events"] = "; ".join(report["events"])
    return lines


def next_commands(done: "Result") -> list[str]:
    """What to type next; no engine is named that would refuse the folder."""
    folder = spoken(done.path)
    serve, evaluate = f"vllm serve {folder}", f"affinequant eval {folder}"
    online = [one["transform"] for one in done.report["plan"]["sites"] if one["placement"] == "online"]
    if not online or Scheme.parse(done.report["scheme"]).weight.kind == "int":
        return [serve, evaluate]
    export = f"affinequant export {folder} --format transform-config"
    return [*([export] if shared_alone(online) else []), evaluate]


def print_next(commands: list[str], screen: Screen) -> None:
    """Under the result."""
    screen.print("\nnext:")
    for command in commands:
        screen.print(f"  {command}")

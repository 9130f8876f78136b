"""`affinequant research`: other papers' methods on the harness of the quantiser."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.cli.arguments import Parser, seeds_of
from affinequant.cli.output import Screen, minutes
from affinequant.cli.report import report_on
from affinequant.errors import QUALITY, AffineQuantError, unknown_name

if TYPE_CHECKING:
    from affinequant_research.experiment import Method

ACTIONS = ("list", "run")
DEFAULT_PRESET = "ci"
USAGE = "list [METHOD] | run METHOD [--preset NAME] [--seeds 0-2] [--set KEY=VALUE] [-o DIR]"
EPILOG = """
METHOD is a method, with all its experiments, or METHOD.EXPERIMENT alone. A preset is smoke (seconds), ci (a minute or
two), bench (what the claims are about, minutes on two cores) or paper (the authors' settings, hours).

DIR gets a folder for each experiment and seed, report.json with the tables, the figures and every claim with its source,
and report.html to look at. Typed again, what is done is taken as it is and what is not goes on. Exit code 4 where a claim
does not hold on every seed, or on the share of the seeds that it names.

examples:
  affinequant research list
  affinequant research run rotations --preset bench --seeds 0-2
  affinequant research run rotations.sanity --set updates=2000 -o try
"""


def add_arguments(parser: Parser) -> None:
    """What to do, and with which settings."""
    parser.add_argument("action", metavar="list|run", nargs="?", help="show what there is, or run it")
    parser.add_argument("method", metavar="METHOD", nargs="?", help="as `affinequant research list` shows them")
    group = parser.add_argument_group("settings")
    group.add_argument(
        "--preset",
        metavar="NAME",
        default=DEFAULT_PRESET,
        help=f"named settings of every experiment (default: {DEFAULT_PRESET})",
    )
    group.add_argument("--seeds", metavar="0-2", default="0", help="one or more, like 0-2 or 0,1,5 (default: 0)")
    group.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="another value of a setting")
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--out", metavar="DIR", help="folder to write (default: ./research-METHOD-PRESET)")


def run(args: argparse.Namespace, screen: Screen) -> int:
    """List, or run and print tables; 4 where a claim does not hold."""
    if args.action not in ACTIONS:
        if args.action is None:
            raise AffineQuantError(
                "nothing to do", "affinequant research", "`list` shows the methods, `run METHOD` runs one"
            )
        raise unknown_name("action", args.action, ACTIONS, where="affinequant research")
    return _list(args, screen) if args.action == "list" else _run(args, screen)


def _list(args: argparse.Namespace, screen: Screen) -> int:
    from affinequant_research.experiment import METHODS, find_method

    methods = [find_method(name) for name in ([args.method] if args.method else METHODS)]
    rows = [
        [f"{method.name}.{one.name}", one.about, ", ".join(one.presets), one.source]
        for method in methods
        for one in method.experiments
    ]
    screen.table(["experiment", "what it shows", "presets", "source"], rows)
    if args.method:
        _print_settings(methods[0], screen)
    listed = {
        method.name: {
            "about": method.about,
            "source": method.source,
            "experiments": {
                one.name: {"about": one.about, "source": one.source, "presets": list(one.presets)}
                for one in method.experiments
            },
        }
        for method in methods
    }
    screen.result({"schema": 1, "methods": listed})
    return 0


def _print_settings(method: "Method", screen: Screen) -> None:
    from dataclasses import asdict

    for one in method.experiments:
        names = list(one.presets)
        rows = [
            [key, *(str(asdict(one.presets[name])[key]) for name in names)] for key in asdict(one.presets[names[0]])
        ]
        screen.print()
        screen.table(["--set", *names], rows, title=f"{method.name}.{one.name}")


def _run(args: argparse.Namespace, screen: Screen) -> int:
    if args.method is None:
        raise AffineQuantError("no method is named", "METHOD", "`affinequant research list` shows them")
    from affinequant_research.experiment import find_experiments

    method, experiments = find_experiments(args.method)
    chosen = [one for one in experiments if args.preset in one.presets]
    if not chosen:
        known = dict.fromkeys(name for one in experiments for name in one.presets)
        raise unknown_name("preset", args.preset, known, where="--preset")
    changed = dict(_pair(text) for text in args.set)
    settings = [(one, one.settings(args.preset, changed)) for one in chosen]
    seeds = seeds_of(args.seeds)
    out = Path(args.out or f"research-{args.method}-{args.preset}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        what = f"cannot write into {out}: {problem.strerror}"
        raise AffineQuantError(what, "-o", "give a folder that can be made") from None
    return _do(method, settings, seeds, args.preset, out, screen)


def _do(method: "Method", settings: list[Any], seeds: tuple[int, ...], preset: str, out: Path, screen: Screen) -> int:
    from affinequant_research.running import run_experiment
    from affinequant_research.summary import summary

    from affinequant.run.durable import write_text

    done = []
    for one, config in settings:
        results = run_experiment(method.name, one, config, seeds, preset, out / one.name, screen.say)
        done.append((one, config, results))
    report = summary(method, preset, done)
    write_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    for index, table in enumerate(report["tables"]):
        if index:
            screen.print()
        screen.table(table["columns"], table["rows"], title=table["title"])
    screen.print(f"\n{report['verdict']}")
    seconds = sum(result["seconds"] for result in report["results"])
    screen.print(f"{minutes(seconds / 60)} in all; written to {out}")
    report_on(out, screen)
    screen.result({"schema": 1, "path": out.absolute(), "report": report})
    return 0 if report["passed"] else QUALITY


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (key and sign):
        raise AffineQuantError(f"{text!r} sets nothing", "--set", "write it like --set updates=2000")
    return key.strip(), value.strip()

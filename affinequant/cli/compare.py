"""`affinequant compare`: one model by several presets, each in a process of its own, on the same windows."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from affinequant.cli import INTERRUPTED
from affinequant.cli.arguments import Parser, add_recipe, recipe_of, seeds_of, whole
from affinequant.cli.comparison import RIGHT, Comparison
from affinequant.cli.entry import Entry, over_seeds
from affinequant.cli.evaluate import BOS_TEXT, DEFAULT_WINDOWS
from affinequant.cli.output import Screen, plain_json
from affinequant.cli.plan import model_help
from affinequant.cli.quantize import PRESETS_TEXT
from affinequant.cli.report import add_report, check_report, report_on
from affinequant.cli.scoring import score_all
from affinequant.errors import AffineQuantError, unknown_name
from affinequant.recipe.presets import ALIASES, PRESETS
from affinequant.recipe.recipe import Recipe
from affinequant.recipe.values import read_toml

WAIT_SECONDS = 3
"""How long a run that was interrupted with us may take to end by itself."""
USAGE = "MODEL (--presets A,B,C | --variants FILE) [--seeds 0-2] [-o DIR] [--text FILE] ..."
EPILOG = f"""
{PRESETS_TEXT}

Each preset writes its checkpoint into DIR/PRESET, in a process of its own: its peak memory is its own, and if it
crashes the others still run. Every other flag holds for all of them; a preset that cannot do what a flag asks for fails
and is listed with the reason. Perplexity is that of the same windows for all, full precision included; KL is the divergence
from full precision's next tokens there. The table also goes into DIR/compare.md and DIR/compare.json.
Typed again, what is finished is taken as it is, and what is not goes on. Exit code 1 where any preset failed.

With --seeds each preset is made once for each seed, from another draw of calibration text, into DIR/PRESET-seedN. Above
the table then stands the noise floor: how far a preset's result moves from seed to seed, and the smallest difference from
the first preset that this noise does not make (Welch's t-test over seeds, 95 % for all comparisons of the table together).
A row says better or worse only where its difference is larger: with three seeds, about three times as large as what a
seed changes.

Where a figure was published for the method and the model (LLaMA and Qwen models, by name; `affinequant list published`),
it stands beside, with pass or FAIL if the text and the windows are the same; below the table stands where the protocols
differ.

examples:
  affinequant compare demo --presets rtn,fast,default
  affinequant compare demo --presets fast,default --seeds 0-2
  affinequant compare ./my-llama --presets fast,default --tier merged --text my-text.txt --windows 20 -o tiers-merged
  affinequant compare meta-llama/Llama-2-7b-hf --presets affinequant-paper,quarot,flatquant,best \\
      --text wikitext2 --bos first -o llama-2-7b-presets
"""


def add_arguments(parser: Parser) -> None:
    """MODEL, the presets, what to score them on, and the recipe's other flags."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help=model_help())
    group = parser.add_argument_group("what to compare")
    group.add_argument("--presets", metavar="A,B,C", help="names of presets, in the order of the table")
    group.add_argument(
        "--variants",
        metavar="FILE",
        help="in their place, recipes: a TOML file with a table of a recipe's fields for each",
    )
    text = "try them in memory, rounded to nearest, on few tokens: how far predictions on held-out text diverge, no checkpoints"
    group.add_argument("--trial", action="store_true", help=text)
    group.add_argument("--seeds", metavar="0-2", help="make each preset with each of these, like 0-2 or 0,1,5")
    group.add_argument("-o", "--out", metavar="DIR", help="folder to write (default: ./MODEL-SCHEME-presets)")
    group.add_argument("--overwrite", action="store_true", help="make every checkpoint anew, finished or not")
    group = parser.add_argument_group("what to score on")
    group.add_argument(
        "--text",
        metavar="SOURCE",
        help=f"`demo`, `wikitext2`, with --bos first `c4`, or a file (default: {DEFAULT_WINDOWS} windows of the demo's)",
    )
    group.add_argument("--windows", type=whole, metavar="N", help="windows of text (default: all that are whole)")
    group.add_argument("--window-len", type=whole, metavar="N", help="tokens per window of text (default: 2048)")
    group.add_argument("--bos", metavar="auto|yes|no|first", help=BOS_TEXT)
    add_report(group)
    add_recipe(parser, without=("preset", "out"))


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Quantise with each preset, score each, print and write the table; 1 where one failed."""
    variants = variants_of(args)
    names, seeds = list(variants), _seeds(args)
    first = recipe_of(args, variants[names[0]])
    out = Path(args.out or f"{Path(os.path.abspath(first.model)).name}-{first.scheme}-presets")
    recipes = [(name, _recipe(args, variants[name], name, seed, out)) for name in names for seed in seeds or (None,)]
    from affinequant_evals.checkpoint import prepare

    # What is wrong with the model or the text shows now, not after hours of quantising.
    windows = args.windows if args.text else args.windows or DEFAULT_WINDOWS
    text = args.text or "demo"
    ready = prepare(first.model, text=text, seq_len=args.window_len, windows=windows, bos=args.bos, say=screen.say)
    _make_folder(out)
    if args.trial:
        from affinequant.cli.trial import run_trial

        return run_trial(recipes, ready, out, screen)
    check_report(args.report, out)
    entries = []
    for number, (name, recipe) in enumerate(recipes, start=1):
        seed = recipe.seed if seeds else None
        which = name if seed is None else f"{name}, seed {seed}"
        screen.say(f"preset {number}/{len(recipes)}: {which}, into {recipe.out}")
        entry = quantize_apart(recipe, out, overwrite=args.overwrite, screen=screen)
        entries.append(replace(entry, preset=name, seed=seed))
    found = score_all(first, entries, ready, all_windows=windows is None, screen=screen)
    if seeds:
        found = replace(found, entries=_by_preset(names, found.entries), seeds=seeds)
    _report(found, out, screen, args.report)
    return 1 if found.failed else 0


def _report(found: Comparison, out: Path, screen: Screen, page: str | None) -> None:
    """Write what was found, and print it."""
    value = found.to_json() | {"path": out.absolute()}
    (out / "compare.json").write_text(json.dumps(plain_json(value), indent=2, ensure_ascii=False) + "\n")
    (out / "compare.md").write_text(found.markdown())
    for line in found.floor():
        screen.print(line)
    if found.seeds:
        screen.print()
    columns, rows = found.table()
    screen.table(columns, rows, right=[columns.index(name) for name in RIGHT])
    screen.print()
    for line in found.notes():
        screen.print(line)
    screen.print(f"written to {out / 'compare.md'} and {out / 'compare.json'}")
    if page is not None:
        report_on(out, screen, out=page)
    screen.result(value)


def _seeds(args: argparse.Namespace) -> tuple[int, ...]:
    """The seeds that were asked for; none where each preset is made once.

    Raises:
        AffineQuantError: no seeds, or one seed for all beside them.
    """
    if args.seeds is None:
        return ()
    if vars(args).get("seed") is not None:
        raise AffineQuantError("--seed and --seeds cannot go together", "--seeds", "leave --seed out")
    return seeds_of(args.seeds)


def _recipe(args: argparse.Namespace, fields: Mapping[str, Any], name: str, seed: int | None, out: Path) -> Recipe:
    """A variant's recipe, into a folder of its own."""
    if seed is None:
        return recipe_of(args, {**fields, "out": str(out / name)})
    return recipe_of(args, {**fields, "out": str(out / f"{name}-seed{seed}"), "seed": seed})


def _by_preset(names: Sequence[str], entries: Sequence[Entry]) -> list[Entry]:
    return [over_seeds([entry for entry in entries if entry.preset == name]) for name in names]


def variants_of(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name to the fields of its recipe, of all that is to be compared: presets, or the tables of a file, each on top of what
    stands above them there. What is typed beside it goes before both.

    Raises:
        AffineQuantError: neither or both were named, or no such file, or one that holds no tables.
    """
    if args.variants is None:
        return {name: {"preset": name} for name in preset_names(args.presets)}
    if args.presets:
        raise AffineQuantError(
            "--presets and --variants cannot go together", "--variants", "name presets in its tables"
        )
    tables = read_toml(args.variants, "--variants", "give a TOML file")
    shared = {name: value for name, value in tables.items() if not isinstance(value, dict)}
    named = {name: shared | fields for name, fields in tables.items() if isinstance(fields, dict)}
    if not named or any(re.search(r"[^\w.-]", name) for name in named):
        what = "it has no tables" if not named else f"names must be plain: {', '.join(named)}"
        raise AffineQuantError(what, args.variants, "write [NAME] above the fields of each recipe")
    typed = {name for name, value in vars(args).items() if value is not None} - {"transforms"}
    return {name: {key: fields[key] for key in fields if key not in typed} for name, fields in named.items()}


def preset_names(typed: str | None) -> list[str]:
    """The presets that were named, each by its first name.

    Raises:
        AffineQuantError: none, an unknown one, or one twice.
    """
    words = [word.strip() for word in (typed or "").split(",") if word.strip()]
    if not words:
        fix = "give names, e.g. --presets rtn,fast,default; `affinequant list presets` shows all"
        raise AffineQuantError("no preset is named", "--presets", fix)
    names: list[str] = []
    for word in words:
        name = ALIASES.get(word, word)
        if name not in PRESETS:
            raise unknown_name("preset", word, (*PRESETS, *ALIASES), where="--presets", listing="presets")
        if name in names:
            raise AffineQuantError(f"preset {name!r} is named twice", "--presets", "name each once")
        names.append(name)
    return names


def quantize_apart(recipe: Recipe, out: Path, *, overwrite: bool, screen: Screen) -> Entry:
    """Run `affinequant quantize` on a recipe in a process of its own; its progress goes where ours goes.

    Raises:
        KeyboardInterrupt: it, or this process, was interrupted.
    """
    file = out / f"{Path(recipe.out).name}.toml"
    file.write_text(recipe.to_toml())
    words = [sys.executable, "-m", "affinequant", "quantize", "--config", str(file), "--json"]
    flags = {"--overwrite": overwrite, "-q": screen.quiet, "-v": screen.verbose}
    code, answer = _run_child([*words, *(flag for flag, wanted in flags.items() if wanted)])
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    entry = Entry(preset=recipe.preset, tier=recipe.tier, path=Path(recipe.out).absolute())
    if code == 0 and "report" in answer:
        return replace(entry, report=answer["report"])
    return replace(entry, error=answer.get("error") or _ended(code, file))


def _run_child(words: Sequence[str]) -> tuple[int, Mapping[str, Any]]:
    """Exit code of a command, and the JSON object on its stdout ({} where there is none)."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
        try:
            shown, _ = child.communicate()
        except KeyboardInterrupt:
            # A terminal's Ctrl-C has reached the child too; one that was sent to this process alone has not.
            try:
                child.wait(WAIT_SECONDS)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGINT)
                child.wait()
            raise
    try:
        answer = json.loads(shown)
    except ValueError:
        answer = {}
    return child.returncode, answer if isinstance(answer, dict) else {}


def _ended(code: int, file: Path) -> dict[str, str]:
    """What is known of a process that left no error of its own."""
    if code >= 0:
        what, fix = f"quantize ended with exit code {code}", "what it said stands above; the same command goes on"
    else:
        what = f"quantize was killed by {signal.Signals(-code).name}"
        fix = "if memory ran out, use fewer --samples or a shorter --seq-len; the same command goes on"
    return {"what": what, "where": f"affinequant quantize --config {file}", "fix": fix}


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        what = f"cannot write into {out}: {problem.strerror}"
        raise AffineQuantError(what, "-o", "give a folder that can be made") from None

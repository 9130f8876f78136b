"""`affinequant report`: one page, to keep or to send, of a run, of scores, of a comparison or of a research run."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from affinequant.cli.arguments import Parser
from affinequant.cli.output import Screen, plain_json, size
from affinequant.errors import AffineQuantError

USAGE = "RUN|EVAL... [-o FILE.html] [--json]"
EPILOG = """
RUN is an output folder of `quantize`, `demo`, `compare` or a research run, or its report.json or compare.json; EVAL is
what `affinequant eval --json` printed. A run and its scores go onto one page: those that are given, else all that were
kept when the checkpoint was evaluated. The page is one HTML file without script or
network, light and dark, readable on a phone; beside it the same is written as Markdown, for a pull request. Both go into
RUN, or beside EVAL where no run is given, as report.html and report.md; a page that is there already is made anew.

examples:
  affinequant report my-llama-w4a4
  affinequant eval my-llama-w4a4 --json > scores.json && affinequant report my-llama-w4a4 scores.json
  affinequant report scores.json tasks.json -o scores.html
  affinequant report demo-w4a4-presets                 a folder of `affinequant compare`
"""


def add_arguments(parser: Parser) -> None:
    """What the page is about, and where it goes."""
    parser.add_argument("sources", metavar="RUN|EVAL", nargs="*", help="folders and JSON files, see below")
    parser.add_argument("-o", "--out", metavar="FILE.html", default="", help="the page; its Markdown lies beside it")


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Read, write the page, say where it is."""
    if not args.sources:
        fix = "give an output folder, or what `affinequant eval --json` printed"
        raise AffineQuantError("nothing is named to make a page of", "RUN|EVAL", fix)
    from affinequant.report.reading import read_sources
    from affinequant.report.words import plain
    from affinequant.report.writing import target, write_report

    sources = read_sources(args.sources)
    target(sources, args.out)
    if sources.made and not sources.scores:
        sources = replace(sources, scores=_kept(sources.made.folder))
    written = write_report(sources, args.out)
    page = written.page
    screen.print(f"{page.title}: {plain(page.verdict)}")
    screen.print(f"written to {written.html} ({size(written.html.stat().st_size)}) and {written.markdown}")
    screen.result(
        {
            "schema": 1,
            "title": page.title,
            "verdict": plain(page.verdict),
            "failed": page.bad,
            "html": written.html.absolute(),
            "markdown": written.markdown.absolute(),
            "bytes": written.html.stat().st_size,
            "figures": [figure.key or figure.title for figure in page.figures],
        }
    )
    return 0


def add_report(group: Any) -> None:
    """`--report [FILE.html]`, for a command that prints its result."""
    text = "write the result as a page too, as `affinequant report` does (default: into the run's folder, else here)"
    group.add_argument("--report", metavar="FILE.html", nargs="?", const="", help=text)


def check_report(out: str | None, place: Path) -> None:
    """Refuse a page that could not be written, before the work that it will show; None: none was asked for.

    Raises:
        AffineQuantError: see `writing.target`.
    """
    if out is not None:
        from affinequant.report.reading import Sources
        from affinequant.report.writing import target

        target(Sources(place=place), out)


def place_of(about: str | Path) -> Path:
    """Where the page of scores goes by itself: the folder of the run that they are of, else the working directory."""
    from affinequant.report.reading import REPORT

    folder = Path(about).expanduser()
    return folder if (folder / REPORT).is_file() else Path()


def report_on(path: str | Path, screen: Screen, *, out: str = "", **scores: Any) -> Path | None:
    """Write the page of a result that is at hand, and say where. What hinders it is said, and takes nothing else along.

    Args:
        path: the folder that it is about, or whatever else the scores name as their checkpoint.
        scores: `card`, an evaluation as JSON values that belongs to it.
    """
    from affinequant.report.reading import REPORT, Sources, read_sources
    from affinequant.report.writing import write_report

    cards = tuple(plain_json(card) for card in scores.values())
    alone = bool(cards) and not (Path(path).expanduser() / REPORT).is_file()
    try:
        sources = Sources(place=place_of(path), scores=cards) if alone else read_sources([path])
        if sources.made:
            sources = replace(sources, scores=(*_kept(sources.made.folder), *cards))
        written = write_report(sources, out).html
    except AffineQuantError as problem:
        print(f"no report was written: {problem}", file=sys.stderr, flush=True)
        return None
    screen.print(f"report: {written}")
    return written


def _kept(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The scores of a checkpoint that were kept when it was evaluated, the newest last."""
    if not any(folder.glob("*.safetensors")):
        return ()
    from affinequant_evals.kept import kept_cards

    try:
        return tuple(reversed(kept_cards(folder)))
    except AffineQuantError:  # its files are no model that can be told from others
        return ()

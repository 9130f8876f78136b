"""The command line: `affinequant COMMAND ...`. Results go to stdout, everything else to stderr.

Nothing in this package imports torch before a command needs it.
"""

import contextlib
import difflib
import importlib
import io
import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from affinequant.cli.arguments import parse
from affinequant.cli.output import Screen
from affinequant.errors import PREFLIGHT, AffineQuantError, disk_full

UNEXPECTED, INTERRUPTED = 1, 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A module with `add_arguments(parser)` and `run(args, screen)`, and a line about it. `saves`: what an interrupted run
    has saved, if the same words go on with it."""

    module: str
    about: str
    saves: str = ""


COMMANDS: dict[str, Command] = {
    "demo": Command(
        module="affinequant.cli.demo",
        about="a real 135M model to W4A4, scored; nothing to prepare",
        saves="every finished block",
    ),
    "quantize": Command(
        module="affinequant.cli.quantize", about="make a checkpoint of a model", saves="every finished block"
    ),
    "plan": Command(module="affinequant.cli.plan", about="what a run would do and cost; no weights are loaded"),
    "eval": Command(
        module="affinequant.cli.evaluate",
        about="score a checkpoint next to the model it was made from",
        saves="every finished score",
    ),
    "compare": Command(
        module="affinequant.cli.compare",
        about="one model by several presets: quality, time, memory, cost",
        saves="every finished block",
    ),
    "report": Command(
        module="affinequant.cli.report", about="one page, HTML and Markdown, of a run, scores, a comparison"
    ),
    "inspect": Command(module="affinequant.cli.inspect", about="bits, sizes and errors per layer; the recipe"),
    "export": Command(
        module="affinequant.cli.export", about="another format out of a finished folder, nothing retrained"
    ),
    "bench": Command(
        module="affinequant.cli.bench", about="time a checkpoint next to its model, or the integer kernels"
    ),
    "research": Command(
        module="affinequant.cli.research",
        about="other papers' methods on the same harness",
        saves="every finished part",
    ),
    "list": Command(
        module="affinequant.cli.lists", about="schemes, models, transforms, formats, presets, data, metrics, published"
    ),
    "env": Command(module="affinequant.cli.env", about="versions, devices, kernel self-test: paste into a bug report"),
}

_EPILOG = """
start here:
  affinequant demo                              see it work, on this machine, in minutes
  affinequant plan MODEL --w4a4                 what it would do to your model, in seconds
  affinequant quantize MODEL --w4a4 -o DIR      do it; Ctrl-C and the same command again goes on
  affinequant eval DIR                          what it cost in quality
  affinequant report DIR                        all that is known of it on one page

MODEL is a local folder, a hub id (org/name) or `demo`. `affinequant COMMAND --help` explains a command.
exit codes: 0 done, 1 unexpected, 2 usage, 3 refused before any work, 4 quality gate failed, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; nothing is raised."""
    typed = list(sys.argv[1:] if argv is None else argv)
    # Said by transformers about itself, not about the run.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    screen = Screen.of(typed)
    _settle()
    if screen.quiet or not sys.stderr.isatty():
        # Bars are drawn over and over, which no file wants; TQDM_DISABLE reaches those that have no setting.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        code = _dispatch(typed, screen)
        sys.stdout.flush()
        return code
    except AffineQuantError as problem:
        if screen.verbose:
            traceback.print_exc()
        screen.error(problem)
        return problem.exit_code
    except KeyboardInterrupt:
        screen.error(_interrupted(typed))
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has seen enough (`| head`); what is left must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as problem:
        screen.error(_unexpected(problem, typed, screen))
        return PREFLIGHT if disk_full(problem) else UNEXPECTED


def _settle() -> None:
    """What the surroundings may lack: a home, and an encoding for every character of a path or a message."""
    from affinequant.data.wheels import settle_home

    with contextlib.suppress(OSError):
        settle_home()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _dispatch(typed: list[str], screen: Screen) -> int:
    if not typed:
        print(_overview(), file=sys.stderr)
        return 2
    name, rest = typed[0], typed[1:]
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name == "--version":
        from affinequant.version import __version__

        print(f"affinequant {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near and not name.startswith("-") else ""
        fix = f"{hint}`affinequant --help` shows all; the command comes first"
        raise AffineQuantError(f"unknown command {name!r}", "affinequant", fix)
    module = importlib.import_module(COMMANDS[name].module)
    args = parse(name, module, COMMANDS[name].about, rest)
    return 0 if args is None else module.run(args, screen)


def _overview() -> str:
    lines = [
        "usage: affinequant COMMAND ...",
        "",
        "4-bit copies of LLMs that still work, for vLLM and transformers.",
        "",
    ]
    lines += ["commands:", *(f"  {name:<10}{command.about}" for name, command in COMMANDS.items())]
    return "\n".join(lines) + "\n" + _EPILOG.rstrip()


def _interrupted(typed: list[str]) -> AffineQuantError:
    # --overwrite or --again would throw away what was saved.
    again = shlex.join(["affinequant", *(word for word in typed if word not in ("--overwrite", "--again"))])
    command = COMMANDS.get(typed[0]) if typed else None
    if command is not None and command.saves:
        return AffineQuantError(f"interrupted; {command.saves} is saved", "Ctrl-C", f"to go on: {again}")
    return AffineQuantError("interrupted", "Ctrl-C", f"to start again: {again}")


def _unexpected(problem: Exception, typed: list[str], screen: Screen) -> AffineQuantError:
    if screen.verbose:
        traceback.print_exc()
    if disk_full(problem):
        again = shlex.join(["affinequant", *(word for word in typed if word != "--overwrite")])
        where = getattr(problem, "filename", None) or "disk"
        return AffineQuantError("the disk is full", where, f"free some room, then go on: {again}")
    what = f"unexpected {type(problem).__name__}: {problem}".splitlines()[0]
    try:
        where = str(_write_traceback(typed))
    except Exception:
        traceback.print_exc()
        where = "the traceback above"
    return AffineQuantError(what, where, "report it with that file and the output of `affinequant env`")


def _write_traceback(typed: list[str]) -> Path:
    from affinequant.data.wheels import cache_folder, own_temporary
    from affinequant.version import __version__

    head = f"affinequant {__version__}, python {sys.version}\n{shlex.join(['affinequant', *typed])}\n\n"
    text = (head + traceback.format_exc()).encode("utf-8", "backslashreplace")

    def write(folder: Path) -> Path:
        (folder / "errors").mkdir(parents=True, exist_ok=True)
        path = folder / "errors" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        path.write_bytes(text)
        return path

    try:
        return write(cache_folder())
    except OSError:  # a home that cannot be written to
        return write(own_temporary())

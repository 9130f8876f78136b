"""What a person or a script sees: stdout for the result, stderr for progress and errors."""

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from affinequant.errors import AffineQuantError
from affinequant.progress import Console, Silent
from affinequant.report.words import minutes as minutes
from affinequant.report.words import size as size

if TYPE_CHECKING:
    from rich.console import Console as Rich

PLAIN_WIDTH = 240
"""Columns where the output is no terminal: long enough that no line is folded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """How to talk, as the flags say. `json`: stdout holds one JSON object and nothing else."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    @staticmethod
    def of(typed: Sequence[str]) -> "Screen":
        """From the words as typed, since errors of the parser need it too."""
        return Screen(
            json="--json" in typed,
            quiet="-q" in typed or "--quiet" in typed,
            verbose="-v" in typed or "--verbose" in typed,
        )

    def listener(self) -> Console | Silent:
        """What a run reports its progress to."""
        return Silent() if self.quiet else Console(verbose=self.verbose)

    def say(self, text: str) -> None:
        """A line of progress."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def print(self, text: str = "") -> None:
        """A line of the result."""
        if not self.json:
            print(text)

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), title: str = ""
    ) -> None:
        """A table of the result; `right` are the columns that are set flush right."""
        if self.json:
            return
        from rich.table import Table
        from rich.text import Text

        console = rich_console(sys.stdout)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=any(columns))
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        if title:
            print(f"{title}:")
        # Rich pads every line to the width of the table.
        with console.capture() as captured:
            console.print(table)
        print("\n".join(line.rstrip() for line in captured.get().splitlines()))

    def facts(self, pairs: Mapping[str, str]) -> None:
        """Names and values, one a line."""
        width = max(map(len, pairs), default=0)
        for name, value in pairs.items():
            self.print(f"{name:<{width}}  {value}")

    def result(self, value: Mapping[str, Any]) -> None:
        """The one JSON object, where it was asked for."""
        if self.json:
            print(json.dumps(plain_json(value), indent=2, ensure_ascii=False))

    def warn(self, problem: AffineQuantError) -> None:
        """Three parts on stderr, beside a result."""
        print(f"affinequant: {problem}", file=sys.stderr, flush=True)

    def error(self, problem: AffineQuantError) -> None:
        """Three parts on stderr; with --json also the object on stdout."""
        self.warn(problem)
        self.result({"schema": 1, "error": {"what": problem.what, "where": problem.where, "fix": problem.fix}})
        sys.stdout.flush()


def rich_console(stream: IO[str]) -> "Rich":
    """A rich console that adds nothing of its own: no colour of numbers, no emoji, no folding without a terminal."""
    from rich.console import Console as Rich

    console = Rich(file=stream, highlight=False, emoji=False)
    return console if console.is_terminal else Rich(file=stream, highlight=False, emoji=False, width=PLAIN_WIDTH)


def plain_json(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def spoken(path: str | Path) -> str:
    """A path as it can be typed and cannot be taken for a hub id."""
    text = str(path)
    return shlex.quote(text if text.startswith(("/", "./", "../", "~")) else f"./{text}")


def kept_text(plan: Mapping[str, Any]) -> str:
    """What a plan's JSON says of cached tokens that stay in 16 bits; "" where none do."""
    if (kept := plan.get("cache_kept")) is None:
        return ""
    which = f"the first {kept['first']} tokens and the latest {kept['latest']} in 16 bits ({size(kept['bytes'])})"
    return f"; {which}: {kept['bits']:.1f} bits on average at {kept['tokens']:,} tokens"


def freedom(dof: float | None) -> str:
    """What `+-` is, and how well it is known: of few windows, far less than the normal distribution would have it."""
    known = "" if dof is None else f" with {dof:g} degree{'s' * (dof != 1)} of freedom"
    return f"+- is one standard error{known}"


def with_error(value: float, stderr: float | None, *, sign: bool = False) -> str:
    """`12.34 +- 0.56`."""
    text = f"{value:+.4g}" if sign else f"{value:.4g}"
    return text if stderr is None else f"{text} +- {stderr:.2g}"


def between(interval: tuple[float, float] | None, *, sign: bool = False) -> str:
    """`[11.2, 13.5]`; nothing where there is none."""
    kind = "+.4g" if sign else ".4g"
    return f"[{interval[0]:{kind}}, {interval[1]:{kind}}]" if interval else ""

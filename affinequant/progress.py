"""What is said while a run works. The pipeline talks to a `Progress`; nothing else in the library prints."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, Protocol, TypeVar

T = TypeVar("T")
SAY_EVERY = 10.0
"""Seconds between two lines about how far a step is."""
KINDS = {"transforms": "transform", "roundings": "rounding"}
"""Key of a block's report to what it says was chosen, site by site."""


class Steps:
    """Says how far a step is that may take long: a line at most every `SAY_EVERY` seconds, with the time that is left.

    Args:
        say: gets the lines; nothing is said of what takes no longer than that.
        what: is being done.
        total: how many times it is called, or the sum of the counts that it is called with.
        shown: what such a count is in words.
    """

    def __init__(
        self, say: Callable[[str], None], what: str, total: int, shown: Callable[[int], object] = lambda count: count
    ) -> None:
        self.say, self.what, self.total, self.shown = say, what, total, shown
        self.done, self.began = 0, time.monotonic()
        self.said = self.began

    def __call__(self, count: int = 1) -> None:
        """So much more has been done."""
        self.done += count
        now = time.monotonic()
        if now - self.said >= SAY_EVERY and 0 < self.done < self.total:
            self.said = now
            left = (now - self.began) / self.done * (self.total - self.done)
            self.say(f"{self.what}: {self.shown(self.done)}/{self.shown(self.total)}, {_left(left)}")

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each of which counts as done when the next is asked for."""
        for item in items:
            yield item
            self()


@contextmanager
def told_by_transformers(say: Callable[[str], None]) -> Iterator[None]:
    """Whatever transformers loads meanwhile says how far it is as any step does, where it would show a bar or nothing."""
    from transformers.utils import logging

    def stepwise(bar: Callable[..., Any], given: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if given and hasattr(given[0], "__len__"):
            what = str(options.get("desc") or "loading").rstrip(".").lower()
            given = (Steps(say, what, len(given[0])).each(given[0]), *given[1:])
        return bar(*given, **options)

    before = logging.set_tqdm_hook(stepwise)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _left(seconds: float) -> str:
    return f"~{seconds / 60:.0f} min left" if seconds >= 90 else f"~{seconds:.0f} s left"


class Progress(Protocol):
    """Listens to a run."""

    def say(self, text: str) -> None:
        """One line about what is going on."""
        ...

    def begin(self, total: int, done: int) -> None:
        """`total` blocks are to be worked on, `done` of which are on disk already."""
        ...

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        """A block has been committed."""
        ...

    def end(self) -> None:
        """No more blocks."""
        ...


class Silent:
    """Says nothing: what a library call gets unless it asks."""

    def say(self, text: str) -> None:
        """Nothing."""

    def begin(self, total: int, done: int) -> None:
        """Nothing."""

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


LEGEND = (
    "per block: loss before -> after learning; SQNR of its output against full precision (higher is better); "
    "largest condition number; time; peak memory"
)


class Console:
    """A line per block and, on a terminal, a bar with the time that is left. Everything goes to stderr."""

    def __init__(self, stream: IO[str] | None = None, *, verbose: bool = False) -> None:
        from rich.console import Console as Rich

        self.rich = Rich(file=stream or sys.stderr, highlight=False, emoji=False, soft_wrap=True)
        self.bar: Any = None
        self.task: Any = None
        self.total, self.fresh, self.began = 0, 0, 0.0
        self.verbose = verbose

    def say(self, text: str) -> None:
        """One line."""
        self.rich.print(text, markup=False)

    def begin(self, total: int, done: int) -> None:
        """Start the bar."""
        self.total, self.fresh, self.began = total, 0, time.monotonic()
        if done:
            self.say(f"resuming: {done} of {total} blocks are on disk")
        if done < total:
            self.say(LEGEND)
        if self.rich.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("blocks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self.rich
            )
            self.task = self.bar.add_task("blocks", total=total, completed=done)
            self.bar.start()

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        """`12/32  loss 3.1e-03 -> 1.2e-03  SQNR 24.1 dB  cond 41  11 s  9.8 GB`."""
        self.fresh += 1
        parts = [f"{index + 1:>3}/{self.total}"]
        if report.get("loss_first") is not None:
            parts.append(f"loss {report['loss_first']:.1e} -> {report['loss_last']:.1e}")
        parts.append(f"SQNR {report['sqnr']:.1f} dB")
        if report.get("condition", 1.0) > 1.0:
            parts.append(f"cond {report['condition']:.3g}")
        if chosen := choices_of(report):
            parts.append(chosen)
        parts += [f"{report['seconds']:.0f} s", f"{report['peak_bytes'] / 2**30:.1f} GB"]
        parts += [f"! {event}" for event in report.get("events", ())]
        if self.bar is None:
            left = (time.monotonic() - self.began) / self.fresh * (self.total - index - 1)
            parts.append(_left(left))
        else:
            self.bar.update(self.task, completed=index + 1)
        self.say("  ".join(parts))
        if self.verbose:
            for name, figures in report.get("linears", {}).items():
                self.say(f"        {name:<20} SQNR {figures['sqnr']:5.1f} dB  input clip {figures['clip']:.2f}")

    def end(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def tally(blocks: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """`transform at mlp_mid` or `rounding at mlp_mid` -> what was chosen -> in how many blocks, the most frequent first;
    nothing where nothing was left to choose."""
    counts: dict[str, dict[str, int]] = {}
    for block in blocks:
        for key, kind in KINDS.items():
            for site, one in block.get(key, {}).items():
                row = counts.setdefault(f"{kind} at {site.partition('.')[0]}", {})  # experts share a name
                row[one[kind]] = row.get(one[kind], 0) + 1
    return {what: dict(sorted(row.items(), key=lambda pair: -pair[1])) for what, row in counts.items()}


def tally_lines(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tally as lines of text: `transform at mlp_mid: diagonal+kronecker x 22, diagonal x 8`."""
    return [
        f"{what}: " + ", ".join(f"{name} x {count}" for name, count in row.items())
        for what, row in tally(blocks).items()
    ]


def choices_of(block: Mapping[str, Any]) -> str:
    """One block's choices in a few characters, parts of transforms by their first letters; "" where there were none."""
    parts = []
    for key, kind in KINDS.items():
        for site, one in block.get(key, {}).items():
            if "." in site:  # of one expert among many
                continue
            words = one[kind].split(" ")[0].split("+")
            parts.append(f"{site}:" + "+".join(word if len(words) == 1 else word[:4] for word in words))
    return " ".join(parts)

"""What is said while a run works: plain lines without a terminal, a bar with one, nothing if silent."""

import io
from typing import Any

import pytest

from affinequant import progress
from affinequant.progress import LEGEND, Console, Silent, Steps

REPORT: dict[str, Any] = {
    "loss_first": 3.1e-3,
    "loss_last": 1.2e-3,
    "sqnr": 24.13,
    "condition": 41.0,
    "seconds": 11.2,
    "peak_bytes": 9.8 * 2**30,
    "events": ["1 non-finite losses: went on at a lower rate"],
    "linears": {"mlp.up_proj": {"sqnr": 20.04, "clip": 0.96}},
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def run(console: Console) -> None:
    console.begin(32, 11)
    console.block(11, REPORT)
    console.end()


def test_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    run(Console(stream))
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["resuming: 11 of 32 blocks are on disk", LEGEND]
    assert lines[2].startswith(" 12/32  loss 3.1e-03 -> 1.2e-03  SQNR 24.1 dB  cond 41  11 s  9.8 GB")
    assert "! 1 non-finite losses" in lines[2] and lines[2].endswith("left")
    assert len(lines) == 3 and "\x1b" not in stream.getvalue()


def test_what_is_not_there_is_not_shown() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.begin(2, 0)
    console.block(0, REPORT | {"loss_first": None, "condition": 1.0, "events": []})
    line = stream.getvalue().splitlines()[-1]
    assert "resuming" not in stream.getvalue()
    assert line.startswith("  1/2  SQNR 24.1 dB  11 s  9.8 GB") and "loss" not in line and "!" not in line


def test_verbose_names_every_linear() -> None:
    stream = io.StringIO()
    run(Console(stream, verbose=True))
    assert stream.getvalue().splitlines()[-1].split() == ["mlp.up_proj", "SQNR", "20.0", "dB", "input", "clip", "0.96"]


def test_text_is_shown_as_it_is() -> None:
    stream = io.StringIO()
    Console(stream).say("a [bold]folder[/bold] :smile: " + "long " * 100)
    assert stream.getvalue() == "a [bold]folder[/bold] :smile: " + "long " * 100 + "\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    run(Console(stream))
    text = stream.getvalue()
    assert "12/32" in text and "━" in text
    hidden, shown = text.rfind("\x1b[?25l"), text.rfind("\x1b[?25h")
    assert 0 <= hidden < shown  # the cursor is back


def test_end_twice_or_without_begin() -> None:
    console = Console(io.StringIO())
    console.end()
    run(console)
    console.end()


def test_silent(capsys: pytest.CaptureFixture[str]) -> None:
    listen = Silent()
    listen.say("x")
    listen.begin(2, 0)
    listen.block(0, REPORT)
    listen.end()
    assert capsys.readouterr() == ("", "")


class Clock:
    """Stands in for `time` where a test decides what time it is."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_step_that_takes_long_says_how_far_it_is(clock: Clock) -> None:
    lines: list[str] = []
    told = Steps(lines.append, "verifying", 100)
    for _ in told.each(range(100)):
        clock.now += 4.0
    assert lines[0] == "verifying: 3/100, ~6 min left"
    assert len(lines) == 33 and lines[-1] == "verifying: 99/100, ~4 s left"


def test_a_step_that_is_quick_says_nothing(clock: Clock) -> None:
    lines: list[str] = []
    told = Steps(lines.append, "writing", 3)
    for _ in range(3):
        clock.now += 3.0
        told()
    clock.now += 60.0
    told()
    assert lines == []  # the last step is no news

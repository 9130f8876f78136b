"""What the benchmark and the search can be asked to measure, as words and as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from affinequant_kernels.checks import fail

SHAPES = {"cuda": ((4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008)), "cpu": ((4096, 4096),)}
ROWS = {"cuda": (1, 16, 64, 256, 2048, 8192), "cpu": (1, 16, 512)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure. Raises ValueError, naming the option, for what cannot be."""

    device: str = "cpu"
    shapes: tuple[tuple[int, int], ...] = SHAPES["cpu"]  # (n, k)
    rows: tuple[int, ...] = ROWS["cpu"]
    rounds: int = 15
    minutes: float = 6.0

    def __post_init__(self) -> None:
        if self.device not in SHAPES:
            raise fail("device", "cpu or cuda", self.device)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise fail("device", "cpu, as there is no CUDA device here", self.device)
        check_sizes(self.shapes, self.rows)
        if self.rounds < 1:
            raise fail("rounds", "at least 1", self.rounds)
        check_minutes(self.minutes)

    @staticmethod
    def read(device: str, shapes: str | None, rows: str | None, rounds: int, minutes: float) -> Settings:
        """From words: `auto` or a device, `NxK,...`, `M,...`; None takes the device's own."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        usual = device if device in SHAPES else "cpu"
        return Settings(
            device=device,
            shapes=SHAPES[usual] if shapes is None else read_shapes(shapes),
            rows=ROWS[usual] if rows is None else read_rows(rows),
            rounds=rounds,
            minutes=minutes,
        )


def check_sizes(shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> None:
    """Raise ValueError for sizes that some layer of the benchmark cannot have."""
    for n, k in shapes:
        if n < 8 or n % 8 or k < 128 or k % 128:
            raise fail("shapes", "N a multiple of 8 and K a multiple of 128", f"{n}x{k}")
    if min(rows) < 1:
        raise fail("rows", "positive numbers", min(rows))


def check_minutes(minutes: float) -> None:
    """Raise ValueError unless it is a span of time."""
    if not (math.isfinite(minutes) and minutes > 0):
        raise fail("minutes", "a positive number", minutes)


def read_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """`NxK,...` as pairs. Raises ValueError."""
    try:
        return tuple((int(n), int(k)) for n, k in (word.split("x") for word in text.split(",")))
    except ValueError:
        raise fail("shapes", "NxK, comma separated, e.g. 4096x4096,12288x4096", repr(text)) from None


def read_rows(text: str) -> tuple[int, ...]:
    """`M,...` as numbers. Raises ValueError."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise fail("rows", "whole numbers, comma separated, e.g. 1,16,512", repr(text)) from None

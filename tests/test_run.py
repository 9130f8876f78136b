"""Durable progress: a stage is there whole or not at all, whatever stops the process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from affinequant.errors import AffineQuantError
from affinequant.run import run as run_module
from affinequant.run.run import Run

ONE, TWO = {"x": torch.ones(3)}, {"x": torch.full((3,), 2.0)}


class Stopped(BaseException):
    """Stands for a kill: nothing that runs afterwards may tidy up."""


@contextmanager
def stopped_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[list[str]]:
    """Stop just before the step-th call that changes the disk; yields the calls made so far."""
    calls: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(calls) == step:
                raise Stopped
            calls.append(name)
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "fsync", "unlink", "mkdir"):
            patch.setattr(os, name, counted(name, getattr(os, name)))
        patch.setattr("affinequant.run.run.save_file", counted("save", run_module.save_file))
        yield calls


def test_a_stage_comes_back_as_it_was(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", {"seed": 0})
    tensors = {
        "a": torch.arange(6).reshape(2, 3).T,
        "b": torch.tensor(1.5).bfloat16(),
        "c": torch.ones(2, dtype=torch.int8),
    }
    run.commit("one", tensors=tensors, carry=ONE, report={"loss": 0.5, "events": ["x"]})
    again = Run.open(tmp_path / "run", {"seed": 0})
    for name, tensor in again.tensors("one").items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype
    assert set(again.tensors("one")) == set(tensors)
    assert again.report("one") == {"loss": 0.5, "events": ["x"]}
    assert torch.equal(again.carry("one")["x"], ONE["x"])


def test_what_is_pending_stays_in_order(tmp_path: Path) -> None:
    run = Run.open(tmp_path, {})
    assert run.pending(["b", "a", "c"]) == ["b", "a", "c"]
    run.commit("a")
    assert run.pending(["b", "a", "c"]) == ["b", "c"] and run.committed("a") and not run.committed("b")
    assert run.report("a") == {}


def test_only_the_newest_carry_is_kept(tmp_path: Path) -> None:
    run = Run.open(tmp_path, {})
    run.commit("one", tensors=ONE, carry=ONE)
    run.commit("two", tensors=TWO, carry=TWO)
    assert [path.parent.name for path in run.stages.glob("*/carry.safetensors")] == ["two"]
    assert torch.equal(run.carry("two")["x"], TWO["x"])
    assert torch.equal(run.tensors("one")["x"], ONE["x"])


def test_what_was_half_written_is_cleared_away(tmp_path: Path) -> None:
    run = Run.open(tmp_path, {})
    (run.stages / "one.tmp").mkdir()
    (run.stages / "one.tmp" / "tensors.safetensors").write_bytes(b"half")
    assert not Run.open(tmp_path, {}).committed("one")
    assert list(run.stages.iterdir()) == []


def test_stopped_anywhere_in_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, finished = 0, False
    while not finished:
        folder = tmp_path / str(step)
        run = Run.open(folder, {"seed": 0})
        run.commit("one", tensors=ONE, carry=ONE, report={"n": 1})
        with stopped_at(monkeypatch, step) as calls:
            try:
                run.commit("two", tensors=TWO, carry=TWO, report={"n": 2})
                finished = True
            except Stopped:
                pass
        run = Run.open(folder, {"seed": 0})
        if not run.committed("two"):
            assert torch.equal(run.carry("one")["x"], ONE["x"]), f"stopped before step {step} of {calls}: no way on"
            run.commit("two", tensors=TWO, carry=TWO, report={"n": 2})
        assert torch.equal(run.carry("two")["x"], TWO["x"]) and torch.equal(run.tensors("two")["x"], TWO["x"])
        assert run.report("two") == {"n": 2} and run.report("one") == {"n": 1}
        run.commit("three")
        assert sorted(path.name for path in run.stages.iterdir()) == ["one", "three", "two"]
        step += 1
    assert step > 8 and {"save", "fsync", "rename", "unlink"} <= set(calls)


def test_stopped_anywhere_while_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(20):
        folder = tmp_path / str(step)
        with stopped_at(monkeypatch, step):
            try:
                Run.open(folder, {"seed": 0})
                break
            except Stopped:
                pass
        Run.open(folder, {"seed": 0}).commit("one", tensors=ONE)
        with pytest.raises(AffineQuantError):
            Run.open(folder, {"seed": 1})
    assert 3 < step < 19


@pytest.mark.parametrize(
    ("now", "shown"),
    [
        ({"seed": 1, "scheme": "w4a4", "lr": 0.1}, "seed: 0 there, 1 now"),
        ({"seed": 0, "scheme": "w4a4"}, "lr: 0.1 there, None now"),
        ({"seed": 0, "scheme": "w4a4", "lr": 0.1, "new": [1]}, "new: None there, [1] now"),
    ],
)
def test_another_recipe_is_refused_by_the_field_that_differs(tmp_path: Path, now: dict[str, Any], shown: str) -> None:
    known = {"seed": 0, "scheme": "w4a4", "lr": 0.1}
    Run.open(tmp_path / ".run", known).commit("one", tensors=ONE)
    with pytest.raises(AffineQuantError) as caught:
        Run.open(tmp_path / ".run", now)
    assert shown in caught.value.what and "scheme" not in caught.value.what
    assert caught.value.exit_code == 2 and "--overwrite" in caught.value.fix
    assert Run.open(tmp_path / ".run", known).committed("one")


def test_a_part_of_a_fingerprint_can_be_compared(tmp_path: Path) -> None:
    run = Run.open(tmp_path, {"seed": 0, "calibration": "abc"})
    run.check_same({"seed": 0}, all_fields=False)
    with pytest.raises(AffineQuantError, match="seed"):
        run.check_same({"seed": 1}, all_fields=False)


def test_tuples_and_lists_are_one_in_a_fingerprint(tmp_path: Path) -> None:
    Run.open(tmp_path, {"shape": (1, 2)})
    Run.open(tmp_path, {"shape": [1, 2]})


def test_stages_without_a_fingerprint_are_nobodys(tmp_path: Path) -> None:
    Run.open(tmp_path, {"seed": 0}).commit("one", tensors=ONE, carry=ONE)
    (tmp_path / "fingerprint.json").unlink()
    run = Run.open(tmp_path, {"seed": 1})
    assert not run.committed("one") and list(run.stages.iterdir()) == []


def test_existence(tmp_path: Path) -> None:
    assert not Run.exists(tmp_path / "run")
    Run.open(tmp_path / "run", {})
    assert Run.exists(tmp_path / "run")


def test_reports_outlive_the_tensors(tmp_path: Path) -> None:
    run = Run.open(tmp_path, {})
    run.commit("one", tensors=ONE, carry=ONE, report={"n": 1})
    run.drop_tensors()
    assert run.report("one") == {"n": 1} and run.committed("one")
    assert not list(run.stages.rglob("*.safetensors"))


def test_dropped_tensors_are_known(tmp_path: Path) -> None:
    run = Run.open(tmp_path, {})
    for name in ("outer", "block.0000"):
        run.commit(name, tensors=ONE)
    assert not run.dropped()
    run.drop_tensors()
    assert run.dropped()


def test_of_a_table_the_entries_that_differ_are_named(tmp_path: Path) -> None:
    run = Run.open(tmp_path, {"files": {"a.json": "1", "b.json": "2"}, "seed": 0})
    with pytest.raises(AffineQuantError) as caught:
        run.check_same({"files": {"a.json": "1", "c.json": "3"}, "seed": 0})
    assert "files.b.json: '2' there, None now; files.c.json: None there, '3' now" in caught.value.what
    assert "a.json" not in caught.value.what


def test_how_far_a_stage_is_can_be_kept_until_it_is_committed(tmp_path: Path) -> None:
    run = Run.open(tmp_path, {})
    assert run.kept("one") is None
    for step in (1, 2):
        run.keep("one", {"w": ONE["x"] * step, "series": {"loss": [0.5, float("inf")]}, "step": step})
    (run.stages / "one.part.tmp").write_bytes(b"half")
    run = Run.open(tmp_path, {})
    found = run.kept("one")
    assert found is not None and torch.equal(found.pop("w"), TWO["x"])
    assert found == {"series": {"loss": [0.5, float("inf")]}, "step": 2} and not list(run.stages.glob("*.tmp"))
    assert not run.committed("one") and run.kept("two") is None
    run.commit("one", tensors=ONE)
    assert run.kept("one") is None and [path.name for path in run.stages.iterdir()] == ["one"]
    run.keep("two", {})
    run.drop_tensors()
    assert run.kept("two") is None and not run.dropped()

"""Durable progress: whole stages or none, one carry, and fingerprints that name what differs."""

import json
from pathlib import Path

import pytest
import torch

from affinequant import AffineQuantError, Run


def test_a_stage_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", {"seed": 0})
    assert run.pending(["a", "b"]) == ["a", "b"]
    (run.stages / "a.tmp").mkdir()  # what a killed process leaves
    run = Run.open(tmp_path / "run", {"seed": 0})
    assert not (run.stages / "a.tmp").exists() and not run.committed("a")
    run.commit("a", tensors={"x": torch.arange(3)}, carry={"h": torch.ones(2)}, report={"loss": 0.5})
    assert run.pending(["a", "b"]) == ["b"]
    assert torch.equal(run.tensors("a")["x"], torch.arange(3)) and run.report("a") == {"loss": 0.5}


def test_only_the_newest_carry_is_kept(tmp_path: Path) -> None:
    run = Run.open(tmp_path, {})
    for name in ("a", "b"):
        run.commit(name, carry={"h": torch.full((2,), ord(name))})
    assert torch.equal(run.carry("b")["h"], torch.full((2,), ord("b")))
    assert len(list(tmp_path.rglob("carry.safetensors"))) == 1


def test_a_failed_commit_leaves_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.open(tmp_path, {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("affinequant.run.save_file", full)
    with pytest.raises(OSError, match="No space"):
        run.commit("a", tensors={"x": torch.ones(1)})
    assert not Run.open(tmp_path, {}).committed("a")


def test_another_fingerprint_is_refused_by_the_fields_that_differ(tmp_path: Path) -> None:
    Run.open(tmp_path, {"seed": 0, "samples": 8, "same": [1, {"a": 2}]})
    Run.open(tmp_path, {"same": [1, {"a": 2}], "samples": 8, "seed": 0})
    with pytest.raises(AffineQuantError) as caught:
        Run.open(tmp_path, {"seed": 1, "samples": 8, "same": [1, {"a": 2}]})
    assert "seed: 0 there, 1 now" in caught.value.what and "samples" not in caught.value.what
    Run(tmp_path).check_same({"samples": 8}, all_fields=False)
    assert json.loads((tmp_path / "fingerprint.json").read_text())["seed"] == 0

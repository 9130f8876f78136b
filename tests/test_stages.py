"""Stages: which a recipe asks for, what is part of whose fingerprint, what they cost together, and how they are gone through."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from affinequant import costs
from affinequant.costs import Cost, minutes
from affinequant.models.dims import Dims
from affinequant.recipe.presets import PRESETS
from affinequant.recipe.recipe import resolve
from affinequant.run.run import Run
from affinequant.stages import STAGES, Stage, fingerprint_of, run_stages, stages_of

DIMS = Dims(layers=3, hidden=64, mlp=128, heads=4, kv_heads=2, head_dim=16, vocab=320, tied=True)
BLOCKS = ["block.0000", "block.0001", "block.0002"]


def stages(device: str = "cpu", **fields: Any) -> tuple[Stage, ...]:
    recipe = fields.pop("recipe", None) or resolve({"model": "m", "preset": "fast"} | fields)
    return stages_of(recipe, DIMS, 50_000, device)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, ["outer", *BLOCKS]),
        ({"preset": "default"}, ["outer", *BLOCKS, "distilled"]),
        ({"preset": "spinquant"}, ["rotation", "outer", *BLOCKS]),
        ({"transforms": {"residual": "gram-schmidt"}, "finish": "kl"}, ["rotation", "outer", *BLOCKS, "distilled"]),
    ],
    ids=str,
)
def test_what_a_recipe_asks_for_stands_one_on_the_other(fields: dict[str, Any], names: list[str]) -> None:
    made = stages(**fields)
    assert [stage.name for stage in made] == names
    assert [stage.needs for stage in made] == [(), *((name,) for name in names[:-1])]
    assert [stage.block for stage in made if stage.name in BLOCKS] == [0, 1, 2]
    assert {stage.name: stage.reported for stage in made if stage.reported} == {
        name: told for name, told in (("rotation", "rotation"), ("distilled", "finish")) if name in names
    }


def test_every_kind_has_somebody_who_does_it() -> None:
    for kind in STAGES.values():
        module, _, attribute = kind.does.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize("preset", PRESETS)
def test_their_fingerprints_are_the_recipe_s_together_and_a_table_is_its_stage_s(preset: str) -> None:
    recipe = resolve({"model": "m", "preset": preset})
    made = stages(recipe=recipe)
    assert fingerprint_of(made) == recipe.fingerprint()
    assert sum(len(stage.fingerprint) for stage in made) == len(recipe.fingerprint())
    if made[-1].name == "distilled":
        assert made[-1].fingerprint.keys() == {"finish", "finish_epochs", "finish_lr"}


def test_another_option_of_the_finish_is_the_finish_s_alone() -> None:
    before, after = (stages(preset="default", finish_lr=rate) for rate in (1e-3, 2e-3))
    assert [one.name for one, other in zip(before, after, strict=True) if one.fingerprint != other.fingerprint] == [
        "distilled"
    ]


def test_what_the_finish_keeps_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is kept saves one forward pass an epoch, and takes its memory."""
    fields: dict[str, Any] = {"preset": "default", "finish_epochs": 3, "samples": 8, "seq_len": 64}
    recipe = resolve({"model": "m"} | fields)
    _, each = costs.blocks_kept(recipe, DIMS, 50_000, "cpu")
    found: list[Cost] = []
    for kept in (0, 1, 3):
        monkeypatch.setattr(costs, "FINISH_ROOM", kept * each)
        found.append(stages(**fields)[-1].cost)
    none, one, three = found
    forward = 2 * 8 * 64 * (50_000 + 64 * DIMS.query)
    assert none.flops - one.flops == pytest.approx(3 * forward)
    assert none.flops - three.flops == pytest.approx(3 * 3 * forward)
    assert (one.cpu - none.cpu, three.cpu - none.cpu) == (each, 3 * each)
    assert stages("cuda", **fields)[-1].cost.flops == none.flops


def test_minutes_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    rate = costs.CPU_FLOPS_PER_CORE
    assert minutes([Cost(flops=120 * rate), Cost(), Cost(flops=240 * rate)], "cpu") == pytest.approx(3.0)
    assert minutes([Cost(flops=60 * costs.GPU_FLOPS)], "cuda") == pytest.approx(1.0)


def note(work: Any, stage: Stage, carry: dict[str, Any]) -> dict[str, Any]:
    """Does a stage: remembers what was handed to it, commits, and hands on."""
    work["seen"].append((stage.name, dict(carry)))
    handed = {"x": torch.full((1,), float(len(work["seen"])))}
    work["run"].commit(stage.name, carry=handed)
    return handed


@pytest.fixture
def chain() -> Callable[..., Stage]:
    def make(name: str, *needs: str) -> Stage:
        return Stage(name=name, does=f"{note.__module__}:note", needs=needs)

    return make


def test_each_gets_what_the_one_before_hands_on_and_what_is_there_is_left(
    tmp_path: Path, chain: Callable[..., Stage]
) -> None:
    run = Run.open(tmp_path, {})
    work: dict[str, Any] = {"run": run, "seen": []}
    made = [chain("a"), chain("b", "a"), chain("c", "b")]
    with pytest.raises(RuntimeError, match="b is due, and a is not there"):
        run_stages(made[1:], run, work)
    run_stages(made[:1], run, work)
    last = run_stages(made, run, work)
    assert [name for name, _ in work["seen"]] == ["a", "b", "c"]
    # The second was done on another day than the first: what that one carries is on disk.
    assert work["seen"][1][1] == {} and work["seen"][2][1] == {"x": torch.tensor([2.0])} and last["x"] == 3.0
    assert run_stages(made, run, work) == {} and len(work["seen"]) == 3


def test_a_device_changes_costs_and_no_fingerprint() -> None:
    here, there = stages("cpu"), stages("cuda")
    assert fingerprint_of(here) == fingerprint_of(there) and here[1].cost.gpu == 0
    assert there[1].cost.gpu > there[1].cost.cpu > 0

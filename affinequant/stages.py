"""What a run consists of: durable steps, each with what it needs, its part of the fingerprint, its cost, and who does it.

Nothing here imports torch: a plan adds the costs up before anything runs. Research methods make stages of their own.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from affinequant.costs import Cost, block_cost, finish_cost, outer_cost, rotation_cost
from affinequant.models import Dims
from affinequant.recipe.recipe import Recipe
from affinequant.recipe.tables import FLAT
from affinequant.transforms import LEARNED_ROTATIONS

if TYPE_CHECKING:
    from affinequant.run.run import Run

ROTATED, OUTER, DISTILLED = "rotation", "outer", "distilled"
"""The stages of the learned rotations, of what lies outside the blocks, and of the end-to-end finish."""
Carry = dict[str, Any]
"""What a stage hands on: the tensors of `Run.carry` while they are in memory; empty where nothing is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One durable step of a run: under its name it is on disk whole or not at all.

    `does`: the `module:attribute` that is called with the run's work, the stage, and what the stage before has handed on;
    it commits, and returns what it hands on. `needs`: the stages that are on disk before it. `fingerprint`: what decides
    its bytes beside what decides theirs. `reported`: its key in report.json, for one that trains the whole network.
    """

    name: str
    does: str
    needs: tuple[str, ...] = ()
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    block: int | None = None
    reported: str = ""

    def run(self, work: Any, carry: Carry) -> Carry:
        """Do it."""
        module, _, attribute = self.does.partition(":")
        return getattr(importlib.import_module(module), attribute)(work, self, carry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How one kind of stage is made for a recipe. `table`: the recipe's table that decides it alone."""

    does: str
    cost: Callable[[Recipe, Dims, int, str], Cost]
    wanted: Callable[[Recipe], bool] = lambda recipe: True
    table: str = ""
    reported: str = ""


_HERE = "affinequant.learning."
STAGES: dict[str, Kind] = {
    ROTATED: Kind(
        does=_HERE + "rotation:rotation_stage",
        cost=rotation_cost,
        wanted=lambda recipe: recipe.transforms.get("residual") in LEARNED_ROTATIONS,
        table="rotation",
        reported="rotation",
    ),
    OUTER: Kind(does=_HERE + "outer:outer_stage", cost=outer_cost),
    "block": Kind(does=_HERE + "block:block_stage", cost=block_cost),
    DISTILLED: Kind(
        does=_HERE + "distill:distill_stage",
        cost=finish_cost,
        wanted=lambda recipe: recipe.distill.loss == "kl",
        table="distill",
        reported="finish",
    ),
}
"""The kinds that the quantiser has, in the order in which they are done; a `block` is done for each block."""


def stage_name(index: int) -> str:
    """The stage that holds block `index`."""
    return f"block.{index:04d}"


def stages_of(recipe: Recipe, dims: Dims, per_block: int, device: str) -> tuple[Stage, ...]:
    """The stages that a recipe asks for, each on top of the one before. What decides more than one table says belongs to
    the first, on which all others stand.

    Args:
        per_block: weights of a block.
        device: `cpu` or `cuda`.
    """
    rest, made = recipe.fingerprint(), list[Stage]()
    for name, kind in STAGES.items():
        if not kind.wanted(recipe):
            continue
        own = {key: rest.pop(key) for key, (table, _) in FLAT.items() if table == kind.table}
        cost = kind.cost(recipe, dims, per_block, device)
        for index in range(dims.layers) if name == "block" else (None,):
            made.append(
                Stage(
                    name=name if index is None else stage_name(index),
                    does=kind.does,
                    needs=tuple(stage.name for stage in made[-1:]),
                    fingerprint=own,
                    cost=cost,
                    block=index,
                    reported=kind.reported,
                )
            )
    first = replace(made[0], fingerprint={**rest, **made[0].fingerprint})
    return (first, *made[1:])


def fingerprint_of(stages: Iterable[Stage]) -> dict[str, Any]:
    """What decides the bytes of all of them."""
    return {name: value for stage in stages for name, value in stage.fingerprint.items()}


def run_stages(stages: Iterable[Stage], run: "Run", work: Any, carry: Carry | None = None) -> Carry:
    """Do every stage that is not on disk yet, in order, each with what the one before has handed on; returns what the last
    has."""
    carry = carry or {}
    for stage in stages:
        missing = run.pending(stage.needs)
        if missing:
            raise RuntimeError(f"{stage.name} is due, and {', '.join(missing)} is not there")
        carry = {} if run.committed(stage.name) else stage.run(work, carry)
    return carry

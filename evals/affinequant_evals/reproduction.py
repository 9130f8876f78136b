"""What was measured beside what others published of the same model: reached, missed, or not to be compared, and why."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from affinequant.errors import AffineQuantError
from affinequant.recipe.recipe import PATTERNS, Recipe, options, resolve
from affinequant.recipe.scheme import Scheme
from affinequant_evals.harness import Scorecard
from affinequant_evals.published import TASKS, Published, published_of
from affinequant_evals.scores import Score

Outcome = Literal["pass", "FAIL", "not run", "not comparable"]
TEXTS = {"wikitext2": "wikitext2", "c4": "c4-old", "c4-new": "c4-new"}
"""Texts that can be scored here -> what published figures call them."""
WINDOW = 2048
FULL_TOLERANCE = 0.01
"""Full precision checks the harness alone: papers print it to 0.1 %, and it differs by 0.6 % between them at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """How a model that is scored came about.

    Attributes:
        model: the name of the model before quantisation.
        scheme, preset: of the checkpoint; both "" for a model that is not quantised.
        changed: options of the method that are not the preset's, as `name value`.
        data: calibration text.
    """

    model: str
    scheme: str = ""
    preset: str = ""
    changed: tuple[str, ...] = ()
    data: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduced:
    """A published figure with ours beside it.

    Attributes:
        ours: measured here, in the unit of the row; None where it was not.
        reason: why there is no verdict, or "".
        differs: what was done otherwise here although there is a verdict.
    """

    row: Published
    ours: float | None
    verdict: Outcome
    reason: str = ""
    differs: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = {"ours": self.ours, "verdict": self.verdict, "reason": self.reason, "differs": list(self.differs)}
        return self.row.to_json() | found


def made_of(folder: Path, name: str) -> Made | None:
    """How the model in a folder was made, by its report.json and recipe.toml.

    Args:
        name: what stands for the model where it is not quantised.

    Returns:
        None of a model that another tool quantised, or whose report cannot be read.
    """
    report = folder / "report.json"
    if not report.exists():
        try:
            config = json.loads((folder / "config.json").read_text())
            return None if "quantization_config" in config else Made(model=name)
        except (OSError, ValueError, TypeError):
            return None
    try:
        read = json.loads(report.read_text())
        made = Made(model=read["model"], scheme=read["scheme"], preset=read["preset"], data=_source(read))
        recipe = Recipe.from_toml(folder / "recipe.toml")
    except (OSError, ValueError, KeyError, TypeError, AffineQuantError):
        return None
    return Made(model=made.model, scheme=made.scheme, preset=made.preset, data=made.data, changed=_changed(recipe))


def reproduction(card: Scorecard, made: Made | None, *, whole: bool) -> list[Reproduced]:
    """Every published row of the model, with ours beside it; empty where nothing is published of it.

    A verdict is given only where the same was measured: text, all windows of 2048 tokens side by side, BOS as in the papers,
    widths of weights and activations, and a preset of the same method without changes, or full precision, which may
    miss its figure on neither side. What differs nonetheless (KV cache, queries, symmetry, calibration text) is told.

    Args:
        card: of the checkpoint, its baseline's inside; or of the model itself.
        made: how what `card` is of was made.
        whole: all windows were scored.
    """
    if made is None:
        return []
    full = card.baseline if made.scheme else card
    mine = card if made.scheme else None
    return [_beside(row, full if row.full else mine, made, whole) for row in published_of(made.model)]


def summary(rows: Sequence[Reproduced]) -> str:
    """`2 pass, 1 FAIL, 30 not comparable, 4 not run`."""
    kinds: tuple[Outcome, ...] = ("pass", "FAIL", "not comparable", "not run")
    counts = {kind: sum(row.verdict == kind for row in rows) for kind in kinds}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def incomparable(row: Published, about: Mapping[str, Any], scheme: str, *, whole: bool) -> str:
    """Why a perplexity cannot be held against a published one on the same text; "" if it can.

    Args:
        about: of the measured score.
        scheme: of the checkpoint; not asked where the row is of full precision.
        whole: the whole text was scored.
    """
    if not row.full and not _same_widths(row.scheme, scheme):
        return f"the figures are for {row.scheme}"
    if about["seq_len"] != WINDOW or about.get("stride") or not whole:
        return f"the figures are for all windows of {WINDOW} tokens"
    if about["bos"] == "each window":
        return "the figures are with --bos first"
    return _unfit(row)


def of_preset(model: str, preset: str, scheme: str) -> list[Published]:
    """What was published of a preset's method on a model: its perplexities in one table, that of the scheme's widths if
    there is one."""
    rows = [row for row in published_of(model) if row.preset == preset and row.measured in TEXTS.values()]
    rows = [row for row in rows if math.isfinite(row.value)]
    alike = [row for row in rows if _same_widths(row.scheme, scheme)] or rows
    return [row for row in alike if row.table == alike[0].table]


def differences(row: Published, made: Made) -> tuple[str, ...]:
    """What a checkpoint of the same widths does otherwise than the published one."""
    if row.full:
        return ()
    theirs, ours = Scheme.parse(row.scheme), Scheme.parse(made.scheme)
    bits = [one.kv.bits if one.kv else 16 for one in (theirs, ours)]
    found = [f"KV cache: {bits[0]} bits there, {bits[1]} here"] if bits[0] != bits[1] else []
    found += [f"queries: {row.queries} bits there, 16 here"] if row.queries != 16 else []
    grids = ["symmetric" if one.weight.symmetric else "asymmetric" for one in (theirs, ours)]
    found += [f"{grids[0]} grids there, {grids[1]} here"] if grids[0] != grids[1] else []
    found += [f"calibrated on {made.data} here"] if made.data and not made.data.startswith("wikitext2") else []
    return tuple(found)


def _beside(row: Published, card: Scorecard | None, made: Made, whole: bool) -> Reproduced:
    score = _measured(row, card) if card else None
    if card is None or score is None:
        return Reproduced(row=row, ours=None, verdict="not run", reason=_not_run(row, card))
    ours = score.value * (100 if row.unit else 1)
    reason = _another_method(row, made)
    if not reason:
        tasks = row.measured == TASKS
        reason = (
            _other_tasks(row, score, card, made) if tasks else incomparable(row, score.about, made.scheme, whole=whole)
        )
    if reason:
        return Reproduced(row=row, ours=ours, verdict="not comparable", reason=reason)
    verdict = "pass" if _reached(row, ours) else "FAIL"
    return Reproduced(row=row, ours=ours, verdict=verdict, differs=differences(row, made))


def _measured(row: Published, card: Scorecard) -> Score | None:
    """The score of what the row measured."""
    for one in card.rows:
        if one.score is None:
            continue
        if one.name.startswith("perplexity@") and TEXTS.get(str(one.score.about.get("text"))) == row.measured:
            return one.score
        if one.name.startswith("mean@") and row.tasks and set(one.score.about.get("tasks", ())) == set(row.tasks):
            return one.score
    return None


def _not_run(row: Published, card: Scorecard | None) -> str:
    if card is None:
        return "there is no baseline" if row.full else "full precision alone was scored"
    if row.measured == TASKS:
        return f"the mean of {', '.join(row.tasks)}" if row.tasks else "which tasks is not known"
    return f"{row.measured} was not scored" if row.measured in TEXTS.values() else f"{row.measured} has no metric here"


def _another_method(row: Published, made: Made) -> str:
    if row.full:
        return ""
    if row.preset != made.preset:
        return f"made by {made.preset}, which is another method"
    return f"made by {made.preset} with {', '.join(made.changed)}" if made.changed else ""


def _other_tasks(row: Published, mean: Score, card: Scorecard, made: Made) -> str:
    """Why a mean of tasks cannot be held against a published one, or ""."""
    if not row.full and not _same_widths(row.scheme, made.scheme):
        return f"the figures are for {row.scheme}"
    scores = [card.score(f"{task},{metric}") for task, metric in mean.about["tasks"].items()]
    abouts = [score.about for score in scores if score]
    if any(about.get("limit") is not None for about in abouts):
        return "the figures are for all documents"
    if any(about.get("num_fewshot") for about in abouts):
        return "the figures are without solved examples"
    if row.lm_eval != "0.4":
        return f"scored by lm-eval {row.lm_eval} there" if row.lm_eval else "how tasks were scored there is not said"
    return _unfit(row)


def _unfit(row: Published) -> str:
    if not math.isfinite(row.value):
        return "it was published as NaN"
    return f"a weak source: {row.weak}" if row.weak else ""


def _reached(row: Published, ours: float) -> bool:
    if row.full:
        return abs(ours - row.value) <= FULL_TOLERANCE * row.value
    if row.unit:
        return ours >= row.value * (1 - row.tolerance)
    return ours <= row.value * (1 + row.tolerance)


def _same_widths(theirs: str, ours: str) -> bool:
    """Whether weights and activations have the same bits and groups."""
    try:
        parsed = [Scheme.parse(text) for text in (theirs, ours)]
    except AffineQuantError:  # widths that we do not have
        return False
    widths = [(one.weight.bits, one.weight.group_size, one.activation and one.activation.bits) for one in parsed]
    return widths[0] == widths[1]


def _changed(recipe: Recipe) -> tuple[str, ...]:
    """Options of a recipe's method, and of how much text it reads, that are not its preset's."""
    names = {name: getattr(recipe, name) for name in ("model", "scheme", "preset", "tier")}
    plain = resolve(names).fingerprint()
    mine = recipe.fingerprint()
    groups = {name: entry.metadata["group"] for name, (entry, _) in options().items()}
    asked = [name for name, group in groups.items() if group == "method" or name in ("samples", "seq_len", *PATTERNS)]
    changed = [name for name in asked if mine.get(name) != plain.get(name)]
    return tuple(name if isinstance(mine[name], dict) else f"{name} {mine[name]}" for name in changed)


def _source(report: Mapping[str, Any]) -> str:
    return str(report.get("calibration", {}).get("source", ""))

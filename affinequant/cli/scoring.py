"""Full precision and the checkpoints of a comparison, scored on the same tokens, one model in memory at a time."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.cli.comparison import Comparison
from affinequant.cli.entry import Entry
from affinequant.cli.output import Screen
from affinequant.errors import AffineQuantError
from affinequant.recipe.recipe import Recipe

if TYPE_CHECKING:
    from affinequant_evals.checkpoint import Ready
    from affinequant_evals.harness import Scorecard
    from affinequant_evals.scores import Score


def score_all(
    recipe: Recipe, entries: Sequence[Entry], ready: "Ready", *, all_windows: bool, screen: Screen
) -> Comparison:
    """Perplexity of full precision and of every checkpoint that was made, and the checkpoints' divergence from it.

    Full precision is read once: what it says of each token waits on disk for the checkpoints, since in memory it would have
    to read each text again beside every one of them. Checkpoints' scores are kept, and not measured again.

    Args:
        recipe: whose model, scheme, device and type of computing all share.
        all_windows: all windows of the text are in `ready`.
    """
    from affinequant_evals.kept import content_of
    from affinequant_evals.reference import Kept, check_disk

    found = Comparison(
        model=recipe.model, scheme=recipe.scheme, entries=list(entries), full=None, all_windows=all_windows
    )
    if not any(entry.report for entry in entries):
        return found
    with tempfile.TemporaryDirectory(prefix="affinequant-") as folder:
        kept: Kept | None = Kept(folder=Path(folder), content=content_of(ready.folder, screen.say))
        try:
            check_disk(kept.folder, kept.bytes_for(ready.compared))
        except AffineQuantError as problem:
            screen.say(f"no KL: {problem.what}")
            kept = None
        card, error = _score(recipe.model, ready.folder, recipe, ready, screen, record=kept)
        full = _found(card, "perplexity@")
        scored = [
            _scored(entry, recipe, ready, screen, kept if full else None) if entry.report else entry
            for entry in entries
        ]
    return replace(found, entries=scored, full=full, error=error, env=card.env if card else {})


def _scored(entry: Entry, recipe: Recipe, ready: "Ready", screen: Screen, reference: Any) -> Entry:
    card, error = _score(entry.name, entry.path, recipe, ready, screen, reference=reference)
    return replace(entry, score=_found(card, "perplexity@"), kl=_found(card, "kl@"), error=error)


def _score(
    name: str, folder: Path, recipe: Recipe, ready: "Ready", screen: Screen, **beside: Any
) -> "tuple[Scorecard | None, Mapping[str, str]]":
    """A model's scores, and why there are none."""
    from affinequant_evals.checkpoint import score_folder

    fix = f"see `affinequant eval {folder} -v`"
    machine: dict[str, Any] = {"device": recipe.device, "dtype": recipe.dtype}
    try:
        card = score_folder(name, folder, ready, keep=True, say=screen.say, **machine, **beside)
    except AffineQuantError as problem:
        return None, {"what": problem.what, "where": problem.where, "fix": problem.fix}
    except Exception as problem:  # one model that breaks must not take the others' scores with it
        return None, {"what": f"{type(problem).__name__}: {problem}", "where": str(folder), "fix": fix}
    if card.failed:
        return card, {"what": card.failed[0].error or "no score", "where": f"scoring {folder}", "fix": fix}
    return card, {}


def _found(card: "Scorecard | None", beginning: str) -> "Score | None":
    """The score whose name begins so."""
    rows = card.rows if card else ()
    return next((row.score for row in rows if row.name.startswith(beginning) and row.score), None)

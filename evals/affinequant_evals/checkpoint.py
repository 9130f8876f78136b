"""A checkpoint next to the model it was made from: the same windows and prompts, token by token where both are read.

Both are in memory where they fit together; else one at a time, and what the baseline says of each token waits on disk.
"""

import functools
import gc
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import affinequant
from affinequant.data.tokenizer import load_tokenizer
from affinequant.data.wheels import Say, quiet
from affinequant.models import check_length
from affinequant.models.source import open_source
from affinequant.recipe.recipe import Device, Dtype
from affinequant.run.run import Run
from affinequant_evals.baseline import NO_BASELINE as NO_BASELINE
from affinequant_evals.baseline import find_baseline, locate_said
from affinequant_evals.gates import Limits
from affinequant_evals.harness import Scorecard, Suite, evaluate, recall, stage_of
from affinequant_evals.kept import content_of, context_of, keep_card, open_scores
from affinequant_evals.memory import fit_together
from affinequant_evals.perplexity import LanguageModel, OnText
from affinequant_evals.reference import Kept, Live, Reference, check_disk
from affinequant_evals.sanity import with_samples
from affinequant_evals.suites import Measurements, build_suite, measurements
from affinequant_evals.windows import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A model's folder, and what any model is scored on next to it: all see the tokens of this one tokenizer. `compared`:
    the texts on which next-token distributions are compared with a baseline's."""

    folder: Path
    tokenizer: Any
    suite: Suite[LanguageModel]
    compared: tuple[Windows, ...] = ()


def eval_checkpoint(
    checkpoint: str | Path,
    *,
    baseline: str | Path | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    keep: bool = False,
    again: bool = False,
    limits: Limits | None = None,
    verbose: bool = False,
    say: Say = quiet,
    **wanted: Any,
) -> Scorecard:
    """Score a checkpoint, then its baseline on the same tokens and prompts; the baseline's scorecard stands inside.

    Args:
        checkpoint: a checkpoint of this package, any model folder, a hub id or `demo`.
        baseline: model to compare with; None for the one that the checkpoint was made from (`find_baseline`), `none` for
            no comparison.
        keep: scores are kept among this user's cached files, and what is kept is not measured once more (`kept`).
        again: measure, whatever is kept; what comes out takes its place.
        limits: what the scorecard is to be judged by (`gates.judge`): refused now where it could not be.
        say: told what is being done; a missing baseline also stands in the scorecard's notes.
        wanted: what to measure, see `suites.measurements`: `suite`, `text`, `tasks`, and the fields of `Measurements`.

    Raises:
        AffineQuantError: anything of the above that is not there or not known (exit 2 or 3), before anything is run.
    """
    ready = prepare(checkpoint, verbose=verbose, say=say, **wanted)
    other, note = find_baseline(ready.folder, baseline, say)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "keep": keep, "again": again, "say": say}
    mine = (str(checkpoint), ready.folder)
    if other and ready.compared:
        note = _vocabularies_differ(ready.folder, other[1])
    if limits:
        texts, compared = bool(measurements(**wanted).texts), bool(ready.compared and not note)
        limits.check(texts=texts, baseline=other is not None, kl=compared, why=note)
    if note:
        say(note)
    if other is None:
        card = score_folder(*mine, ready, **options)
    elif note or not ready.compared:
        card = score_folder(*mine, ready, **options).against(score_folder(*other, ready, **options))
    else:
        card = _score_both(mine, other, ready, **options)
    card = replace(card, notes=(*card.notes, note)) if note else card
    card = with_samples(card)
    if keep:
        keep_card(ready.folder, card)
    return card


def _score_both(mine: tuple[str, Path], other: tuple[str, Path], ready: Ready, **options: Any) -> Scorecard:
    """A checkpoint and its baseline, whose next-token distributions are compared."""
    machine = {name: options[name] for name in ("device", "dtype")}
    content = content_of(other[1], options["say"]) if options["keep"] else {}
    if fit_together((mine[1], other[1]), **machine):
        load = functools.partial(affinequant.load, other[1], **machine, say=options["say"])
        live = Live(load=functools.cache(load), content=content)
        card = score_folder(*mine, ready, reference=live, **options)
        return card.against(score_folder(*other, ready, read=live, **options))
    with tempfile.TemporaryDirectory(prefix="affinequant-") as folder:
        kept = Kept(folder=Path(folder), content=content)
        if options["keep"] and not options["again"] and (card := _recall(*mine, ready, reference=kept, **options)):
            return card.against(score_folder(*other, ready, **options))
        check_disk(kept.folder, kept.bytes_for(ready.compared))
        options["say"](
            "the two models do not fit into memory together: the baseline's logits are kept on disk meanwhile"
        )
        full = score_folder(*other, ready, record=kept, **options)
        return score_folder(*mine, ready, reference=kept, **options).against(full)


def prepare(checkpoint: str | Path, *, verbose: bool = False, say: Say = quiet, **wanted: Any) -> Ready:
    """Find a model, read and cut what it will be scored on; no weight is read. Arguments as in `eval_checkpoint`.

    Raises:
        AffineQuantError: anything that is not there or not known (exit 2 or 3).
    """
    folder = locate_said(str(checkpoint), say)
    measured = measurements(**wanted)
    _check_length(folder, measured)
    tokenizer = load_tokenizer(folder, _vocab(folder))
    built = build_suite(measured, tokenizer, name=wanted.get("suite") or "", verbose=verbose, say=say)
    texts = tuple(metric.windows for metric in built.metrics if isinstance(metric, OnText))
    return Ready(folder=folder, tokenizer=tokenizer, suite=built, compared=texts if measured.kl else ())


def score_folder(
    name: str,
    folder: Path,
    ready: Ready,
    *,
    device: Device = "auto",
    dtype: Dtype = "auto",
    keep: bool = False,
    again: bool = False,
    say: Say = quiet,
    reference: Reference | None = None,
    record: Kept | None = None,
    read: Live | None = None,
) -> Scorecard:
    """Load the model in a folder, score it on what is ready, and let go of it; where all scores are kept nothing is
    loaded. `keep` and `again` as in `eval_checkpoint`.

    Args:
        reference: what its next-token distributions are compared with.
        record: where its own are kept, to be another model's reference.
        read: itself as it was another model's reference: it is in memory, and reads no text twice.
    """
    say(f"scoring {name}")
    suite = _beside(ready.suite, reference)

    def score(run: Run | None) -> Scorecard:
        model = read.load() if read else affinequant.load(folder, device=device, dtype=dtype, say=say)
        beside: dict[str, Any] = {"reference": reference, "record": record, "losses": read.losses if read else {}}
        subject = LanguageModel(model=model, tokenizer=ready.tokenizer, name=name, say=say, **beside)
        card = evaluate(subject, suite, run=run, nameless=False, say=say)
        placed = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
        del model, subject
        gc.collect()
        return replace(card, env={**card.env, **placed})

    if not keep:
        return score(None)
    context = context_of(folder, ready.folder, device=device, dtype=dtype, say=say)
    with open_scores(context, say) as run:
        if run:
            for metric in suite.metrics:
                unread = record and isinstance(metric, OnText) and not record.holds(metric.windows)
                if again or unread:
                    run.forget(stage_of(metric))
            if card := _recalled(name, suite, context, run):
                return card
        return score(run)


def _recall(
    name: str,
    folder: Path,
    ready: Ready,
    *,
    reference: Reference,
    device: Device,
    dtype: Dtype,
    say: Say,
    **_: Any,
) -> Scorecard | None:
    """What `score_folder` would give without loading anything."""
    context = context_of(folder, ready.folder, device=device, dtype=dtype, say=say)
    with open_scores(context, say) as run:
        return _recalled(name, _beside(ready.suite, reference), context, run) if run else None


def _recalled(name: str, suite: Suite[LanguageModel], context: Mapping[str, Any], run: Run) -> Scorecard | None:
    card = recall(name, suite, run)
    return card and replace(card, env={**card.env, "device": context["device"], "dtype": context["dtype"]})


def _beside(suite: Suite[LanguageModel], reference: Reference | None) -> Suite[LanguageModel]:
    """The suite, in which the scores of texts are kept as those beside this reference."""
    if not reference:
        return suite
    known = {"reference": {**reference.about, **reference.content}}
    metrics = (
        replace(one, fingerprint={**one.fingerprint, **known}) if isinstance(one, OnText) else one
        for one in suite.metrics
    )
    return replace(suite, metrics=tuple(metrics))


def _vocabularies_differ(folder: Path, other: Path) -> str:
    """Why two models' next-token distributions cannot be compared, or nothing."""
    mine, theirs = _vocab(folder), _vocab(other)
    return "" if mine == theirs else f"no KL: the baseline has a vocabulary of {theirs}, this model of {mine}"


def _vocab(folder: Path) -> int | None:
    size = open_source(folder, weights=False).config.get("vocab_size")
    return size if isinstance(size, int) else None


def _check_length(folder: Path, wanted: Measurements) -> None:
    if wanted.texts:
        check_length(wanted.seq_len, open_source(folder, weights=False).config)

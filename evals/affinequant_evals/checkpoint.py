"""A checkpoint next to the model it was made from: the same windows and prompts, token by token where both are read.

Both are in memory where they fit together; else one at a time, and what the baseline says of each token waits on disk.
"""

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from affinequant.data.tokenizer import load_tokenizer
from affinequant.data.wheels import Say, quiet
from affinequant.models import check_length, find_family
from affinequant.models.multimodal import text_config
from affinequant.models.source import open_source
from affinequant.recipe.recipe import Device, Dtype
from affinequant.run.run import Run
from affinequant_evals.backends import (
    Backend,
    check_machine,
    check_room,
    find_backend,
    is_address,
    load_model,
    opened,
    reached,
)
from affinequant_evals.baseline import NO_BASELINE as NO_BASELINE
from affinequant_evals.baseline import find_baseline, locate_said
from affinequant_evals.drift import score_drift
from affinequant_evals.drift_texts import Compared, compare_texts
from affinequant_evals.gates import Limits
from affinequant_evals.harness import Scorecard, Suite, evaluate, recall, stage_of
from affinequant_evals.kept import can_keep, content_of, context_of, keep_card, open_scores
from affinequant_evals.memory import fit_together
from affinequant_evals.perplexity import LanguageModel, OnText
from affinequant_evals.reference import Kept, Live, Reference, check_disk
from affinequant_evals.sample_log import SampleLog
from affinequant_evals.sanity import with_samples
from affinequant_evals.suites import Measurements, build_suite, measurements
from affinequant_evals.windows import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A model's folder, and what any model is scored on next to it: all see the tokens of this one tokenizer.

    Attributes:
        compared: the texts on which next-token distributions are compared with a baseline's.
        backend: in what it runs, and its baseline unless that says another.
        seq_len: tokens of the longest window of text; 0 without texts.
    """

    folder: Path
    tokenizer: Any
    suite: Suite[LanguageModel]
    compared: tuple[Windows, ...] = ()
    backend: Backend = field(default_factory=find_backend)
    seq_len: int = 0


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
        baseline: model to compare with, or a server's address; None for the model that the checkpoint was made from
            (`find_baseline`), `none` for no comparison. Beside a checkpoint on a server, whose only model that is, None is
            no comparison, and a model runs as with the backend `auto`.
        keep: scores are kept among this user's cached files, and what is kept is not measured once more (`kept`).
        again: measure, whatever is kept; what comes out takes its place.
        limits: what the scorecard is to be judged by (`gates.judge`): refused now where it could not be.
        say: told what is being done; a missing baseline also stands in the scorecard's notes.
        wanted: what to measure, see `suites.measurements`: `suite`, `text`, `tasks`, and the fields of `Measurements`.

    Raises:
        AffineQuantError: anything of the above that is not there or not known (exit 2 or 3), before anything is run.
    """
    check_machine(find_backend(wanted.get("backend") or "auto"), device, dtype)
    ready = prepare(checkpoint, verbose=verbose, say=say, **wanted)
    other, theirs, note = _other(ready, baseline, say)
    keep = keep and can_keep(say)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "keep": keep, "again": again, "say": say}
    apart = _apart(ready, other, measurements(**wanted), say)
    note = note if ready.suite.metrics else ""  # drift alone needs no model to compare with
    mine = (str(checkpoint), ready.folder)
    if other and ready.compared:
        note = _incomparable(ready, other[1], theirs)
    if limits:
        texts, compared = bool(measurements(**wanted).texts), bool(ready.compared and not note)
        limits.check(texts=texts, baseline=other is not None, kl=compared, why=note)
    if note:
        say(note)
    if not ready.suite.metrics:
        card = Scorecard(subject=mine[0], rows=(), env={}, seconds=0.0)
    elif other is None:
        card = score_folder(*mine, ready, **options)
    elif note or not ready.compared:
        card = score_folder(*mine, ready, **options).against(score_folder(*other, ready, backend=theirs, **options))
    else:
        card = _score_both(mine, other, ready, **options)
    card = replace(card, notes=(*card.notes, note)) if note else card
    card = with_samples(card)
    if apart:
        card = card.beside(score_drift(apart, ready.folder, **options))
    if keep and not ready.backend.url and not card.failed:  # a server's weights are not those of the tokenizer's folder
        keep_card(ready.folder, card)
    return card


def _apart(ready: Ready, other: tuple[str, Path] | None, wanted: Measurements, say: Say) -> Compared | None:
    """What drift is measured of, in the model before quantisation: the baseline where there is one here, else the model
    itself."""
    full = other if other and not is_address(other[0]) else (str(ready.folder), ready.folder)
    texts = {"texts": wanted.drift, "start": wanted.drift_from, "say": say}
    return compare_texts(ready.folder, full, ready.tokenizer, **texts) if wanted.drift else None


def _score_both(mine: tuple[str, Path], other: tuple[str, Path], ready: Ready, **options: Any) -> Scorecard:
    """A checkpoint and its baseline, whose next-token distributions are compared."""
    machine = {name: options[name] for name in ("device", "dtype")}
    content = content_of(other[1], options["say"]) if options["keep"] else {}
    if fit_together((mine[1], other[1]), **machine):
        load = functools.partial(load_model, ready.backend, other[1], **machine, say=options["say"])
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
    if measured.texts:
        check_length(measured.seq_len, open_source(folder, weights=False).config)
    tokenizer = load_tokenizer(folder, _vocab(folder), bos=_needs_bos(folder))
    backend = find_backend(measured.backend)
    seq_len = measured.seq_len if measured.texts else 0
    check_room(backend, seq_len, folder)
    log = SampleLog(folder=Path(measured.log_samples), checkpoint=str(checkpoint)) if measured.log_samples else None
    named = wanted.get("suite") or ""
    built = build_suite(measured, tokenizer, name=named, verbose=verbose, say=say, backend=backend, log=log)
    if log:
        log.check()
    texts = tuple(metric.windows for metric in built.metrics if isinstance(metric, OnText))
    return Ready(
        folder=folder,
        tokenizer=tokenizer,
        suite=built,
        compared=texts if measured.kl else (),
        backend=reached(backend, tokenizer),
        seq_len=seq_len,
    )


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
    backend: Backend | None = None,
) -> Scorecard:
    """Load the model in a folder, score it on what is ready, and let go of it; where all scores are kept nothing is
    loaded. `keep` and `again` as in `eval_checkpoint`.

    Args:
        reference: what its next-token distributions are compared with.
        record: where its own are kept, to be another model's reference.
        read: itself as it was another model's reference: it is in memory, and reads no text twice.
        backend: in what it runs, where that is not what is ready. What a server says is not kept: another may answer next.
    """
    say(f"scoring {name}")
    suite, backend = _beside(ready.suite, reference), backend or ready.backend

    def score(run: Run | None) -> Scorecard:
        beside: dict[str, Any] = {"reference": reference, "record": record, "losses": read.losses if read else {}}
        how: dict[str, Any] = {"device": device, "dtype": dtype, "seq_len": ready.seq_len, "say": say}
        with opened(backend, folder, ready.tokenizer, **how, model=read and read.load()) as (model, placed):
            said = {"tokenizer": ready.tokenizer, "name": name, "say": say, "backend": backend.said}
            card = evaluate(LanguageModel(model=model, **said, **beside), suite, run=run, nameless=False, say=say)
            del model
        return replace(card, env={**card.env, **placed, "backend": backend.said})

    if not keep or backend.url:
        return score(None)
    context = context_of(folder, ready.folder, device=device, dtype=dtype, say=say, backend=backend.said)
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
    context = context_of(folder, ready.folder, device=device, dtype=dtype, say=say, backend=ready.backend.said)
    with open_scores(context, say) as run:
        return _recalled(name, _beside(ready.suite, reference), context, run) if run else None


def _recalled(name: str, suite: Suite[LanguageModel], context: Mapping[str, Any], run: Run) -> Scorecard | None:
    card = recall(name, suite, run)
    return card and replace(card, env={**card.env, **{name: context[name] for name in ("device", "dtype", "backend")}})


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


def _other(ready: Ready, baseline: str | Path | None, say: Say) -> tuple[tuple[str, Path] | None, Backend, str]:
    """Name and folder of the baseline, or None and at the end why there is none; and in what it runs."""
    if baseline is not None and is_address(str(baseline)):
        return (str(baseline), ready.folder), reached(find_backend(str(baseline)), ready.tokenizer), ""
    if not ready.backend.url:
        other, note = find_baseline(ready.folder, baseline, say)
        return other, ready.backend, note
    if baseline is None:
        return None, ready.backend, "no baseline: a server has one model; give --baseline URL|MODEL to compare"
    other, note = find_baseline(ready.folder, baseline, say)
    return other, find_backend(), note


def _incomparable(ready: Ready, other: Path, backend: Backend) -> str:
    """Why two models' next-token distributions cannot be compared, or nothing."""
    for one in (ready.backend, backend):
        if not one.all_logits:
            return f"no KL: it needs the logits of all tokens, which {one.said} does not give"
    mine, theirs = _vocab(ready.folder), _vocab(other)
    return "" if mine == theirs else f"no KL: the baseline has a vocabulary of {theirs}, this model of {mine}"


def _vocab(folder: Path) -> int | None:
    size = text_config(open_source(folder, weights=False).config).get("vocab_size")
    return size if isinstance(size, int) else None


def _needs_bos(folder: Path) -> bool:
    family = find_family(open_source(folder, weights=False).config)
    return family is not None and family.bos

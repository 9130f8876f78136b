"""A checkpoint next to the model it was made from: the same windows and prompts, one model in memory at a time."""

import gc
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import affinequant
from affinequant.data.demo import demo_model
from affinequant.data.offline import offline_setting
from affinequant.data.tokenizer import load_tokenizer
from affinequant.data.wheels import Say, quiet
from affinequant.errors import AffineQuantError
from affinequant.models import check_length
from affinequant.models.source import is_local, locate, open_source
from affinequant.recipe.recipe import Device, Dtype
from affinequant.run.run import Run
from affinequant_evals.harness import Scorecard, Suite, evaluate, recall, stage_of
from affinequant_evals.kept import context_of, keep_card, open_scores
from affinequant_evals.perplexity import LanguageModel
from affinequant_evals.suites import Measurements, build_suite, measurements

NO_BASELINE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A model's folder, and what any model is scored on next to it: all see the tokens of this one tokenizer."""

    folder: Path
    tokenizer: Any
    suite: Suite[LanguageModel]


def eval_checkpoint(
    checkpoint: str | Path,
    *,
    baseline: str | Path | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    keep: bool = False,
    again: bool = False,
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
        say: told what is being done; a missing baseline also stands in the scorecard's notes.
        wanted: what to measure, see `suites.measurements`: `suite`, `text`, `tasks`, and the fields of `Measurements`.

    Raises:
        AffineQuantError: anything of the above that is not there or not known (exit 2 or 3), before anything is run.
    """
    ready = prepare(checkpoint, verbose=verbose, say=say, **wanted)
    other, note = find_baseline(ready.folder, baseline, say)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "keep": keep, "again": again, "say": say}
    card = score_folder(str(checkpoint), ready.folder, ready, **options)
    if other is None:
        say(note)
        card = replace(card, notes=(*card.notes, note))
    else:
        name, place = other
        card = card.against(score_folder(name, place, ready, **options))
    if keep:
        keep_card(ready.folder, card)
    return card


def prepare(checkpoint: str | Path, *, verbose: bool = False, say: Say = quiet, **wanted: Any) -> Ready:
    """Find a model, read and cut what it will be scored on; no weight is read. Arguments as in `eval_checkpoint`.

    Raises:
        AffineQuantError: anything that is not there or not known (exit 2 or 3).
    """
    folder = _locate(str(checkpoint), say)
    measured = measurements(**wanted)
    _check_length(folder, measured)
    tokenizer = load_tokenizer(folder, _vocab(folder))
    built = build_suite(measured, tokenizer, name=wanted.get("suite") or "", verbose=verbose, say=say)
    return Ready(folder=folder, tokenizer=tokenizer, suite=built)


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
) -> Scorecard:
    """Load the model in a folder, score it on what is ready, and let go of it; where all scores are kept nothing is
    loaded. `keep` and `again` as in `eval_checkpoint`."""
    say(f"scoring {name}")
    if not keep:
        return _scored(name, folder, ready, device, dtype, None, say)
    context = context_of(folder, ready.folder, device=device, dtype=dtype, say=say)
    with open_scores(context, say) as run:
        if run and again:
            for metric in ready.suite.metrics:
                run.forget(stage_of(metric))
        if run and (card := recall(name, ready.suite, run)):
            return replace(card, env={**card.env, "device": context["device"], "dtype": context["dtype"]})
        return _scored(name, folder, ready, device, dtype, run, say)


def _scored(
    name: str, folder: Path, ready: Ready, device: Device, dtype: Dtype, run: Run | None, say: Say
) -> Scorecard:
    model = affinequant.load(folder, device=device, dtype=dtype, say=say)
    subject = LanguageModel(model=model, tokenizer=ready.tokenizer, name=name, say=say)
    card = evaluate(subject, ready.suite, run=run, nameless=False, say=say)
    placed = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    del model, subject
    gc.collect()
    return replace(card, env={**card.env, **placed})


def _locate(model: str, say: Say) -> Path:
    """As `locate`, but a demo that has to be fetched first is said, and a folder that holds no model is refused now and
    not after another model has been scored."""
    folder = demo_model(say) if model == "demo" else locate(model)
    open_source(folder)
    return folder


def find_baseline(folder: Path, baseline: str | Path | None, say: Say) -> tuple[tuple[str, Path] | None, str]:
    """Name and folder of the baseline, or None and why there is none. One that was named must exist.

    Whoever wrote the folder chose the name in its report: what would be fetched for it is said first, and with offline
    settings nothing is fetched.
    """
    if baseline is not None:
        if str(baseline) == NO_BASELINE:
            return None, "no baseline: --baseline none"
        return (str(baseline), _locate(str(baseline), say)), ""
    report = folder / "report.json"
    try:
        model = json.loads(report.read_text()).get("model")
    except (OSError, ValueError, AttributeError):
        model = None
    if not isinstance(model, str):
        return None, f"no baseline: {report} names no model; give --baseline MODEL to compare"
    try:
        if not is_local(model) and not _in_cache(model):
            _announce(model, report, say)
        place = _locate(model, say)
        _check_same_shape(folder, place, model)
        return (model, place), ""
    except AffineQuantError as problem:
        return None, f"no baseline: {problem.what}; give --baseline MODEL to compare"


def _in_cache(model: str) -> bool:
    """Whether a model of the hub needs no fetching: all that its index, or the lack of one, asks for is here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        open_source(Path(snapshot_download(model, local_files_only=True)))
    except (AffineQuantError, HFValidationError, LocalEntryNotFoundError):
        return False
    return True


def _announce(model: str, report: Path, say: Say) -> None:
    """Say what will be fetched, and why.

    Raises:
        AffineQuantError: it is no name of the hub's, or nothing may be fetched.
    """
    parts = model.split("/")
    if len(parts) != 2 or not all(parts) or model.startswith((".", "~", "/")):
        raise AffineQuantError(f"{report} names {model}, which is not here", str(report), "give --baseline MODEL")
    if setting := offline_setting():
        raise AffineQuantError(
            f"{report} names {model}, which is neither a folder here nor in the cache, and {setting} is set",
            str(report),
            "give --baseline MODEL",
        )
    say(
        f"the baseline {model} is fetched from the hub{_hub_size(model)}, because {report} names it as the model that this "
        "checkpoint was made from (--baseline MODEL compares with another, --baseline none with none)"
    )


def _hub_size(model: str) -> str:
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(model, files_metadata=True, timeout=5).siblings or []
    except Exception:  # whatever it is, fetching says it
        return ""
    size = sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))
    return f" ({size / 1e9:.1f} GB of weights)" if size else ""


def _check_same_shape(folder: Path, other: Path, name: str) -> None:
    """A relative path names another model in another place.

    Raises:
        AffineQuantError: the two cannot be one model before and after.
    """
    mine, theirs = (open_source(place, weights=False).config for place in (folder, other))
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    differ = [f"{key} {theirs.get(key)} for {mine.get(key)}" for key in keys if mine.get(key) != theirs.get(key)]
    if differ:
        raise AffineQuantError(
            f"{name} here is not the model that this checkpoint was made from ({', '.join(differ)})",
            str(other),
            "give --baseline MODEL",
        )


def _vocab(folder: Path) -> int | None:
    size = open_source(folder, weights=False).config.get("vocab_size")
    return size if isinstance(size, int) else None


def _check_length(folder: Path, wanted: Measurements) -> None:
    if wanted.texts:
        check_length(wanted.seq_len, open_source(folder, weights=False).config)

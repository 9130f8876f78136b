"""A checkpoint next to the model it was made from: the same windows and prompts, one model in memory at a time."""

import gc
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import affinequant
from affinequant.checkpoint import locate
from affinequant.demo import demo_model
from affinequant.errors import AffineQuantError
from affinequant.recipe import Device, Dtype
from affinequant.wheels import Say, quiet
from affinequant_evals.harness import Scorecard, Suite, evaluate
from affinequant_evals.perplexity import Bos, LanguageModel
from affinequant_evals.suites import Measurements, build_suite, measurements

NO_BASELINE = "none"


def eval_checkpoint(
    checkpoint: str | Path,
    *,
    text: str | None = None,
    tasks: Sequence[str] = (),
    suite: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    seq_len: int | None = None,
    windows: int | None = None,
    bos: Bos | None = None,
    baseline: str | Path | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    verbose: bool = False,
    say: Say = quiet,
) -> Scorecard:
    """Score a checkpoint, then its baseline on the same tokens and prompts; the baseline's scorecard stands inside.

    Args:
        checkpoint: a checkpoint of this package, any model folder, a hub id or `demo`.
        text: `demo`, `wikitext2` or a file for perplexity; with `suite`, instead of the suite's texts.
        tasks: lm-eval task names; with `suite`, instead of the suite's tasks. Without text, tasks and suite: `quick`.
        limit: documents of each task; None for the suite's number, or all.
        baseline: model to compare with; None for the one that the checkpoint was made from, `none` for no comparison.
        say: told what is being done; a missing baseline also stands in the scorecard's notes.

    Raises:
        AffineQuantError: anything of the above that is not there or not known (exit 2 or 3), before anything is run.
    """
    folder = _locate(str(checkpoint), say)
    wanted = measurements(
        suite=suite,
        text=text,
        tasks=tasks,
        limit=limit,
        num_fewshot=num_fewshot,
        seq_len=seq_len,
        windows=windows,
        bos=bos,
    )
    _check_length(folder, wanted)
    other, note = _find_baseline(folder, baseline, say)
    tokenizer = _tokenizer(folder)
    built = build_suite(wanted, tokenizer, name=suite or "", verbose=verbose, say=say)
    card = _score(str(checkpoint), folder, tokenizer, built, device, dtype, say)
    if other is None:
        say(note)
        return replace(card, notes=(*card.notes, note))
    name, place = other
    # The checkpoint's tokenizer also serves the baseline: both models must see the same tokens.
    return card.against(_score(name, place, tokenizer, built, device, dtype, say))


def _score(
    name: str, folder: Path, tokenizer: Any, suite: Suite[LanguageModel], device: Device, dtype: Dtype, say: Say
) -> Scorecard:
    say(f"scoring {name}")
    model = affinequant.load(folder, device=device, dtype=dtype)
    card = evaluate(LanguageModel(model=model, tokenizer=tokenizer, name=name), suite, say=say)
    placed = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    del model
    gc.collect()
    return replace(card, env={**card.env, **placed})


def _locate(model: str, say: Say) -> Path:
    """As `locate`, but a demo that has to be fetched first is said."""
    return demo_model(say) if model == "demo" else locate(model)


def _find_baseline(folder: Path, baseline: str | Path | None, say: Say) -> tuple[tuple[str, Path] | None, str]:
    """Name and folder of the baseline, or None and why there is none. One that was named must exist."""
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
        return (model, _locate(model, say)), ""
    except AffineQuantError as problem:
        return None, f"no baseline: {problem.what}; give --baseline MODEL to compare"


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        fix = "copy tokenizer.json and tokenizer_config.json of the model there"
        raise AffineQuantError(f"no tokenizer that loads: {reason}", str(folder), fix) from problem


def _check_length(folder: Path, wanted: Measurements) -> None:
    try:
        longest = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    except (OSError, ValueError):
        return  # `load` says what is wrong with this folder.
    if wanted.texts and isinstance(longest, int) and wanted.seq_len > longest:
        raise AffineQuantError(
            f"windows of {wanted.seq_len} tokens are longer than the model's context of {longest}",
            "--seq-len",
            f"use --seq-len {longest} or less",
        )

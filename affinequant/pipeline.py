"""The story: a recipe in, a verified checkpoint out, one block at a time."""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from affinequant.data.text import check_source
from affinequant.data.tokenizer import load_tokenizer
from affinequant.data.tokens import Tokens, calibration_tokens
from affinequant.deliver import Result, deliver, phases, publish, spent
from affinequant.errors import AffineQuantError
from affinequant.learning.allocation import allocated
from affinequant.learning.network import Laps, peak_bytes
from affinequant.learning.sensitivity import looked_at
from affinequant.learning.work import Work
from affinequant.models.decoder import Decoder, open_decoder
from affinequant.models.device import check_device, compute_dtype
from affinequant.models.source import read_through
from affinequant.models.source_files import revision
from affinequant.plan import Plan, with_weights
from affinequant.plan import plan as make_plan
from affinequant.progress import Console, Progress, Silent, tally_lines
from affinequant.recipe.budget import undecided
from affinequant.recipe.recipe import Recipe
from affinequant.recipe.recipe import resolve as resolve_recipe
from affinequant.recipe.tables import flat
from affinequant.run.run import Run
from affinequant.run.workspace import RUN_FOLDER, Workspace, check_disk, empty, expect, open_workspace
from affinequant.runtime.integer_linear import check_engine
from affinequant.stages import fingerprint_of, run_stages
from affinequant.version import __version__


def quantize(
    model: Recipe | str | Path,
    *,
    progress: bool | Progress = False,
    overwrite: bool = False,
    resume: bool = False,
    **fields: Any,
) -> Result:
    """Quantise a model and write a checkpoint; a run of the same recipe that was interrupted is taken up.

    Args:
        model: a Recipe, or MODEL with the recipe's other fields as keywords (`scheme="w4a4"`, `out="folder"`, ...).
        progress: True prints to stderr; anything with the methods of `Progress` listens itself.
        overwrite: remove an earlier run or export from the output folder first.
        resume: insist on a run to take up.

    Raises:
        AffineQuantError: with what happened, where and what to do; before any long work wherever that is possible.
    """
    listen: Progress = Console() if progress is True else (progress or Silent())
    if isinstance(model, Recipe) and fields:
        model = replace(model, **flat(fields))
    recipe = model if isinstance(model, Recipe) else resolve_recipe({"model": model} | fields)
    began = time.perf_counter()
    if recipe.model == "demo":
        from affinequant.data.demo import demo_model

        demo_model(listen.say)
    made = make_plan(recipe)
    check_device(made.device)
    laps = Laps(torch.device(made.device), began)
    check_engine()
    if undecided(made.recipe, made.schemes):
        made = make_plan(decided(made, listen, anew=overwrite))
        laps("allocating bits")
    with open_workspace(
        recipe.output_folder(), made.source.folder, overwrite=overwrite, resume=resume, keep=recipe.data
    ) as workspace:
        work, content = _open(made, workspace, listen, overwrite=overwrite)
        if workspace.finished:
            listen.say(f"{workspace.out} is finished already")
            return Result(path=workspace.out, report=json.loads((workspace.out / "report.json").read_text()))
        before = spent(work.run)
        laps("reading")
        make_stages(work)
        laps("stages")
        report = deliver(work, workspace.out, laps)
        laps("writing")
        report |= {
            "seconds": before[0] + laps.last - began,
            "peak_bytes": max(before[1], peak_bytes(work.decoder.device)),
            "phases": phases(work.made, work.run, laps.phases, before[0]),
            "source": {"commit": revision(work.made.source.folder), "weights": content["weights"]},
        }
        publish(workspace, work.run, report)
        return Result(path=workspace.out, report=report)


def _open(made: Plan, workspace: Workspace, listen: Progress, *, overwrite: bool) -> tuple[Work, Mapping[str, Any]]:
    """Everything that is read before the first stage, and the run that it fits, new or taken up: what the stages are called
    with, and the hashes of weights and files."""
    if not workspace.finished:
        check_disk(workspace.out, made.disk_bytes)
        check_source(made.recipe.data)
    known, made = made.notes, with_weights(made)
    for note in made.notes:
        if note not in known:
            listen.say(f"note: {note}")
    decoder, tokens = decoder_of(made), tokens_of(made, listen)
    content = read_through(made.source, listen.say) | {"files": made.side.content()}
    fingerprint = _fingerprint(made, tokens, content)
    if overwrite:
        empty(workspace)
    run = Run.open(workspace.run_folder, fingerprint)
    if workspace.finished:
        run.drop_tensors()  # a kill may have come between the report and this
    elif run.dropped():
        raise AffineQuantError(
            "this run was finished and has dropped its tensors, but its report.json is gone",
            str(workspace.out),
            "put report.json back; the checkpoint beside it can still be loaded. --overwrite makes it anew",
        )
    else:
        expect(workspace, made.side.targets)
    return Work(made=made, run=run, tokens=tokens, decoder=decoder, listen=listen), content


def decided(made: Plan, listen: Progress, *, anew: bool = False) -> Recipe:
    """The plan's recipe with the schemes of all linears, of which a budget decides some: those of the run that the output
    folder holds, where it is one for this budget, or by what is measured now. `anew`: whatever it holds."""
    folder = made.recipe.output_folder() / RUN_FOLDER
    there = {} if anew or not Run.exists(folder) else Run(folder).fingerprint()
    if there.get("avg_bits") == made.recipe.avg_bits and made.recipe.set.items() <= there.get("set", {}).items():
        return replace(made.recipe, set=there["set"])
    listen.say("measuring what rounding each group of linears costs")
    few = looked_at(with_weights(made))
    recipe, choices = allocated(few, decoder_of(few), tokens_of(few, listen), listen.say)
    listen.say(f"{len(choices)} groups of linears have their schemes, {made.recipe.avg_bits:g} bits on average at most")
    return replace(made.recipe, set=recipe.set)


def make_stages(work: Work) -> None:
    """Every stage that is not on disk yet, in order; listeners hear of the blocks among them."""
    run, stages, listen = work.run, work.made.stages, work.listen
    blocks = [stage for stage in stages if stage.block is not None]
    first = stages.index(blocks[0])
    carry = run_stages(stages[:first], run, work)
    names = [stage.name for stage in blocks]
    listen.begin(len(names), len(names) - len(run.pending(names)))
    carry = run_stages(blocks, run, work, carry)
    listen.end()
    for line in tally_lines([run.report(name) for name in names]):
        listen.say(line)
    run_stages(stages[first + len(blocks) :], run, work, carry)


def decoder_of(made: Plan) -> Decoder:
    """The model's own code, empty, where and in what the recipe computes.

    Raises:
        AffineQuantError: transformers cannot make it (see `open_decoder`).
    """
    device = torch.device(made.device)
    dtype = compute_dtype(made.recipe.dtype, device)
    return open_decoder(
        made.source, made.family, made.dims, device, dtype, trust_remote_code=made.recipe.trust_remote_code
    )


def tokens_of(made: Plan, listen: Progress) -> Tokens:
    """The calibration samples that the recipe asks for.

    Raises:
        AffineQuantError: no tokenizer, no such text, or too little of it.
    """
    recipe = made.recipe
    tokenizer = load_tokenizer(
        made.source.folder, made.dims.vocab, bos=made.family.bos, trust_remote_code=recipe.trust_remote_code
    )
    return calibration_tokens(
        recipe.data, tokenizer, samples=recipe.samples, seq_len=recipe.seq_len, seed=recipe.seed, say=listen.say
    )


def _fingerprint(made: Plan, tokens: Tokens, content: Mapping[str, Any]) -> dict[str, Any]:
    """What a run must share with the one that it takes up, or whose result it takes for its own: its stages', the content
    of weights, config and text, and the versions. The device is not in it: another may finish what one began."""
    import transformers

    versions = {
        "affinequant": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return fingerprint_of(made.stages) | dict(content) | {"calibration": tokens.sha256, "versions": versions}

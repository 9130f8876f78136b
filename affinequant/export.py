"""Another format out of a finished folder: the same integers written again, read back and compared."""

import gc
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from affinequant.data.tokenizer import load_tokenizer
from affinequant.deliver import Result
from affinequant.errors import PREFLIGHT, QUALITY, AffineQuantError
from affinequant.formats import FORMATS, Format, find_format, held_elsewhere, network_of, unheld
from affinequant.formats.dense import dense_stage
from affinequant.formats.reading import Dtype, from_tensors
from affinequant.formats.reread import Finished, read_finished
from affinequant.formats.shards import write_json
from affinequant.formats.under import full_range, under_scheme
from affinequant.progress import Steps, told_by_transformers
from affinequant.run.run import Run
from affinequant.run.workspace import RUN_FOLDER, check_output, clear
from affinequant.serve.transformers_quantizer import stock
from affinequant.transforms.fold import Tensors
from affinequant.transforms.online import apply_online, parts_of
from affinequant.version import __version__

PROBE = (
    "Early in the morning the harbour is quiet. A few boats come back with the tide, and their crews unload the catch "
    "before the market opens. By eight o'clock buyers from the town have arrived; they look at the fish, talk about "
    "the weather, and agree on a price. In 1987 there were forty boats here, and today there are eleven. Those who "
    "are left say that the work has changed less than the sea: water that is two degrees warmer brings other fish, and "
    "the old charts no longer show where to find them. So they measure, write down what they see, and compare it with "
    "last year. A good record, one of them explained, is worth more than a good guess."
)
"""Text on which a written folder is held against its source."""
PROBE_TOKENS = 256
SAMPLE, SAMPLE_TOKENS = 12, 12
"""Tokens of the probe that a greedy sample starts from, and how many it adds."""
ACTIVATIONS_TOLERANCE = 0.05
"""Nats per token that 8-bit activations may add, where what reads the folder quantises them."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    source: Path
    name: str
    form: Format
    there: Finished
    found: Finished
    out: Path


def export(
    checkpoint: str | Path,
    *,
    format: str,
    scheme: str | None = None,
    out: str | Path = "",
    overwrite: bool = False,
    dtype: Dtype = "float32",
    say: Say = lambda text: None,
) -> Result:
    """Write a finished folder's integers in another format, read them back, and compare; nothing is trained.

    Args:
        checkpoint: an output folder of `quantize`, or an export that keeps integers of ours.
        format: a name that `affinequant list formats` shows.
        scheme: which activations to declare (`w4a16`, `w8a8`, `w4a8`); weights keep their groups and symmetry.
        out: a new or empty folder; by default beside the working directory's, named after source and format.
        overwrite: remove an earlier run or export from `out` first.
        dtype: in which source and export are held and compared, on the CPU.
        say: receives lines of progress.

    Raises:
        AffineQuantError: exit 2 or 3 for what cannot be exported, with the reason, before anything is written;
            exit 4 where what is read back is not what the source means, and the folder is kept.
    """
    job = _prepare(
        Path(os.path.expanduser(checkpoint)), format, scheme, Path(os.path.expanduser(out)) if out else None, overwrite
    )
    say(f"writing {job.out}")
    files = _write(job, say)
    if (recipe := job.source / "recipe.toml").is_file():
        files.append(Path(shutil.copyfile(recipe, job.out / "recipe.toml")))
    say("verifying what was written by loading it again")
    verified = _verify(job, dtype, say)
    report = _report(job, files, verified)
    if not verified["passed"]:
        write_json(job.out / "report.failed.json", report)
        raise AffineQuantError(
            f"what was written diverges from {job.source} by {verified['divergence']:.3g} nats per token, "
            f"more than {verified['tolerance']:.3g}",
            str(job.out),
            f"{_remedy(job.form)}; the folder is kept for inspection, see report.failed.json; do not serve it",
            exit_code=QUALITY,
        )
    write_json(job.out / "report.json", report)
    return Result(path=job.out, report=report)


def _prepare(source: Path, name: str, scheme: str | None, out: Path | None, overwrite: bool) -> _Job:
    """Everything that can be refused."""
    there = read_finished(source)
    name = "compressed-tensors" if name == "auto" else name
    form = find_format(name)
    found = under_scheme(there, scheme, weight_only=form.WEIGHT_ONLY)
    contents = found.contents
    reason = unheld(form, contents.schemes, found.placements)
    if reason is None and unheld(form, contents.schemes, found.placements, found.narrowed):
        found = full_range(found)
    reason = reason or form.refuses(contents, found.shapes)
    if reason:
        fix = held_elsewhere(name, FORMATS, contents.schemes, found.placements, found.narrowed)
        raise AffineQuantError(f"format {name} cannot hold this: {reason}", "--format", fix, exit_code=PREFLIGHT)
    words = [source.resolve().name, name, *([contents.scheme.name] if scheme else [])]
    out = out or Path("-".join(words))
    check_output(out, source, overwrite=overwrite, resume=False)
    if Run.exists(out / RUN_FOLDER) and not overwrite:
        fix = "use another folder, or --overwrite to empty it first"
        raise AffineQuantError(f"{out} holds a run", "-o", fix)
    clear(out)
    return _Job(source=source, name=name, form=form, there=there, found=found, out=out)


def _write(job: _Job, say: Say) -> list[Path]:
    there_before = job.out.exists()
    contents = replace(job.found.contents, stages=lambda: _told_stages(job, "writing", say))
    try:
        return job.form.write(contents, job.out)
    except BaseException:  # a part of a folder is of no use: nothing of it can be taken up
        _empty(job.out)
        if job.out.exists() and not there_before:
            job.out.rmdir()
        raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir() if folder.exists() else ():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _told_stages(job: _Job, what: str, say: Say) -> Iterator[Tensors]:
    """The stages of what is exported, which are its blocks and what lies outside them."""
    return Steps(say, what, network_of(job.found.contents)[1].layers + 1).each(job.found.contents.stages())


def read_back(form: Format, out: Path, dtype: Dtype) -> tuple[Any, str]:
    """What was written in a format as a transformers model on the CPU, and in words what has read it."""
    if form.reload is not None:
        return form.reload(out, dtype)
    from affinequant.runtime.load import load

    return load(out, device="cpu", dtype=dtype), "affinequant.load"


def _verify(job: _Job, dtype: Dtype, say: Say) -> dict[str, Any]:
    """Logits and a greedy sample of what was written, against what the source means under that scheme."""
    tokens, words = _probe(job)
    schemes = job.found.contents.schemes
    floats = any(scheme.weight.kind != "int" for scheme in schemes)
    own = schemes == job.there.contents.schemes and job.name in ("affinequant", *["compressed-tensors"] * floats)
    told = Steps(say, "comparing", 2 * (1 + SAMPLE_TOKENS))
    with told_by_transformers(say):
        expected = _answers((_loaded_source if own else _reference)(job, dtype, say), tokens, told)
        gc.collect()
        with stock():  # as engines without this package read it
            model, reader = read_back(job.form, job.out, dtype)
    got = _answers(model, tokens, told)
    quantised = not own and _reads_activations(job, model)
    wanted, logs = expected["logits"].log_softmax(-1), got["logits"].log_softmax(-1)
    divergence = float((wanted.exp() * (wanted - logs)).sum(-1).mean())
    tolerance = job.form.TOLERANCE + (ACTIVATIONS_TOLERANCE if quantised else 0)
    targets = tokens[1:, None]
    losses = [-float(each[:-1].gather(1, targets).mean()) for each in (wanted, logs)]
    spread = float(expected["logits"].std())
    return {
        "passed": math.isfinite(divergence) and divergence <= tolerance,
        "divergence": divergence,
        "tolerance": tolerance,
        "nats": losses[1] - losses[0],
        "same_next_token": float((wanted.argmax(-1) == logs.argmax(-1)).double().mean()),
        "largest_logit_difference": float((expected["logits"] - got["logits"]).abs().max()) / spread,
        "tokens": len(tokens),
        "probe": words,
        "reference": "the source as affinequant.load runs it" if own else "the source's weights, 16-bit activations",
        "read_by": reader,
        "quantised_activations": quantised or (own and any(scheme.activation for scheme in schemes)),
        "sample": got["sample"],
        "sample_of_source": expected["sample"],
        "dtype": dtype,
    }


def _reference(job: _Job, dtype: Dtype, say: Say) -> Any:
    """The source's weights as they multiply what comes in, an online transform P included: x P W^T = x (W P^T)^T."""
    contents, tensors = job.found.contents, {}
    for stage in _told_stages(job, "reading the source", say):
        rest, values = dense_stage(stage, contents)
        for name, value in values.items():
            linear = name.removesuffix(".weight")
            parts = {part: rest.pop(stored) for part, stored in parts_of(list(rest), linear).items()}
            if parts:
                value = value @ apply_online(torch.eye(value.shape[1]), parts).T
            tensors[name] = value.to(getattr(torch, dtype))
        tensors |= rest
    return from_tensors(contents.source, tensors, dtype, tie_word_embeddings=contents.tied)


def _remedy(form: Format) -> str:
    if not form.ROUNDS:
        return "export it again, and report it if that is no better"
    return f"this format rounds once more: {form.ROUNDS}; one that holds the integers is exact"


def _loaded_source(job: _Job, dtype: Dtype, say: Say) -> Any:
    from affinequant.runtime.load import load

    return load(job.source, device="cpu", dtype=dtype, say=say)


def _answers(model: Any, tokens: Tensor, told: Steps) -> dict[str, Any]:
    """Logits over the probe, and a greedy sample after its beginning."""
    with torch.no_grad():
        logits = model(tokens[None]).logits[0].float()
        told()
        text = tokens[:SAMPLE]
        for _ in told.each(range(SAMPLE_TOKENS)):
            text = torch.cat([text, model(text[None]).logits[0, -1:].argmax(-1)])
    return {"logits": logits, "sample": text[SAMPLE:].tolist()}


def _probe(job: _Job) -> tuple[Tensor, str]:
    """Tokens to compare on: a text, or seeded random ones where the folder has no tokenizer that can be read."""
    try:
        tokenizer = load_tokenizer(job.source)
        ids = tokenizer(PROBE, truncation=True, max_length=PROBE_TOKENS)["input_ids"]
        return torch.tensor(ids), f"{len(ids)} tokens of text"
    except AffineQuantError:
        seeded = torch.Generator().manual_seed(0)
        vocab = network_of(job.found.contents)[1].vocab
        return torch.randint(0, vocab, (PROBE_TOKENS,), generator=seeded), "random tokens: no tokenizer could be read"


def _reads_activations(job: _Job, model: Any) -> bool:
    """Whether what has read the folder quantises activations: our loader where asked, others where it is declared."""
    rounded = any(scheme.activation for scheme in job.found.contents.schemes)
    if not rounded or job.name == "affinequant":
        return rounded
    schemes = (getattr(module, "quantization_scheme", None) for module in model.modules())
    return any(scheme is not None and scheme.input_activations is not None for scheme in schemes)


def _report(job: _Job, files: list[Path], verified: dict[str, Any]) -> dict[str, Any]:
    path = job.source / "report.json"
    origin = json.loads(path.read_text()) if path.is_file() else {}
    contents = job.found.contents
    # A card and the source's own README may both become SOURCE_README.md.
    names = sorted({str(file.relative_to(job.out)) for file in files} | {"report.json"})
    sizes = {name: (job.out / name).stat().st_size for name in names if name != "report.json"}
    weights = sum(size for name, size in sizes.items() if name.endswith((".safetensors", ".gguf")))
    note = verified["read_by"].partition("; note: ")[2]
    events = [*([f"rounded once more: {job.form.ROUNDS}"] if job.form.ROUNDS else []), *([note] if note else [])]
    return {
        "schema": 1,
        "model": origin.get("model"),
        "exported_from": str(job.source.absolute()),
        "format": job.name,
        "scheme": contents.scheme.name,
        "tier": contents.extra.get("tier"),
        "activations": _activations(job),
        "rounded": job.form.ROUNDS or None,
        "bytes": sum(sizes.values()),
        "weight_bytes": weights,
        "files": names,
        "verified": verified,
        "events": events,
        "env": {"affinequant": __version__, "torch": torch.__version__},
    }


def _activations(job: _Job) -> str:
    """What the result says of activations, next to what the source said."""
    schemes = job.found.contents.scheme, job.there.contents.scheme
    new, old = (scheme.activation for scheme in schemes)
    cache = "; keys and values in 16 bits, unlike the source's" if schemes[1].kv and not schemes[0].kv else ""
    if new is None:
        return ("16 bits" if old is None else f"16 bits; the {old.bits} bits of the source are not declared") + cache
    grid = f"{new.bits} bits per token" + (f" and {new.group_size} inputs" if new.group_size else "")
    if new == old and job.found.clips == job.there.clips:
        return f"{grid}, as in the source{cache}"
    lost = "; the narrowed ranges of the source do not carry over" if job.there.clipped else ""
    return f"{grid} over its full range{lost}{cache}"

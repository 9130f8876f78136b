"""The end of the story: write the checkpoint, check it by reading it back, and say what was done."""

import functools
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from affinequant.data.tokens import Tokens
from affinequant.errors import QUALITY, AffineQuantError
from affinequant.formats import Contents, find_format
from affinequant.formats.card import write_card
from affinequant.formats.shards import write_text
from affinequant.learning.network import Laps, scored_samples, store_dtype
from affinequant.learning.work import Work
from affinequant.models.decoder import Decoder
from affinequant.plan import Plan
from affinequant.progress import Steps, tally
from affinequant.run.durable import json_text
from affinequant.run.run import Run
from affinequant.run.workspace import Workspace
from affinequant.stages import DISTILLED, OUTER, stage_name
from affinequant.transforms.fold import Tensors
from affinequant.transforms.placements import block_flops, choice_bytes, settled
from affinequant.verify import Committed, verify
from affinequant.version import __version__

HEADER_BYTES = 8192
"""Room for the entries of one block, or of eight linears, in the headers of safetensors files, when sizes are held against
the plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Where the checkpoint is, and its report.json."""

    path: Path
    report: Mapping[str, Any]


def deliver(work: Work, out: Path, laps: Laps) -> dict[str, Any]:
    """Write the format from the run's stages, read it back, and return the report; `laps` hears of each step's end.

    Raises:
        AffineQuantError: exit 4 where what was read back is not what the run has; the folder is kept.
    """
    made, run, tokens, decoder, listen, jobs = work.made, work.run, work.tokens, work.decoder, work.listen, work.jobs()
    names = [OUTER, *(stage_name(index) for index in range(made.dims.layers))]
    last, changed = names[-1], {}
    if run.committed(DISTILLED):
        last, changed = DISTILLED, run.tensors(DISTILLED)
    unknown = decoder.unknown(made.source.entries)
    contents = _contents(made, run, names, changed, unknown)
    listen.say(f"writing {out}")
    told = Steps(listen.say, "writing", len(names) + len(unknown))
    telling = replace(contents, stages=lambda: told.each(contents.stages()))
    files = find_format(made.recipe.format, made.placements).write(telling, out)
    files.append(write_text(out / "recipe.toml", made.recipe.to_toml()))
    laps("writing")
    listen.say("verifying what was written by reading it again")
    committed = Committed(
        outer=_current(run.tensors(OUTER), changed),
        block=lambda index: _current(run.tensors(stage_name(index)), changed),
        copied=(made.source.read([name]) for name in unknown),
    )
    told = Steps(listen.say, "verifying block by block", len(jobs))
    checked = verify(out, contents, committed, jobs, tokens.ids, told, dense=made.recipe.format == "dense")
    laps("verifying")
    losses = _stream_losses(run, decoder, tokens, last, committed.outer)
    laps("measuring losses")
    report = _report(made, run, out, tokens, names, unknown)
    report |= {
        "calibration_perplexity": {name: float(loss.mean().exp()) for name, loss in losses.items()}
        | {"tokens": len(losses["full"])},
        "verified": checked,
        **_listing(files, out),
    }
    if not checked["passed"]:
        write_text(out / "report.failed.json", json_text(report))
        more = f" (and {len(checked['wrong']) - 1} more)" if len(checked["wrong"]) > 1 else ""
        raise AffineQuantError(
            f"what was written differs from the run: {checked['wrong'][0]}{more}",
            str(out),
            "the checkpoint is kept for inspection, see report.failed.json; do not serve it",
            exit_code=QUALITY,
        )
    files.append(write_card(out, made.source.folder, report, json.loads((out / "config.json").read_text())))
    return report | _listing(files, out)


def publish(workspace: Workspace, run: Run, report: Mapping[str, Any]) -> None:
    """Put report.json in place, which marks the folder as finished, and forget the run's tensors."""
    write_text(workspace.out / "report.json", json_text(report))
    run.drop_tensors()


def spent(run: Run) -> tuple[float, int]:
    """(seconds, peak bytes) of the stages that are on disk: what processes before this one have put into a run."""
    stages = [run.report(path.parent.name) for path in run.stages.glob("*/report.json")]
    return sum(stage.get("seconds", 0.0) for stage in stages), max((s.get("peak_bytes", 0) for s in stages), default=0)


def phases(made: Plan, run: Run, laps: Sequence[Mapping[str, Any]], before: float) -> list[dict[str, Any]]:
    """Where a run's time went, in order, over all processes that took part: each step's `seconds`, and the most memory
    that a process has held up to its end, `peak_bytes`.

    Args:
        laps: this process's, all stages as the one `stages`.
        before: seconds of the stages that earlier processes have put on disk.
    """
    found = dict[str, dict[str, Any]]()

    def add(name: str, seconds: float, peak: int) -> None:
        old = found.setdefault(name, {"name": name, "seconds": 0.0, "peak_bytes": 0})
        old |= {"seconds": old["seconds"] + seconds, "peak_bytes": max(old["peak_bytes"], peak)}

    for lap in laps:
        name, left = lap["name"], lap["seconds"]
        if name == "stages":
            name, left = "keeping progress", left + before
            for stage in made.stages:
                report, kind = run.report(stage.name), stage.reported or stage.name
                left -= report["seconds"]
                parts = report.get("phases", ())  # a block that an older version has made has none
                for part in parts:
                    add(f"blocks: {part['name']}", part["seconds"], part["peak_bytes"])
                last = f"blocks: {parts[-1]['name']}" if parts else "blocks" if stage.block is not None else kind
                add(last, report["seconds"] - sum(part["seconds"] for part in parts), report["peak_bytes"])
        add(name, left, lap["peak_bytes"])
    return list(found.values())


def token_losses(
    logits_of: Any, hidden: Float[Tensor, "tokens hidden"], ids: Int[Tensor, " tokens"], chunk: int = 512
) -> Float[Tensor, " targets"]:
    """Negative log-likelihood of each next token, logits made a chunk at a time."""
    parts = []
    for start in range(0, len(ids) - 1, chunk):
        stop = min(start + chunk, len(ids) - 1)
        logits = logits_of(hidden[start:stop]).float()
        parts.append(torch.nn.functional.cross_entropy(logits, ids[start + 1 : stop + 1], reduction="none"))
    return torch.cat(parts).cpu()


def _contents(made: Plan, run: Run, names: list[str], changed: Tensors, unknown: list[str]) -> Contents:
    """What the run has made, and the source's tensors that nothing here knows, as they are and one at a time."""
    family = made.family
    blocks = [run.report(name) for name in names[1:]]
    placements = settled(made.placements, made.sites, blocks)
    chosen = [{site: one["transform"] for site, one in block.get("transforms", {}).items()} for block in blocks]
    rotated = "residual" in made.recipe.transforms

    def stages() -> Iterator[Tensors]:
        yield from (_current(run.tensors(name), changed) for name in names)
        yield from (made.source.read([name]) for name in unknown)

    return Contents(
        config=dict(made.source.config),
        source=made.source.folder,
        scheme=made.recipe.parsed_scheme,
        dtype="float16" if store_dtype(made) == torch.float16 else "bfloat16",
        tied=made.dims.tied and not rotated,
        linears=tuple(
            f"{family.blocks}.{index}.{linear.name}"
            for index, block in enumerate(family.each_block(made.dims))
            for linear in block.linears
        ),
        others={name: one for name, one in made.schemes.items() if one not in (None, made.recipe.parsed_scheme)},
        kept=tuple(name for name, scheme in made.schemes.items() if scheme is None),
        stages=stages,
        beside=tuple(made.copied),
        renamed=made.source.renamed,
        extra={
            "tier": made.recipe.tier,
            "placements": {name: asdict(placement) for name, placement in placements.items()},
            "transforms": dict(made.recipe.transforms),
            **({"transforms_by_block": chosen} if any(chosen) else {}),
            "slices": _sliced(made),
        },
    )


def _sliced(made: Plan) -> dict[str, int]:
    """The linears whose inputs are transformed and quantised in slices, and in how many."""
    return {
        f"{made.family.blocks}.{index}.{member}": made.sites[site].slices
        for index, block in enumerate(made.family.each_block(made.dims))
        for site, members in block.input_groups()
        for member in members
        if made.sites[site].slices > 1
    }


def _current(stage: Tensors, changed: Tensors) -> Tensors:
    """A stage's tensors, with what the end-to-end finish has changed in them."""
    return {name: changed.get(name, tensor) for name, tensor in stage.items()}


def _stream_losses(run: Run, decoder: Decoder, tokens: Tokens, last: str, outer: Tensors) -> dict[str, Tensor]:
    """Losses on the first calibration samples, from the hidden states of both streams behind the stage `last`."""
    device, count, losses = decoder.device, scored_samples(tokens), {}
    head, norm = decoder.head(outer), f"{decoder.family.norm}."
    plain = {name: tensor for name, tensor in run.tensors(OUTER).items() if name.startswith(norm)}
    heads = {"full": head | decoder.head(plain), "quantized": head}  # but for the last norm they are one
    with torch.no_grad():
        for name, stream in run.carry(last).items():
            logits_of = functools.partial(decoder.logits, head=heads[name])
            rows = [
                token_losses(logits_of, row.to(device), ids.to(device))
                for row, ids in zip(stream[:count], tokens.ids, strict=False)
            ]
            losses[name] = torch.cat(rows)
    return losses


def _model_name(model: str) -> str:
    """The model as someone elsewhere can find it; a folder that is called `demo` is not meant by `demo`."""
    return str(Path(model).absolute()) if model != "demo" and Path(model).is_dir() else model


def _listing(files: list[Path], out: Path) -> dict[str, Any]:
    """Every file of the folder with its bytes; the report that holds this is not among them."""
    sizes = {file.relative_to(out).as_posix(): file.stat().st_size for file in sorted(files)}
    return {"bytes": sum(sizes.values()), "files": sizes}


def _report(made: Plan, run: Run, out: Path, tokens: Tokens, names: list[str], unknown: list[str]) -> dict[str, Any]:
    import transformers

    blocks = [run.report(name) for name in names[1:]]
    whole = {stage.reported: run.report(stage.name) for stage in made.stages if stage.reported}
    copied = {name: made.source.entries[name].size for name in unknown}
    planned = made.output_bytes + sum(copied.values()) - sum(made.copied.values())
    weights = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    events = [f"block {i}: {event}" for i, block in enumerate(blocks) for event in block["events"]]
    events += [f"{name}: {event}" for name, stage in whole.items() for event in stage["events"]]
    devices = sorted({stage["device"] for stage in (run.report(OUTER), *blocks, *whole.values())} | {made.device})
    if len(devices) > 1:
        events.append(f"worked on {' and '.join(devices)}, finished on {made.device}")
    flops, each = block_flops(made.family, made.dims), made.family.each_block(made.dims)
    spare = sum(choice_bytes(made.recipe, block, flops, made.sites) for block in each)
    count = sum(len(block["linears"]) for block in blocks)
    room = 0.02 * planned + HEADER_BYTES * max(len(blocks), count / 8)
    if not planned - spare - room <= weights <= planned + room:
        events.append(f"weights take {weights:,} bytes, the plan said {planned:,}")
    return {
        "schema": 1,
        "model": _model_name(made.recipe.model),
        "scheme": made.recipe.scheme,
        "tier": made.recipe.tier,
        "preset": made.recipe.preset,
        "plan": made.to_json(),
        "calibration": tokens.summary(),
        "bits_per_weight": made.bits_per_weight,
        "weight_bytes": weights,
        "weight_bytes_planned": planned,
        "unknown_tensors": copied,
        **({"choices": counted} if (counted := tally(blocks)) else {}),
        "blocks": blocks,
        **whole,
        "non_finite": sum(stage["non_finite"] for stage in (*blocks, *whole.values())),
        "events": events,
        "devices": devices,
        "env": {
            "affinequant": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": made.device,
        },
    }

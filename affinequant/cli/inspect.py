"""`affinequant inspect`: what is in an output folder, finished or not, without loading a model."""

import argparse
import json
import os
import shlex
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from affinequant.cli.arguments import Parser
from affinequant.cli.export import outcome
from affinequant.cli.output import Screen, kept_text, minutes, size
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.models import resolve as resolve_model
from affinequant.models.multimodal import said_of_copies, text_config
from affinequant.models.source import Source, locate, open_source, unquantized
from affinequant.progress import tally
from affinequant.recipe.presets import PRESETS
from affinequant.recipe.recipe import PATTERNS, options, resolve
from affinequant.recipe.tables import flat

USAGE = "CKPT [-v] [--json]"
EPILOG = """
Per block: bits and size, how well its output survived (SQNR in dB, on the calibration text, errors of earlier blocks
included; higher is better), the loss before and after learning, and the largest condition number of its transforms.
-v adds every linear, its inputs as they are rounded, and the whole recipe. On a folder whose run has not finished: how far
it is, and how to go on.
"""
State = Literal["finished", "unfinished", "failed", "checkpoint only"]
_RUN, _REPORT, _FAILED = ".run/fingerprint.json", "report.json", "report.failed.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What an output folder says about itself. `resume`: the command that goes on, where one is needed."""

    folder: Path
    state: State
    config: Mapping[str, Any]
    report: Mapping[str, Any]
    recipe: Mapping[str, Any]
    blocks: Sequence[Mapping[str, Any]]
    total: int | None
    resume: str


def add_arguments(parser: Parser) -> None:
    """CKPT."""
    parser.add_argument("checkpoint", metavar="CKPT", help="an output folder of `quantize`, finished or not")


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Print what is there."""
    folder = Path(os.path.expanduser(args.checkpoint))
    exported = _read(folder / _REPORT) if folder.is_dir() else {}
    if "exported_from" in exported:
        screen.facts({"exported": f"from {exported['exported_from']}"} | outcome(folder, exported, verbose=True))
        screen.result(exported | {"path": folder.absolute(), "state": "exported"})
        return 0
    found = look(folder)
    sizes = _block_sizes(found)
    screen.facts(_summary(found))
    screen.print()
    _print_blocks(found, sizes, screen)
    if found.report.get("events"):
        screen.print("\nevents:")
        for event in found.report["events"]:
            screen.print(f"  {event}")
    _print_recipe(found, screen)
    if found.resume:
        screen.print(f"\nto go on:\n  {found.resume}")
    screen.result(_as_json(found, sizes))
    return 0


def look(folder: Path) -> Found:
    """Read the folder's own files.

    Raises:
        AffineQuantError: no such folder, or one that no run of this package made, with the reason.
    """
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"no such folder: {folder}"
        raise AffineQuantError(what, "CKPT", "give the output folder of `affinequant quantize`")
    config = _read(folder / "config.json")
    report, failed = _read(folder / _REPORT), _read(folder / _FAILED)
    declared = _declared(config)
    running = _read(folder / _RUN)
    state: State = "finished"
    if report.get("blocks") is None:
        state = "failed" if failed else "unfinished" if running else "checkpoint only"
    if state == "checkpoint only" and "affinequant" not in declared:
        raise _foreign(folder, config, declared)
    report = report if state == "finished" else failed
    recipe = _recipe(_read(folder / "recipe.toml", tomllib.loads)) or _recipe(running, out=str(folder))
    blocks = report.get("blocks") or _committed(folder)
    return Found(
        folder=folder,
        state=state,
        config=config,
        report=report,
        recipe=recipe,
        blocks=blocks,
        total=len(blocks) if state != "unfinished" else _layers(str(recipe.get("model", ""))),
        resume=_resume(recipe, folder) if state == "unfinished" else "",
    )


def _declared(config: Mapping[str, Any]) -> Mapping[str, Any]:
    value = config.get("quantization_config")
    return value if isinstance(value, dict) else {}


def _summary(found: Found) -> dict[str, str]:
    report, recipe = found.report, found.recipe
    ours = _declared(found.config).get("affinequant") or {}
    of = "?" if found.total is None else str(found.total)
    states: dict[State, str] = {
        "finished": "finished and verified",
        "unfinished": f"unfinished: {len(found.blocks)} of {of} blocks are done",
        "failed": "FAILED its verification; see report.failed.json",
        "checkpoint only": "a checkpoint without report.json: sizes and clipping only",
    }
    lines = {"folder": str(found.folder), "state": states[found.state]}
    names = {name: recipe.get(name, ours.get(name)) for name in ("model", "scheme", "tier", "preset")}
    lines |= {name: str(value) for name, value in names.items() if value is not None}
    if report:
        lines["bits"] = f"{report['bits_per_weight']:.2f} per weight of the blocks' linears"
        planned = size(report["weight_bytes_planned"])
        lines["size"] = f"{size(report['bytes'])}; weights {size(report['weight_bytes'])}, planned {planned}"
        if ours.get("kv"):
            cached, kept = report["plan"]["cache_bytes_per_token"], kept_text(report["plan"])
            lines["KV cache"] = f"{ours['kv']['bits']} bits, {cached:,} bytes per token with its scales{kept}"
        losses = report.get("calibration_perplexity", {})
        if losses:
            lines["perplexity"] = f"{losses['full']:.2f} -> {losses['quantized']:.2f} on calibration text"
        if parts := report["plan"].get("copied"):
            lines["copied"] = said_of_copies(parts)
        check = report["verified"]
        lines["verified"] = _verified(check)
        data = report["calibration"]
        lines["data"] = f"{data['source']}, {data['samples']} x {data['seq_len']} tokens, BOS: {data['bos']}"
        lines |= {
            what: ", ".join(f"{one} x {n}" for one, n in row.items()) for what, row in tally(found.blocks).items()
        }
        if "seconds" in report:
            lines["cost"] = f"{minutes(report['seconds'] / 60)}, peak memory {size(report['peak_bytes'])}"
    return lines


def _verified(check: Mapping[str, Any]) -> str:
    """What was found when the folder was read back; reports of older versions knew the loss alone."""
    if "tensors" not in check:
        return f"{check['nats']:+.4f} +- {check['stderr']:.4f} nats per token after reloading"
    if not check["passed"]:
        return f"FAILED: {'; '.join(check['wrong'][:3])}"
    blocks = f"blocks off by {check['hidden']:.1g} at most (median over {check['tokens']} tokens)"
    return f"{check['tensors']} tensors bit for bit; {blocks}"


def _print_blocks(found: Found, sizes: Mapping[str, int], screen: Screen) -> None:
    bits = found.report.get("bits_per_weight")
    rows = []
    for index, block in enumerate(found.blocks):
        loss = f"{block['loss_first']:.2e} -> {block['loss_last']:.2e}" if block.get("loss_first") is not None else "-"
        worst = max(block["conditions"], key=block["conditions"].get, default="")
        condition = f"{block['condition']:.3g}" + (f" ({worst})" if worst and block["condition"] > 1 else "")
        known = size(sizes[str(index)]) if str(index) in sizes else "-"
        figures = [f"{bits:.2f}" if bits else "-", known, f"{block['sqnr']:.1f}", condition, loss]
        rows.append([str(index), *figures, f"{block['seconds']:.1f}", "; ".join(block["events"])])
        if screen.verbose:
            rows += [
                [f"  {name}", "", "", f"{one['sqnr']:.1f}", "", f"input clip {one['clip']:.2f}", "", ""]
                for name, one in block["linears"].items()
            ]
            inputs = {site: one["sqnr"] for site, one in block.get("inputs", {}).items() if one.get("sqnr")}
            rows += [[f"  input {site}", "", "", f"{sqnr:.1f}", "", "", "", ""] for site, sqnr in inputs.items()]
    if "outside" in sizes:
        rows.append(["outside", "16", size(sizes["outside"]), "", "", "embedding, final norm, head", "", ""])
    columns = ["block", "bits", "size", "SQNR dB", "condition", "loss", "s", "events"]
    screen.table(columns, rows, right=(1, 2, 3, 6))


def _print_recipe(found: Found, screen: Screen) -> None:
    recipe = found.recipe
    if not recipe:
        return
    screen.print("\nmade by:")
    toml = found.folder / "recipe.toml"
    again = f"affinequant quantize --config {shlex.quote(str(toml))} -o ..."
    screen.print(f"  {again if toml.exists() else found.resume}")
    if screen.verbose:
        for name, value in recipe.items():
            screen.print(f"  {name} = {json.dumps(value)}")


def _as_json(found: Found, sizes: Mapping[str, int]) -> dict[str, Any]:
    report = {name: value for name, value in found.report.items() if name not in ("schema", "blocks", "plan", "files")}
    blocks = [{"bytes": sizes.get(str(index)), **block} for index, block in enumerate(found.blocks)]
    return {
        "schema": 1,
        "path": found.folder.absolute(),
        "state": found.state,
        "blocks_done": len(found.blocks),
        "blocks_total": found.total,
        "resume": found.resume or None,
        "recipe": found.recipe,
        "bytes_outside_blocks": sizes.get("outside"),
        **report,
        "blocks": blocks,
    }


def _block_sizes(found: Found) -> dict[str, int]:
    """Bytes of each block by its number, and of what lies `outside`, from the headers of the shards."""
    if found.state not in ("finished", "checkpoint only"):
        return {}
    source: Source = open_source(found.folder)
    family, _ = resolve_model(unquantized(source.config), where=str(found.folder / "config.json"))
    sizes: dict[str, int] = {}
    for name, entry in source.entries.items():
        rest = name.removeprefix(f"{family.blocks}.")
        key = rest.split(".")[0] if rest != name else "outside"
        sizes[key] = sizes.get(key, 0) + entry.size
    return sizes


def _committed(folder: Path) -> list[dict[str, Any]]:
    return [_read(path) for path in sorted(folder.glob(".run/stages/block.*[0-9]/report.json"))]


def _recipe(values: Mapping[str, Any], **more: str) -> dict[str, Any]:
    """A recipe's options out of what a file holds, by their flat names, and `more` where there are any."""
    found = flat(values)
    known = {name: found[name] for name in options() if name in found}
    return known | more if known else {}


def _resume(recipe: Mapping[str, Any], folder: Path) -> str:
    """The shortest command that gives the recipe of an unfinished run."""
    recipe = flat(recipe)
    start = {name: recipe[name] for name in ("model", "scheme", "preset")}
    base = resolve(start | {"tier": recipe["tier"]})
    words = ["affinequant", "quantize", str(recipe["model"]), "--scheme", base.scheme, "--preset", base.preset]
    words += ["--tier", base.tier] if resolve(start).tier != base.tier else []
    preset = PRESETS[base.preset].fields(base.tier, base.parsed_scheme)
    transforms = dict.fromkeys(preset.get("transforms", {}), "none") | recipe["transforms"]
    for site, name in transforms.items():
        if base.transforms.get(site, "none") != name:
            words += ["--transform", f"{site}={name}"]
    for name, value in recipe.items():
        if name in PATTERNS:
            pairs = (f"{pattern}={value[pattern]}" if isinstance(value, Mapping) else pattern for pattern in value)
            words += [word for pair in pairs for word in (f"--{name}", pair)]
        if name in ("transforms", "out", "device", *PATTERNS) or value == getattr(base, name):
            continue
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join([*words, "-o", str(folder)])


def _layers(model: str) -> int | None:
    """How many blocks the model has, if it is at hand."""
    from affinequant.data.demo import MODEL_FOLDER
    from affinequant.data.wheels import cache_folder

    folder = cache_folder() / MODEL_FOLDER if model == "demo" else None
    try:
        found = folder or locate(model, weights=False)
        return int(text_config(open_source(found, weights=False).config)["num_hidden_layers"])
    except (AffineQuantError, KeyError, TypeError, ValueError):
        return None


def _foreign(folder: Path, config: Mapping[str, Any], declared: Mapping[str, Any]) -> AffineQuantError:
    fix = "give the output folder of `affinequant quantize`"
    if not config:
        return AffineQuantError(f"{folder} is no checkpoint: it has no config.json and holds no run", "CKPT", fix)
    if declared:
        method = declared.get("quant_method", "unknown")
        what = f"{folder} was quantised by something else (quant_method {method!r}), which keeps no report"
        return AffineQuantError(what, "CKPT", fix, exit_code=PREFLIGHT)
    what = f"{folder} is a model that is not quantised, or a checkpoint whose report.json is gone"
    return AffineQuantError(what, "CKPT", f"`affinequant quantize {shlex.quote(str(folder))}` would quantise it")


def _read(path: Path, loads: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    try:
        value = loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as problem:
        raise AffineQuantError(f"{path.name} cannot be read: {problem}", str(path), "write the folder again") from None
    return value if isinstance(value, dict) else {}

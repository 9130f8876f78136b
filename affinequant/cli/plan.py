"""`affinequant plan`: sites, sizes, minutes and memory, from a config.json alone."""

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.advice import HARDWARE, advice, gains, this_cpu
from affinequant.cli.arguments import Parser, add_recipe, recipe_of
from affinequant.cli.output import Screen, kept_text, minutes, size
from affinequant.cli.report import add_report, check_report
from affinequant.cli.sensitivity import measure, print_sensitivity, write_page
from affinequant.errors import AffineQuantError
from affinequant.recipe.assigned import KEPT, counted, differing, placed
from affinequant.recipe.budget import undecided
from affinequant.recipe.recipe import Recipe
from affinequant.recipe.scheme import SCHEMES

if TYPE_CHECKING:
    from affinequant.plan import Plan

USAGE = "MODEL [--w4a4 | --scheme NAME] [--preset NAME] ..."
EPILOG = """
For each site the table says what becomes of its transform: folded into the weights (free), online (a small matmul at
run time; its cost is given), or refused. -v adds what every other transform would be there. Minutes and gigabytes are
arithmetic, not measurements. A config.json without weights is enough.

--sensitivity measures what the rest is arithmetic for: every site of every block is rounded alone, to nearest and without
transforms, and the table says by how many nats per token the model's predictions diverge (2 samples of 512 tokens of the
calibration text; minutes on a small model, and four times that on one of twice as many blocks). --report makes a page of it.

--avg-bits measures the same for every group of linears that share an input and every scheme that they may have (the scheme
with other widths of weights; where activations are rounded, with w8a8), and prints which gets which, as `quantize` would take it.

--for says what another device would gain from this scheme and its neighbours: sm_80, sm_86, sm_89, sm_90, sm_100, cpu-amx,
cpu-vnni, cpu-avx2. On GPUs these are bounds, by bytes and by rates of products; on CPUs measurements.

examples:
  affinequant plan meta-llama/Llama-2-70b-hf --w4a4 --cpu-memory 64GB
  affinequant plan ./my-llama --w4a16-g128 --preset fast --json
  affinequant plan ./my-llama --w4a4 --for sm_90
  affinequant plan demo --w4a4 --sensitivity --report where.html
"""


def add_arguments(parser: Parser) -> None:
    """MODEL, the device that is asked about, and the recipe's flags."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help=model_help())
    parser.add_argument("--for", metavar="DEVICE", dest="target", help="what that device gains from the scheme")
    text = "measure which sites of which blocks suffer when they alone are rounded"
    parser.add_argument("--sensitivity", action="store_true", help=text)
    add_report(parser)
    add_recipe(parser)


def model_help() -> str:
    """What MODEL may be."""
    return str(Recipe.__dataclass_fields__["model"].metadata["help"])


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Print the plan."""
    from affinequant.plan import plan

    recipe = recipe_of(args)
    if args.target:
        gains(args.target, recipe.scheme)  # before anything is fetched
    if args.report is not None and not args.sensitivity:
        raise AffineQuantError("a plan alone has no page", "--report", "add --sensitivity")
    check_report(args.report, Path())
    fetch_demo(recipe.model, screen)
    made = plan(recipe)
    if undecided(made.recipe, made.schemes):
        from affinequant.pipeline import decided

        made = plan(decided(made, screen.listener()))
        _print_allocation(made, screen)
    found = measure(made, screen) if args.sensitivity else None
    print_plan(made, screen, args.target or "", found)
    if found and args.report is not None:
        write_page(found, args.report, screen)
    return 0


def _print_allocation(made: "Plan", screen: Screen) -> None:
    """Blocks x inputs: which scheme the linears have."""
    from affinequant.models.linears import bound

    rows: dict[int, dict[str, str]] = {}
    for name, one in bound(made.family, made.dims).items():
        block, inside = placed(name)
        scheme = made.schemes[name]
        read = one.read.removeprefix(name.removesuffix(inside))
        rows.setdefault(block, {})[read] = scheme.name if scheme else KEPT
    names = list(dict.fromkeys(read for row in rows.values() for read in row))
    cells = [[str(block), *(row.get(read, "-") for read in names)] for block, row in rows.items()]
    title = f"which linears get how many bits: {made.bits_per_weight:.3f} per weight on average"
    screen.table(["block", *names], cells, right=(0,), title=title)
    screen.print()


def fetch_demo(model: str, screen: Screen) -> None:
    """Fetch and convert the demo's model where it is wanted, and say so."""
    if model == "demo":
        from affinequant.data.demo import demo_model

        demo_model(screen.say)


def header(made: "Plan") -> dict[str, str]:
    """The plan in a few lines."""
    recipe = made.recipe
    at = ", ".join(f"{site} {name}" for site, name in recipe.transforms.items() if name != "none") or "no transform"
    memory = f"{size(made.cpu_bytes)} memory" + (f", {size(made.gpu_bytes)} on the GPU" if made.gpu_bytes else "")
    lines = {
        "model": f"{recipe.model} ({made.family.name}, {made.dims.layers} blocks of width {made.dims.hidden})",
        "scheme": f"{recipe.scheme}: {SCHEMES.get(recipe.scheme, 'as the name says')}; tier {recipe.tier}",
        "linears": counted(differing(made.schemes, recipe.scheme)),
        "method": f"preset {recipe.preset}; {at}; rounding {recipe.rounding}",
        "data": f"{recipe.data}, {recipe.samples} samples of {recipe.seq_len} tokens, seed {recipe.seed}",
        "plan": f"about {minutes(made.minutes)} on {made.device}, {memory}, {size(made.disk_bytes)} disk",
        "size": f"{size(made.source_bytes)} -> {size(made.output_bytes)}, {made.bits_per_weight:.2f} bits per weight",
        "out": str(recipe.output_folder()),
    }
    notes = {"note" + " " * index: note for index, note in enumerate(made.notes)}
    return {name: text for name, text in lines.items() if text} | notes


def print_plan(made: "Plan", screen: Screen, target: str = "", sensitivity: Mapping[str, Any] | None = None) -> None:
    """The plan as tables, or as JSON; with what the device `target` gains, or the CPU at hand where it is to be used, and
    what has been measured."""
    from affinequant.transforms.placements import block_flops

    block = block_flops(made.family, made.dims)
    screen.facts({name: text for name, text in header(made).items() if not name.startswith(("plan", "size", "note"))})
    screen.print()
    _print_sites(made, block, screen)
    if screen.verbose:
        screen.print()
        _print_choices(made, block, screen)
    screen.print()
    screen.facts(_figures(made))
    for note in made.notes:
        screen.print(f"note: {note}")
    value = made.to_json()
    value["advice"] = _advice(made, screen, target)
    if sensitivity:
        print_sensitivity(sensitivity, screen)
        value["sensitivity"] = sensitivity
    for site in value["sites"]:
        site["percent_of_block"] = round(100 * site["flops_per_token"] / block, 3)
    screen.result(value)


def _print_sites(made: "Plan", block: int, screen: Screen) -> None:
    rows = []
    for name, placement in made.placements.items():
        transform = made.recipe.transforms.get(name, "none")
        how = "-" if transform == "none" else placement.how
        cost = f"{placement.flops:,}" if placement.flops else "0"
        if transform == "auto":
            cost = f"<= {cost}"
        rows.append([name, transform, how, cost, f"{100 * placement.flops / block:.1f} %", placement.reason])
    columns = ["site", "transform", "placement", "FLOPs/token", "of the block", "reason"]
    screen.table(columns, rows, right=(3, 4))


def _advice(made: "Plan", screen: Screen, target: str) -> dict[str, Any] | None:
    device = target or (this_cpu() if made.device == "cpu" else "")
    if not device:
        return None
    found, text = gains(device, made.recipe.scheme), advice(device, made.recipe.scheme)
    hardware = HARDWARE[device]
    if target:
        screen.print()
        columns = ["scheme", "one token", "many tokens", "what the figures are"]
        rows = [[gain.scheme, _times(gain.one), _times(gain.many), gain.basis] for gain in found]
        screen.table(columns, rows, right=(1, 2), title=f"what a linear gains on {device} ({hardware.about})")
    for said in (hardware.note if target else "", text):
        if said:
            screen.print(f"{device}: {said}")
    return {"device": device, "gains": [asdict(gain) for gain in found], "note": hardware.note, "text": text}


def _times(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}x"


def _print_choices(made: "Plan", block: int, screen: Screen) -> None:
    from affinequant.models.sites import STRUCTURES, place

    rows = []
    for name, site in made.sites.items():
        for structure in STRUCTURES:
            placement = place(site, structure)
            rows.append([name, structure, placement.how, f"{100 * placement.flops / block:.1f} %", placement.reason])
    columns = ["site", "structure", "placement", "of the block", "reason"]
    screen.table(columns, rows, right=(3,), title="every structure at every site")


def _figures(made: "Plan") -> dict[str, str]:
    free = shutil.disk_usage(_existing(made.recipe.output_folder())).free
    untied = f", {size(made.untied_bytes)} of them a head of its own" if made.untied_bytes else ""
    figures: dict[str, Any] = {
        "size": f"{size(made.source_bytes)} -> {size(made.output_bytes)}{untied}",
        "bits per weight": f"{made.bits_per_weight:.2f} in the blocks' linears, scales and zero points included",
        "KV cache": _cache_text(made) if made.recipe.parsed_scheme.kv else "",
        "time": f"about {minutes(made.minutes)} on {made.device}",
        "memory": f"{size(made.cpu_bytes)}; activations between blocks: {made.offload}",
        "GPU memory": size(made.gpu_bytes) if made.gpu_bytes else "",
        "disk": f"{size(made.disk_bytes)} while it runs; {size(free)} free",
    }
    return {name: text for name, text in figures.items() if text}


def _cache_text(made: "Plan") -> str:
    scheme, width = made.recipe.parsed_scheme, made.dims.head_dim
    packed = f"{made.cache_bytes:,} bytes a token where it is packed: {scheme.bits_per_cached(width):.1f} of 16 bits"
    return packed + kept_text(made.to_json())


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder

"""`affinequant list`: what there is to choose from."""

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from affinequant.cli.arguments import Parser
from affinequant.cli.output import Screen
from affinequant.errors import AffineQuantError, unknown_name

USAGE = "[schemes|models|transforms|formats|presets|data|metrics|published [--model NAME]]"
EPILOG = """
Without a word all of them are listed. Each name can be used where a flag asks for one:
  schemes     --scheme w4a16-g64, or --w4a4 and so on for those that are listed
  transforms  --transform SITE=NAME
  formats     --format NAME
  presets     --preset NAME
  data        --data NAME and, for evaluation, --text NAME
  published   nowhere; these are figures of papers. --model NAME lists those of one model
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A table: its columns, and rows whose first cell is the name. `below` gives a further line to a row.

    Where not all columns are `shown`, these are, under headings of their own; `notes` stand behind the table. With --json there
    are all columns, and by name `more`.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    below: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shown: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def headings(self) -> list[str]:
        """What stands above the columns that are shown."""
        return list(self.shown.values()) or list(self.columns)

    def lines(self) -> list[Sequence[str]]:
        """The rows as they are shown."""
        shown: list[Sequence[str]] = []
        places = [self.columns.index(name) for name in self.shown or self.columns]
        for row in self.rows:
            shown.append([row[place] for place in places])
            where = dict[str, list[str]]()
            for name, value in self.below.get(row[0], {}).items():
                place, _, name = name.rpartition(":")
                where.setdefault(place, [f"{place}:"] if place else []).append(f"{name}={value}")
            for words in where.values():
                text = textwrap.fill(" ".join(words), 76, subsequent_indent="  ", break_on_hyphens=False)
                shown += [("", f"  {line}") for line in text.splitlines()]
        return shown


def add_arguments(parser: Parser) -> None:
    """What to list."""
    parser.add_argument("topic", metavar="WHAT", nargs="?", help="one of the names above (default: all)")
    parser.add_argument("--model", metavar="NAME", help="published: the figures of a model, e.g. Llama-2-7b")


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Print one table, or all."""
    if args.topic is not None and args.topic not in TOPICS:
        raise unknown_name("topic", args.topic, TOPICS, where="affinequant list")
    topics = [args.topic] if args.topic else list(TOPICS)
    if args.model is not None and topics != ["published"]:
        raise AffineQuantError("--model is about published figures", "--model", "write `list published --model NAME`")
    found = {topic: TOPICS[topic]() for topic in topics} if args.model is None else {"published": _of(args.model)}
    for index, (topic, listing) in enumerate(found.items()):
        if index:
            screen.print()
        screen.table(listing.headings(), listing.lines(), title=topic if len(found) > 1 else "")
        for note in listing.notes:
            screen.print("\n".join(textwrap.wrap(note, 100, subsequent_indent="  ")))
    screen.result({"schema": 1, "list": {topic: _as_json(listing) for topic, listing in found.items()}})
    return 0


def _as_json(listing: Listing) -> list[dict[str, Any]]:
    rows = [dict[str, Any](zip(listing.columns, row, strict=True)) for row in listing.rows]
    rows = [row | listing.more.get(row[listing.columns[0]], {}) for row in rows]
    return [row | ({"settings": listing.below[row["name"]]} if listing.below else {}) for row in rows]


def _schemes() -> Listing:
    from affinequant.recipe.scheme import SCHEMES

    pattern = (
        "wNaM[kvK][-gG][-agG][-sym|-asym]",
        "w 4 or 8 with a 4, 8 or 16, w 2 or 3 with a16; KV cache 4 or 8 bits; a scale per G inputs of weights (g) and of "
        "a token's activations (ag), where both of one G; symmetric or not",
    )
    return Listing(columns=("name", "about"), rows=[*SCHEMES.items(), pattern])


def _models() -> Listing:
    from affinequant.formats import FORMATS, find_format
    from affinequant.models import FAMILIES, Dims, resolve_sites
    from affinequant.models.multimodal import WRAPPERS
    from affinequant.models.sites import named, refusal
    from affinequant.serve.families import in_vllm
    from affinequant.transforms import names_at

    dims = Dims(layers=1, hidden=64, mlp=64, heads=4, kv_heads=2, head_dim=16, vocab=1, tied=False)
    dims = replace(dims, experts=1, routed=1, expert=64, shared=64)  # of a model of whichever family
    dims = replace(dims, delta_heads=4, delta_head=16, delta_key_heads=4, delta_key_head=16)
    rows, tiers, reasons = [], {}, dict[str, list[str]]()
    for name, family in FAMILIES.items():
        flags = tuple(linear.bias for linear in family.linears if isinstance(linear.bias, str))
        found = resolve_sites(
            family.sized(dims), replace(dims, biases=tuple(f for f in flags if family.defaults.get(f)))
        )
        sites = {named(site.name): site for site in found}
        bare = {site: reason for site, one in sites.items() if (reason := refusal(one))}
        lacking = {one: reason for one in FORMATS if (reason := find_format(one).lacks(family))}
        status, meaning = in_vllm(family)
        said = {f"{site}: {reason}" for site, reason in bare.items()} | {f"vLLM {status}: {meaning}"}
        for words in said | {f"{one}: {reason}" for one, reason in lacking.items()}:
            reasons.setdefault(words, []).append(name)
        exports = f"all but {', '.join(lacking)}" if lacking else "all"
        few = exports if len(lacking) <= 3 else f"all but {', '.join([*lacking][:2])}, {len(lacking) - 2} more"
        nowhere = "; ".join(f"{site}: {reason}" for site, reason in bare.items())
        rows.append(
            (name, ", ".join(family.architectures), ", ".join(sites), exports, nowhere, status, ", ".join(bare), few)
        )
        tiers[name] = {
            "inside": [wrapper for wrapper, decoders in WRAPPERS.items() if name in decoders],
            "tiers": {
                tier: {site: _words(names_at(one, how)) for site, one in sites.items()}
                for tier, how in (("merged", "folded"), ("online", "online"))
            },
            "refused": {**bare, **lacking} | ({} if status == "proven" else {"vllm": meaning}),
        }
    columns = (
        "family",
        "architectures in config.json",
        "sites",
        "exports",
        "where nothing folds",
        "vllm",
        "unfolded",
        "few",
    )
    return Listing(
        columns=columns,
        rows=rows,
        more=tiers,
        shown={
            "family": "family",
            columns[1]: "architecture",
            "unfolded": "folds not at",
            "vllm": "vLLM",
            "few": "exports",
        },
        notes=[
            *(f"{words} ({', '.join(names)})" for words, names in sorted(reasons.items())),
            *(f"{name}: the decoder is quantised, the rest copied ({', '.join(of)})" for name, of in WRAPPERS.items()),
        ],
    )


def _words(names: str) -> list[str]:
    return names.split(", ") if names else []


def _transforms() -> Listing:
    from affinequant.models import FAMILIES
    from affinequant.models.sites import Kind, Site, named, place
    from affinequant.transforms import TRANSFORMS, structures_of

    # Where families differ the first stands for most: OPT alone has no RoPE at qk, hybrids alone a gate at vo.
    specs = [spec for family in reversed(FAMILIES.values()) for spec in family.sites]
    kinds: dict[str, Kind] = {named(spec.name): spec.kind for spec in specs}
    sites = [Site(name=name, kind=kind, width=64, sources=(), sinks=()) for name, kind in kinds.items()]
    rows = []
    for name, (structure, _, about) in TRANSFORMS.items():
        placed = {site.name: place(site, structures_of(name, where="")[0]).how for site in sites}
        at = [", ".join(site for site, how in placed.items() if how == wanted) for wanted in ("folded", "online")]
        rows.append((name, structure, *at, about))
    return Listing(columns=("name", "structure", "folds at", "online at", "about"), rows=rows)


def _formats() -> Listing:
    from affinequant.formats import FORMATS, find_format
    from affinequant.recipe.recipe import Format

    first = (
        "auto",
        "quantize",
        "what stock engines load: compressed-tensors; where a transform stays online, affinequant",
    )
    by = {name: "quantize, export" if name in get_args(Format) else "export" for name in FORMATS}
    rows = [first, *((name, by[name], find_format(name).ABOUT) for name in FORMATS)]
    return Listing(columns=("name", "written by", "about"), rows=rows)


def _presets() -> Listing:
    from affinequant.recipe.presets import PRESETS

    below = {}
    for name, preset in PRESETS.items():
        below[name] = _settings(preset.settings) | _settings(preset.online, "online:")
        for numbers, by_tier in {"weights alone in groups": preset.weights, "4-bit floats": preset.floats}.items():
            for tier, more in by_tier.items():
                below[name] |= _settings(more, f"{tier}, {numbers}:")
        below[name] |= {f"online, kv:{site}": one for site, one in preset.kv.items()}
        below[name] |= {f"with biases:{site}": one for site, one in preset.shifted.items()}
    rows = [(name, preset.about) for name, preset in PRESETS.items()]
    return Listing(columns=("name", "about"), rows=rows, below=below)


def _settings(part: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """What a part of a preset sets, its transforms first, under names that say where it holds."""
    plain = {name: value for name, value in part.items() if name != "transforms"}
    return {f"{where}{name}": value for name, value in (dict(part.get("transforms", {})) | plain).items()}


def _data() -> Listing:
    from affinequant.data.text import DATA

    return Listing(columns=("source", "about"), rows=list(DATA.items()))


def _metrics() -> Listing:
    from affinequant_evals.backends import BACKENDS
    from affinequant_evals.suites import METRICS, SUITES

    suites = [(f"--suite {name}", suite.about) for name, suite in SUITES.items()]
    backends = [(f"--backend {name}", about) for name, about in BACKENDS.items()]
    return Listing(columns=("name", "about"), rows=[*METRICS.items(), *suites, *backends])


def _published() -> Listing:
    from affinequant_evals.published import published

    tables: dict[str, dict[str, None]] = {}
    for row in published():
        tables.setdefault(row.table, {})[row.model] = None
    sources = {row.table: row.source for row in reversed(published())}
    rows = [(name, ", ".join(models), sources[name]) for name, models in tables.items()]
    return Listing(columns=("table", "models", "source"), rows=rows)


def _of(model: str) -> Listing:
    """The published figures of one model."""
    from affinequant_evals.published import published, published_of

    from affinequant.cli.published import COLUMNS, cells

    rows = [(*cells(row), row.weak and f"weak: {row.weak}", row.source) for row in published_of(model)]
    if not rows:
        known = dict.fromkeys(row.model for row in published())
        raise unknown_name("model", model, known, where="--model")
    return Listing(columns=(*COLUMNS, "note", "source"), rows=rows)


TOPICS: dict[str, Callable[[], Listing]] = {
    "schemes": _schemes,
    "models": _models,
    "transforms": _transforms,
    "formats": _formats,
    "presets": _presets,
    "data": _data,
    "metrics": _metrics,
    "published": _published,
}

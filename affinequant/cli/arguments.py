"""Flags: those of a recipe are made from its fields; mistakes get three parts and the nearest spelling."""

import argparse
import difflib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field
from types import ModuleType
from typing import Any, Literal, NoReturn, get_args, get_origin

from affinequant.errors import AffineQuantError, unknown_name
from affinequant.recipe.presets import PRESETS
from affinequant.recipe.recipe import AUTO, CHOICE_SITES, EVERY, PATTERNS, Recipe, options, resolve
from affinequant.recipe.scheme import SCHEMES

_GROUPS = {
    "what": "what to make",
    "method": "how (whatever is not given here, the preset decides)",
    "data": "calibration data",
    "machine": "machine",
    "output": "output",
}
_METAVARS = {"data": "SOURCE", "out": "DIR", "gpu_memory": "SIZE", "cpu_memory": "SIZE"}
_BY_PRESET = {name for preset in PRESETS.values() for name in preset.settings}
_DEFAULTS = {"tier": "online where 4-bit weights or activations need our kernels anyway, else merged"}
"""Defaults that are no one value."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours and which completes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        width = min(shutil.get_terminal_size().columns, 120)
        super().__init__(
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=width),
            **options,
        )

    def error(self, message: str) -> NoReturn:
        """Say the same in three parts.

        Raises:
            AffineQuantError: always.
        """
        found = re.match(r"argument ([^:]+): (.*)", message, re.DOTALL)
        names, what = (found[1].split("/"), found[2]) if found else ([self.prog], message)
        flag = next((name for name in names if name.startswith("--")), names[0])
        what = what.replace("ignored explicit argument", f"{flag} takes no value, and got")
        what = what.replace("expected one argument", "a value is missing")
        what = what.replace("not allowed with argument", f"{flag} cannot go together with")
        if required := re.match(r"the following arguments are required: (.*)", message):
            what = f"{required[1]} is missing"
        raise AffineQuantError(what, flag, f"`{self.prog} --help` shows what can be given")


def parse(name: str, module: ModuleType, about: str, words: Sequence[str]) -> argparse.Namespace | None:
    """The arguments of a command, or None where help was asked for and printed.

    Raises:
        AffineQuantError: anything that cannot be understood, with the nearest spelling.
    """
    parser = Parser(
        prog=f"affinequant {name}",
        usage=f"affinequant {name} {module.USAGE}",
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=module.EPILOG,
        add_help=False,
    )
    module.add_arguments(parser)
    screen = parser.add_argument_group("screen")
    screen.add_argument("--json", action="store_true", help="one JSON object on stdout")
    screen.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    screen.add_argument("-v", "--verbose", action="store_true", help="more of everything; tracebacks of errors")
    screen.add_argument("-h", "--help", action="store_true", help="this")
    if "-h" in words or "--help" in words:
        print(parser.format_help().rstrip())
        return None
    args, left = parser.parse_known_args(list(words))
    if left:
        raise _unexpected_word(parser, left[0])
    return args


def add_recipe(parser: Parser, *, without: Sequence[str] = ()) -> None:
    """A flag for each option of a recipe, in the groups that they name. Nothing is set that was not typed."""
    groups = {name: parser.add_argument_group(title) for name, title in _GROUPS.items()}
    groups["what"].add_argument("--config", metavar="FILE", help="a recipe.toml to start from; flags win over it")
    for name, (entry, hint) in options().items():
        group = groups[entry.metadata["group"]]
        if name == "scheme":
            one = group.add_mutually_exclusive_group()
            one.add_argument("--scheme", metavar="NAME", default=argparse.SUPPRESS, help=_help(name, entry))
            for scheme, about in SCHEMES.items():
                flag, default = f"--{scheme}", argparse.SUPPRESS
                one.add_argument(flag, action="store_const", const=scheme, dest="scheme", default=default, help=about)
        elif name == "transforms":
            text = (
                f"{entry.metadata['help']}; repeat it; NAME none takes the preset's away, auto lets each block choose, "
            )
            text += "auto without a site wherever it can (default: by preset)"
            group.add_argument("--transform", metavar="SITE=NAME", action="append", default=[], help=text)
        elif name in PATTERNS:
            text = f"{entry.metadata['help']}; repeat it"
            metavar = "PATTERN" if name == "keep" else "PATTERN=SCHEME"
            group.add_argument(f"--{name}", metavar=metavar, action="append", default=argparse.SUPPRESS, help=text)
        elif name != "model" and name not in without:
            _add_option(group, name, entry, hint)


def recipe_of(args: argparse.Namespace, fixed: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that was typed; `fixed` fields cannot be typed.

    Raises:
        AffineQuantError: no model, or a value that is not allowed.
    """
    typed = vars(args)
    values = {name: typed[name] for name in options() if typed.get(name) is not None}
    values |= fixed or {}
    if args.transform:
        values["transforms"] = _pairs(args.transform)
    if "set" in values:
        values["set"] = _settings(values["set"])
    if args.config:
        return Recipe.from_toml(args.config, **values)
    return resolve(values, where="MODEL" if "model" not in values else "the command line")


def choice(value: str, allowed: Any, flag: str) -> Any:
    """`value` if the Literal type `allowed` has it.

    Raises:
        AffineQuantError: it has not; the nearest that it has is named.
    """
    if value not in get_args(allowed):
        raise unknown_name(flag.lstrip("-"), value, get_args(allowed), where=flag)
    return value


def whole(text: str) -> int:
    """A whole number, for argparse."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def number(text: str) -> float:
    """A number, for argparse."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _add_option(group: argparse._ArgumentGroup, name: str, entry: "Field[Any]", hint: Any) -> None:
    flags = ["--" + name.replace("_", "-")]
    if name == "out":
        flags.insert(0, "-o")
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(name, entry)}
    if hint is bool:
        group.add_argument(*flags, action=Switch, **options)
        return
    if get_origin(hint) is Literal:
        options["metavar"] = "|".join(get_args(hint))
    elif hint in (int, float):
        options |= {"metavar": "N" if hint is int else "X", "type": whole if hint is int else number}
    else:
        options["metavar"] = _METAVARS.get(name, "NAME")
    group.add_argument(*flags, **options)


class Switch(argparse.BooleanOptionalAction):
    """--flag and --no-flag, without argparse's own remark about the default."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str, default: Any) -> None:
        super().__init__(option_strings, dest, help=help, default=default)
        self.help = help


def _help(name: str, entry: "Field[Any]") -> str:
    text = str(entry.metadata["help"])
    default = _DEFAULTS.get(name, PRESETS["default"].settings.get(name, entry.default))
    if name in _BY_PRESET:
        text += f" (default: by preset; {default})"
    elif default is not MISSING and default != "" and default is not False:
        text += f" (default: {default})"
    return text.replace("%", "%%")


def _pairs(words: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in (word for word in words if word != AUTO):
        site, equals, name = word.partition("=")
        if not (site and equals and name):
            fix = "write SITE=NAME, e.g. --transform vo=hadamard, or auto for every site that can choose; "
            fix += "`affinequant list transforms` shows both"
            raise AffineQuantError(f"cannot read {word!r}", "--transform", fix)
        if site in pairs:
            raise AffineQuantError(f"two transforms for the site {site}", "--transform", "give one for each site")
        pairs[site] = name
    return dict.fromkeys((EVERY, *CHOICE_SITES) if AUTO in words else (), AUTO) | pairs


def _settings(words: Sequence[str]) -> dict[str, str]:
    """Pattern to scheme, in the order in which they were last given."""
    found: dict[str, str] = {}
    for word in words:
        pattern, equals, scheme = word.rpartition("=")
        if not (pattern and equals and scheme):
            fix = "write PATTERN=SCHEME, e.g. --set '*.down_proj=w8a8'"
            raise AffineQuantError(f"cannot read {word!r}", "--set", fix)
        found.pop(pattern, None)
        found[pattern] = scheme
    return found


def _unexpected_word(parser: Parser, word: str) -> AffineQuantError:
    shown = f"`{parser.prog} --help` shows all"
    if not word.startswith("-") or word == "-":
        return AffineQuantError(f"unexpected argument {word!r}", parser.prog, f"leave it out, or quote it; {shown}")
    flag = word.split("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return AffineQuantError(f"unknown option {flag}", parser.prog, hint + shown)


def seeds_of(text: str) -> tuple[int, ...]:
    """`0`, `0-2` or `0,1,5` -> the seeds.

    Raises:
        AffineQuantError: anything else, or one twice (exit 2).
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not found or (found[2] and int(found[2]) < int(found[1])):
            raise AffineQuantError(f"{text!r} names no seeds", "--seeds", "write it like 0-2 or 0,1,5")
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    if len(set(seeds)) < len(seeds):
        raise AffineQuantError(f"{text!r} names a seed twice", "--seeds", "name each once")
    return tuple(seeds)

"""The values of a recipe: what kinds there are, whether an option takes one, how its flag is called, and how TOML has it."""

import json
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from affinequant.errors import AffineQuantError, unknown_name

Tier = Literal["merged", "online"]
Rounding = Literal["nearest", "gptq", "gptaq", "auto"]
Clip = Literal["none", "search", "learn", "learn+search"]
Loss = Literal["mse", "relative"]
Propagate = Literal["quantized", "full"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]
Offload = Literal["auto", "cpu", "disk"]
Format = Literal["auto", "compressed-tensors", "affinequant", "dense"]
Schedule = Literal["constant", "cosine"]
Size = Literal["maximum", "rms"]
Start = Literal["closed-form", "hadamard"]

EXPORTS = ("int-quantized", "humming", "gptq", "gguf", "nvfp4", "mxfp4", "transform-config", "fp_quant")
"""Formats that are made from a finished folder."""
_PAIRS = {"transforms": "SITE=TRANSFORM", "set": "PATTERN=SCHEME"}
"""What is written between an equals sign, by option."""


def check_type(name: str, value: Any, hint: Any) -> None:
    """Whether an option of this name and type takes the value.

    Raises:
        AffineQuantError: it does not; the nearest that it takes is named where they are few.
    """
    option = flag(name)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            if name == "format" and value in EXPORTS:
                fix = f"quantise first, then `affinequant export DIR --format {value}`"
                raise AffineQuantError(f"{value} is made from a finished folder", option, fix)
            raise unknown_name(name.replace("_", " "), str(value), get_args(hint), where=option)
        return
    if get_origin(hint) is dict:
        if not isinstance(value, dict) or not all(isinstance(item, str) for pair in value.items() for item in pair):
            raise AffineQuantError(f"{name} = {value!r}", option, f"give {_PAIRS[name]} pairs")
        return
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise AffineQuantError(f"{name} = {value!r}", option, "give a list of names or patterns")
        return
    allowed = (int, float) if hint is float else hint
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        raise AffineQuantError(f"{name} = {value!r}", option, f"give a value of type {hint.__name__}")


def flag(name: str) -> str:
    """What the command line calls an option."""
    return "--" + name.replace("_", "-")


def toml(value: Any) -> str:
    """A value as TOML writes it; a list's items, and keys, are strings."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # JSON's escapes are TOML's
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml, value))}]"
    return repr(value)


def key(name: str) -> str:
    """A key as TOML writes it: quoted where it is no plain word."""
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else toml(name)


def read_toml(path: str | Path, flag: str, wanted: str) -> dict[str, Any]:
    """The tables of a file that `flag` names; `wanted` says what to give where there is none.

    Raises:
        AffineQuantError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as problem:
        raise AffineQuantError(f"cannot read {path}: {problem.strerror}", flag, wanted) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise AffineQuantError(f"{path} is not TOML: {problem}", flag, "correct that line") from None

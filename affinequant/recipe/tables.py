"""The options of a method, a table each in a recipe: `[distill]`, `[rotation]`. Every one has a flat name too: its flag,
its keyword, its key in the fingerprint and in files from before there were tables."""

import functools
import operator
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

from affinequant.errors import AffineQuantError, unknown_name

T = TypeVar("T")
Divergence = Literal["none", "kl"]


def option(
    default: Any, group: str, text: str, *, same_bytes: bool = False, factory: Any = MISSING, flat: str = ""
) -> Any:
    """A recipe field: its default, its help group and text, whether changing it leaves the result's bytes alone, and in a
    table its flat name."""
    metadata = {"group": group, "help": text, "same_bytes": same_bytes, "flat": flat}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill:
    """`[distill]`: the end-to-end finish."""

    loss: Divergence = option(
        "none", "method", "train scales, gains and clips on the full model's logits at the end", flat="finish"
    )
    epochs: int = option(2, "method", "passes of the finish over the calibration samples", flat="finish_epochs")
    lr: float = option(1e-3, "method", "learning rate of the finish", flat="finish_lr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """`[rotation]`: the learned rotation of the residual stream."""

    steps: int = option(
        100, "method", "steps that learn the rotation of the residual stream, where one is", flat="rotation_steps"
    )
    len: int = option(2048, "method", "tokens of each of those steps, at most", flat="rotation_len")
    lr: float = option(0.05, "method", "radians by which the first of those steps turn a feature", flat="rotation_lr")


TABLES: dict[str, Any] = {"distill": Distill, "rotation": Rotation}
FLAT: dict[str, tuple[str, str]] = {
    entry.metadata["flat"]: (table, entry.name) for table, kind in TABLES.items() for entry in fields(kind)
}
"""flat name -> (table, key in it)."""


def flat(values: Mapping[str, Any], *, where: str = "the recipe") -> dict[str, Any]:
    """The values with the options of tables by their flat names, in one order whichever way they were given. Beside a
    whole table, an instance of its class, a flat name replaces what stands in it.

    Raises:
        AffineQuantError: a table that is none, a key that it has not, or an option that is given in both ways.
    """
    result: dict[str, Any] = {}
    for name, value in values.items():
        if name not in TABLES:
            result[name] = value
            continue
        known = {key: one for one, (table, key) in FLAT.items() if table == name}
        whole = isinstance(value, TABLES[name])
        table: Any = asdict(value) if whole else value
        if not isinstance(table, Mapping):
            raise AffineQuantError(f"{name} = {value!r}", where, f"give a table of {', '.join(known)}")
        for key, item in table.items():
            if key not in known:
                raise unknown_name("recipe field", f"{name}.{key}", [f"{name}.{one}" for one in known], where=where)
            if not whole and known[key] in values:
                what = f"{name}.{key} and {known[key]} are one option"
                raise AffineQuantError(what, where, "give it once")
            result[known[key]] = item
    return result | {name: values[name] for name in FLAT if name in values}


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with every table made, from its options by their flat names and from its defaults."""
    plain = flat(values)
    made = {
        table: kind(**{key: plain[name] for name, (owner, key) in FLAT.items() if owner == table and name in plain})
        for table, kind in TABLES.items()
    }
    return {name: value for name, value in plain.items() if name not in FLAT} | made


def with_flat_names(cls: type[T]) -> type[T]:
    """A recipe class that takes flat names as keywords, in `dataclasses.replace` too, and has them as attributes."""
    made = cls.__init__

    @functools.wraps(made)
    def __init__(self: T, **values: Any) -> None:
        made(self, **nested(values))

    cls.__init__ = __init__
    for name, path in FLAT.items():
        setattr(cls, name, property(operator.attrgetter(".".join(path))))
    return cls

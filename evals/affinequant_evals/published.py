"""Figures as others published them, from `published.toml`: one value a row, each comparable within its own table only."""

import functools
import math
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

FULL_PRECISION = "full precision"
"""The name of the method in the rows of unquantised models."""
TASKS = "tasks"
"""What is measured in rows that are the mean of tasks, in per cent."""
_PERCENT = (TASKS, "mmlu", "c-eval", "aime-2024")
_OWN = ("source", "protocol", "scheme", "queries", "tolerance", "tasks", "lm_eval", "weak")
"""What a method's rows may have otherwise than their table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One published figure.

    Attributes:
        table: names the table; figures of two tables are not comparable.
        method: as the source calls it, or `full precision`.
        model: `llama-2-7b`.
        measured: `wikitext2`, `c4-old` or `c4-new` (perplexity), `tasks` (the mean of `tasks`), ...
        value: a perplexity, or per cent; nan where the source says so.
        scheme: the numbers, as our schemes are named.
        source, protocol: where it was read, and how it was measured.
        queries: bits of the queries.
        tolerance: the share of `value` by which a rerun may miss it.
        tasks: whose mean it is; empty where the source does not say, and for texts.
        lm_eval: the generation of lm-eval, `0.3` or `0.4`.
        weak: why the source is a weak one, or "".
        preset: of ours, which is the same method, or "".
    """

    table: str
    method: str
    model: str
    measured: str
    value: float
    scheme: str
    source: str
    protocol: str
    queries: int = 16
    tolerance: float = 0.02
    tasks: tuple[str, ...] = ()
    lm_eval: str = ""
    weak: str = ""
    preset: str = ""

    @property
    def full(self) -> bool:
        """Whether it is of the unquantised model."""
        return self.method == FULL_PRECISION

    @property
    def unit(self) -> str:
        """`%`, or "" of a perplexity."""
        return "%" if self.measured in _PERCENT else ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = {one.name: getattr(self, one.name) for one in fields(self)} | {"unit": self.unit}
        return plain | {"tasks": list(self.tasks), "value": self.value if math.isfinite(self.value) else None}


@functools.cache
def published() -> tuple[Published, ...]:
    """All rows, in the order of the file."""
    tables = tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))
    return tuple(row for name, table in tables.items() for row in _rows(name, table))


def published_of(model: str) -> tuple[Published, ...]:
    """The rows of a model, by the last part of its folder's or hub id's name; none where nothing is known of it."""
    name = Path(os.path.abspath(model)).name.lower().removesuffix("-hf").removeprefix("meta-")
    return tuple(row for row in published() if row.model == name)


def _rows(name: str, table: Mapping[str, Any]) -> Iterator[Published]:
    for measured, methods in table["rows"].items():
        for method, values in methods.items():
            own = {key: table[key] for key in _OWN if key in table} | table.get("methods", {}).get(method, {})
            own["tasks"] = tuple(own.get("tasks", ())) if measured == TASKS else ()
            own |= {"lm_eval": own.get("lm_eval", "") if measured == TASKS else ""}
            if method == FULL_PRECISION:
                own |= {"scheme": "", "queries": 16}
            preset = table.get("presets", {}).get(method, "")
            for model, value in zip(table["models"], values, strict=True):
                if value != "-":
                    row = {"table": name, "method": method, "model": model, "measured": measured, "preset": preset}
                    yield Published(**row, value=float(value), **own)

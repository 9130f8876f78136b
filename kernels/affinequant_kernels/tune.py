"""Which kernel configuration to use, from tables.

A lookup never measures anything: it takes the user's table ($AFFQ_CACHE, or ~/.cache/affinequant/kernels), the table
shipped for this GPU, or a rule of thumb, in this order. A table is DEVICE.json with {"configs": {size: configuration}}.
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from .weight import Kind

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How to launch a product."""

    path: Literal["gemm", "gemv"] = "gemm"
    bn: int = 128  # output features of a tile
    bm: int = 128  # tokens of a tile
    bj: int = 64  # weight bytes of a row per step (gemm: 32 or 64); int32 words per step (gemv)
    split: int = 1  # programs per tile, along K
    programs: int | None = None  # persistent: at most so many programs walk over the tiles
    warps: int = 8
    stages: int = 3


def bucket(m: int) -> int:
    """The least tabulated number of tokens that is not smaller."""
    return next((b for b in BUCKETS if b >= m), BUCKETS[-1])


def _divisor_split(tiles: int, steps: int, wanted: int) -> int:
    """A power of two that brings about `wanted` programs, with at least four steps each."""
    split = 1
    while split < 8 and tiles * split < wanted and steps // (2 * split) >= 4:
        split *= 2
    return split


def rule(m: int, n: int, k: int, kind: Kind, bits: int, processors: int) -> Config:
    """A configuration for a GPU that no table knows."""
    if m <= 2 and kind == "channel" and bits == 4 and k % 4 == 0:
        return Config(path="gemv", bn=16, bm=1, bj=128, warps=4)
    if m <= 64:
        bm = 16 if m <= 16 else 32 if m <= 32 else 64
        tiles = -(-n // 64)
        split = 1 if kind == "group" else _divisor_split(tiles, -(-k // 128), 2 * processors)
        return Config(bn=64, bm=bm, split=split, warps=4, stages=4)
    if kind == "group":
        return Config(bn=128, bm=64, warps=8)
    return Config(bn=128, bm=128, warps=8)


def _key(m: int, n: int, k: int, kind: Kind, bits: int) -> str:
    return f"{kind}{bits} m{bucket(m)} n{n} k{k}"


def device_name(name: str) -> str:
    """A device's name as that of a file or folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def cache_folder() -> Path:
    """Where this user's tables are."""
    return Path(os.environ.get("AFFQ_CACHE") or "~/.cache/affinequant/kernels").expanduser()


def read_table(path: Path) -> dict[str, Config]:
    """The configurations of a file, by size; none where there is no file. Raises ValueError for anything else."""
    if not path.is_file():
        return {}
    try:
        return {key: Config(**value) for key, value in json.loads(path.read_text())["configs"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise ValueError(f"{path}: not a table of configurations ({problem}); write it again") from problem


@functools.cache
def _table(device: str) -> dict[str, Config]:
    file = device_name(device) + ".json"
    return read_table(Path(__file__).parent / "tables" / file) | read_table(cache_folder() / file)


@functools.cache
def _device(index: int | None) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    return properties.name, properties.multi_processor_count


def lookup(m: int, n: int, k: int, kind: Kind, bits: int, device: torch.device) -> Config:
    """The configuration for these sizes on this device."""
    if device.type != "cuda":  # the interpreter
        return rule(m, n, k, kind, bits, 8)
    name, processors = _device(device.index)
    return _table(name).get(_key(m, n, k, kind, bits)) or rule(m, n, k, kind, bits, processors)

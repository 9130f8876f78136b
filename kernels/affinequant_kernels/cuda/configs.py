"""Which kernel configuration to use, from tables, which the search of `bench/search.py` fills.

A lookup never measures anything: it takes the user's table ($AFFQ_CACHE, or ~/.cache/affinequant/kernels), the table
shipped for this GPU, or a rule of thumb, in this order. A table is a file DEVICE/tune.json in such a folder:
{"configs": {size: configuration}}.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from affinequant_kernels.cache import cache_folder
from affinequant_kernels.weight import Kind

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


def a16_tile(m: int, n: int, k: int, device: torch.device) -> tuple[int, int]:
    """Tokens of a tile of `weight_only.w4a16_linear`, and programs per tile."""
    bm = 16 if m <= 16 else 32 if m <= 32 else 64
    processors = device_facts(device.index)[1] if device.type == "cuda" else 8
    return bm, _divisor_split(-(-n // 64) * -(-m // bm), -(-k // 128), 2 * processors)


def rule(m: int, n: int, k: int, kind: Kind, bits: int, processors: int, wide: bool = False) -> Config:
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
    # The more outputs a tile has, the fewer bytes it takes from the L2 cache for each; weights cost half a byte. With less
    # than a tile for every processor some would have nothing to do.
    if wide and kind == "channel" and bits == 4 and -(-n // 256) * -(-m // 128) >= processors:
        return Config(bn=256, bm=128, warps=8)
    return Config(bn=128, bm=128, warps=8)


def rows_to_meet(n: int, k: int, kind: Kind, bits: int, device: torch.device) -> list[int]:
    """Numbers of tokens among which is every kernel that a layer of this size can come to be launched with.

    Kernels do not depend on the number of tokens itself, only on the choices made by it: the configuration, the tile of
    weights alone, and the rows at a time of block-diagonal transforms.
    """
    seen: dict[object, int] = {}
    for m in BUCKETS:
        seen.setdefault((lookup(m, n, k, kind, bits, device), a16_tile(m, n, k, device), m > 2048), m)
    return list(seen.values())


def size_key(m: int, n: int, k: int, kind: Kind, bits: int) -> str:
    return f"{kind}{bits} m{bucket(m)} n{n} k{k}"


def device_name(name: str) -> str:
    """A device's name as that of a file or folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def table_path(folder: Path, device: str) -> Path:
    """The file of a device's table."""
    return folder / device_name(device) / "tune.json"


def read_table(path: Path) -> dict[str, Config]:
    """The configurations of a file, by size; none where there is no file. Raises ValueError for anything else."""
    if not path.is_file():
        return {}
    try:
        return {key: Config(**value) for key, value in json.loads(path.read_text())["configs"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise ValueError(f"{path}: not a table of configurations ({problem}); write it again") from problem


def write_table(path: Path, configs: dict[str, Config], about: dict[str, Any]) -> None:
    """Add configurations to a table; those of other sizes that it holds stay."""
    merged = read_table(path) | configs
    text = json.dumps(about | {"configs": {key: asdict(merged[key]) for key in sorted(merged)}}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(text + "\n")
    new.replace(path)


@functools.cache
def _table(device: str) -> dict[str, Config]:
    shipped = Path(__file__).parents[1] / "tables"
    return read_table(table_path(shipped, device)) | read_table(table_path(cache_folder(), device))


@functools.cache
def device_facts(index: int | None) -> tuple[str, int, bool]:
    """Name, multiprocessors, and whether tiles of 256 x 128 fit the registers, zero points included: on Hopper they do
    (aot.py), on Ada 79 are spilled."""
    properties = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    return properties.name, properties.multi_processor_count, properties.major == 9


def lookup(m: int, n: int, k: int, kind: Kind, bits: int, device: torch.device) -> Config:
    """The configuration for these sizes on this device."""
    if device.type != "cuda":  # the interpreter
        return rule(m, n, k, kind, bits, 8)
    name, processors, wide = device_facts(device.index)
    return _table(name).get(size_key(m, n, k, kind, bits)) or rule(m, n, k, kind, bits, processors, wide)

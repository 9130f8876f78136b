"""Which kernel configuration to use, from tables; and, as a program, the search that fills them.

    python -m affinequant_kernels.tune --shapes 4096x4096,12288x4096      needs a CUDA device; writes JSON

A lookup never measures anything: it takes the user's table ($AFFQ_CACHE, or ~/.cache/affinequant/kernels), the table
shipped for this GPU, or a rule of thumb, in this order.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from dataclasses import asdict, dataclass
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


@functools.cache
def _table(device_name: str) -> dict[str, Config]:
    file = device_name.replace(" ", "-").replace("/", "-") + ".json"
    own = Path(os.environ.get("AFFQ_CACHE") or Path.home() / ".cache" / "affinequant" / "kernels")
    entries: dict[str, Config] = {}
    for path in (Path(__file__).parent / "tables" / file, own / file):
        if path.is_file():
            entries |= {key: Config(**value) for key, value in json.loads(path.read_text())["configs"].items()}
    return entries


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


def candidates(m: int, kind: Kind, bits: int) -> list[Config]:
    """What the search tries."""
    small = m <= 64
    bms = sorted({16, 32, min(64, bucket(max(m, 16)))}) if small else [64, 128, 256]
    found = [
        Config(bn=bn, bm=bm, split=split, warps=4 if bn * bm <= 64 * 128 else 8, stages=stages)
        for bm in bms
        if not small or bm >= min(m, 64)
        for bn in ((64, 128) if small else (128,))
        for split in ((1, 2, 4, 8) if small and kind != "group" else (1,))
        for stages in (3, 4)
    ]
    if not small and kind != "group":
        found += [Config(bm=bm, programs=264 if bm == 128 else 132, stages=3) for bm in (128, 256)]
    if m <= 2 and kind == "channel" and bits == 4:
        found += [Config(path="gemv", bn=bn, bm=1, bj=bj, warps=4) for bn in (8, 16, 32) for bj in (64, 128)]
    return found


def search(shapes: list[tuple[int, int]], rows: list[int], kind: Kind, bits: int) -> dict[str, dict[str, object]]:
    """The fastest candidate for every size, by the median of cold runs. Needs CUDA."""
    from triton.testing import do_bench

    from . import bench, gemm, quant

    chosen: dict[str, dict[str, object]] = {}
    for n, k in shapes:
        weight = bench.sample_weight(n, k, kind, bits).to("cuda")
        for m in rows:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            part = quant.row_quant(x, bits=4, symmetric=True, clip=1.0)
            timed: list[tuple[float, Config]] = []
            for config in candidates(m, kind, bits):

                def call(config: Config = config, part: Rows = part, weight: Weight = weight) -> torch.Tensor:
                    return gemm.linear(part.q, part.scale, None, part.rowsum, weight, None, torch.bfloat16, config)

                try:
                    timed.append((float(do_bench(call, warmup=5, rep=20, return_mode="median")), config))
                except Exception as error:  # a tile that does not fit this GPU's shared memory or registers
                    print(f"  skipped {config}: {type(error).__name__}")
            best = min(timed, key=lambda pair: pair[0])
            chosen[_key(m, n, k, kind, bits)] = asdict(best[1])
            print(f"n{n} k{k} m{m}: {best[0] * 1e3:.1f} us  {best[1]}")
    return chosen


def main() -> None:
    """Search, and write a table for this GPU."""
    parser = argparse.ArgumentParser(prog="python -m affinequant_kernels.tune", description=main.__doc__)
    parser.add_argument("--shapes", default="4096x4096,12288x4096,22016x4096,4096x11008", help="NxK, comma separated")
    parser.add_argument("--rows", default="1,16,64,256,2048,8192", help="numbers of tokens")
    parser.add_argument("--kind", default="channel", choices=("channel", "integer", "group"))
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("AFFQ_CACHE") or "~/.cache/affinequant/kernels")
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("the search measures on a CUDA device, and there is none")
    shapes = [(int(n), int(k)) for n, k in (s.split("x") for s in arguments.shapes.split(","))]
    import triton

    name = torch.cuda.get_device_name()
    path = arguments.out.expanduser() / (name.replace(" ", "-").replace("/", "-") + ".json")
    table = json.loads(path.read_text()) if path.is_file() else {"configs": {}}
    found = search(shapes, [int(r) for r in arguments.rows.split(",")], arguments.kind, arguments.bits)
    table |= {"device": name, "triton": triton.__version__, "torch": torch.__version__}
    table["configs"] |= found
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(path)


if __name__ == "__main__":
    main()

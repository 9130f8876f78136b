"""Which kernel configuration to use, from tables; and, as a program, the search that fills them.

    python -m affinequant_kernels.tune --shapes 4096x4096,12288x4096      needs a CUDA device; writes JSON

A lookup never measures anything: it takes the user's table ($AFFQ_CACHE, or ~/.cache/affinequant/kernels), the table
shipped for this GPU, or a rule of thumb, in this order. A table is a file DEVICE/tune.json in such a folder:
{"configs": {size: configuration}}.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from .cache import cache_folder
from .weight import Kind

if TYPE_CHECKING:
    from .weight import Weight

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# The search takes all of them, those first that stand for the others should its time run out.
SEARCHED = tuple(sorted(BUCKETS, key=lambda m: m not in (1, 16, 64, 256, 2048, 8192)))


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
    """Tokens of a tile of `gemm_group.w4a16_linear`, and programs per tile."""
    bm = 16 if m <= 16 else 32 if m <= 32 else 64
    processors = _device(device.index)[1] if device.type == "cuda" else 8
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


def _key(m: int, n: int, k: int, kind: Kind, bits: int) -> str:
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


@functools.cache
def _table(device: str) -> dict[str, Config]:
    shipped = Path(__file__).parent / "tables"
    return read_table(table_path(shipped, device)) | read_table(table_path(cache_folder(), device))


@functools.cache
def _device(index: int | None) -> tuple[str, int, bool]:
    """Name, multiprocessors, and whether tiles of 256 x 128 fit the registers, zero points included: on Hopper they do
    (aot.py), on Ada 79 are spilled."""
    properties = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    return properties.name, properties.multi_processor_count, properties.major == 9


def lookup(m: int, n: int, k: int, kind: Kind, bits: int, device: torch.device) -> Config:
    """The configuration for these sizes on this device."""
    if device.type != "cuda":  # the interpreter
        return rule(m, n, k, kind, bits, 8)
    name, processors, wide = _device(device.index)
    return _table(name).get(_key(m, n, k, kind, bits)) or rule(m, n, k, kind, bits, processors, wide)


# The search. Nothing below runs when a model is served.


def candidates(m: int, n: int, k: int, kind: Kind, bits: int, processors: int, wide: bool = False) -> list[Config]:
    """What the search tries for m tokens: a dozen or two, the rule of thumb among them."""
    first = rule(m, n, k, kind, bits, processors, wide)
    if m <= 64:
        bm = max(16, bucket(m))
        splits = (1,) if kind == "group" else (1, 2, 4, 8)
        found = [Config(bn=bn, bm=bm, split=s, warps=4, stages=4) for bn in (64, 128) for s in splits]
        found += [Config(bn=64, bm=bm, split=s, warps=4, stages=3) for s in splits[1:3] or splits]
        if m <= 2 and kind == "channel" and bits == 4 and k % 4 == 0:
            found += [Config(path="gemv", bn=bn, bm=1, bj=bj, warps=4) for bn in (8, 16, 32) for bj in (64, 128)]
    else:
        # A group's fp32 sums take as many registers again, so there a tile has at most 64 tokens.
        bms = [bm for bm in (64, 128, 256) if bm == 64 or (kind != "group" and bm <= bucket(m))]
        found = [
            Config(bn=128, bm=bm, warps=warps, stages=stages)
            for bm in bms
            for warps in ((4, 8) if bm == 64 else (8,))
            for stages in (3, 4)
        ]
        if wide and kind == "channel" and bits == 4:
            found += [Config(bn=256, bm=128)]  # with four stages and zero points registers spill
        # Persistent with 256 tokens, registers spill.
        found += [Config(bm=128, programs=2 * processors)] if 128 in bms else []
    return list(dict.fromkeys([first, *found]))


def search(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    kind: Kind,
    bits: int,
    minutes: float,
    say: Callable[[str], None],
) -> Iterator[tuple[str, Config]]:
    """Size and fastest candidate, as they are found, until the time is over: with zero points on both sides, which is what
    a run makes by default. Needs CUDA."""
    from .bench_layers import sample_weight

    end = time.monotonic() + 60 * minutes
    weights = {(n, k): sample_weight(n, k, kind, bits, "cuda", zero=True) for n, k in shapes}
    # Tokens outside, shapes inside: a candidate is compiled once and serves every shape.
    for m in rows:
        for (n, k), weight in weights.items():
            key = _key(m, n, k, kind, bits)
            if time.monotonic() > end:
                say(f"{key}: left out for want of time")
                continue
            timed = _time_candidates(m, n, k, weight, kind, bits, say)
            if not timed:
                say(f"{key}: no candidate works here; the rule of thumb stays")
                continue
            best, milliseconds = min(timed.items(), key=lambda pair: pair[1])
            say(f"{key}: {milliseconds * 1e3:.1f} us, {len(timed)} candidates, {best}")
            yield key, best


def _time_candidates(
    m: int, n: int, k: int, weight: Weight, kind: Kind, bits: int, say: Callable[[str], None]
) -> dict[Config, float]:
    """Milliseconds with a cold cache, of the candidates that work and are exact."""
    from triton.testing import do_bench

    from . import gemm, quant, reference

    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    q = quant.row_quant(x, bits=4, symmetric=False, clip=1.0)
    few = slice(0, 256)  # the reference multiplies in fp64
    wanted = reference.linear(q.q[few], q.scale[few], q.zero[few], weight, None, torch.bfloat16)
    timed: dict[Config, float] = {}
    for config in candidates(m, n, k, kind, bits, *_device(None)[1:]):
        call = functools.partial(gemm.linear, q.q, q.scale, q.zero, q.rowsum, weight, None, torch.bfloat16, config)
        try:
            if not torch.equal(call()[few], wanted):
                say(f"  skipped, it differs from the reference: {config}")
                continue
            timed[config] = cast(float, do_bench(call, warmup=5, rep=20, return_mode="median"))
        except Exception as error:  # a tile that does not fit this GPU's shared memory or registers
            say(f"  skipped, {type(error).__name__}: {config}")
    return timed


def write_table(path: Path, configs: dict[str, Config], about: dict[str, Any]) -> None:
    """Add configurations to a table; those of other sizes that it holds stay."""
    merged = read_table(path) | configs
    text = json.dumps(about | {"configs": {key: asdict(merged[key]) for key in sorted(merged)}}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(text + "\n")
    new.replace(path)


def main() -> int:
    """Search for the fastest configuration of each size on this GPU, and write a table of them."""
    from .bench import check_minutes, check_sizes, read_rows, read_shapes

    parser = argparse.ArgumentParser(prog="python -m affinequant_kernels.tune", description=main.__doc__)
    parser.add_argument("--shapes", metavar="NxK,...", default="4096x4096,12288x4096,22016x4096,4096x11008")
    rows = ",".join(map(str, SEARCHED))
    parser.add_argument("--rows", metavar="M,...", default=rows, help=f"numbers of tokens (default: {rows})")
    parser.add_argument("--kind", default="channel", choices=("channel", "integer", "group"), help="kind of weight")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8), help="bits of the weight")
    parser.add_argument("--minutes", metavar="X", type=float, default=6.0, help="start no size later (default: 6)")
    parser.add_argument("--out", metavar="DIR", type=Path, help=f"default: {cache_folder()}, where it takes effect")
    given = parser.parse_args()
    try:
        shapes, rows = read_shapes(given.shapes), read_rows(given.rows)
        check_sizes(shapes, rows)
        check_minutes(given.minutes)
        if given.kind == "integer" and given.bits == 8:
            raise ValueError("bits: expected 4 for kind integer, got 8")
        if not torch.cuda.is_available():
            raise ValueError("the search measures on a CUDA device, and there is none here")
        name = torch.cuda.get_device_name()
        path = table_path(given.out or cache_folder(), name)
        read_table(path)  # before minutes are spent
    except ValueError as problem:
        parser.error(str(problem))
    import triton

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    about = {
        "device": name,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    for key, config in search(shapes, rows, given.kind, given.bits, given.minutes, say):
        write_table(path, {key: config}, about)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

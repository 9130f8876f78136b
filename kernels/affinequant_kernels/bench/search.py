"""The search for the fastest configuration of every size, as a program. It writes the tables that `cuda/configs.py` reads.

python -m affinequant_kernels.tune --shapes 4096x4096,12288x4096      needs a CUDA device; writes JSON
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch

from affinequant_kernels import reference
from affinequant_kernels.bench.layers import sample_weight
from affinequant_kernels.bench.settings import check_minutes, check_sizes, read_rows, read_shapes
from affinequant_kernels.cache import cache_folder
from affinequant_kernels.cuda.configs import (
    BUCKETS,
    Config,
    bucket,
    device_facts,
    read_table,
    rule,
    size_key,
    table_path,
    write_table,
)
from affinequant_kernels.weight import Kind, Weight

# The search takes all tabulated numbers of tokens, those first that stand for the others should its time run out.
SEARCHED = tuple(sorted(BUCKETS, key=lambda m: m not in (1, 16, 64, 256, 2048, 8192)))


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
    end = time.monotonic() + 60 * minutes
    weights = {(n, k): sample_weight(n, k, kind, bits, "cuda", zero=True) for n, k in shapes}
    # Tokens outside, shapes inside: a candidate is compiled once and serves every shape.
    for m in rows:
        for (n, k), weight in weights.items():
            key = size_key(m, n, k, kind, bits)
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

    from affinequant_kernels.cuda import gemm, quant

    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    q = quant.row_quant(x, bits=4, symmetric=False, clip=1.0)
    few = slice(0, 256)  # the reference multiplies in fp64
    wanted = reference.linear(q.q[few], q.scale[few], q.zero[few], weight, None, torch.bfloat16)
    timed: dict[Config, float] = {}
    for config in candidates(m, n, k, kind, bits, *device_facts(None)[1:]):
        call = functools.partial(gemm.linear, q.q, q.scale, q.zero, q.rowsum, weight, None, torch.bfloat16, config)
        try:
            if not torch.equal(call()[few], wanted):
                say(f"  skipped, it differs from the reference: {config}")
                continue
            timed[config] = cast(float, do_bench(call, warmup=5, rep=20, return_mode="median"))
        except Exception as error:  # a tile that does not fit this GPU's shared memory or registers
            say(f"  skipped, {type(error).__name__}: {config}")
    return timed


def main() -> int:
    """Search for the fastest configuration of each size on this GPU, and write a table of them."""
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

"""Triton: what every product does with a tile: where it lies, what it reads of the activations, where it goes.

Shapes: M rows (tokens), N output features, K input features; tile BN x BM.
"""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from affinequant_kernels.checks import fail

FINISH = (
    128,
    4,
)  # features and tokens of a tile of the kernels that add up shares: four sums a thread, and many programs


@triton.jit
def tile_of(pid, N, M, BN: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr):
    """Tile indices such that GROUP tiles of weights are in use at a time: their activations stay in the L2 cache."""
    tiles_n, tiles_m = tl.cdiv(N, BN), tl.cdiv(M, BM)
    band = pid // (GROUP * tiles_m)
    width = tl.minimum(tiles_n - band * GROUP, GROUP)
    within = pid % (GROUP * tiles_m)
    return band * GROUP + within % width, within // width


@triton.jit
def load_activations(a_ptr, rm, k, K, EVEN: tl.constexpr):
    """A^T tile [columns, rows]; columns past K are 0."""
    at = a_ptr + rm[None, :].to(tl.int64) * K + k[:, None]
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=(k < K)[:, None], other=0)


@triton.jit
def store_tile(y, out_ptr, rn, rm, N, M):
    """A tile [features, tokens] into [M, N], as far as it lies inside."""
    at = rm[:, None].to(tl.int64) * N + rn[None, :]
    tl.store(out_ptr + at, tl.trans(y).to(out_ptr.dtype.element_ty), mask=(rm < M)[:, None] & (rn < N)[None, :])


def group_step(group_size: int, bj: int) -> int:
    """Bytes per step such that the columns of one half-step belong to one group. Raises ValueError where none does."""
    if group_size % 32:
        raise fail("group size", "a multiple of 32 on this device", group_size)
    return min(bj, 64 if group_size % 64 == 0 else 32)

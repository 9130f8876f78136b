"""What each op may be given. Shapes may be symbolic here: the checks also run under torch.compile.

Values (finite scales, codes in range) are checked once, in `prepare_weight`; with these checks no kernel reads out of
bounds. Every check takes an op's arguments by their names, and raises ValueError.

Shapes: m rows (tokens), k input features, n output features, t tokens, h heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from affinequant_kernels import layout
from affinequant_kernels.checks import FLOATS, WEIGHT_ONLY, check_quant, check_tensor, fail
from affinequant_kernels.weight import Weight

_OUT = (*FLOATS, torch.int32)


# Rows that are quantised.


def check_rows(x: Tensor, bits: int, clip: float, group: int = 0) -> None:
    """x [m, k] of floats, the settings of a quantiser, and a group that divides k, or 0."""
    check_tensor("x", x, (None, None), FLOATS)
    check_quant(bits, clip)
    if group < 0 or (group and x.shape[1] % group):
        raise fail("group", f"0, or a size that divides {x.shape[1]} columns", group)


def check_kron(x: Tensor, left: Tensor, right: Tensor, bits: int, clip: float, group: int) -> None:
    """Two square matrices whose sizes multiply to x's width."""
    check_rows(x, bits, clip, group)
    _check_factor(x, left, right)


def check_block(x: Tensor, matrices: Tensor, bits: int, clip: float, group: int) -> None:
    """Square matrices [blocks, b, b] that fill x's width, or one that divides it."""
    check_rows(x, bits, clip, group)
    _check_factor(x, matrices)


def _check_factor(x: Tensor, *matrices: Tensor) -> None:
    """(left, right) of a Kronecker product or (blocks,), for x [..., k]."""
    k = x.shape[-1]
    for name, matrix in zip(("left", "right") if len(matrices) == 2 else ("matrices",), matrices, strict=True):
        check_tensor(name, matrix, (None,) * (4 - len(matrices)), FLOATS, x.device)
        if matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
            raise fail(name, "square matrices", list(matrix.shape))
    first, size = matrices[0].shape[0], matrices[-1].shape[-1]
    if len(matrices) == 2 and first * size != k:
        raise fail("left, right", f"sizes whose product is {k}", (first, size))
    if len(matrices) == 1 and (k % size or (first != 1 and first * size != k)):
        raise fail("matrices", f"one matrix, or as many as fill {k} columns", list(matrices[0].shape))


def check_norm(x: Tensor, residual: Tensor | None, gain: Tensor, eps: float, bits: int, clip: float) -> None:
    """A residual like x, a gain [k] and a positive eps."""
    check_rows(x, bits, clip)
    if residual is not None:
        check_tensor("residual", residual, tuple(x.shape), (x.dtype,), x.device)
    check_tensor("gain", gain, (x.shape[1],), FLOATS, x.device)
    if not eps > 0:
        raise fail("eps", "a positive number", eps)


def check_gate(gate_up: Tensor, bits: int, clip: float) -> None:
    """Rows [gate | up]."""
    check_tensor("gate_up", gate_up, (None, None), FLOATS)
    check_quant(bits, clip)
    if gate_up.shape[1] % 2 or gate_up.shape[1] == 0:
        raise fail("gate_up", "an even number of columns", gate_up.shape[1])


# Layers.


def check_weight(k: int, device: torch.device, weight: Weight, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    """A weight of k columns on a device, a bias [n], and a type that its products can be handed out in."""
    qweight, scale, zero, mul, colsum = weight
    four = qweight.dtype == torch.uint8
    columns = layout.packed_columns(k) if four else k
    check_tensor("qweight", qweight, (None, columns), (torch.uint8, torch.int8), device)
    n = qweight.shape[0]
    grouped = scale.ndim == 2
    check_tensor("w_scale", scale, (n, None) if grouped else (n,), (torch.float32,), device)
    groups = None
    if mul is not None:
        if grouped or not four:
            raise fail("w_mul", "None beside a scale per group or 8-bit codes", list(mul.shape))
        check_tensor("w_mul", mul, (n, None), (torch.uint8,), device)
        groups = mul.shape[1]
    elif grouped:
        groups = scale.shape[1]
    if groups is not None and (groups == 0 or k % groups):
        raise fail("w_mul" if mul is not None else "w_scale", f"a number of groups that divides {k} columns", groups)
    if zero is not None:
        check_tensor("w_zero", zero, (n,) if groups is None else (n, groups), (torch.int8,), device)
    in_groups = colsum.ndim == 2  # what is multiplied by it
    if in_groups:
        _check_act_groups(k, groups, mul, colsum.shape[1])
    sums = (n, None) if in_groups else (n,)
    check_tensor("w_colsum", colsum, sums, (torch.int32 if in_groups or not grouped else torch.float32,), device)
    if bias is not None:
        check_tensor("bias", bias, (n,), FLOATS, device)
    if out_dtype not in _OUT or ((grouped or in_groups) and out_dtype == torch.int32):
        raise fail("out_dtype", "a float type, or int32 without a scale per group", out_dtype)
    # The accumulator, zero points included, must fit int32.
    if k * 255 * (255 if not four else 128) >= 1 << 31:
        raise fail("k", "an accumulator within int32", f"{k} columns")


def _check_act_groups(k: int, groups: int | None, mul: Tensor | None, count: int) -> None:
    if count == 0 or k % count or mul is not None or groups not in (None, count):
        wanted = (
            f"as many groups as the weight has, {groups}" if groups else f"a number of groups that divides {k} columns"
        )
        raise fail("w_colsum", "no groups beside multipliers" if mul is not None else wanted, count)


def check_product(
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    rowsum: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Rows as a quantiser makes them, and a weight that fits them."""
    check_tensor("q", q, (None, None), (torch.int8,))
    shape = (q.shape[0], *weight.colsum.shape[1:])
    check_tensor("scale", scale, shape, (torch.float32,), q.device)
    for name, part in (("zero", zero), ("rowsum", rowsum)):
        if part is not None:
            check_tensor(name, part, shape, (torch.int32,), q.device)
    check_weight(q.shape[1], q.device, weight, bias, out_dtype)


def check_layer(
    x: Tensor, weight: Weight, bias: Tensor | None, act_bits: int, clip: float, out_dtype: torch.dtype | None
) -> None:
    """x [..., k], the settings of its quantiser, and a weight that fits."""
    _check_input(x)
    check_quant(act_bits, clip)
    check_weight(x.shape[-1], x.device, weight, bias, out_dtype or x.dtype)


def check_weight_only(x: Tensor, weight: Weight, bias: Tensor | None, out_dtype: torch.dtype | None) -> None:
    """x [..., k], a weight that fits, and an output of floats."""
    _check_input(x)
    if out_dtype not in (None, *FLOATS):
        raise fail("out_dtype", "a float type", out_dtype)
    check_weight(x.shape[-1], x.device, weight, bias, out_dtype or x.dtype)


def check_online(
    x: Tensor,
    matrices: Sequence[Tensor],
    weight: Weight,
    bias: Tensor | None,
    act_bits: int,
    clip: float,
    out_dtype: torch.dtype | None,
) -> None:
    """As `check_weight_only`, with matrices in an order that `factors` takes, each of x's width."""
    check_weight_only(x, weight, bias, out_dtype)
    if act_bits != WEIGHT_ONLY:
        check_quant(act_bits, clip)
    for factor in factors(matrices):
        _check_factor(x, *factor)


def _check_input(x: Tensor) -> None:
    if x.ndim == 0:
        raise fail("x", "shape [..., k]", [])
    check_tensor("x", x, x.shape, FLOATS)


def factors(matrices: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """What a flat list of matrices means, one factor at a time: (left, right) of a Kronecker product, or (blocks,).

    Raises:
        ValueError: a matrix without its partner.
    """
    waiting: Tensor | None = None
    for matrix in matrices:
        if matrix.ndim == 2:
            if waiting is None:
                waiting = matrix
                continue
            yield waiting, matrix
            waiting = None
        elif matrix.ndim == 3 and waiting is None:
            yield (matrix,)
        else:
            raise fail("matrices", "two of two dimensions, or one of three", list(matrix.shape))
    if waiting is not None:
        raise fail("matrices", "a second factor beside the first", "one")


# The key-value cache.


def check_kv(k: Tensor) -> None:
    """Keys or values [t, h, d] with an even d."""
    check_tensor("k", k, (None, None, None), FLOATS)
    if k.shape[2] % 2 or k.shape[2] == 0:
        raise fail("k", "an even head dimension", k.shape[2])


def check_packed(packed: Tensor, scale: Tensor, zero: Tensor, out_dtype: torch.dtype) -> None:
    """What `kv_pack` made, and a float type."""
    check_tensor("packed", packed, (None, None, None), (torch.uint8,))
    for name, part in (("scale", scale), ("zero", zero)):
        check_tensor(name, part, tuple(packed.shape[:2]), (torch.float16,), packed.device)
    if out_dtype not in FLOATS:
        raise fail("out_dtype", "a float type", out_dtype)

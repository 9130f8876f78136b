"""The ops of the namespace `affq`, an entry each: what it takes and gives, its checks, its shapes, and who computes it.

On the CPU that is cpu/ or the reference itself, on CUDA a Triton kernel; all equal reference.py. A kernel may only see what
the checks have let through, so an op begins with them, and so does its twin for torch.compile, which gives shapes alone.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from affinequant_kernels import reference
from affinequant_kernels.checks import WEIGHT_ONLY
from affinequant_kernels.cpu import layer, quant
from affinequant_kernels.ops import arguments, shapes
from affinequant_kernels.weight import Weight

Run = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Op:
    """One op. Each of its functions is called by name with those of its arguments that it has a parameter for; the five
    tensors of a weight are one of them."""

    takes: str  # as torch.library writes it
    gives: str
    check: Callable[..., None]  # raises ValueError
    shapes: Run  # of what it gives, as empty tensors
    cpu: Run
    cuda: Run


def _cuda(module: str, name: str) -> Run:
    """A function of a module in cuda/, imported when it is first called: triton may be missing."""

    def run(**given: Any) -> Any:
        return getattr(importlib.import_module(f"affinequant_kernels.cuda.{module}"), name)(**given)

    return run


def _layer(linear_dyn: Run) -> Run:
    """A layer for inputs [..., k] from one for rows [m, k]. What an op has no argument for is left out."""

    def run(
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        out_dtype: torch.dtype | None,
        matrices: Sequence[Tensor] = (),
        act_bits: int = WEIGHT_ONLY,
        act_symmetric: bool = True,
        clip: float = 1.0,
    ) -> Tensor:
        y = linear_dyn(
            x=x if x.ndim == 2 else x.view(-1, x.shape[-1]),
            weight=weight,
            bias=bias,
            factors=list(arguments.factors(matrices)) if matrices else (),
            act_bits=act_bits,
            act_symmetric=act_symmetric,
            clip=clip,
            out_dtype=out_dtype or x.dtype,
        )
        return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])

    return run


_WEIGHT = "Tensor qweight, Tensor w_scale, Tensor? w_zero, Tensor? w_mul, Tensor w_colsum, Tensor? bias"
_ROWS = "Tensor q, Tensor scale, Tensor zero, Tensor rowsum"
_QUANTISER = "int bits=4, bool symmetric=True, float clip=1.0"
_IN_GROUPS = f"{_QUANTISER}, int group=0"
_DYNAMIC = f"{_WEIGHT}, int act_bits=4, bool act_symmetric=True, float clip=1.0, ScalarType? out_dtype=None"
_ON_CPU, _ON_CUDA = _layer(layer.linear_dyn), _layer(_cuda("layer", "linear_dyn"))

OPS = {
    # Rows of integers from rows of floats, alone or at the end of what computes them.
    "row_quant": Op(
        f"Tensor x, {_IN_GROUPS}", _ROWS,
        arguments.check_rows, shapes.rows, quant.row_quant, _cuda("quant", "row_quant"),
    ),
    "kron_quant": Op(
        f"Tensor x, Tensor left, Tensor right, {_IN_GROUPS}", _ROWS,
        arguments.check_kron, shapes.rows, quant.kron_quant, _cuda("transform", "kron_quant"),
    ),
    "block_quant": Op(
        f"Tensor x, Tensor matrices, {_IN_GROUPS}", _ROWS,
        arguments.check_block, shapes.rows, quant.block_quant, _cuda("transform", "block_quant"),
    ),
    "rmsnorm_quant": Op(
        f"Tensor x, Tensor? residual, Tensor gain, float eps, {_QUANTISER}", f"{_ROWS}, Tensor hidden",
        arguments.check_norm, shapes.rows_and_hidden, quant.rmsnorm_quant, _cuda("quant", "rmsnorm_quant"),
    ),
    "silu_mul_quant": Op(
        f"Tensor gate_up, {_QUANTISER}", _ROWS,
        arguments.check_gate, shapes.rows_of_half, quant.silu_mul_quant, _cuda("quant", "silu_mul_quant"),
    ),
    # Their product with a weight; and whole layers, from floats to floats.
    "w4a4_linear": Op(
        f"Tensor q, Tensor scale, Tensor? zero, Tensor? rowsum, {_WEIGHT}, ScalarType out_dtype", "Tensor",
        arguments.check_product, shapes.product, layer.linear, _cuda("gemm", "linear"),
    ),
    "w4a4_linear_dyn": Op(
        f"Tensor x, {_DYNAMIC}", "Tensor",
        arguments.check_layer, shapes.layer, _ON_CPU, _ON_CUDA,
    ),
    "w4a16_linear": Op(
        f"Tensor x, {_WEIGHT}, ScalarType? out_dtype=None", "Tensor",
        arguments.check_weight_only, shapes.layer, _ON_CPU, _ON_CUDA,
    ),
    "online_linear": Op(
        f"Tensor x, Tensor[] matrices, {_DYNAMIC}", "Tensor",
        arguments.check_online, shapes.layer, _ON_CPU, _ON_CUDA,
    ),
    # The key-value cache.
    "kv_pack": Op(
        "Tensor k", "Tensor packed, Tensor scale, Tensor zero",
        arguments.check_kv, shapes.packed, reference.kv_pack, _cuda("kv", "kv_pack"),
    ),
    "kv_unpack": Op(
        "Tensor packed, Tensor scale, Tensor zero, ScalarType out_dtype", "Tensor",
        arguments.check_packed, shapes.unpacked, reference.kv_unpack, _cuda("kv", "kv_unpack"),
    ),
}  # fmt: skip


# Registration.

_LIBRARY = torch.library.Library("affq", "DEF")


def _register(name: str, op: Op) -> None:
    _LIBRARY.define(f"{name}({op.takes}) -> ({op.gives})")
    names, bind = _binder(getattr(torch.ops.affq, name).default._schema.arguments)
    check = _by_name(op.check, names)

    def checked(function: Run) -> Run:
        work = _by_name(function, names)

        def run(*given: object) -> Any:
            named = bind(given)
            check(named)
            return _flat(work(named))

        return run

    _LIBRARY.impl(name, checked(op.cpu), "CPU")
    _LIBRARY.impl(name, checked(op.cuda), "CUDA")
    torch.library.register_fake(f"affq::{name}", checked(op.shapes), lib=_LIBRARY)


def _binder(schema: Sequence[Any]) -> tuple[list[str], Callable[[tuple[object, ...]], dict[str, object]]]:
    """The names of an op's arguments, and what puts them to what is given: torch leaves out usual values at the end."""
    names, usual = [argument.name for argument in schema], tuple(argument.default_value for argument in schema)
    first = names.index("qweight") if "qweight" in names else len(names)
    last = first + len(Weight._fields)
    names[first:last] = ["weight"] * (first < len(names))

    def bind(given: tuple[object, ...]) -> dict[str, object]:
        whole = (*given, *usual[len(given) :])
        weight = (Weight(*whole[first:last]),) if first < len(whole) else ()  # type: ignore[arg-type]
        return dict(zip(names, (*whole[:first], *weight, *whole[last:]), strict=True))

    return names, bind


def _by_name(function: Run, names: Sequence[str]) -> Callable[[dict[str, object]], Any]:
    """The function as one of all that an op was given: it takes what it has parameters for."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return lambda given: function(**given)
    wanted = tuple(name for name in names if name in parameters)
    return lambda given: function(**{name: given[name] for name in wanted})


def _flat(result: Any) -> Any:
    """One tensor, or all of them in one tuple."""
    if isinstance(result, Tensor):
        return result
    return tuple(tensor for part in result for tensor in (part if isinstance(part, tuple) else (part,)))


for _name, _op in OPS.items():
    _register(_name, _op)

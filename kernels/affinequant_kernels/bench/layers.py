"""What the benchmark times: layers of this package, of torch and of other packages, all holding the same matrix.

The matrix is a quantised Gaussian: random codes toggle more bits than real ones do, and cost clock speed. Every layer
exists in several copies, so that a walk over them finds none in a cache.

Shapes: m rows (tokens), n output features, k input features.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from affinequant_kernels import ops, reference
from affinequant_kernels.weight import Kind, Weight, prepare_weight, unpack

Call = Callable[[], object]
Holds = tuple[Kind, int, bool, int]

GROUP = 128


class Ours(NamedTuple):
    """A layer of this package. Quantising the activations is part of its time."""

    name: str
    kind: Kind
    bits: int  # of the weight
    act_bits: int
    zero: bool = False  # zero points on both sides
    online: bool = False  # a Kronecker transform of the activations, fused with their quantiser
    rows: int = 0  # columns of a row that share a scale; 0: all of them

    @property
    def holds(self) -> Holds:
        """What its weight is made of."""
        return self.kind, self.bits, self.zero, self.rows


OURS = (
    Ours("w4a4", "channel", 4, 4),
    Ours("w4a4 asymmetric", "channel", 4, 4, zero=True),
    Ours("w4a4 online", "channel", 4, 4, zero=True, online=True),  # the default scheme of a run at W4A4
    Ours("w4a8", "channel", 4, 8),
    Ours("w8a8", "channel", 8, 8),
    Ours("w4a4 g128", "group", 4, 4),
    Ours("w4a4 ag64 asymmetric", "channel", 4, 4, zero=True, rows=64),
    Ours("w4a4 g128 ag128 asymmetric", "group", 4, 4, zero=True, rows=GROUP),
)
BASELINES = ("torch bf16", "torch fp32")
# Largest relative error of another package's layer against the dense one: 4-bit activations come to about 0.15.
RIVAL_ERROR = 0.3
# Of a fused transform against its reference: what is quantised may differ in its last bits, so single codes may.
ONLINE_ERROR = 0.05


def kron_factors(k: int, device: str) -> list[Tensor]:
    """Two random rotations [n1, n1], [n2, n2] in fp32, n1 * n2 = k: the sizes with the smallest sum, as a run takes."""
    small = next(size for size in range(math.isqrt(k), 0, -1) if k % size == 0)
    return [
        torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(size)))[0]
        .contiguous()
        .to(device)
        for size in (small, k // small)
    ]


def sample_weight(
    n: int, k: int, kind: Kind = "channel", bits: int = 4, device: str = "cpu", zero: bool = False, rows: int = 0
) -> Weight:
    """A quantised Gaussian [n, k], made on the device, for rows in groups of `rows`; its own groups are of GROUP columns.

    `zero`: with zero points, which lie within 1 of none, as a Gaussian's do. Kind "integer" then multiplies by 8 at most,
    so that all fits int8; 8 bits in groups stay without.
    """
    generator = torch.Generator(device).manual_seed(0)
    value = torch.randn(n, k, generator=generator, device=device)
    high = (1 << (bits - 1)) - 1
    groups = 1 if kind == "channel" else k // GROUP
    parts = value.unflatten(1, (groups, -1))
    scale = parts.abs().amax(2) * 0.7 / high
    shift = torch.zeros_like(scale)
    if zero and (kind == "channel" or bits == 4):
        shift = ((parts.amax(2) + parts.amin(2)) / (-2 * scale)).round().clamp(-1, 1)
    codes = (parts / scale.unsqueeze(2) + shift.unsqueeze(2)).round().clamp(-high - 1, high).to(torch.int8).flatten(1)
    points = shift.to(torch.int8) if zero and (kind == "channel" or bits == 4) else None
    if kind == "integer":
        top = 9 if zero else 17
        mul = torch.randint(1, top, (n, groups), dtype=torch.uint8, generator=generator, device=device)
        return prepare_weight(codes, scale[:, 0].contiguous(), points, bits=bits, mul=mul)
    return prepare_weight(codes, scale, points, bits=bits, act_group=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """One matrix as every layer that is compared, each in the same number of copies."""

    device: str
    dense: list[Tensor]  # bfloat16 [n, k]
    dense32: list[Tensor]  # float32 [n, k]; only on a CPU
    weights: dict[Holds, list[Weight]]  # by kind, bits, whether there are zero points, and the groups of rows
    factors: list[Tensor]  # of the transform before those of ours that have one
    rivals: dict[str, list[Any]]  # other packages' modules
    skipped: dict[str, str]  # those that are not compared, and why


def make_layers(n: int, k: int, device: str, copies: int) -> Layers:
    """Quantise one matrix in every way. Raises nothing for other packages: what fails is in `skipped`."""
    weights: dict[Holds, list[Weight]] = {}
    for ours in OURS:
        if ours.holds not in weights:
            first = sample_weight(n, k, ours.kind, ours.bits, device, ours.zero, ours.rows)
            weights[ours.holds] = [first, *(_clone(first) for _ in range(copies - 1))]
    four = weights["channel", 4, False, 0][0]
    dense = (unpack(four.qweight, k).float() * four.scale.unsqueeze(1)).bfloat16()
    rivals, skipped = _make_rivals(four, dense, device, copies)
    return Layers(
        device=device,
        dense=[dense.clone() for _ in range(copies)],
        dense32=[dense.float() for _ in range(copies)] if device == "cpu" else [],
        weights=weights,
        factors=[factor.bfloat16() for factor in kron_factors(k, device)],
        rivals=rivals,
        skipped=skipped,
    )


def _clone(weight: Weight) -> Weight:
    return Weight(*(None if t is None else t.clone() for t in weight))  # type: ignore[arg-type]


def providers(layers: Layers, m: int) -> dict[str, list[Call]]:
    """Name -> one call per copy, for bfloat16 inputs of m rows. Raises AssertionError where a layer of ours is wrong."""
    k = layers.dense[0].shape[1]
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(layers.device, torch.bfloat16)
    found: dict[str, list[Call]] = {"torch bf16": [functools.partial(F.linear, x, w) for w in layers.dense]}
    if layers.dense32:
        x32 = x.float()
        found["torch fp32"] = [functools.partial(F.linear, x32, w) for w in layers.dense32]
        found["w4a4, fp32 in and out"] = [
            functools.partial(ops.linear, x32, w) for w in layers.weights["channel", 4, False, 0]
        ]
    for ours in OURS:
        weights = layers.weights[ours.holds]
        _check(ours, x, weights[0], layers.factors)
        found[ours.name] = [functools.partial(_apply, ours, x, w, layers.factors) for w in weights]
    found |= _without_quantising(layers, x)
    if m <= 64 and layers.device == "cuda":  # on a CPU it multiplies by a dense copy, as torch does
        a16 = functools.partial(torch.ops.affq.w4a16_linear, x)
        found["w4a16"] = [functools.partial(a16, *w, None) for w in layers.weights["channel", 4, False, 0]]
    for name, modules in layers.rivals.items():
        found[name] = [functools.partial(module, x) for module in modules]
    return found


def _without_quantising(layers: Layers, x: Tensor) -> dict[str, list[Call]]:
    rows = ops.row_quant(x)
    product = functools.partial(torch.ops.affq.w4a4_linear, rows.q, rows.scale, None, rows.rowsum)
    found: dict[str, list[Call]] = {
        "w4a4, x quantised before": [
            functools.partial(product, *w, None, torch.bfloat16) for w in layers.weights["channel", 4, False, 0]
        ]
    }
    if layers.device == "cpu" or x.shape[0] > 16:  # what torch asks of a GPU
        int_mm = functools.partial(_int_mm, rows)
        found["torch._int_mm, x quantised before"] = [
            functools.partial(int_mm, w) for w in layers.weights["channel", 8, False, 0]
        ]
    return found


def _int_mm(rows: reference.Rows, weight: Weight) -> Tensor:
    product = torch._int_mm(rows.q, weight.qweight.t())  # pyright: ignore[reportPrivateImportUsage]
    return (product.float() * weight.scale * rows.scale.unsqueeze(1)).bfloat16()


def _apply(ours: Ours, x: Tensor, weight: Weight, factors: list[Tensor]) -> Tensor:
    settings: dict[str, Any] = {"act_bits": ours.act_bits, "act_symmetric": not ours.zero}
    return ops.online_linear(x, factors, weight, **settings) if ours.online else ops.linear(x, weight, **settings)


def _check(ours: Ours, x: Tensor, weight: Weight, factors: list[Tensor]) -> None:
    """Raise where the fast path is not the reference, on the first rows."""
    few = x[:17].contiguous()
    got = _apply(ours, few, weight, factors)
    moved = reference.kron_apply(few, *factors) if ours.online else few
    rows = reference.row_quant(moved, bits=ours.act_bits, symmetric=not ours.zero, group=ours.rows)
    wanted = reference.linear(rows.q, rows.scale, rows.zero if ours.zero else None, weight, None, x.dtype)
    if ours.online:
        right = float((got.float() - wanted.float()).norm() / wanted.float().norm()) < ONLINE_ERROR
    else:
        right = torch.equal(got, wanted)
    if not right:
        largest = (got - wanted).abs().max()
        raise AssertionError(f"{ours.name} differs from its reference at {tuple(x.shape)}: {largest}")


# Other packages, as their documentation shows them. Written against gemlite 0.6.0 and humming 0.1.19.


def _make_rivals(
    weight: Weight, dense: Tensor, device: str, copies: int
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """(modules by name, reasons by the name of what is left out)."""
    modules: dict[str, list[Any]] = {}
    skipped: dict[str, str] = {}
    x = torch.randn(64, dense.shape[1], generator=torch.Generator().manual_seed(0)).to(dense)
    for name, (package, make) in RIVALS.items():
        if not find_spec(package):
            skipped[name] = "not installed"
        elif device != "cuda":
            skipped[name] = "needs a CUDA device"
        else:
            try:
                module = make(weight, dense)
                _check_rival(module(x), F.linear(x, dense))
                modules[name] = [module, *(copy.deepcopy(module) for _ in range(copies - 1))]
            except Exception as error:  # another package's failure is a line of the report, not the end of it
                skipped[name] = reason(error)
    return modules, skipped


def reason(error: Exception) -> str:
    """An exception in one line."""
    return f"failed: {type(error).__name__}: {error}".splitlines()[0]


def _check_rival(got: Tensor, wanted: Tensor) -> None:
    error = float((got.float() - wanted.float()).norm() / wanted.float().norm())
    if not error < RIVAL_ERROR:
        raise ValueError(f"its output is off by {error:.2f} of the norm")


def _gemlite(helper: str, weight: Weight, dense: Tensor) -> Any:
    n, k = dense.shape
    maker = getattr(import_module("gemlite.helper"), helper)(device=str(dense.device), dtype=torch.bfloat16)
    codes = (unpack(weight.qweight, k) + 8).to(torch.uint8)
    scales = weight.scale.view(n, 1).to(torch.bfloat16)
    return maker.from_weights(codes, scales, torch.full_like(scales, 8.0))


def _humming(activations: str | None, weight: Weight, dense: Tensor) -> Any:
    del weight  # it quantises by itself
    n, k = dense.shape
    layer = import_module("humming.layer").HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config={"dtype": "int4"},
        input_config=None if activations is None else {"dtype": activations},
        torch_dtype=torch.bfloat16,
    )
    layer.to(dense.device)
    layer.load_from_unquantized(dense)
    layer.transform()
    return layer


RIVALS: dict[str, tuple[str, Callable[[Weight, Tensor], Any]]] = {
    "gemlite w4a16": ("gemlite", functools.partial(_gemlite, "A16W4_HQQ_INT")),
    "gemlite w4a8 (fp8)": ("gemlite", functools.partial(_gemlite, "A8W4_HQQ_INT_dynamic")),
    "humming w4a16": ("humming", functools.partial(_humming, None)),
    "humming w4a8": ("humming", functools.partial(_humming, "int8")),
    "humming w4a4": ("humming", functools.partial(_humming, "int4")),
}


def fused(m: int, widths: Sequence[int], device: str) -> dict[str, list[Call]]:
    """The fused transform and the quantiser with zero points, at the first width next to the same in plain torch, and the
    key-value cache."""

    def sample(k: int) -> list[Tensor]:
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
        return [x, *(factor.bfloat16() for factor in kron_factors(k, device))]

    k = widths[0]
    x, left, right = sample(k)
    kron = torch.ops.affq.kron_quant

    def eager() -> object:
        return reference.row_quant((left.t() @ (x.view(m, len(left), -1) @ right)).view(m, k), symmetric=False)

    return {
        "kron + quant": [functools.partial(kron, x, left, right, 4, False)],
        **{f"kron + quant of {width}": [functools.partial(kron, *sample(width), 4, False)] for width in widths[1:]},
        "kron + quant, eager torch": [eager],
        "row_quant": [lambda: torch.ops.affq.row_quant(x, 4, False)],
        "kv_pack": [lambda: torch.ops.affq.kv_pack(x.view(m, -1, 128))],
    }

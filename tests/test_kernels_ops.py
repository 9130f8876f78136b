"""The registered ops: opcheck, torch.compile, refusals, and how light the import is."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from affinequant_kernels import Weight, linear, ops, prepare_weight, reference, row_quant

K = 256


def sample(kind: str = "channel", bits: int = 4, with_zero: bool = False, n: int = 24, act_group: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(4)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (n, K), dtype=torch.int8, generator=generator)
    scale = torch.rand(n, 4 if kind == "group" else 1, generator=generator) * 0.01 + 1e-3
    zero = torch.randint(-8, 8, (n, 1 if kind == "channel" else 4), dtype=torch.int8, generator=generator)
    mul = torch.randint(1, 9, (n, 4), dtype=torch.uint8, generator=generator) if kind == "integer" else None
    return prepare_weight(codes, scale, zero if with_zero else None, bits=bits, mul=mul, act_group=act_group)


WEIGHTS = [("channel", 4, False), ("channel", 4, True), ("integer", 4, True), ("group", 4, True), ("channel", 8, False)]


@pytest.mark.parametrize("symmetric, group", [(True, 0), (False, 64)])
def test_opcheck_row_quant(symmetric: bool, group: int) -> None:
    torch.library.opcheck(torch.ops.affq.row_quant, (torch.randn(5, K), 4, symmetric, 0.9, group))


@pytest.mark.parametrize("kind", ["channel", "group"])
def test_opcheck_rows_in_groups(kind: str) -> None:
    x, weight, square = torch.randn(2, 5, K), sample(kind, 4, True, act_group=64), [torch.randn(16, 16)] * 2
    rows = row_quant(x.view(-1, K), symmetric=False, group=64)
    torch.library.opcheck(torch.ops.affq.w4a4_linear, (*rows[:3], None, *weight, torch.randn(24), torch.bfloat16))
    torch.library.opcheck(torch.ops.affq.online_linear, (x, square, *weight, None, 8, False, 0.9, None))
    turned = torch.ops.affq.kron_quant(x.view(-1, K), *square, 4, False, 0.9, 64)
    wanted = reference.kron_quant(x.view(-1, K), *square, symmetric=False, clip=0.9, group=64)
    assert all(torch.equal(a, b) for a, b in zip(turned, wanted, strict=True)) and turned[1].shape == (10, 4)
    got = torch.ops.affq.w4a4_linear(*rows[:3], None, *weight, None, torch.float32)
    assert torch.equal(got, reference.linear(*rows[:3], weight))
    assert torch.equal(linear(x, weight, act_symmetric=False).view(10, 24), got)


def test_rows_and_weights_whose_groups_do_not_fit_are_refused() -> None:
    x, weight, whole = torch.randn(5, K), sample(act_group=64), sample()
    rows, in_groups = row_quant(x), row_quant(x, group=64)
    refused = {
        r"scale: expected shape \[5, 4\], got \[5\]": lambda: torch.ops.affq.w4a4_linear(
            *rows[:3], None, *weight, None, torch.float32
        ),
        r"scale: expected shape \[5\], got \[5, 4\]": lambda: torch.ops.affq.w4a4_linear(
            *in_groups[:3], None, *whole, None, torch.float32
        ),
        "w_colsum: expected as many groups as the weight has, 4, got 8": lambda: linear(
            x, sample("group")._replace(colsum=torch.zeros(24, 8, dtype=torch.int32))
        ),
        "w_colsum: expected no groups beside multipliers": lambda: linear(
            x, sample("integer")._replace(colsum=torch.zeros(24, 4, dtype=torch.int32))
        ),
        "w_colsum: expected a number of groups that divides 256 columns, got 3": lambda: linear(
            x, whole._replace(colsum=torch.zeros(24, 3, dtype=torch.int32))
        ),
        "out_dtype: expected a float type": lambda: linear(x, weight, out_dtype=torch.int32),
        "group: expected 0, or a size that divides 256 columns, got 48": lambda: row_quant(x, group=48),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("kind, bits, with_zero", WEIGHTS)
def test_opcheck_linear(kind: str, bits: int, with_zero: bool) -> None:
    weight = sample(kind, bits, with_zero)
    rows = row_quant(torch.randn(5, K), symmetric=False)
    torch.library.opcheck(torch.ops.affq.w4a4_linear, (*rows[:3], None, *weight, torch.randn(24), torch.bfloat16))
    torch.library.opcheck(torch.ops.affq.w4a4_linear_dyn, (torch.randn(2, 5, K), *weight, None, 8, False, 0.9, None))


class Layer(torch.nn.Module):
    def __init__(self, weight: Weight) -> None:
        super().__init__()
        for name, value in weight._asdict().items():
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = Weight(self.qweight, self.scale, self.zero, self.mul, self.colsum)
        y = linear(x * 2, weight, act_symmetric=False, bias=torch.ones(24))
        rows = row_quant(y.flatten(0, -2), bits=8)
        return y + rows.scale.view(*y.shape[:-1], 1)


@pytest.mark.parametrize("kind, bits, with_zero", WEIGHTS)
def test_compile_without_a_break_at_any_size(kind: str, bits: int, with_zero: bool) -> None:
    torch.compiler.reset()  # or each kind counts as one more recompilation of the same code
    layer = Layer(sample(kind, bits, with_zero))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (3, 1, 17):
        x = torch.randn(2, m, K)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("kind, bits, with_zero", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_equal_reference(kind: str, bits: int, with_zero: bool, dtype: torch.dtype) -> None:
    weight = sample(kind, bits, with_zero)
    x = torch.randn(2, 3, K, dtype=dtype)
    for symmetric in (True, False):
        wanted = reference.linear_dyn(x.view(6, K), weight, act_bits=8, act_symmetric=symmetric, clip=0.9)
        got = linear(x, weight, act_bits=8, act_symmetric=symmetric, clip=0.9)
        assert got.dtype == dtype and torch.equal(got, wanted.view(2, 3, 24))
        rows = row_quant(x.view(6, K), bits=8, symmetric=symmetric, clip=0.9)
        parts = torch.ops.affq.w4a4_linear(*rows, *weight, None, dtype)
        assert torch.equal(parts, wanted)


def test_empty_batch() -> None:
    assert linear(torch.empty(0, K), sample()).shape == (0, 24)
    assert linear(torch.empty(2, 0, K), sample("group")).shape == (2, 0, 24)


def test_transposed_input_is_taken() -> None:
    x = torch.randn(K, 6).t()
    assert torch.equal(linear(x, sample()), linear(x.contiguous(), sample()))


def refused(message: str, **changes: object) -> None:
    weight = sample("group", with_zero=True)
    call: dict[str, object] = {"x": torch.randn(2, K), **weight._asdict(), "bias": None, "bits": 4, "symmetric": True}
    call |= {"clip": 1.0, "out_dtype": None} | changes
    with pytest.raises(ValueError, match=message):
        torch.ops.affq.w4a4_linear_dyn(*call.values())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.randn(2, K + 128)}, r"qweight: expected shape \[any, 192\], got \[24, 128\]"),
        ({"x": torch.randn(2, K).double()}, "x: expected torch.float32 or .*, got torch.float64"),
        ({"x": torch.randn(K, 2).t()}, "x: expected a contiguous tensor"),
        ({"x": torch.tensor(1.0)}, "x: expected shape"),
        ({"qweight": torch.zeros(24, 128)}, "qweight: expected torch.uint8 or torch.int8"),
        ({"scale": torch.ones(24, 3)}, "w_scale: expected a number of groups that divides 256 columns, got 3"),
        ({"scale": torch.ones(23, 4)}, r"w_scale: expected shape \[24, any\], got \[23, 4\]"),
        ({"scale": torch.ones(24, 4, dtype=torch.float16)}, "w_scale: expected torch.float32"),
        ({"zero": torch.zeros(24, dtype=torch.int8)}, r"w_zero: expected shape \[24, 4\]"),
        ({"zero": torch.zeros(24, 4)}, "w_zero: expected torch.int8"),
        ({"mul": torch.ones(24, 4, dtype=torch.uint8)}, "w_mul: expected None"),
        ({"colsum": torch.zeros(24, dtype=torch.int32)}, "w_colsum: expected torch.float32"),
        ({"bias": torch.zeros(23)}, r"bias: expected shape \[24\]"),
        ({"bits": 2}, "bits: expected 4 or 8"),
        ({"clip": 2.0}, "clip: expected"),
        ({"out_dtype": torch.int32}, "out_dtype: expected"),
        ({"out_dtype": torch.int8}, "out_dtype: expected"),
    ],
)
def test_linear_dyn_refuses(changes: dict[str, object], message: str) -> None:
    refused(message, **changes)


def test_linear_refuses_rows_that_do_not_fit() -> None:
    weight = sample()
    q, scale = torch.zeros(3, K, dtype=torch.int8), torch.ones(3)
    for bad, message in (
        ((q.float(), scale, None), "q: expected torch.int8"),
        ((q, torch.ones(2), None), r"scale: expected shape \[3\]"),
        ((q, scale, torch.zeros(3, dtype=torch.int8)), "zero: expected torch.int32"),
        ((q[:, ::2], scale, None), "q: expected a contiguous tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.affq.w4a4_linear(*bad, None, *weight, None, torch.float32)


def test_import_is_light_and_needs_no_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None; import affinequant_kernels; assert 'torch' not in sys.modules;"
        "import torch; from affinequant_kernels import ops; assert torch.ops.affq.row_quant(torch.ones(1, 8))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_resolve() -> None:
    import affinequant_kernels

    for name in affinequant_kernels.__all__:
        assert getattr(affinequant_kernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        affinequant_kernels.nonsense  # noqa: B018
    assert ops.linear is affinequant_kernels.linear


def test_every_op_of_the_table_runs_on_both_devices_and_under_the_compiler() -> None:
    for name in ops.OPS:
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"affq::{name}", key), (name, key)


def test_an_op_knows_its_arguments_by_name_and_their_usual_values() -> None:
    x, weight = torch.randn(3, K), sample()
    named = dict(zip(("qweight", "w_scale", "w_zero", "w_mul", "w_colsum"), weight, strict=True))
    got = torch.ops.affq.w4a4_linear_dyn(x, bias=None, clip=0.9, **named)
    assert torch.equal(got, reference.linear_dyn(x, weight, clip=0.9))
    rows, wanted = torch.ops.affq.row_quant(x, symmetric=False), reference.row_quant(x, symmetric=False)
    assert all(torch.equal(a, b) for a, b in zip(rows, wanted, strict=True))


# The fused ops


def fused_calls() -> dict[str, tuple[object, ...]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(5, 96, generator=generator)
    square = {n: torch.randn(n, n, generator=generator) for n in (8, 12, 32)}
    return {
        "kron_quant": (x, square[8], square[12], 4, False, 0.9),
        "block_quant": (x, torch.stack([square[32]] * 3), 8, True, 0.9),
        "rmsnorm_quant": (x, x + 1, torch.rand(96, generator=generator), 1e-6, 4, True, 1.0),
        "silu_mul_quant": (x, 4, False, 1.0),
        "kv_pack": (x.view(5, 2, 48),),
    }


@pytest.mark.parametrize("name", fused_calls())
def test_fused_ops_equal_reference(name: str) -> None:
    arguments = fused_calls()[name]
    torch.library.opcheck(getattr(torch.ops.affq, name).default, arguments)
    got = getattr(torch.ops.affq, name)(*arguments)
    if name == "kv_pack":
        wanted = reference.kv_pack(*arguments)
        back = torch.ops.affq.kv_unpack(*got, torch.float32)
        torch.library.opcheck(torch.ops.affq.kv_unpack.default, (*got, torch.float16))
        assert torch.equal(back, reference.kv_unpack(*wanted))
    else:
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        numbers = arguments[len(tensors) :]
        eps, settings = numbers[: len(numbers) - 3], dict(zip(("bits", "symmetric", "clip"), numbers[-3:], strict=True))
        result = getattr(reference, name)(*tensors, *eps, **settings)
        wanted = (*result[0], result[1]) if name == "rmsnorm_quant" else result
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("kind, bits, with_zero", WEIGHTS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_weights_only_product(kind: str, bits: int, with_zero: bool, dtype: torch.dtype, tolerance: float) -> None:
    weight, x = sample(kind, bits, with_zero), torch.randn(2, 3, K).to(dtype)
    got = torch.ops.affq.w4a16_linear(x, *weight, torch.ones(24))
    wanted = reference.w4a16_linear(x.view(6, K).double(), weight, torch.ones(24)).view(2, 3, 24)
    # bf16: the dequantised weight is rounded to it, and the result.
    assert got.dtype == dtype and (got - wanted).abs().max() < tolerance * wanted.abs().max()
    torch.library.opcheck(torch.ops.affq.w4a16_linear.default, (x, *weight, None))


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        (
            "kron_quant",
            (torch.ones(2, 96), torch.eye(8), torch.eye(11)),
            "left, right: expected sizes whose product is 96",
        ),
        ("kron_quant", (torch.ones(2, 96), torch.ones(8, 4), torch.eye(12)), "left: expected square matrices"),
        ("block_quant", (torch.ones(2, 96), torch.ones(2, 32, 32)), "matrices: expected one matrix, or as many"),
        ("block_quant", (torch.ones(2, 96), torch.ones(1, 36, 36)), "matrices: expected one matrix"),
        ("rmsnorm_quant", (torch.ones(2, 96), None, torch.ones(95), 1e-6), r"gain: expected shape \[96\]"),
        (
            "rmsnorm_quant",
            (torch.ones(2, 96), torch.ones(2, 96).half(), torch.ones(96), 1e-6),
            "residual: expected torch.f",
        ),
        ("rmsnorm_quant", (torch.ones(2, 96), None, torch.ones(96), 0.0), "eps: expected a positive number"),
        ("silu_mul_quant", (torch.ones(2, 95),), "gate_up: expected an even number"),
        ("kv_pack", (torch.ones(2, 3, 5),), "k: expected an even head dimension"),
        ("kv_pack", (torch.ones(2, 3),), "k: expected shape"),
        (
            "kv_unpack",
            (torch.ones(2, 3, 4, dtype=torch.uint8), torch.ones(2, 3), torch.ones(2, 3), torch.float32),
            "scale",
        ),
    ],
)
def test_fused_ops_refuse(name: str, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.affq, name)(*arguments)

"""A whole layer with its transform as one op: what it equals, opcheck, compilation, refusals."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from affinequant_kernels import Weight, online_linear, prepare_weight, reference
from affinequant_kernels.cuda import configs
from affinequant_kernels.ops import arguments, calls
from torch import Tensor

K, N = 96, 24
GENERATOR = torch.Generator().manual_seed(0)
LEFT, RIGHT = torch.randn(8, 8, generator=GENERATOR), torch.randn(12, 12, generator=GENERATOR)
BLOCKS, SHARED = torch.randn(6, 16, 16, generator=GENERATOR), torch.randn(1, 32, 32, generator=GENERATOR)
LISTS = {"none": [], "kronecker": [LEFT, RIGHT], "blocks": [BLOCKS], "both": [SHARED, LEFT, RIGHT]}


def sample(grouped: bool = False) -> Weight:
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8, generator=GENERATOR)
    groups = 3 if grouped else 1
    scale = torch.rand(N, groups, generator=GENERATOR) * 0.01 + 1e-3
    return prepare_weight(codes, scale, torch.randint(-8, 8, (N, groups), dtype=torch.int8, generator=GENERATOR))


def dense(matrices: list[Tensor]) -> Tensor:
    """The product of the factors as one matrix [K, K]."""
    whole = torch.eye(K, dtype=torch.float64)
    for first, *second in arguments.factors(matrices):
        if second:
            factor = torch.kron(first.double(), second[0].double())
        else:
            factor = torch.block_diag(*first.double().expand(K // first.shape[1], -1, -1))
        whole = whole @ factor
    return whole


def test_what_serving_can_meet_is_run_once_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a weight that says it lies on a GPU: one call for each kernel that some number of tokens leads to."""
    monkeypatch.setattr(configs, "device_facts", lambda index: ("Some GPU", 100, True))
    monkeypatch.setattr(calls, "_WARM", set())
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(calls, "online_linear", lambda x, *_, **__: seen.append(tuple(x.shape)))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **more: zeros(*size, **more))

    class Pretend(NamedTuple):
        shape: torch.Size
        dtype: torch.dtype
        device: torch.device = torch.device("cuda", 0)
        ndim: int = 1

    here = sample()
    there: Any = here._replace(
        **{name: Pretend(t.shape, t.dtype, ndim=t.ndim) for name, t in here._asdict().items() if t is not None}
    )
    settings: Any = {"act_bits": 4, "act_symmetric": True, "bias": None, "out_dtype": torch.bfloat16}
    assert calls.warm(K, torch.bfloat16, [LEFT, RIGHT], here, **settings) == [] and not seen
    rows = calls.warm(K, torch.bfloat16, [LEFT, RIGHT], there, **settings)
    assert rows == configs.rows_to_meet(N, K, "channel", 4, torch.device("cuda", 0)) and rows[0] == 1 and len(rows) > 4
    assert seen == [(m, K) for m in rows]
    assert calls.warm(K, torch.bfloat16, [LEFT, RIGHT], there, **settings) == [] and len(seen) == len(rows)
    assert calls.warm(K, torch.bfloat16, [BLOCKS], there, **settings) == rows


@pytest.mark.parametrize("matrices", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("grouped", [False, True])
def test_equals_the_dense_transform_and_the_reference(matrices: list[Tensor], grouped: bool) -> None:
    weight, x, bias = sample(grouped), torch.randn(2, 3, K, generator=GENERATOR), torch.randn(N, generator=GENERATOR)
    flat = x.view(6, K)
    moved = (flat.double() @ dense(matrices)).float()
    value = reference.w4a16_linear(torch.eye(K), weight).t()
    got = online_linear(x, matrices, weight, act_bits=16, bias=bias)
    torch.testing.assert_close(got.view(6, N), moved @ value.t() + bias, rtol=1e-4, atol=1e-4)
    # The last bits of the moved x differ, so single codes may: each moves an output by one step of its weight.
    wanted = reference.linear_dyn(moved, weight, bias, act_bits=8, act_symmetric=False, clip=0.9)
    got = online_linear(x, matrices, weight, act_bits=8, act_symmetric=False, clip=0.9, bias=bias).view(6, N)
    assert float(((got - wanted).abs() > 1e-3).float().mean()) < 0.2
    assert float((got - wanted).norm() / wanted.norm()) < 1e-2
    if not matrices:
        assert torch.equal(got, wanted)


def test_the_last_factor_goes_unrounded_into_the_quantiser() -> None:
    weight, x = sample(), torch.randn(5, K, generator=GENERATOR).bfloat16()
    rows = reference.kron_quant(x, LEFT, RIGHT, bits=4, symmetric=False, clip=0.8)
    wanted = reference.linear(rows.q, rows.scale, rows.zero, weight, None, torch.bfloat16)
    assert torch.equal(online_linear(x, [LEFT, RIGHT], weight, act_symmetric=False, clip=0.8), wanted)
    first = reference.block_apply(x, SHARED).to(x.dtype)
    rows = reference.kron_quant(first, LEFT, RIGHT, bits=4, symmetric=False, clip=0.8)
    wanted = reference.linear(rows.q, rows.scale, rows.zero, weight, None, torch.bfloat16)
    assert torch.equal(online_linear(x, [SHARED, LEFT, RIGHT], weight, act_symmetric=False, clip=0.8), wanted)


@pytest.mark.parametrize("matrices", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("bits", [4, 16])
def test_opcheck(matrices: list[Tensor], bits: int) -> None:
    given = (torch.randn(2, 5, K), matrices, *sample(), torch.randn(N), bits, False, 0.9, None)
    torch.library.opcheck(torch.ops.affq.online_linear, given)


def test_compiles_without_a_break_at_any_size() -> None:
    weight = sample()

    def layer(x: Tensor) -> Tensor:
        return online_linear(x * 2, [LEFT, RIGHT], weight, act_symmetric=False) + 1

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (3, 1, 17):
        x = torch.randn(2, m, K, generator=GENERATOR)
        assert torch.equal(compiled(x), layer(x))
    assert layer(torch.empty(0, K)).shape == (0, N)


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ([LEFT], "a second factor beside the first"),
        ([LEFT, BLOCKS], "two of two dimensions"),
        ([LEFT, LEFT], "sizes whose product is 96"),
        ([torch.randn(2, 16, 16)], "one matrix, or as many as fill 96 columns"),
        ([torch.randn(8, 12), torch.randn(12, 8)], "square matrices"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(matrices: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        online_linear(torch.randn(2, K), matrices, sample())


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="bits: expected 4 or 8"):
        online_linear(torch.randn(2, K), [], sample(), act_bits=5)
    with pytest.raises(ValueError, match="out_dtype"):
        online_linear(torch.randn(2, K), [], sample(), out_dtype=torch.int32)

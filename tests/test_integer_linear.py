"""The linear on integers: what is done once, and what moving it to another type leaves alone."""

import pytest
import torch
from affinequant_kernels import online_linear
from torch import nn

from affinequant.recipe.scheme import NumberFormat, Scheme
from affinequant.runtime import integer_linear
from affinequant.runtime.integer_linear import IntegerLinear


def sample(dtype: torch.dtype | None, slices: int = 1) -> IntegerLinear:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (16, 64), dtype=torch.int8, generator=generator)
    matrices = [torch.randn(8, 8, generator=generator), torch.randn(8 // slices, 8 // slices, generator=generator)]
    activation = Scheme.parse("w4a4").activation
    assert isinstance(activation, NumberFormat)
    settings = {"bits": 4, "activation": activation, "clip": 0.9, "matrices": matrices, "slices": slices}
    return IntegerLinear(codes, torch.rand(16, 1, generator=generator) * 0.01, None, None, dtype=dtype, **settings)


def test_matrices_are_rounded_once_and_not_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[torch.Tensor]] = []

    def remembered(x: torch.Tensor, matrices: list[torch.Tensor], *args, **settings) -> torch.Tensor:
        given.append(list(matrices))
        return online_linear(x, matrices, *args, **settings)

    layer, plain = sample(torch.bfloat16), sample(None)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = plain(x)
    monkeypatch.setattr(integer_linear, "online_linear", remembered)
    assert torch.equal(layer(x), wanted) and torch.equal(layer(x), wanted)
    assert all(first is second and first.dtype == x.dtype for first, second in zip(*given, strict=True))
    assert given[0]


def test_another_type_rounds_what_was_given_and_not_what_was_rounded() -> None:
    layer = nn.Sequential(sample(torch.bfloat16)).to(torch.float16).to(torch.float32)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), sample(None)(x))
    assert torch.equal(layer.to(torch.float16)(x.half()), sample(None)(x.half()))


@pytest.mark.parametrize("slices", [1, 2])
def test_what_is_warmed_is_what_is_called(slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[tuple] = []
    called: list[tuple] = []

    def key(x: int, dtype: torch.dtype, matrices: list[torch.Tensor], *_, **settings) -> tuple:
        settings.pop("clip", None)
        return x, dtype, [(m.shape, m.dtype) for m in matrices], sorted(settings.items(), key=lambda pair: pair[0])

    monkeypatch.setattr(integer_linear, "warm", lambda *args, **settings: warmed.append(key(*args, **settings)))
    layer, bias = sample(torch.bfloat16, slices), torch.randn(16)
    layer.warm(torch.bfloat16, bias)

    def run(x: torch.Tensor, matrices: list[torch.Tensor], *args, **settings) -> torch.Tensor:
        called.append(key(x.shape[-1], x.dtype, matrices, *args, **settings))
        return online_linear(x, matrices, *args, **settings)

    monkeypatch.setattr(integer_linear, "online_linear", run)
    layer(torch.randn(3, 64).bfloat16(), bias)
    assert len(warmed) == slices and repr(warmed) == repr(called)

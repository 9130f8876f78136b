"""Scheme names to numbers."""

import re
from dataclasses import replace

import pytest

from affinequant.errors import AffineQuantError
from affinequant.recipe.scheme import SCHEMES, NumberFormat, Scheme

# text -> name, weight bits, symmetric, group, activation bits (16 means none)
TABLE = [
    ("w4a4", "w4a4", 4, False, None, 4),
    ("W4A4 ", "w4a4", 4, False, None, 4),
    ("w4a4-asym", "w4a4", 4, False, None, 4),
    ("w4a4-sym", "w4a4-sym", 4, True, None, 4),
    ("w4a4-g32", "w4a4-g32", 4, False, 32, 4),
    ("w4a8", "w4a8", 4, False, None, 8),
    ("w4a16-g64", "w4a16-g64", 4, False, 64, 16),
    ("w4a16-g128-sym", "w4a16-g128-sym", 4, True, 128, 16),
    ("w3a16-g64", "w3a16-g64", 3, False, 64, 16),
    ("w2a16-g32-sym", "w2a16-g32-sym", 2, True, 32, 16),
    ("w8a16", "w8a16", 8, False, None, 16),
    ("w8a8", "w8a8", 8, True, None, 8),
    ("w8a8-sym", "w8a8", 8, True, None, 8),
    ("w8a8-asym", "w8a8-asym", 8, False, None, 8),
]


@pytest.mark.parametrize(("text", "name", "bits", "symmetric", "group", "activation"), TABLE)
def test_names(text: str, name: str, bits: int, symmetric: bool, group: int | None, activation: int) -> None:
    scheme = Scheme.parse(text)
    assert scheme.name == name
    weight = scheme.weight
    assert (weight.bits, weight.symmetric, weight.group_size, weight.dynamic) == (bits, symmetric, group, False)
    assert weight.granularity == ("group" if group else "channel")
    if activation == 16:
        assert scheme.activation is None
    else:
        expected = NumberFormat(bits=activation, symmetric=symmetric, granularity="token", dynamic=True)
        assert scheme.activation == expected
    assert Scheme.parse(scheme.name) == scheme


@pytest.mark.parametrize("name", SCHEMES)
def test_every_listed_scheme_is_its_own_name(name: str) -> None:
    assert Scheme.parse(name).name == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "w4",
        "a4w4",
        "w4a4-g",
        "w4a4kv",
        "kv4",
        "w4a4-g64kv4",
        "w4a4kv4kv4",
        "w4a4-x",
        "w4a4-sym-g32",
        "w4a4-ag",
        "w4a4-ag32-g32",
        "4/4",
        "w4a4 w8a8",
    ],
)
def test_what_is_no_scheme_is_refused_with_the_list(text: str) -> None:
    with pytest.raises(AffineQuantError, match="unknown scheme") as caught:
        Scheme.parse(text)
    assert caught.value.exit_code == 2 and caught.value.where == "--scheme"
    assert "affinequant list schemes" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "near"),
    [("w4a17", "w4a16"), ("w5a16", "w4a16"), ("w3a4", "w4a4"), ("w4a16g64", "w4a16-g64"), ("w8a4", "w8a8")],
)
def test_bits_that_nothing_stores_name_the_nearest(text: str, near: str) -> None:
    with pytest.raises(AffineQuantError, match=f"did you mean '{near}'"):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "name", "bits"),
    [
        ("w4a4kv4", "w4a4kv4", 4),
        ("W4A4KV8", "w4a4kv8", 8),
        ("w4a16kv4-g64", "w4a16kv4-g64", 4),
        ("w4a4kv4-g32-sym", "w4a4kv4-g32-sym", 4),
        ("w8a8kv8-sym", "w8a8kv8", 8),
        ("w4a4kv16", "w4a4", 16),
    ],
)
def test_keys_and_values_have_a_grid_of_their_own(text: str, name: str, bits: int) -> None:
    scheme, without = Scheme.parse(text), Scheme.parse(re.sub(r"kv\d+", "", text.lower()))
    assert scheme.name == name and Scheme.parse(scheme.name) == scheme
    assert (scheme.weight, scheme.activation) == (without.weight, without.activation)
    if bits == 16:
        assert scheme.kv is None and scheme.bits_per_cached(64) == 16
    else:
        assert scheme.kv == NumberFormat(bits=bits, symmetric=False, granularity="head", dynamic=True)
        assert scheme.bits_per_cached(64) == bits + 0.5


@pytest.mark.parametrize(("text", "near"), [("w4a4kv3", "kv4"), ("w4a4kv0", "kv4"), ("w4a4kv7-g64", "kv8")])
def test_a_cache_in_bits_that_nothing_stores(text: str, near: str) -> None:
    with pytest.raises(AffineQuantError, match="KV cache in") as caught:
        Scheme.parse(text)
    assert near in caught.value.fix and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "name", "weights"),
    [
        ("w4a4-ag64", "w4a4-ag64", None),
        ("W4A4-G64-AG64", "w4a4-g64-ag64", 64),
        ("w4a8kv4-g32-ag32-sym", "w4a8kv4-g32-ag32-sym", 32),
        ("w8a8-ag128-sym", "w8a8-ag128", None),
    ],
)
def test_activations_in_groups(text: str, name: str, weights: int | None) -> None:
    scheme, size = Scheme.parse(text), int(re.findall(r"ag(\d+)", name)[0])
    without = Scheme.parse(text.lower().replace(f"-ag{size}", ""))
    assert scheme.name == name and Scheme.parse(scheme.name) == scheme and scheme.weight == without.weight
    assert scheme.activation and without.activation and scheme.weight.group_size == weights
    assert scheme.activation == replace(without.activation, granularity="group", group_size=size)
    assert not scheme.engines_round_activations


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("w4a4-g128-ag64", "weights in groups of 128 and activations in groups of 64", "-g64-ag64"),
        ("w4a16-ag64", "activations that stay in 16 bits", "leave -ag64 out"),
        ("w4a4-ag0", "group of 0", "-ag64"),
    ],
)
def test_groups_of_activations_that_nothing_computes(text: str, what: str, fix: str) -> None:
    with pytest.raises(AffineQuantError, match=what) as caught:
        Scheme.parse(text)
    assert fix in caught.value.fix and caught.value.exit_code == 2


def test_stock_engines_round_the_activations_of_one_scheme() -> None:
    names = ["w8a8", "w8a8kv4", "w8a8-asym", "w8a8-g64", "w4a8", "w4a4", "w8a16"]
    assert [name for name in names if Scheme.parse(name).engines_round_activations] == ["w8a8", "w8a8kv4"]


def test_a_group_of_nothing() -> None:
    with pytest.raises(AffineQuantError, match="group of 0"):
        Scheme.parse("w4a4-g0")


def test_codes_are_signed_and_ranges_follow_the_bits() -> None:
    assert (Scheme.parse("w4a4").weight.code_min, Scheme.parse("w4a4").weight.code_max) == (-8, 7)
    assert (Scheme.parse("w8a8").weight.code_min, Scheme.parse("w8a8").weight.code_max) == (-128, 127)


@pytest.mark.parametrize(
    ("text", "width", "bits"),
    [
        ("w4a4", 4096, 4 + 20 / 4096),
        ("w4a4-sym", 4096, 4 + 16 / 4096),
        ("w4a16-g64", 4096, 4 + 20 / 64),
        ("w4a16-g128-sym", 4096, 4 + 16 / 128),
        ("w3a16-g64", 4096, 3 + 19 / 64),
        ("w8a8", 1024, 8 + 16 / 1024),
    ],
)
def test_stored_bits_count_scales_and_zeros(text: str, width: int, bits: float) -> None:
    assert Scheme.parse(text).bits_per_weight(width) == pytest.approx(bits)

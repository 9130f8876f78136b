"""Recipes: presets, precedence, TOML, and what a fingerprint leaves out."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from affinequant import AffineQuantError, Recipe, Scheme
from affinequant.recipe import PRESETS, parse_bytes, resolve


@pytest.mark.parametrize("model", ["demo", "org/name"])
@pytest.mark.parametrize("preset", PRESETS)
def test_toml_round_trip(preset: str, model: str, tmp_path: Path) -> None:
    recipe = resolve({"model": model, "preset": preset, "out": 'a "quoted" \\ name'})
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert Recipe.from_toml(path) == recipe
    assert Recipe.from_toml(path, seed=7).seed == 7
    assert tomllib.loads(path.read_text())["preset"] == preset


def test_what_is_given_wins_over_the_preset_and_none_takes_away() -> None:
    recipe = resolve({"model": "demo", "preset": "default", "epochs": 2, "transforms": {"qk": "none", "vo": "banded"}})
    assert recipe.epochs == 2 and recipe.data == "demo"
    assert "qk" not in recipe.transforms and recipe.transforms["vo"] == "banded"
    assert recipe.transforms["residual"] == "hadamard"
    assert resolve({"model": "org/name"}).samples == 128


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"preset": "defualt"}, "default"),
        ({"scheme": "w4a44"}, "w4a4"),
        ({"roundin": "gptq"}, "rounding"),
        ({"rounding": "gtpq"}, "gptq"),
        ({"epochs": "many"}, "type int"),
        ({"samples": 0}, "1 or more"),
        ({"alpha": 2.0}, "0.0 to 1.0"),
        ({"cpu_memory": "lots"}, "22GB"),
        ({"transforms": "vo"}, "SITE=TRANSFORM"),
    ],
)
def test_a_wrong_value_says_what_would_be_right(values: dict[str, Any], hint: str) -> None:
    with pytest.raises(AffineQuantError) as caught:
        resolve({"model": "demo"} | values)
    assert caught.value.exit_code == 2 and hint in str(caught.value)


def test_the_fingerprint_leaves_out_what_leaves_the_bytes_alone() -> None:
    recipe = resolve({"model": "demo"})
    same = resolve({"model": "demo", "out": "x", "device": "cpu", "cpu_memory": "9GB", "offload": "disk"})
    assert recipe.fingerprint() == same.fingerprint()
    for name, value in (("seed", 1), ("samples", 3), ("scheme", "w4a8"), ("lr", 0.1), ("dtype", "bfloat16")):
        assert resolve({"model": "demo", name: value}).fingerprint() != recipe.fingerprint()


def test_sizes() -> None:
    assert [parse_bytes(text, flag="") for text in ("", "1GB", "1.5GiB", "512mb", "10")] == [
        None,
        2**30,
        3 * 2**29,
        2**29,
        10,
    ]


@pytest.mark.parametrize(
    ("text", "weight", "group", "symmetric", "activation"),
    [
        ("w4a4", 4, None, False, 4),
        ("W4A16-G64", 4, 64, False, 16),
        ("w4a8-sym", 4, None, True, 8),
        ("w8a8", 8, None, True, 8),
        ("w8a8-asym", 8, None, False, 8),
        ("w4a16-g128-asym", 4, 128, False, 16),
    ],
)
def test_schemes(text: str, weight: int, group: int | None, symmetric: bool, activation: int) -> None:
    scheme = Scheme.parse(text)
    assert (scheme.weight.bits, scheme.weight.group_size, scheme.weight.symmetric) == (weight, group, symmetric)
    assert (scheme.activation.bits if scheme.activation else 16) == activation
    assert Scheme.parse(scheme.name) == scheme


@pytest.mark.parametrize("text", ["w4a4kv4", "w8a4", "w3a16", "w4a16-g0", "nvfp4", ""])
def test_schemes_that_cannot_be_written_are_refused(text: str) -> None:
    with pytest.raises(AffineQuantError):
        Scheme.parse(text)


def test_bits_per_weight_count_scales_and_zeros() -> None:
    assert Scheme.parse("w4a16-g64").bits_per_weight(576) == pytest.approx(4 + 20 / 64)
    assert Scheme.parse("w4a4-sym").bits_per_weight(576) == pytest.approx(4 + 16 / 576)

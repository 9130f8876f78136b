"""Bits per weight on average: what linears choose from, that the choice is the best one, and that a recipe holds it."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import affinequant
from affinequant.cli import main
from affinequant.errors import AffineQuantError
from affinequant.learning.allocation import Choice, allocated, choose
from affinequant.learning.sensitivity import sensitivities
from affinequant.pipeline import decoder_of, tokens_of
from affinequant.plan import plan
from affinequant.progress import Silent
from affinequant.recipe.budget import choices_of, undecided
from affinequant.recipe.recipe import Recipe
from affinequant.recipe.scheme import SCHEMES, Scheme

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(1500)))
    return path


@pytest.mark.parametrize("name", [*SCHEMES, "w4a16-g32-sym", "w8a16", "nvfp4a16", "w8a8-asym", "w2a16"])
def test_the_scheme_is_among_its_candidates_and_they_rise(name: str) -> None:
    scheme = Scheme.parse(name)
    found = choices_of(scheme)
    assert found.count(scheme) == 1 and len({one.activation is None for one in found}) == 1
    bits = [one.bits_per_weight(1024) for one in found]
    assert bits == sorted(bits) and len(set(bits)) == len(bits) > 1


def test_the_choice_is_the_best_of_all() -> None:
    generator = random.Random(0)
    names = ("w3", "w4", "w8")
    choices: list[Choice] = []
    for trial in range(20):
        choices = [
            Choice(
                linears=(str(index),),
                bits={name: int(name[1]) * size for name in names},
                kl={name: generator.random() * scale for name, scale in zip(names, (1.0, 0.2, 0.01), strict=True)},
            )
            for index, size in enumerate(generator.choices((100, 150, 400), k=5))
        ]
        most = sum(choice.bits["w4"] for choice in choices) * (1 + trial / 20)
        every = [
            (sum(one.kl[name] for one, name in zip(choices, taken, strict=True)), taken)
            for taken in itertools.product(names, repeat=5)
            if "w4" in taken and sum(one.bits[name] for one, name in zip(choices, taken, strict=True)) <= most
        ]
        assert tuple(choose(choices, most, "w4")) == min(every)[1]
    with pytest.raises(AffineQuantError, match="so few bits"):
        choose(choices, 1.0, "w4")


def test_a_budget_that_cannot_be_met_is_refused_with_what_can(tiny: Tiny) -> None:
    with pytest.raises(AffineQuantError) as caught:
        plan(tiny(), scheme="w4a4", avg_bits=12.0, data="demo", seq_len=64)
    assert caught.value.where == "--avg-bits" and caught.value.fix == "use 4.278 to 8.222"
    for most in (4.278, 8.222):
        assert plan(tiny(), scheme="w4a4", avg_bits=most, data="demo", seq_len=64).bits_per_weight == most
    made = plan(tiny(), scheme="w4a4", avg_bits=8.0, keep=["*.down_proj"], set={"*.o_proj": "w8a8"}, **NOW, data="demo")
    assert {name.rpartition(".")[2] for name in undecided(made.recipe, made.schemes)} == {
        *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    }


NOW: dict[str, Any] = {"seq_len": 64, "preset": "rtn"}


def test_each_scheme_is_measured_as_it_would_be_alone(tiny: Tiny, text: Path) -> None:
    made = plan(tiny(), data=text, samples=2, seq_len=16, scheme="w4a4", device="cpu")
    decoder, tokens = decoder_of(made), tokens_of(made, Silent())
    both = sensitivities(made, decoder, tokens, schemes=choices_of(made.recipe.parsed_scheme))
    alone = sensitivities(made, decoder, tokens)
    assert [one for one in both if one.scheme == "w4a4"] == alone
    wide = [one.kl for one in both if one.scheme == "w8a8"]
    assert all(kl < one.kl / 10 for kl, one in zip(wide, alone, strict=True))


def test_experts_share_one_choice_with_what_reads_the_same(tiny: Tiny, text: Path) -> None:
    made = plan(
        tiny(family="qwen2_moe"), data=text, samples=2, seq_len=16, scheme="w4a16-sym", avg_bits=4.8, preset="rtn"
    )
    recipe, choices = allocated(made, decoder_of(made), tokens_of(made, Silent()))
    experts = [choice for choice in choices if any(".experts." in name for name in choice.linears)]
    assert {*choices[0].bits} == {"w4a16-sym", "w8a16-sym"}  # no engine runs experts of 2 or 3 bits
    assert len(choices) == 2 * 4 and {len(choice.linears) for choice in experts} == {4 * 3 + 2}
    settled = plan(recipe)
    assert not undecided(settled.recipe, settled.schemes) and settled.bits_per_weight <= 4.8


def test_a_run_holds_what_was_chosen_and_nothing_is_measured_again(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"scheme": "w4a16-g32", "avg_bits": 4.0, "keep": ["model.layers.0.mlp.down_proj"]}
    asked |= {"set": {"*.o_proj": "w4a16-sym"}, "preset": "rtn", "samples": 4, "seq_len": 16, "data": str(text)}
    with pytest.raises(AffineQuantError, match="cannot be had"):
        affinequant.quantize(tiny(), out=tmp_path / "out", **asked)
    asked["avg_bits"] = 6.5
    done = affinequant.quantize(tiny(), out=tmp_path / "out", **asked)
    linears = done.report["plan"]["linears"]
    assert (
        linears["model.layers.0.mlp.down_proj"] == "16 bits"
        and linears["model.layers.1.self_attn.o_proj"] == "w4a16-sym"
    )
    assert 6.0 < done.report["bits_per_weight"] <= 6.5 and len(set(linears.values())) >= 3
    monkeypatch.setattr("affinequant.pipeline.allocated", None)
    words = [
        "quantize",
        str(tiny()),
        "-o",
        str(done.path),
        "--scheme",
        "w4a16-g32",
        "--avg-bits",
        "6.5",
        "--preset",
        "rtn",
    ]
    words += ["--keep", asked["keep"][0], "--samples", "4", "--seq-len", "16", "--data", str(text), "-q"]
    assert main([*words, "--set", "*.o_proj=w4a16-sym"]) == 0
    monkeypatch.setattr("affinequant.pipeline.allocated", lambda made, *_: (made.recipe, ()))
    assert main([*words, "--set", "*.o_proj=w8a16"]) == 2  # another recipe than the folder's
    assert affinequant.quantize(tiny(), out=tmp_path / "out", **asked).report == done.report
    recipe = Recipe.from_toml(tmp_path / "out/recipe.toml")
    assert recipe.avg_bits == 6.5 and len(recipe.set) == 1 + 2 * 7 - 3
    again = affinequant.quantize(recipe, out=str(tmp_path / "again"))
    for file in done.path.glob("*.safetensors"):
        one, other = load_file(file), load_file(again.path / file.name)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_plan_prints_what_would_be_chosen(tiny: Tiny, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(tiny()), "--data", str(text), "--samples", "2", "--seq-len", "16", "--scheme", "w4a4"]
    assert main([*words, "--avg-bits", "5", "-q", "--preset", "rtn"]) == 0
    shown = capsys.readouterr().out
    assert "which linears get how many bits" in shown and "w8a8" in shown and "w4a4" in shown
    assert main([*words, "--avg-bits", "5", "-q", "--preset", "rtn", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert set(read["linears"].values()) == {"w8a8"} and 4.5 < read["bits_per_weight"] <= 5

"""What rounding one site of one block costs: against stock transformers with those weights rounded, and in the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from affinequant.cli import main
from affinequant.learning.sensitivity import LENGTH, SAMPLES, Sensitivity, looked_at, sensitivities
from affinequant.numbers import grid_of
from affinequant.numbers.weights import fake_quantize, weight_range
from affinequant.pipeline import decoder_of, tokens_of
from affinequant.plan import plan
from affinequant.progress import Silent

Tiny = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("some words and others " * 2000)
    return tmp_path / "text.txt"


def measured(folder: Path, text: Path, scheme: str, **fields: str) -> tuple[list[Sensitivity], torch.Tensor]:
    made = plan(folder, data=text, samples=2, seq_len=16, scheme=scheme, device="cpu", **fields)
    tokens = tokens_of(made, Silent())
    return sensitivities(made, decoder_of(made), tokens), tokens.ids


def test_it_is_the_divergence_of_the_stock_model_with_those_weights_rounded(tiny: Tiny, text: Path) -> None:
    found, ids = measured(tiny(), text, "w4a16")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    grid = grid_of(plan(tiny(), data=text, scheme="w4a16", samples=2, seq_len=16).recipe.parsed_scheme.weight)
    with torch.no_grad():
        full = model(ids).logits.log_softmax(-1)
        for one in found:
            linears = [model.get_submodule(f"model.layers.{one.block}.{name}") for name in one.linears]
            kept = [linear.weight.clone() for linear in linears]
            for linear in linears:
                low, high = weight_range(linear.weight, grid)
                linear.weight.copy_(fake_quantize(linear.weight, low, high, grid, torch.bfloat16))
            rounded = model(ids).logits.log_softmax(-1)
            kl = (full.exp() * (full - rounded)).sum(-1).mean()
            for linear, weight in zip(linears, kept, strict=True):
                linear.weight.copy_(weight)
            assert one.kl == pytest.approx(float(kl), rel=2e-3), one
    assert [(one.block, one.site) for one in found] == [
        (b, s) for b in (0, 1) for s in ("attn_in", "vo", "mlp_in", "mlp_mid")
    ]
    assert sum(one.weights for one in found) == sum(
        parameter.numel() for name, parameter in model.named_parameters() if "_proj" in name
    )


def test_activations_count_and_more_bits_cost_less(tiny: Tiny, text: Path) -> None:
    weights, both, wide = ([one.kl for one in measured(tiny(), text, name)[0]] for name in ("w4a16", "w4a4", "w8a8"))
    assert all(one < other for one, other in zip(weights, both, strict=True))
    assert all(one < other / 10 for one, other in zip(wide, both, strict=True))


def test_experts_count_as_one(tiny: Tiny, text: Path) -> None:
    found, _ = measured(tiny(family="qwen2_moe"), text, "w4a4", preset="rtn")
    assert {one.site for one in found} == {"attn_in", "vo", "mlp_in", "mlp_mid"} and all(one.kl > 0 for one in found)
    assert {len(one.linears) for one in found if one.site == "mlp_mid"} == {4 + 1}


def test_few_samples_are_looked_at(tiny: Tiny, text: Path) -> None:
    recipe = looked_at(plan(tiny(), data=text, samples=64, seq_len=16)).recipe
    assert (recipe.samples, recipe.seq_len) == (SAMPLES, 16) and LENGTH > 16


def test_the_command_shows_it_and_makes_a_page(
    tiny: Tiny, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(tiny()), "--w4a4", "--data", str(text), "--seq-len", "16", "--samples", "2"]
    page = tmp_path / "page.html"
    assert main([*words, "--sensitivity", "--report", str(page), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)["sensitivity"]
    worst = max(value["sites"], key=lambda one: one["kl"])
    assert value["verdict"].startswith(f"Block {worst['block']} suffers most, at {worst['site']}")
    assert worst["site"] in page.read_text() and "sensitivity" in page.with_suffix(".md").read_text().lower()
    assert main([*words, "--report", str(page)]) == 2
    assert "--sensitivity" in capsys.readouterr().err

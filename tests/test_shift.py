"""The shift, which makes a transform affine: where it starts, that it is learned, what a whole run makes of it, refusals."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import affinequant
from affinequant.errors import AffineQuantError
from affinequant.formats.reading import in_transformers
from affinequant.learning.fit import fit
from affinequant.learning.training import FitConfig
from affinequant.report.transforms import transform_section
from affinequant.transforms.shift import Shift
from tests.test_objective import make_job, objective_of

Tiny = Callable[..., Path]
IDS = torch.arange(2, 42)[None]
OPT = {"family": "opt", "tied": True}
SHIFTED = {"attn_in": "shift+diagonal", "vo": "shift+banded", "mlp_in": "shift+diagonal"}


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(1500)))
    return {"preset": "paper", "epochs": 1, "samples": 4, "seq_len": 32, "data": tmp_path / "text.txt"}


def test_both_ends_of_a_feature_start_equally_far_from_zero(tiny: Tiny) -> None:
    """Of a value feature over all query heads that read it; what follows balances the half of what it spans."""
    job, tensors, x = make_job(tiny(bias=True), preset="rtn", transforms={"vo": "shift+diagonal"})
    tensors["self_attn.v_proj.bias"] += torch.linspace(-3, 3, 32)
    objective, seen = objective_of(job, tensors, x), dict[str, Tensor]()
    job.run_all(tensors, x, lambda site, value: seen.update({site: torch.cat([seen.get(site, value), value])}) or value)
    chain: Any = objective.transforms["vo"]
    moved = chain.parts[0].on_activations(seen["vo"], 2).reshape(-1, 2, 2, 16).detach()
    torch.testing.assert_close(moved.amax((0, 2)), -moved.amin((0, 2)), rtol=1e-4, atol=1e-5)
    w = tensors["self_attn.o_proj.weight"].abs().reshape(-1, 2, 2, 16).amax((0, 2))
    expected = (w / moved.abs().amax((0, 2))).sqrt()
    scale = chain.parts[1].log_scale.detach().exp()
    torch.testing.assert_close(scale, expected / expected.log().mean().exp(), rtol=1e-4, atol=0)


def test_it_is_learned(tiny: Tiny) -> None:
    job, tensors, x = make_job(tiny(bias=True), preset="rtn", transforms={"vo": "shift"}, epochs=1, lr=0.01)
    objective, target = objective_of(job, tensors, x), job.run_all(tensors, x)
    shift: Any = objective.transforms["vo"]
    assert isinstance(shift, Shift)
    before = shift.shift.detach().clone()
    fit(objective, lambda _: [(x, target)] * 2, FitConfig(epochs=1, steps_per_epoch=2))
    assert bool((shift.shift.detach() != before).all())


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS, use_cache=False).logits.float()


def test_a_preset_shifts_where_biases_take_it_up(tiny: Tiny, fields: dict[str, Any], tmp_path: Path) -> None:
    made = affinequant.quantize(tiny(**OPT), scheme="w4a16", tier="merged", out=tmp_path / "out", **fields)
    assert made.report["verified"]["passed"] and made.report["events"] == []
    drawn = [getattr(part, "title", "") for one in transform_section(made.report["blocks"]) for part in one.parts]
    assert "The shift at vo" in drawn and "The scaling at attn_in diagonal" in drawn
    written = tomllib.loads((made.path / "recipe.toml").read_text())["transforms"]
    assert {site: name for site, name in written.items() if "shift" in name} == SHIFTED
    stock, _ = in_transformers(made.path, "float32")
    torch.testing.assert_close(
        logits(stock), logits(affinequant.load(made.path, device="cpu", dtype="float32")), rtol=1e-4, atol=1e-4
    )
    again = affinequant.plan(tiny(**OPT), scheme="w4a16", tier="merged", **fields | {"transforms": written})
    assert again.recipe.transforms == written
    notes = affinequant.plan(tiny(**OPT), scheme="w4a16", tier="merged", **fields).notes
    assert "paper's vo=banded is shift+banded here: biases take the shift up" in notes
    assert not any("shift" in note for note in affinequant.plan(tiny(), tier="merged", **fields).notes)


def test_what_stays_online_acts_behind_it(tiny: Tiny, fields: dict[str, Any], tmp_path: Path) -> None:
    chosen = {"attn_in": "shift+diagonal+kronecker", "vo": "shift+block", "mlp_in": "shift+hadamard"}
    made = affinequant.quantize(
        tiny(**OPT), out=tmp_path / "out", tier="online", transforms=chosen, **fields | {"preset": "rtn", "epochs": 1}
    )
    assert made.report["verified"]["passed"]
    placed = json.loads((made.path / "config.json").read_text())["quantization_config"]["affinequant"]["placements"]
    assert [placed[site]["how"] for site in chosen] == ["online", "folded", "online"]


REFUSED = [
    ("llama", "attn_in", "input_layernorm has no bias"),
    ("llama", "vo", r"self_attn\.v_proj has no bias"),
    ("qwen2", "vo", r"self_attn\.o_proj has no bias"),
    ("qwen2", "attn_in", "input_layernorm has no bias"),
    ("llama", "qk", "differs from key to key"),
    ("opt", "qk", "differs from key to key"),
    ("opt", "mlp_mid", "not linear"),
    ("opt", "residual", "take away the mean"),
]


@pytest.mark.parametrize(("family", "site", "words"), REFUSED)
def test_where_nothing_takes_it_up_it_is_refused_by_name(
    family: str, site: str, words: str, tiny: Tiny, fields: dict[str, Any]
) -> None:
    with pytest.raises(AffineQuantError, match=f"shift at {site} is refused: .*{words}"):
        affinequant.plan(tiny(family=family, tied=family == "opt"), tier="merged", transforms={site: "shift"}, **fields)


def test_an_opt_without_biases_takes_none(tiny: Tiny, fields: dict[str, Any]) -> None:
    model = tiny(**OPT, enable_bias=False)
    made = affinequant.plan(model, tier="merged", **fields)
    assert made.recipe.transforms["attn_in"] == "diagonal"
    with pytest.raises(AffineQuantError, match=r"self_attn\.q_proj has no bias"):
        affinequant.plan(model, tier="merged", transforms={"attn_in": "shift"}, **fields)

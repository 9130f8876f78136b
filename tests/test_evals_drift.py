"""Drift: about 1 for more of the same text and more for another, per site; and nothing measured from a text that is not the
one that was calibrated on."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_evals import drift
from affinequant_evals.checkpoint import eval_checkpoint
from affinequant_evals.drift import MEASURES, far, halvings, looked_at
from affinequant_evals.site_inputs import open_reader, site_inputs
from affinequant_evals.suites import measurements

import affinequant
from affinequant.__main__ import main
from affinequant.data.tokens import calibration_tokens
from affinequant.errors import PREFLIGHT, USAGE, AffineQuantError
from affinequant.report.figure import Figure
from affinequant.report.reading import read_sources
from affinequant.report.writing import write_report

WORDS = {"birds": ["heron", "reed", "bridge", "water", "an", "over"], "sums": ["7", "+", "91", "=", "(", "3.5)"]}


def write(path: Path, words: str, seed: int, count: int = 1500) -> str:
    path.write_text(" ".join(random.Random(seed).choices(WORDS[words], k=count)))
    return str(path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The file of a name: `calibration` and `same` are of birds, `other` is of sums, `short` is too little."""
    folder = tmp_path_factory.mktemp("texts")
    made = {
        "calibration": write(folder / "calibration.txt", "birds", 0),
        "same": write(folder / "same.txt", "birds", 1),
        "other": write(folder / "other.txt", "sums", 2),
        "short": write(folder / "short.txt", "birds", 3, count=5),
    }
    return made.__getitem__


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], texts: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was calibrated on birds."""
    out = tmp_path_factory.mktemp("made") / "w4a16"
    data = {"data": texts("calibration"), "samples": 16, "seq_len": 32, "seed": 3}
    return affinequant.quantize(str(tiny()), scheme="w4a16", preset="rtn", out=str(out), **data).path


def test_more_of_the_same_text_and_another(made: Path, texts: Callable[[str], str]) -> None:
    said: list[str] = []
    card = eval_checkpoint(made, drift=(texts("same"), texts("other")), keep=True, say=said.append)
    names = [f"{row}@{text}.txt,seq32" for text in ("same", "other") for row in ("drift", "drift_gaussian")]
    assert [row.name for row in card.rows] == names and not card.failed and card.baseline is None and not card.notes
    values = {row.name: row.score.value for row in card.rows if row.score}
    for measure in ("drift", "drift_gaussian"):
        same, other = values[f"{measure}@same.txt,seq32"], values[f"{measure}@other.txt,seq32"]
        assert 0.8 < same < 1.25 and other > 2, (same, other)
    entry = card.to_json()["metrics"]["drift@other.txt,seq32"]
    about = entry["about"]
    assert (entry["stderr"], entry["better"], entry["n"]) == (None, "lower", 8)
    assert about["calibration"]["source"] == "calibration.txt" and about["windows_each"] == 8
    assert {(one["block"], one["site"]) for one in about["sites"]} == {
        (block, site) for block in (0, 1) for site in ("attn_in", "vo", "mlp_in", "mlp_mid")
    }
    ratios = [one["value"] / one["floor"] for one in about["sites"]]
    assert ratios == pytest.approx([one["ratio"] for one in about["sites"]])
    assert entry["value"] == pytest.approx(sum(ratios) / 8)
    assert about["said"].startswith("other.txt is ") and "two halves" in about["said"]
    worst = max(about["sites"], key=lambda one: one["ratio"])
    assert f"{worst['site']} of block {worst['block']}" in about["said"]
    again = eval_checkpoint(made, drift=(texts("same"), texts("other")), keep=True)
    assert again == card and all(row.kept for row in again.rows), "measured twice"


def test_before_anything_is_quantised(tiny: Callable[..., Path], made: Path, texts: Callable[[str], str]) -> None:
    """A model folder and a text to calibrate on: about the same as of the checkpoint, whose windows are others."""
    card = eval_checkpoint(tiny(), drift=(texts("other"),), drift_from=texts("calibration"))
    score = card.score("drift@other.txt,seq256")
    assert score and score.value > 2
    other = eval_checkpoint(made, drift=(texts("same"),), drift_from=texts("other")).score("drift@same.txt,seq256")
    assert other and other.value > 2 and other.about["calibration"]["source"] == "other.txt"


def test_beside_perplexity_and_without_names(made: Path, texts: Callable[[str], str]) -> None:
    card = eval_checkpoint(made, text=texts("same"), seq_len=32, windows=2, drift=())
    names = [row.name for row in card.rows]
    assert names[0] == "perplexity@same.txt,seq32" and names[-2:] == [
        "drift@same.txt,seq32",
        "drift_gaussian@same.txt,seq32",
    ]
    assert card.baseline and card.env["backend"].startswith("affinequant")


READERS = {
    "llama": ("model.layers.1", ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")),
    "opt": ("model.decoder.layers.1", ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")),
}
"""By family a block, and of each of its sites a linear that reads there; OPT embeds positions too."""


@pytest.mark.parametrize("family", READERS)
def test_inputs_are_those_that_calibration_sees(
    family: str, tiny: Callable[..., Path], texts: Callable[[str], str]
) -> None:
    """Against hooks in the whole model of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, (block, linears) = tiny(family=family), READERS[family]
    ids = calibration_tokens(texts("same"), AutoTokenizer.from_pretrained(folder), samples=6, seq_len=16, seed=0).ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    heard: dict[str, torch.Tensor] = {}
    for name in linears:
        module = model.get_submodule(f"{block}.{name}")
        module.register_forward_pre_hook(lambda _, args, name=name: heard.update({name: args[0].detach()}))
    with torch.no_grad():
        model(ids)
    *_, (index, kept) = site_inputs(open_reader(folder), ids, lambda x: x)
    assert index == 1 and list(kept) == ["attn_in", "vo", "mlp_in", "mlp_mid"]
    for found, wanted in zip(kept.values(), heard.values(), strict=True):
        torch.testing.assert_close(found, wanted.view_as(found), rtol=1e-4, atol=1e-5)


def test_sliced_distance_is_that_of_pot() -> None:
    import ot

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 50, 8, generator=generator)
    measure = MEASURES["sliced"]
    found = measure.between(measure.prepare(x), measure.prepare(y))
    squared: Any = ot.wasserstein_1d(x.double(), y.double(), p=2)
    assert found == pytest.approx(float(squared.mean()) ** 0.5, rel=1e-5)


def test_gaussian_distance_of_a_shift_and_a_scale() -> None:
    """Moved by m and stretched by s, a cloud of standard deviation 1 is sqrt(m^2 + (s - 1)^2) away in each direction."""
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T, correction=0))).T
    measure = MEASURES["gaussian"]
    found = measure.between(measure.prepare(x), measure.prepare(3 * x + 1))
    assert found == pytest.approx(5**0.5, rel=1e-4)
    assert measure.between(measure.prepare(x), measure.prepare(x)) == pytest.approx(0, abs=1e-3)


def test_scale_means_nothing_and_distance_does() -> None:
    generator = torch.Generator().manual_seed(0)
    calibration, same = torch.randn(16, 32, 8, generator=generator), torch.randn(8, 32, 8, generator=generator)
    one, two = far(calibration, [same, same + 1])
    scaled = far(1000 * calibration, [1000 * same])[0]
    for name in MEASURES:
        assert scaled[name].value == pytest.approx(one[name].value, rel=1e-4)
        assert two[name].value > 3 * one[name].value and one[name].ratio == pytest.approx(1, abs=0.2)
    with pytest.raises(AffineQuantError, match="one token again"):
        far(torch.ones(4, 3, 2), [torch.ones(2, 3, 2)])
    with pytest.raises(AffineQuantError, match="halves of the calibration text are the same"):
        far(calibration[:1].expand(4, -1, -1), [same[:2]])


def test_halves_share_no_window_and_the_first_token_is_left_out() -> None:
    for first, second in halvings(9, 4):
        assert len({*first.tolist(), *second.tolist()}) == 8
    x = torch.zeros(2, 256, 16)
    x[:, 0] = 1e6
    assert looked_at(x).shape == (2, drift.ROWS, 16) and not looked_at(x).any()
    assert looked_at(torch.ones(1, 5, 3)).shape == (1, 4, 3)


def test_refusals(made: Path, tiny: Callable[..., Path], texts: Callable[[str], str], tmp_path: Path) -> None:
    def refused(match: str, code: int = USAGE, folder: Path = made, **wanted: Any) -> str:
        with pytest.raises(AffineQuantError, match=match) as caught:
            eval_checkpoint(folder, **wanted)
        assert caught.value.exit_code == code
        return caught.value.fix

    other = (texts("other"),)
    assert "--drift-from" in refused("does not say on which text", folder=tiny(), drift=other)
    assert "--baseline" in refused("is quantised", drift=other, baseline="none")
    refused("too little text", PREFLIGHT, drift=(texts("short"),))
    refused("too little text", PREFLIGHT, drift=other, drift_from=texts("short"))
    refused("no such file", drift=(str(tmp_path / "gone.txt"),))
    refused("crops", drift=("c4",))
    refused("drift of no text", drift=(), tasks=("piqa",))
    refused("none is asked for", drift_from=texts("same"))
    (tmp_path / "same.txt").write_text(Path(texts("same")).read_text())
    refused("one name", drift=(texts("same"), str(tmp_path / "same.txt")))

    changed = Path(shutil.copytree(made, tmp_path / "changed"))
    recipe = (changed / "recipe.toml").read_text()
    (changed / "recipe.toml").write_text(recipe.replace("seed = 3", "seed = 4"))
    assert "--drift-from" in refused("does not give the tokens any more", folder=changed, drift=other)
    (changed / "recipe.toml").write_text(recipe.replace("calibration.txt", "gone.txt"))
    assert "--drift-from" in refused("not at hand", folder=changed, drift=other)


def test_a_drift_is_measured_alone_or_beside_a_suite() -> None:
    assert measurements(drift=("a.txt",)).texts == () and measurements(drift=("a.txt",)).tasks == ()
    assert measurements(drift=(), suite="quick").drift == ("demo",) and measurements().drift == ()


def test_command(made: Path, texts: Callable[[str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["eval", str(made), "--drift", texts("same"), texts("other"), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (
        value["schema"] == 1
        and value["baseline"] is None
        and set(value["metrics"])
        == {f"{row}@{text}.txt,seq32" for text in ("same", "other") for row in ("drift", "drift_gaussian")}
    )
    assert main(["eval", str(made), "--drift", texts("other")]) == 0
    shown = capsys.readouterr().out
    assert "times as far from the calibration text" in shown and "lower is better" in shown
    assert main(["eval", str(made), "--drift-from", texts("other")]) == USAGE
    (tmp_path / "eval.json").write_text(json.dumps(value))
    page = write_report(read_sources([made, tmp_path / "eval.json"]), tmp_path / "page.html").page
    section = next(one for one in page.sections if one.title == "Drift from the calibration text")
    figures = [part for part in section.parts if isinstance(part, Figure)]
    assert [figure.key for figure in figures] == ["drift-same-txt", "drift-other-txt"]
    assert all(len(figure.series[0].cells) == 2 and len(figure.x.names) == 4 for figure in figures)
    assert write_report(read_sources([tmp_path / "eval.json"]), tmp_path / "alone.html").page.sections

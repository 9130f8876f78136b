"""From a folder to a checked checkpoint, for every preset and scheme, and what happens when a block goes wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import affinequant
from affinequant import AffineQuantError
from affinequant.progress import Silent
from affinequant.recipe.presets import PRESETS
from tests.tiny import SLIDING, TIERS

Make = Callable[..., Path]


@pytest.fixture
def quantize(tiny: Make, tmp_path: Path) -> Callable[..., affinequant.Result]:
    (tmp_path / "text.txt").write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(2500)))

    def call(model: Path | None = None, **fields: Any) -> affinequant.Result:
        small = {"samples": 6, "seq_len": 32, "data": tmp_path / "text.txt", "out": tmp_path / "out"}
        if PRESETS[fields.get("preset", "default")].settings.get("epochs"):
            small["epochs"] = 2
        return affinequant.quantize(model or tiny(tied=True), **(small | fields))

    return call


@pytest.mark.parametrize(("preset", "tier"), TIERS)
def test_every_preset(preset: str, tier: str, quantize: Callable[..., affinequant.Result]) -> None:
    report = quantize(preset=preset, tier=tier).report
    assert report["verified"]["passed"] and report["verified"]["hidden"] < 1e-3
    harmed = "rotation: learning left the held-out"  # which so small a model may say of a rotation
    assert [event for event in report["events"] if harmed not in event] == [] and report["non_finite"] == 0
    assert len(report["blocks"]) == 2 and report["calibration"]["source"] == "text.txt"
    learned = bool(PRESETS[preset].settings.get("epochs"))
    for block in report["blocks"]:
        assert (block["steps"] > 0) is learned
        assert block["condition"] < 1e4
        assert all(value < 1 for value in block["dominance"].values())
    assert affinequant.load(report_path(report)).config.model_type == "llama"


def report_path(report: Any) -> Path:
    return Path(report["plan"]["out"])


@pytest.mark.parametrize(
    "scheme",
    [
        *("w4a16", "w4a16-g32", "w4a8", "w4a4-sym", "w4a4-g32", "w4a8-ag32", "w8a8", "w4a16-sym", "w3a16-g32"),
        "w2a16-g32-sym",
    ],
)
def test_every_scheme(scheme: str, quantize: Callable[..., affinequant.Result]) -> None:
    clip = {"activation_clip": "none"} if scheme == "w8a8" else {}
    report = quantize(preset="fast", scheme=scheme, tier="merged", **clip).report
    assert report["verified"]["passed"] and report["verified"]["compared"]


@pytest.mark.parametrize(
    "shape", [{}, {"kv_heads": 4}, {"shards": 2}, {"bias": True}, {"hidden": 72, "heads": 3, "kv_heads": 1}, SLIDING]
)
def test_every_shape_online(shape: dict[str, Any], tiny: Make, quantize: Callable[..., affinequant.Result]) -> None:
    report = quantize(tiny(**shape), preset="fast", tier="online").report
    assert report["verified"]["passed"] and report["verified"]["hidden"] < 1e-3
    assert not report["plan"]["untied_bytes"]


@pytest.mark.parametrize(
    "scheme", ["w4a16", "w4a16-g32", "w4a8", "w4a4-sym", "w8a8", "w4a8kv4", "w4a4-g32-ag32", "w3a16"]
)
def test_every_scheme_online(scheme: str, quantize: Callable[..., affinequant.Result]) -> None:
    report = quantize(preset="fast", scheme=scheme, tier="online").report
    assert report["verified"]["passed"] and report["verified"]["compared"]


@pytest.mark.parametrize(
    "shape", [{}, {"kv_heads": 4}, {"shards": 2}, {"bias": True}, {"hidden": 72, "heads": 3, "kv_heads": 1}, SLIDING]
)
def test_every_shape(shape: dict[str, Any], tiny: Make, quantize: Callable[..., affinequant.Result]) -> None:
    report = quantize(tiny(**shape), tier="merged").report
    assert report["verified"]["passed"] and report["verified"]["hidden"] < 1e-3


def test_in_bfloat16(quantize: Callable[..., affinequant.Result]) -> None:
    assert quantize(dtype="bfloat16", tier="merged").report["verified"]["passed"]


def test_the_auxiliary_loss_is_a_term_of_its_own(quantize: Callable[..., affinequant.Result], tmp_path: Path) -> None:
    plain = quantize(preset="paper").report["blocks"][1]["loss_first"]
    more = quantize(preset="paper", aux_loss=True, out=tmp_path / "aux").report["blocks"][1]["loss_first"]
    assert more > 1.1 * plain


def test_a_block_that_cannot_be_learned_takes_its_closed_form_start(
    quantize: Callable[..., affinequant.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from affinequant.learning.objective import BlockObjective

    real = BlockObjective.loss
    monkeypatch.setattr(
        BlockObjective,
        "loss",
        lambda self, batch: {"block": real(self, batch)["block"] * (torch.nan if self.job.index == 1 else 1.0)},
    )
    report = quantize(tier="merged").report
    assert report["verified"]["passed"]
    assert report["blocks"][1]["stopped"] == "non-finite" and report["blocks"][0]["stopped"] == "done"
    assert any("block 1" in event and "non-finite" in event for event in report["events"])


def test_a_file_that_reads_back_otherwise_fails_the_gate(
    quantize: Callable[..., affinequant.Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from affinequant import deliver

    real = deliver._contents

    def corrupted(*args: Any) -> Any:
        contents = real(*args)
        stages = contents.stages

        def wrong():
            for tensors in stages():
                yield {n: torch.zeros_like(t) if n.endswith("1.mlp.down_proj.codes") else t for n, t in tensors.items()}

        object.__setattr__(contents, "stages", wrong)
        return contents

    monkeypatch.setattr(deliver, "_contents", corrupted)
    with pytest.raises(AffineQuantError) as caught:
        quantize(preset="rtn")
    assert caught.value.exit_code == 4
    assert (tmp_path / "out/model.safetensors").exists() and not (tmp_path / "out/report.json").exists()


def test_a_finished_folder_is_returned_for_its_own_recipe_only(quantize: Callable[..., affinequant.Result]) -> None:
    first = quantize(preset="rtn")
    assert quantize(preset="rtn").report == first.report
    with pytest.raises(AffineQuantError, match="seed"):
        quantize(preset="rtn", seed=1)


def test_every_long_step_says_how_far_it_is(
    quantize: Callable[..., affinequant.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from affinequant import progress

    monkeypatch.setattr(progress, "SAY_EVERY", 0.0)
    listen = Heard()
    path = quantize(preset="default", finish="kl", finish_epochs=1, progress=listen).path
    steps = (
        "block 1, learning: 6/12",
        "block 2, rounding: 3/7",
        "finish: 1/5",
        "writing: 1/3",
        "verifying block by block: 1/2",
    )
    for step in steps:
        assert any(line.startswith(f"{step}, ~") for line in listen.lines), step
    listen.lines.clear()
    affinequant.load(path, say=listen.say)
    assert listen.lines[0].startswith("reading the weights: 1/14, ~")


class Heard(Silent):
    """Keeps what is said, and stops a run behind a block."""

    def __init__(self, stop: int = -1) -> None:
        self.lines: list[str] = []
        self.stop = stop

    def say(self, text: str) -> None:
        self.lines.append(text)

    def block(self, index: int, report: Any) -> None:
        if index == self.stop:
            raise KeyboardInterrupt


def test_a_report_counts_what_earlier_processes_took_and_where(
    quantize: Callable[..., affinequant.Result], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(preset="rtn", progress=Heard(stop=0))
    for name in ("outer", "block.0000"):
        file = tmp_path / f"out/.run/stages/{name}/report.json"
        report = json.loads(file.read_text())
        assert report["seconds"] > 0 and report["device"] == "cpu"
        file.write_text(json.dumps(report | {"seconds": 1000.0, "peak_bytes": 2**50, "device": "cuda"}))
    with pytest.raises(KeyboardInterrupt):
        quantize(preset="rtn", progress=Heard(stop=1))
    report = quantize(preset="rtn").report
    assert 2000 < report["seconds"] < 3000 and report["peak_bytes"] == 2**50
    times = {phase["name"]: phase["seconds"] for phase in report["phases"]}
    assert sum(times.values()) == pytest.approx(report["seconds"], rel=1e-12)
    assert times.pop("outer") == 1000 < sum(times[name] for name in times if name.startswith("blocks: ")) < 1100
    assert max(phase["peak_bytes"] for phase in report["phases"]) == report["peak_bytes"]
    assert report["devices"] == ["cpu", "cuda"] and report["events"] == ["worked on cpu and cuda, finished on cpu"]


def test_a_report_says_what_took_how_long(quantize: Callable[..., affinequant.Result]) -> None:
    fields = {"finish": "kl", "finish_epochs": 1, "rotation_steps": 2, "transforms": {"residual": "orthogonal"}}
    report = quantize(preset="fast", tier="merged", **fields).report
    blocks = [f"blocks: {name}" for name in ("loading", "learning", "rounding", "recording")]
    ends = ["finish", "keeping progress", "writing", "verifying", "measuring losses"]
    assert [phase["name"] for phase in report["phases"]] == ["reading", "rotation", "outer", *blocks, *ends]
    assert all(phase["seconds"] > 0 and phase["peak_bytes"] > 0 for phase in report["phases"])
    assert sum(phase["seconds"] for phase in report["phases"]) == pytest.approx(report["seconds"], rel=1e-12)
    for name in ("rotation", "finish"):
        assert len(report[name]["curve"]) == 1 and report[name]["divergence"][0] == report[name]["divergence_first"]


def test_curves_are_the_losses_of_all_epochs(quantize: Callable[..., affinequant.Result]) -> None:
    for block in quantize(preset="paper", aux_loss=True, judge="kl", epochs=3).report["blocks"]:
        assert len(block["curve"]) == 3 and len(block["divergence"]) == 4
        assert block["curve"][0] == block["loss_first"] and block["curve"][-1] == block["loss_last"]
        terms = block["series"]
        assert [sum(both) for both in zip(terms["block"], terms["auxiliary"], strict=True)] == pytest.approx(
            block["curve"]
        )
        assert terms["band"] == [1, 8, 16]


def test_tables_are_rotated_some_rows_at_a_time(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from affinequant.learning import outer
    from affinequant.transforms import build

    (tmp_path / "text.txt").write_text("some words " * 2000)
    made = affinequant.plan(tiny(tied=True), preset="fast", tier="merged", data=tmp_path / "text.txt", seq_len=32)
    turn: Any = build("hadamard", made.sites["residual"], seed=1, alpha=1.0).double()
    tensors = made.source.read(["model.embed_tokens.weight", "model.norm.weight"])
    rows: list[int] = []
    real = outer.rotate_outer

    def seen(part: Any, *rest: Any) -> Any:
        rows.append(len(part["model.embed_tokens.weight"]))
        return real(part, *rest)

    monkeypatch.setattr(outer, "rotate_outer", seen)
    whole = outer.rotated(made, tensors, turn)
    monkeypatch.setattr(outer, "TABLE_ROWS", 100)
    parts = outer.rotated(made, tensors, turn)
    assert rows == [320, 100, 100, 100, 20] and whole.keys() == parts.keys() == tensors.keys() | {"lm_head.weight"}
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=2**-7, atol=1e-6)  # the order of a sum may move one bit

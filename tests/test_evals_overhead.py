"""The command that times passes: its figures belong together. How large they are is the machine's matter."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from affinequant_evals import overhead


def test_overhead(tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the heron in the reed over the water " * 60)
    argv = [str(tiny()), "--against", str(tiny(seed=1)), "--text", str(tmp_path / "text.txt"), "--seq-len", "48"]
    overhead.main([*argv, "--windows", "2", "--rounds", "2", "--top-k", "16", "--device", "cpu"])
    shown = capsys.readouterr()
    value = json.loads(shown.out)
    took, ratios = value["cpu_seconds"], value["ratios"]
    assert took.keys() == value["seconds"].keys() and all(ratio > 0 for ratio in ratios.values())
    assert ratios.keys() == {"perplexity", "live", "baseline kept", "kept"}
    assert list(value["peak_bytes"]) == ["2", "8"] and value["peak_bytes"]["2"] > 0
    assert (
        0 < value["kl"]["at_least"] < value["kl"]["live"] and value["kl"]["kept"] > 0 and 0 < value["kl"]["outside"] < 1
    )
    assert (value["windows"], value["seq_len"], value["rounds"], value["text"]) == (2, 48, 2, "text.txt")
    for name, asked in overhead.ASKED.items():
        assert ("met" if ratios[name] <= asked else "MISSED") + f": {asked} asked" in shown.err


def test_a_model_beside_itself_has_no_divergence(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the heron in the reed over the water " * 60)
    overhead.main(
        [str(tiny()), "--text", str(tmp_path / "text.txt"), "--seq-len", "32", "--windows", "1", "--rounds", "1"]
    )
    found = json.loads(capsys.readouterr().out)["kl"]
    assert found["live"] == found["kept"] == 0

"""What `plan` says of a device: bounds that follow from bits and rates, measurements, and which scheme costs no more."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from affinequant.advice import HARDWARE, advice, gains, this_cpu
from affinequant.cli import main
from affinequant.errors import AffineQuantError


def test_bounds_follow_from_bits_and_rates() -> None:
    found = {gain.scheme: gain for gain in gains("sm_90", "w8a8")}
    assert found["w8a8"].many == found["w4a4"].many == found["w4a8"].many == HARDWARE["sm_90"].int8
    assert found["w4a16-g64"].many == 1.0
    assert found["w4a4"].one == pytest.approx(4.0, rel=0.01)
    assert found["w8a8"].one == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("device", HARDWARE)
def test_eight_bits_are_advised_where_they_cost_no_more(device: str) -> None:
    said = advice(device, "w4a4")
    assert "w4a8 costs there what w4a4 costs" in said
    assert not advice(device, "w4a16-g64") and not advice(device, "w8a8")


def test_what_was_not_measured_is_not_made_up() -> None:
    for device in ("cpu-amx", "cpu-vnni", "cpu-avx2"):
        found = {gain.scheme: (gain.one, gain.many, gain.basis) for gain in gains(device, "w4a16-g64")}
        assert found["w4a16-g64"] == (None, None, "not measured") and None not in found["w4a4"]


def test_an_unknown_device_is_refused_with_the_nearest() -> None:
    with pytest.raises(AffineQuantError, match="sm_91") as refused:
        gains("sm_91", "w4a4")
    assert refused.value.exit_code == 2 and "sm_90" in refused.value.fix
    assert this_cpu() in ("", *HARDWARE)


@pytest.mark.parametrize("units, expected", [
    ("avx2 avx512_vnni amx_int8", "cpu-amx"), ("avx2 avx512_vnni avx_vnni", "cpu-vnni"), ("avx2 avx_vnni", "cpu-avx2"),
    ("sse4_2", ""),
])  # fmt: skip
def test_a_cpu_is_known_by_the_compiled_code_that_it_gets(
    units: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX-VNNI alone that is AVX2's: figures of AVX512's say nothing of it."""
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: f"flags : {units}")
    assert this_cpu() == expected


def test_plan_says_what_another_device_gains(
    tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some words " * 2000)
    sizes = ["--data", str(tmp_path / "text.txt"), "--samples", "2", "--seq-len", "16"]
    arguments = ["plan", str(tiny()), "--w4a4", *sizes, "--for", "sm_90"]
    assert main([*arguments, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)["advice"]
    assert value["device"] == "sm_90" and "w4a8" in value["text"]
    assert main(arguments) == 0
    assert "w4a8 costs there what w4a4 costs" in capsys.readouterr().out

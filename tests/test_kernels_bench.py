"""The benchmark runs, checks what it times, and says what it left out. Its figures are not judged here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from affinequant_kernels import ops, reference
from affinequant_kernels.bench import benchmark, layers, report
from affinequant_kernels.cpu import layer
from affinequant_kernels.weight import kind_of

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def small(monkeypatch: Patch) -> Iterator[None]:
    monkeypatch.setattr(benchmark, "COLD_BYTES", {"cpu": 1 << 14})
    monkeypatch.setattr(benchmark, "FLUSH_BYTES", 1 << 20)
    monkeypatch.setattr(benchmark, "TURN_SECONDS", {"cpu": 1e-4})
    monkeypatch.setattr(benchmark, "FUSED", {"cpu": (4, 512)})
    yield
    layer.clear_cache()


def bench_main(monkeypatch: Patch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    return benchmark.main()


SMALL = ("--device", "cpu", "--shapes", "128x256", "--rows", "1,3", "--rounds", "2")


def test_writes_json_table_and_plot(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    assert bench_main(monkeypatch, *SMALL, "--out", str(tmp_path)) == 0
    shown = capsys.readouterr()
    assert "| 128 x 256, 3 tokens | cold us |" in shown.out and "\n| kron + quant | " in shown.out
    assert "w4a4" in shown.err and "written to" in shown.err
    for name in layers.RIVALS:
        assert f"not compared: {name}: " in shown.out
    (folder,) = tmp_path.iterdir()
    result = json.loads((folder / "bench.json").read_text())
    assert [size["m"] for size in result["sizes"]] == [1, 3] and not result["left_out"]
    first = result["sizes"][0]
    ours = {"w4a4", "w4a4 asymmetric", "w4a4 online", "w4a8", "w8a8", "w4a4 g128"}
    assert {"torch bf16", "torch fp32"} | ours <= set(first["cold"])
    assert set(first["cold"]) == set(first["warm"]) and "clocks" in result["before"] and "clocks" in result["after"]
    for time in first["cold"].values():
        assert 0 < time["p20"] <= time["us"] <= time["p80"] and set(time["x"]) == {"torch bf16", "torch fp32"}
    assert first["cold"]["torch bf16"]["x"]["torch bf16"] == 1.0
    assert (folder / "bench.md").read_text().strip() == shown.out.strip()
    pytest.importorskip("matplotlib")
    assert (folder / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_all_of_stdout(monkeypatch: Patch, capsys: Capture) -> None:
    assert bench_main(monkeypatch, *SMALL, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["schema"] == 1 and len(result["sizes"]) == 2 and result["fused"]["times"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--shapes", "4096"], "shapes: expected NxK, comma separated"),
        (["--shapes", "128x100"], "K a multiple of 128, got 128x100"),
        (["--shapes", "12x128"], "N a multiple of 8"),
        (["--rows", "1,two"], "rows: expected whole numbers"),
        (["--rows", "0"], "rows: expected positive numbers, got 0"),
        (["--rounds", "0"], "rounds: expected at least 1"),
        (["--rounds", "few"], "invalid int value: 'few'"),
        (["--minutes", "nan"], "minutes: expected a positive number"),
        (["--device", "tpu"], "device: expected cpu or cuda, got tpu"),
        (["--out", __file__], "out: expected a folder"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_arguments_are_exit_code_2(words: list[str], message: str, monkeypatch: Patch, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_main(monkeypatch, *words)
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and message in shown.err and shown.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there(monkeypatch: Patch, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        bench_main(monkeypatch, "--device", "cuda")
    assert "no CUDA device here" in capsys.readouterr().err


def test_sizes_beyond_the_time_are_listed(monkeypatch: Patch) -> None:
    monkeypatch.setattr(benchmark.time, "monotonic", iter(range(0, 10_000, 50)).__next__)
    settings = benchmark.Settings(shapes=((64, 128), (128, 128)), rows=(1, 2), rounds=1, minutes=2.0)
    result = benchmark.run(settings)
    assert [(s["n"], s["m"]) for s in result["sizes"]] == [(64, 1)] and result["fused"] is None
    assert result["left_out"] == [[64, 128, 2], [128, 128, 1], [128, 128, 2]]
    assert "left out for want of time: 128 x 128, 2 tokens" in report.table(result)


def test_a_wrong_kernel_is_not_timed(monkeypatch: Patch) -> None:
    right = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *a, **k: right(*a, **k) + 1)
    with pytest.raises(AssertionError, match="w4a4 differs from its reference"):
        benchmark.run(benchmark.Settings(shapes=((64, 128),), rows=(2,), rounds=1))


def test_the_default_scheme_is_timed_as_it_runs(monkeypatch: Patch) -> None:
    """Zero points on both sides, and the transform of 86 x 128 that an input of 11008 gets."""
    assert [len(factor) for factor in layers.kron_factors(11008, "cpu")] == [86, 128]
    made = layers.make_layers(64, 11008, "cpu", 1)
    asked: list[tuple[list[int], bool]] = []
    right = ops.online_linear

    def online_linear(x: Any, factors: Any, weight: Any, **settings: Any) -> torch.Tensor:
        assert weight.zero is not None and int(weight.zero.abs().max()) > 0
        asked.append(([len(factor) for factor in factors], settings["act_symmetric"]))
        return right(x, factors, weight, **settings)

    monkeypatch.setattr(ops, "online_linear", online_linear)
    (call,) = layers.providers(made, 3)["w4a4 online"]
    call()
    assert asked == [([86, 128], False)] * 2
    wrong = [torch.eye(86), torch.eye(128)]
    monkeypatch.setattr(ops, "online_linear", lambda x, _, weight, **settings: right(x, wrong, weight, **settings))
    with pytest.raises(AssertionError, match="w4a4 online differs from its reference"):
        layers.providers(made, 3)


# Other packages: none is installed where these tests run, so their place is taken by modules with their interface.


def stand_in(name: str, monkeypatch: Patch, **members: Any) -> None:
    package = name.split(".")[0]
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(layers, "find_spec", lambda wanted: wanted == package or None)


class Hqq:
    """gemlite's helpers: value = (code - zero) * scale, codes and one zero for each scale."""

    def __init__(self, *, device: str, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def from_weights(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.nn.Module:
        assert codes.dtype == torch.uint8 and int(codes.max()) <= 15 and scales.shape == (codes.shape[0], 1)
        layer = torch.nn.Linear(codes.shape[1], codes.shape[0], bias=False, dtype=self.dtype).requires_grad_(False)
        layer.weight.copy_((codes - zeros) * scales)
        return layer


def rivals(monkeypatch: Patch) -> tuple[dict[str, list[Any]], dict[str, str]]:
    weight = layers.sample_weight(64, 128)
    dense = layers.unpack(weight.qweight, 128).float() * weight.scale.unsqueeze(1)
    # As on a GPU, with tensors that stay on the CPU.
    return layers._make_rivals(weight, dense.bfloat16(), "cuda", 2)


def test_gemlite_gets_the_same_matrix(monkeypatch: Patch) -> None:
    stand_in("gemlite.helper", monkeypatch, A16W4_HQQ_INT=Hqq, A8W4_HQQ_INT_dynamic=Hqq)
    modules, skipped = rivals(monkeypatch)
    assert {name: len(copies) for name, copies in modules.items()} == {"gemlite w4a16": 2, "gemlite w4a8 (fp8)": 2}
    assert modules["gemlite w4a16"][0] is not modules["gemlite w4a16"][1]
    assert set(skipped.values()) == {"not installed"}


def test_what_fails_or_computes_something_else_is_a_line_of_the_report(monkeypatch: Patch) -> None:
    def broken(**_: Any) -> Any:
        raise RuntimeError("no kernel image\nfor this device")

    class Doubled(Hqq):
        def from_weights(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.nn.Module:
            return super().from_weights(codes, 2 * scales, zeros)

    stand_in("gemlite.helper", monkeypatch, A16W4_HQQ_INT=broken, A8W4_HQQ_INT_dynamic=Doubled)
    modules, skipped = rivals(monkeypatch)
    assert not modules and skipped["gemlite w4a16"] == "failed: RuntimeError: no kernel image"
    assert skipped["gemlite w4a8 (fp8)"].startswith("failed: ValueError: its output is off by 1.0")


def test_humming_is_made_as_its_documentation_shows(monkeypatch: Patch) -> None:
    made: list[dict[str, Any]] = []

    class HummingLayer(torch.nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            made.append(options)

        def load_from_unquantized(self, dense: torch.Tensor) -> None:
            self.dense = dense

        def transform(self) -> None:
            self.ready = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.ready
            return x @ self.dense.t()

    stand_in("humming.layer", monkeypatch, HummingLayer=HummingLayer)
    modules, _ = rivals(monkeypatch)
    assert list(modules) == ["humming w4a16", "humming w4a8", "humming w4a4"]
    assert [options["input_config"] for options in made] == [None, {"dtype": "int8"}, {"dtype": "int4"}]
    assert all(o["shape_n"] == 64 and o["shape_k"] == 128 and o["weight_config"] == {"dtype": "int4"} for o in made)


def test_a_rival_that_fails_while_timed_is_left_out() -> None:
    def fail() -> object:
        raise RuntimeError("capture")

    good: list[Callable[[], object]] = [lambda: None]
    times, failed = benchmark.measure({"torch bf16": good, "x": [fail]}, "cpu", 1, may_fail=["x"])
    assert list(times) == ["torch bf16"] and failed == {"x": "failed: RuntimeError: capture"}
    with pytest.raises(RuntimeError, match="capture"):
        benchmark.measure({"x": [fail]}, "cpu", 1)


def test_roofline_share_of_a_known_device() -> None:
    time = {"us": 10.0, "p20": 9.0, "p80": 11.0, "x": {"torch bf16": 1.0}}
    names = ("torch bf16", "w4a4", "torch._int_mm, x quantised before")
    size = {"n": 4096, "k": 4096, "m": 1, "cold": dict.fromkeys(names, time), "warm": dict.fromkeys(names, time)}
    about = {"device": "NVIDIA H200", "torch": "2", "triton": "3", "date": "today", "clocks": "1 MHz"}
    result = {"before": about, "after": about, "sizes": [size], "fused": None, "skipped": {}, "left_out": []}
    shares = [line.split("|")[-2].strip() for line in report.table(result).splitlines() if line.startswith("| t")]
    # 2 bytes a weight at 4.8e12 bytes a second: 7 of 10 us.
    assert shares == ["70", "-"]
    assert "| w4a4 | 10.0 | 9.0..11.0 | 10.0 | 1.00 | 1.00 | 18 |" in report.table(result)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind, bits", [("channel", 4), ("channel", 8), ("group", 4), ("group", 8), ("integer", 4)])
def test_what_is_timed_is_a_quantised_gaussian(kind: Any, bits: int, zero: bool) -> None:
    weight = layers.sample_weight(16, 256, kind, bits, zero=zero)
    assert (weight.zero is not None) == (zero and (kind, bits) != ("group", 8))
    assert kind_of(weight.scale, weight.mul) == kind
    value = reference.w4a16_linear(torch.eye(256), weight).t()
    # Clipped at 0.7 of each scale's largest value. The integer multipliers are random, so there the size says nothing.
    assert kind == "integer" or 0.85 < float(value.std()) < 1.05
    assert len(value.unique()) > 16

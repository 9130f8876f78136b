"""How fast a checkpoint generates next to its model: each in its own process; the table, the verdict, the plot."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from affinequant_evals import generate, speed

import affinequant
from affinequant.cli import main

RESULT: dict[str, Any] = {
    "results": [
        {
            "engine": "vllm",
            "model": name,
            "ready_s": 3.0,
            "peak_bytes": 2**30,
            "weight_bytes": 2**20,
            "rows": [
                {"batch": batch, "first_token_s": 0.1, "ms_per_token": 1e3 * batch / rate, "tokens_per_s": rate}
                for batch, rate in zip((1, 4), rates, strict=True)
            ],
        }
        for name, rates in (("w4a4 (this)", (10.0, 60.0)), ("bf16", (20.0, 40.0)))
    ],
    "skipped": {"vllm w8a8": "no kernel"},
}


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in the online form."""
    folder = tmp_path_factory.mktemp("made")
    text = folder / "text.txt"
    text.write_text(" ".join(f"{i} red foxes and {i % 7} hens" for i in range(2000)))
    source = tiny(hidden=128, heads=4, kv_heads=2, mlp=256)
    settings: dict[str, Any] = {"preset": "fast", "tier": "online", "samples": 4, "seq_len": 32, "data": text}
    return affinequant.quantize(source, scheme="w4a4", out=folder / "out", **settings).path


def test_time_is_divided_into_the_first_token_and_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    now = [0.0]

    def engine(prompts: list[list[int]], new: int) -> None:
        assert len(prompts) == 4 and all(len(ids) == 8 and max(ids) < 50 for ids in prompts)
        now[0] += 0.5 + 0.1 * (new - 1)

    monkeypatch.setattr(generate.time, "perf_counter", lambda: now[0] + 0 * next(clock))
    row = generate.measure(engine, 50, batch=4, prompt=8, new=11, rounds=3)
    assert row["first_token_s"] == pytest.approx(0.5) and row["ms_per_token"] == pytest.approx(100)
    assert row["tokens_per_s"] == pytest.approx(40)


def test_the_table_and_the_verdict_say_where_it_loses() -> None:
    columns, rows = speed.table(RESULT)
    cells = {(row[1], row[2]): dict(zip(columns, row, strict=True)) for row in rows}
    assert cells["1", "w4a4 (this)"]["x bf16"] == "0.50" and cells["4", "w4a4 (this)"]["x bf16"] == "1.50"
    assert speed.verdict(RESULT) == ["vllm: slower than bf16 at batch 1 (0.50x)", "not measured: vllm w8a8: no kernel"]


def test_turns_become_one_result(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians of what was measured; what was asked for stays as it is."""
    rates = iter((10.0, 40.0, 30.0, 40.0))

    def measured(*_: Any) -> dict[str, Any]:
        rate = next(rates)
        rows = [{"batch": 4, "first_token_s": 0.1, "ms_per_token": 4e3 / rate, "tokens_per_s": rate}]
        return {"ready_s": rate, "peak_bytes": 2**30, "rows": rows}

    monkeypatch.setattr(speed, "_measure", measured)
    work = speed.Workload(batches=(4,), turns=2)
    result = speed.bench_checkpoint(checkpoint, engines=("transformers",), against=("bf16",), workload=work)
    columns, rows = speed.table(result)
    cells = {row[2]: dict(zip(columns, row, strict=True)) for row in rows}
    ours = cells["w4a4 online (this)"]
    assert (ours["batch"], ours["tokens/s"], ours["x bf16"], ours["start-up"]) == ("4", "20.0", "0.50", "20 s")
    assert speed.verdict(result) == ["transformers: slower than bf16 at batch 4 (0.50x)"]


def test_the_plot_is_written(tmp_path: Path) -> None:
    speed.plot(RESULT, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_checkpoint_is_timed_in_transformers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--engines", "transformers", "--batches", "1,2", "--prompt", "4", "--new", "4", "--turns", "1"]
    assert main(["bench", str(checkpoint), *words, "--out", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [entry["model"] for entry in result["results"]] == ["w4a4 online (this)", "bf16", "w4a16", "w8a8"]
    for entry in result["results"]:
        assert [row["batch"] for row in entry["rows"]] == [1, 2]
        assert all(row["tokens_per_s"] > 0 for row in entry["rows"])
        assert entry["peak_bytes"] > 10**7 and entry["ready_s"] > 0
    assert result["skipped"] == {} and json.loads((tmp_path / "out/speed.json").read_text()) == result


@pytest.mark.vllm
@pytest.mark.slow
def test_and_in_vllm(checkpoint: Path) -> None:
    work = speed.Workload(batches=(2,), prompt=4, new=4, turns=1, eager=True, dtype="float32")
    result = speed.bench_checkpoint(checkpoint, engines=("vllm",), against=(), workload=work)
    (entry,) = result["results"]
    assert entry["engine"] == "vllm" and entry["rows"][0]["tokens_per_s"] > 0


def test_the_peak_is_that_of_all_processes() -> None:
    """vLLM's engine is a child of the process that measures, and has let go of memory when it is asked."""
    code = (
        "import subprocess, sys\n"
        "from affinequant_evals.generate import peak_bytes\n"
        "alone = peak_bytes()\n"
        "hold = 'x = bytearray(400 * 2**20); x = None; print(1, flush=True); input()'\n"
        "child = subprocess.Popen([sys.executable, '-c', hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(alone, peak_bytes())\n"
        "child.communicate(b'\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    alone, both = map(int, done.stdout.split())
    assert alone > 50 * 2**20 and 400 * 2**20 < both - alone < 480 * 2**20


def test_a_measurement_that_fails_says_why(checkpoint: Path) -> None:
    work = speed.Workload(batches=(1,), dtype="nonsense")
    with pytest.raises(affinequant.AffineQuantError, match="nonsense"):
        speed.bench_checkpoint(checkpoint, engines=("transformers",), against=(), workload=work)

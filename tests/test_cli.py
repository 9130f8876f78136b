"""The command line: exit codes, what goes where, JSON, help, and what it does not load."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from affinequant.cli import main

Make = Callable[..., Path]
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"{i} grey geese over field {i % 11}" for i in range(2500)))
    return path


@pytest.fixture
def words(tiny: Make, text: Path) -> list[str]:
    small = ["--tier", "merged", "--preset", "fast", "--samples", "4", "--seq-len", "32"]
    return ["quantize", str(tiny(tied=True)), "--w4a4", "--data", str(text), *small]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("demo", "quantize", "plan", "eval", "compare", "inspect", "bench", "list", "env"):
        assert f"\n  {command}" in shown
    assert main(["quantize", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "--w4a4",
        "--tier",
        "--preset",
        "--data",
        "--samples",
        "--resume",
        "--dry-run",
        "examples:",
        "default",
    ):
        assert word in shown
    assert main([]) == 2


@pytest.mark.parametrize(
    "command",
    [["--help"], ["quantize", "--help"], ["compare", "--help"], ["list", "presets"], ["list", "schemes"]],
    ids=" ".join,
)
def test_what_needs_no_torch_loads_none(command: list[str]) -> None:
    code = (
        "import sys; from affinequant.cli import main; assert main(sys.argv[1:]) == 0; "
        "print('LOADED', 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert "LOADED False False" in done.stdout


def test_a_plan_for_70b_reads_a_config_alone(tmp_path: Path, text: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    code = (
        "import sys; from affinequant.cli import main; code = main(sys.argv[1:]); "
        "print(code, 'torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "plan", str(tmp_path), "--w4a4", "--data", str(text), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("0 False False")
    plan = json.loads(done.stdout)
    assert plan["schema"] == 1 and plan["dims"]["layers"] == 80
    assert {site["site"] for site in plan["sites"]} == {"residual", "attn_in", "qk", "vo", "mlp_in", "mlp_mid"}
    assert 33e9 < plan["output_bytes"] < 37e9
    assert not list(tmp_path.glob("*.safetensors"))


def test_quantize_inspect_and_again(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([*words, "-o", str(out), "--json"]) == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert answer["report"]["verified"]["passed"] and "1/2" in shown.err
    assert {"config.json", "model.safetensors", "recipe.toml", "tokenizer.json", "report.json"} <= set(os.listdir(out))
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert main([*words, "-o", str(out)]) == 0
    shown = capsys.readouterr()
    assert "vllm serve" in shown.out and f"affinequant eval {out}" in shown.out
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == 1
    assert main(["quantize", "--config", str(out / "recipe.toml"), "-o", str(tmp_path / "twin"), "-q"]) == 0
    assert (tmp_path / "twin/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert capsys.readouterr().err == ""


def test_a_dry_run_writes_nothing(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert "unties the head" in capsys.readouterr().out


def test_eval_next_to_the_baseline(
    words: list[str], tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "-o", str(tmp_path / "out"), "-q"]) == 0
    capsys.readouterr()
    flags = ["--text", str(text), "--seq-len", "64", "--windows", "3", "--json"]
    assert main(["eval", str(tmp_path / "out"), *flags]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["schema"] == 1 and card["baseline"]
    assert set(card) >= {"schema", "checkpoint", "baseline", "metrics", "env"}
    score = card["metrics"]["perplexity@text.txt,seq64"]
    assert set(score) >= {"value", "stderr", "n", "better", "baseline"} and score["better"] == "lower"
    # A page of the folder knows what was scored, although nobody named it.
    assert main(["report", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    shown = f'<data value="{score["value"]!r}">'
    assert shown in (tmp_path / "out/report.html").read_text()
    (tmp_path / "out/report.html").unlink()
    assert main(["eval", str(tmp_path / "out"), *flags, "--report"]) == 0
    assert shown in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(
    "what", ["schemes", "models", "transforms", "formats", "presets", "data", "metrics", "published"]
)
def test_lists(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert main(["list", what, "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_env_tests_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    assert "torch" in json.dumps(json.loads(capsys.readouterr().out))


def test_a_mistake_of_ours_is_1_with_a_traceback_in_a_file(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFFINEQUANT_CACHE", str(tmp_path / "cache"))

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("affinequant.pipeline.make_stages", broken)
    assert main([*words, "-o", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert "a bug" in shown and "Traceback" not in shown
    written = list((tmp_path / "cache/errors").glob("*.txt"))
    assert len(written) == 1 and "ZeroDivisionError" in written[0].read_text()


def test_a_checkpoint_that_reads_back_wrongly_is_4(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from affinequant.formats import compressed_tensors

    real = compressed_tensors.pack_stage

    def wrong(*given: Any, **options: Any) -> Any:
        return {
            n: t * 1.5 if n.endswith("0.mlp.up_proj.weight_scale") else t for n, t in real(*given, **options).items()
        }

    monkeypatch.setattr(compressed_tensors, "pack_stage", wrong)
    assert main([*words, "-o", str(tmp_path / "out")]) == 4
    assert (tmp_path / "out/model.safetensors").exists() and not (tmp_path / "out/report.json").exists()
    assert json.loads((tmp_path / "out/report.failed.json").read_text())["verified"]["passed"] is False
    assert "differs from the run: model.layers.0.mlp.up_proj.scale" in capsys.readouterr().err


INTERRUPTED = """
import os, signal, sys
from affinequant.cli import main
from affinequant.progress import Console
block = Console.block
def press(self, index, report):  # the first block is on disk
    block(self, index, report)
    os.kill(os.getpid(), signal.SIGINT)
Console.block = press
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_is_130_and_the_same_command_goes_on(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*words, "-o", str(tmp_path / "out")]
    # A shell that starts jobs in the background lets them ignore Ctrl-C, and children inherit that.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *command], stderr=subprocess.PIPE, text=True, preexec_fn=listen
    )
    assert process.returncode == 130, process.stderr
    assert "to go on: affinequant quantize" in process.stderr
    assert main(command) == 0
    assert "resuming: 1 of 2 blocks" in capsys.readouterr().err

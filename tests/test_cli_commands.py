"""Each command for itself: what its help says, what it prints where, its JSON, and how it is taken up again."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import affinequant
from affinequant.cli import COMMANDS, arguments, inspect, main, quantize
from affinequant.models import FAMILIES
from affinequant.models import source as checkpoint
from affinequant.recipe.presets import PRESETS
from affinequant.recipe.recipe import Recipe, resolve
from affinequant.recipe.recipe import options as recipe_options
from affinequant.recipe.scheme import SCHEMES
from affinequant.run.run import Run
from affinequant.serve.families import PROVEN

Tiny = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"{number} green bottles hang on wall {number % 7}." for number in range(1200)))
    return path


@pytest.fixture(scope="module")
def options(text: Path) -> list[str]:
    return ["--data", str(text), "--samples", "4", "--seq-len", "32", "--tier", "merged", "--preset", "fast"]


@pytest.fixture(scope="module")
def made(tiny: Tiny, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint of the merged tier; tests must not change it."""
    out = tmp_path_factory.mktemp("made") / "tiny w4a4"
    assert main(["quantize", str(tiny()), *options, "-o", str(out), "-q"]) == 0
    return out


def answer(capsys: Capture, argv: list[str], code: int = 0) -> dict[str, Any]:
    """The one JSON object on stdout."""
    capsys.readouterr()
    assert main([*argv, "--json"]) == code
    value = json.loads(capsys.readouterr().out)
    assert value["schema"] == 1
    return value


# Help.


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]], ids=" ".join)
def test_overview_names_every_command(argv: list[str], capsys: Capture) -> None:
    assert main(argv) == 0
    shown = capsys.readouterr()
    for name, command in COMMANDS.items():
        assert f"  {name}" in shown.out and command.about in shown.out
    assert "affinequant demo " in shown.out and "130 interrupted" in shown.out and shown.err == ""


def test_nothing_typed_gets_the_overview_on_stderr(capsys: Capture) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert "usage: affinequant COMMAND" in shown.err and shown.out == ""


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"affinequant {affinequant.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name: str, capsys: Capture) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: affinequant {name} ") and "--json" in shown and "-q, --quiet" in shown


def test_help_of_quantize_has_every_field_and_explains_presets(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["quantize", "--help"]) == 0
    shown = capsys.readouterr().out
    names = {"model": "MODEL", "transforms": "--transform SITE=NAME", "out": "-o DIR, --out DIR"}
    for name in recipe_options():
        assert names.get(name, "--" + name.replace("_", "-")) in shown
    for scheme in SCHEMES:
        assert f"--{scheme} " in shown
    for name, preset in PRESETS.items():
        assert f"  {name} " in shown and f" {preset.about}\n" in shown
    for title in ("what to make:", "how (", "calibration data:", "machine:", "output:", "run:", "examples:"):
        assert f"\n{title}" in shown
    assert "calibration sequences (default: by preset; 128)" in shown
    assert "seed of every random choice (default: 0)" in shown
    words = " ".join(shown.split())
    assert (
        "(default: by preset; online where 4-bit weights or activations need our kernels anyway, else merged)" in words
    )


# plan and --dry-run.


def test_plan(tiny: Tiny, options: list[str], capsys: Capture) -> None:
    assert main(["plan", str(tiny(tied=True)), *options, "--w4a4"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    row = next(line for line in lines if line.startswith("residual"))
    assert row.split()[:5] == ["residual", "hadamard", "folded", "0", "0.0"] and "orthogonal" in row
    assert any(line.split()[:3] == ["qk", "none", "-"] for line in lines)
    for word in ("bits per weight", "time", "memory", "disk", "note: rotating the residual stream unties"):
        assert any(line.startswith(word) for line in lines), word
    assert shown.err == "" and "\x1b" not in shown.out


def test_plan_of_what_blocks_choose(tiny: Tiny, options: list[str], capsys: Capture) -> None:
    words = ["--tier", "online", "--transform", "auto", "--transform", "vo=kronecker", "--cost-budget", "60"]
    assert main(["plan", str(tiny()), *options, *words]) == 0
    shown = capsys.readouterr().out
    assert shown.count("each block takes one of none, diagonal, hadamard") == 3
    assert "<= 8,192" in shown and "at most 60 % of the block" in shown


def test_plan_verbose_shows_every_structure(tiny: Tiny, options: list[str], capsys: Capture) -> None:
    assert main(["plan", str(tiny()), *options, "-v"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    online = next(line for line in lines if line[:2] == ["attn_in", "kronecker"])
    assert online[2] == "online" and float(online[3]) > 0
    assert ["qk", "dense", "refused"] in [line[:3] for line in lines]


def test_plan_json(tiny: Tiny, options: list[str], capsys: Capture) -> None:
    value = answer(capsys, ["plan", str(tiny()), *options, "--w4a16-g64"])
    assert value["scheme"] == "w4a16-g64" and value["bits_per_weight"] == pytest.approx(4.312, abs=1e-3)
    assert {"site", "transform", "placement", "reason", "flops_per_token", "percent_of_block"} == set(value["sites"][0])
    for name in ("minutes", "output_bytes", "source_bytes", "cpu_bytes", "disk_bytes", "notes"):
        assert name in value


def test_dry_run_reads_no_weights(
    tiny: Tiny, options: list[str], tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(checkpoint.Source, "read", refuse)
    argv = ["quantize", str(tiny()), *options, "--dry-run", "-o", str(tmp_path / "out")]
    assert main(argv) == 0
    assert "residual" in capsys.readouterr().out
    assert answer(capsys, argv)["out"] == str(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_flags_win_over_a_recipe_file(tiny: Tiny, options: list[str], tmp_path: Path, capsys: Capture) -> None:
    file, data = tmp_path / "recipe.toml", {"data": options[1], "samples": 7, "seq_len": 32}
    recipe = resolve({"model": str(tiny()), "tier": "merged", "transforms": {"vo": "none"}} | data)
    file.write_text(recipe.to_toml())
    assert Recipe.from_toml(file) == recipe

    def sites(*argv: str) -> dict[str, str | None]:
        value = answer(capsys, ["plan", "--config", str(file), *argv])
        return {site["site"]: site["transform"] for site in value["sites"]}

    assert sites()["vo"] is None and sites()["mlp_mid"] == "diagonal"
    assert sites("--transform", "mlp_mid=none") == sites() | {"mlp_mid": None}
    # Another preset decides what the file's preset had decided, and nothing that the file had changed.
    fast = Recipe.from_toml(file, preset="fast")
    assert (fast.epochs, fast.weight_clip, fast.samples) == (0, "search", 7)
    assert fast.transforms["residual"] == "hadamard" and "mlp_mid" not in fast.transforms
    assert Recipe.from_toml(file, scheme="w4a16").activation_clip == "none"


# quantize.


def test_header_progress_table_and_next_command(
    tiny: Tiny, options: list[str], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "with space"
    assert main(["quantize", str(tiny()), *options, "-o", str(out)]) == 0
    shown = capsys.readouterr()
    for word in ("model ", "scheme ", "method ", "data ", "plan ", "size ", "out ", "note ", "per block:", "  1/2  "):
        assert any(line.startswith(word) for line in shown.err.splitlines()), word
    assert "rounding = " not in shown.err  # the recipe: only with -v
    lines = shown.out.splitlines()
    for word in ("size", "bits per weight", "perplexity", "time", "peak memory", "path"):
        assert any(line.startswith(word) for line in lines), word
    assert "-> " in next(line for line in lines if line.startswith("perplexity"))
    assert lines[-2:] == [f"  vllm serve '{out}'", f"  affinequant eval '{out}'"]
    assert "\x1b" not in shown.out + shown.err

    assert main(["quantize", "--config", str(out / "recipe.toml"), "-v"]) == 0
    shown = capsys.readouterr()
    assert "is finished already" in shown.err and 'rounding = "gptq"' in shown.err and "vllm serve" in shown.out


def test_another_recipe_needs_another_folder_or_overwrite(
    made: Path, tiny: Tiny, options: list[str], tmp_path: Path, capsys: Capture
) -> None:
    out = Path(shutil.copytree(made, tmp_path / "copy"))
    argv = ["quantize", str(tiny()), *options, "-o", str(out), "--w4a8", "-q"]
    before = (out / "model.safetensors").read_bytes()
    assert main(argv) == 2
    assert "scheme: 'w4a4' there, 'w4a8' now" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before
    assert main([*argv, "--overwrite"]) == 0
    assert json.loads((out / "report.json").read_text())["scheme"] == "w4a8"


def test_interrupted_inspected_and_taken_up(
    tiny: Tiny, options: list[str], tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    out, commit = tmp_path / "my out", Run.commit

    def interrupt(run: Run, name: str, **parts: Any) -> None:
        commit(run, name, **parts)
        if name == "block.0000":
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "commit", interrupt)
    argv = ["quantize", str(tiny()), *options, "--transform", "vo=none", "--lr", "0.001", "-o", str(out)]
    assert main([*argv, "--overwrite"]) == 130
    shown = capsys.readouterr()
    # Emptying the folder once more would throw away what was saved.
    assert f"to go on: {shlex.join(['affinequant', *argv])}\n" in shown.err
    assert not (out / "config.json").exists()
    monkeypatch.undo()

    assert main(["inspect", str(out)]) == 0
    assert "unfinished: 1 of 2 blocks are done" in capsys.readouterr().out
    found = answer(capsys, ["inspect", str(out)])
    assert (found["state"], found["blocks_done"], found["blocks_total"]) == ("unfinished", 1, 2)
    assert main([*shlex.split(found["resume"])[1:], "--resume"]) == 0
    assert "resuming: 1 of 2 blocks are on disk" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    assert "finished already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [{}, {"tier": "merged"}, {"tier": "online"}, {"tier": "online", "transforms": {"mlp_in": "none"}, "lr": 0.1}],
)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_command_that_goes_on_gives_the_same_recipe(preset: str, fields: dict[str, Any]) -> None:
    recipe = resolve({"model": "m", "preset": preset, "out": "there"} | fields)
    command = shlex.split(inspect._resume(asdict(recipe), Path("there")))
    args = arguments.parse("quantize", quantize, "about", command[2:])
    assert args is not None and arguments.recipe_of(args) == recipe


def test_json_of_an_interruption_and_of_a_bug(tiny: Tiny, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("AFFINEQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr("affinequant.cli.plan.recipe_of", fails(KeyboardInterrupt()))
    assert "affinequant plan x" in answer(capsys, ["plan", "x"], code=130)["error"]["fix"]
    monkeypatch.setattr("affinequant.cli.plan.recipe_of", fails(ZeroDivisionError("a bug")))
    error = answer(capsys, ["plan", "x"], code=1)["error"]
    assert error.keys() == {"what", "where", "fix"} and "ZeroDivisionError: a bug" in error["what"]
    assert "Traceback" in Path(error["where"]).read_text()
    assert main(["plan", "x", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_where_the_cache_cannot_be_written(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AFFINEQUANT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("affinequant.cli.plan.recipe_of", fails(ZeroDivisionError("half an emoji: \ud83d")))
    assert main(["plan", "x"]) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and "Traceback" not in error
    assert list(tmp_path.glob("affinequant-*/errors/*.txt"))


def test_a_full_disk_says_how_to_go_on(capsys: Capture, monkeypatch: Patch) -> None:
    full = OSError(28, "No space left on device", "/data/out")
    monkeypatch.setattr("affinequant.cli.quantize.recipe_of", fails(full))
    assert main(["quantize", "x y", "--overwrite"]) == 3
    error = capsys.readouterr().err
    assert "the disk is full" in error and "/data/out" in error and "go on: affinequant quantize 'x y'\n" in error


def test_a_reader_that_stops_reading_is_no_error() -> None:
    code = "import sys; from affinequant.cli import main; sys.exit(main(['list', 'schemes']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() == 0
    child.stderr.close()


# bench.


def test_bench(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    from affinequant_kernels.bench import benchmark
    from affinequant_kernels.cpu import layer

    monkeypatch.setattr(benchmark, "COLD_BYTES", {"cpu": 1 << 14})
    monkeypatch.setattr(benchmark, "FLUSH_BYTES", 1 << 20)
    monkeypatch.setattr(benchmark, "TURN_SECONDS", {"cpu": 1e-4})
    monkeypatch.setattr(benchmark, "FUSED", {"cpu": (4, 512)})
    argv = ["bench", "--device", "cpu", "--shapes", "64x128", "--rows", "2", "--rounds", "1"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "| 64 x 128, 2 tokens | cold us |" in shown.out and "written to" in shown.err
    (folder,) = (tmp_path / "out").iterdir()
    assert (folder / "bench.md").read_text() == shown.out
    assert main([*argv, "-q"]) == 0
    assert capsys.readouterr().err == ""
    value = answer(capsys, argv)
    assert value["sizes"][0]["cold"]["w4a4"]["us"] > 0 and set(value["sizes"][0]["cold"]["w4a4"]["x"]) > {"torch bf16"}
    layer.clear_cache()


def test_bench_has_the_options_of_the_module(capsys: Capture, monkeypatch: Patch) -> None:
    """`python -m affinequant_kernels.bench` and `affinequant bench` are described twice."""
    from affinequant_kernels.bench import benchmark

    monkeypatch.setattr(sys, "argv", ["bench", "--help"])
    with pytest.raises(SystemExit):
        benchmark.main()
    options = {word.strip("[],") for word in capsys.readouterr().out.split() if word.strip("[],").startswith("--")}
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(options) >= 7 and all(f"{option}" in shown for option in options)


# inspect, eval, list, env.


def test_inspect(made: Path, capsys: Capture) -> None:
    assert main(["inspect", str(made)]) == 0
    shown = capsys.readouterr()
    assert "finished and verified" in shown.out and "4.28 per weight" in shown.out and shown.err == ""
    assert f"affinequant quantize --config '{made / 'recipe.toml'}'" in shown.out
    rows = [line.split() for line in shown.out.splitlines()]
    assert [row[1] for row in rows if row[:1] in (["0"], ["1"])] == ["4.28", "4.28"]
    assert main(["inspect", str(made), "-v"]) == 0
    verbose = capsys.readouterr().out
    assert verbose.count("self_attn.q_proj") == verbose.count("input mlp_mid") == 2 and 'rounding = "gptq"' in verbose


def test_inspect_json(made: Path, capsys: Capture) -> None:
    value = answer(capsys, ["inspect", str(made)])
    assert (value["state"], value["blocks_done"], value["resume"]) == ("finished", 2, None)
    assert value["recipe"]["preset"] == "fast" and value["events"] == []
    tensors = sum(block["bytes"] for block in value["blocks"]) + value["bytes_outside_blocks"]
    assert 0 < (made / "model.safetensors").stat().st_size - tensors < 16384  # the header
    assert {"sqnr", "condition", "linears", "events"} <= value["blocks"][0].keys()


def test_inspect_without_a_report_and_with_broken_weights(made: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "downloaded"
    shutil.copytree(made, out, ignore=shutil.ignore_patterns("report.json", "recipe.toml", ".run"))
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "without report.json" in shown and "w4a4" in shown and "outside" in shown
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert main(["inspect", str(out)]) == 3
    assert "cut short" in capsys.readouterr().err


def test_eval(made: Path, text: Path, tiny: Tiny, capsys: Capture) -> None:
    argv = ["eval", str(made), "--text", str(text), "--seq-len", "32", "--windows", "3"]
    assert main(argv) == 0
    shown = capsys.readouterr()
    row = next(line for line in shown.out.splitlines() if line.startswith("perplexity@text.txt,seq32"))
    assert row.count("+-") == 3 and "lower is better" in row
    assert "+- is one standard error with 2 degrees of freedom" in shown.out
    assert f"baseline    {tiny()}" in shown.out and "3 windows of 32 tokens" in shown.out
    assert "scoring" in shown.err
    value = answer(capsys, [*argv, "--baseline", "none", "--bos", "yes", "-q"])
    assert value["baseline"] is None and "none" in value["notes"][0]
    assert value["metrics"]["perplexity@text.txt,seq32"]["about"]["bos"] == "each window"


@pytest.mark.parametrize("fits", [True, False])
def test_eval_beside_a_baseline(made: Path, text: Path, capsys: Capture, monkeypatch: Patch, fits: bool) -> None:
    from affinequant_evals import checkpoint

    monkeypatch.setattr(checkpoint, "fit_together", lambda folders, **options: fits)
    argv = [
        "eval",
        str(made),
        "--text",
        str(text),
        "--seq-len",
        "32",
        "--windows",
        "3",
        "--stride",
        "16",
        "--no-samples",
    ]
    assert main(argv) == 0
    shown = capsys.readouterr()
    label = "text.txt,seq32,stride16"
    rows = {line.split("@")[0]: line for line in shown.out.splitlines() if f"@{label} " in line}
    assert list(rows) == ["perplexity", "kl", "agreement", "flips"]
    assert rows["kl"].endswith("lower is better") and rows["agreement"].endswith("higher is better")
    assert "3 windows of 32 tokens of text.txt, one every 16, " in shown.out
    how = (
        "beside the baseline (live)" if fits else "by the baseline's 128 largest logits of each and 32 that were drawn"
    )
    assert f"kl@{label}: the same tokens, {how}" in shown.out
    assert ("do not fit into memory together" in shown.err) is not fits
    entry = answer(capsys, argv)["metrics"][f"kl@{label}"]
    assert entry["value"] > 0 and entry["baseline"] is entry["delta"] is None and entry["about"]["stride"] == 16
    assert list(answer(capsys, [*argv, "--no-kl"])["metrics"]) == [f"perplexity@{label}"]


def test_eval_prints_greedy_samples(made: Path, text: Path, capsys: Capture) -> None:
    argv = ["eval", str(made), "--text", str(text), "--seq-len", "32", "--windows", "2", "-q"]
    value = answer(capsys, argv)
    assert len(value["samples"]) == 3 and "gates" not in value
    assert {"prompt", "baseline", "text", "repetition", "suspicious"} <= value["samples"][0].keys()
    assert "repetition@greedy" in value["metrics"]
    assert main(argv) == 0
    assert "  The capital of France is ..." in capsys.readouterr().out
    assert "samples" not in answer(capsys, [*argv, "--no-samples"])


def test_eval_with_limits(made: Path, text: Path, capsys: Capture) -> None:
    argv = ["eval", str(made), "--text", str(text), "--seq-len", "32", "--windows", "3", "--no-samples", "-q"]
    (gate,) = answer(capsys, [*argv, "--max-ppl-increase", "1e9"])["gates"]
    assert gate["passed"] and gate["metric"] == "perplexity@text.txt,seq32" and gate["limit"] == 1e9
    capsys.readouterr()
    assert main([*argv, "--max-ppl-increase", "0", "--json"]) == 4
    shown = capsys.readouterr()
    (gate,) = json.loads(shown.out)["gates"]  # one object, although something failed
    assert not gate["passed"] and gate["value"] > 0 and len(gate["interval"]) == 2
    for part in ("quality gate failed: perplexity@text.txt,seq32", f"where: {made}", "the checkpoint is kept"):
        assert part in shown.err
    assert main([*argv, "--max-ppl-increase", "0"]) == 4
    assert "FAILED: perplexity@text.txt,seq32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("limit", "code", "words"),
    [
        (["--max-ppl-increase", "five"], 2, "is no limit"),
        (["--max-ppl-increase", "5%", "--baseline", "none"], 3, "there is none (no baseline: --baseline none)"),
        (["--max-kl", "0.1", "--no-kl"], 3, "not compared (--no-kl)"),
    ],
)
def test_a_limit_that_cannot_be_judged_is_refused(
    limit: list[str], code: int, words: str, made: Path, text: Path, capsys: Capture
) -> None:
    assert main(["eval", str(made), "--text", str(text), "--seq-len", "32", "--windows", "3", *limit]) == code
    shown = capsys.readouterr()
    assert words in shown.err and "scoring" not in shown.err and shown.out == ""


def test_quantize_with_limits(
    made: Path, tiny: Tiny, options: list[str], text: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    from affinequant.data import tokens

    passages = text.read_text().split(". ")
    out = Path(shutil.copytree(made, tmp_path / "copy"))
    argv = ["quantize", str(tiny()), *options, "-o", str(out), "-q", "--max-ppl-increase", "0"]
    monkeypatch.setattr(quantize, "DEFAULT_WINDOWS", 10**6)
    monkeypatch.setattr(tokens, "demo_passages", lambda say=None: (passages, passages))
    assert main(argv) == 3  # too little text to judge it is said before the run
    assert "too little text" in capsys.readouterr().err
    monkeypatch.setattr(quantize, "DEFAULT_WINDOWS", 2)
    before = (out / "model.safetensors").read_bytes()
    value = answer(capsys, argv, code=4)
    assert value["scores"]["metrics"]["perplexity@demo,seq512"]["n"] == 2  # as long as this model can read
    assert value["gates"][0]["passed"] is False and value["scores"]["gates"] == value["gates"]
    assert value["next"] and (out / "model.safetensors").read_bytes() == before
    gates = answer(capsys, [*argv[:-1], "1e9", "--max-kl", "1e9"])["gates"]
    assert [gate["metric"] for gate in gates] == ["perplexity@demo,seq512", "kl@demo,seq512"]
    assert all(gate["passed"] for gate in gates)


def test_eval_where_a_metric_fails_is_1(made: Path, text: Path, capsys: Capture, monkeypatch: Patch) -> None:
    from affinequant_evals import perplexity

    monkeypatch.setattr(perplexity, "read", fails(RuntimeError("no luck")))
    argv = ["eval", str(made), "--text", str(text), "--seq-len", "32", "--windows", "1", "--baseline", "none"]
    assert main(argv) == 1
    assert "failed: RuntimeError: no luck" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("topic", "names"),
    [
        ("schemes", ["w4a4", "w4a16-g64"]),
        (
            "models",
            ["llama", "LlamaForCausalLM", "gemma3", "all but gguf", "residual: the gain of post_attention_layernorm"],
        ),
        ("transforms", ["hadamard", "residual, vo", "rope-pair"]),
        ("formats", ["auto", "compressed-tensors", "dense"]),
        ("presets", [*PRESETS, "residual=hadamard"]),
        ("data", ["wikitext2", "demo", "hf:ID"]),
        ("metrics", ["perplexity@TEXT", "--suite quick"]),
    ],
)
def test_list(topic: str, names: list[str], capsys: Capture) -> None:
    assert main(["list", topic]) == 0
    shown = capsys.readouterr().out
    for name in names:
        assert name in shown
    assert topic in answer(capsys, ["list"])["list"]


def test_models_say_what_each_can_be_made_into(capsys: Capture) -> None:
    """Within 100 columns; and with --json what folds and what stays online at each site, and what is refused and why."""
    assert main(["list", "models"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    models = {row["family"]: row for row in answer(capsys, ["list", "models"])["list"]["models"]}
    assert set(models) == set(FAMILIES)
    assert {name for name, row in models.items() if row["vllm"] == "proven"} == set(PROVEN)
    opt, llama = models["opt"], models["llama"]
    assert opt["tiers"]["merged"]["attn_in"] == ["diagonal", "shift"] and opt["tiers"]["merged"]["residual"] == []
    assert "take away the mean" in opt["refused"]["residual"] and "no OPT" in opt["refused"]["gguf"]
    assert llama["refused"] == {} and "kronecker" in llama["tiers"]["online"]["attn_in"]
    assert "experts" in models["mixtral"]["refused"]["vllm"] and models["mixtral"]["vllm"] == "refused"


def test_env(tiny: Tiny, options: list[str], tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    from affinequant_kernels import reference
    from affinequant_kernels.cpu import engines

    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    for word in ("python", "torch", "transformers", "threads", "integer units", "cache", "offline"):
        assert any(line.startswith(word) for line in shown.splitlines()), word
    assert shown.count("equals its reference") == 4
    value = answer(capsys, ["env"])
    assert value["passed"] and value["versions"]["torch"] and value["kernels"]["w4a4"]["passed"]
    for name, found in value["engines"].items():
        assert name in shown and found["chosen"] in found["candidates"]
        for candidate, outcome in found["candidates"].items():
            assert candidate in shown and outcome["text"]
            assert outcome["ms"] is None or outcome["ms"] > 0

    monkeypatch.setenv("AFFQ_ENGINE", "fastest")
    engines.forget()
    error = answer(capsys, ["env"], code=2)["error"]
    assert "got fastest" in error["what"] and "float32" in error["what"] and "AFFQ_ENGINE" in error["where"]
    model = str(tiny(tied=True))
    error = answer(capsys, ["quantize", model, *options, "--w4a4", "-o", str(tmp_path / "out")], code=2)["error"]
    assert "got fastest" in error["what"] and not (tmp_path / "out" / "report.json").exists()
    monkeypatch.delenv("AFFQ_ENGINE")
    engines.forget()

    honest = reference.linear_dyn
    monkeypatch.setattr(reference, "linear_dyn", lambda *args, **options: honest(*args, **options) + 1)
    assert main(["env"]) == 1
    assert "DIFFERS by 1" in capsys.readouterr().out


def fails(problem: BaseException) -> Callable[..., None]:
    def function(*_: Any, **__: Any) -> None:
        raise problem

    return function

"""Recipes tried in memory: the table and its files, what a trial refuses, and that it computes what a run would write."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import affinequant
from affinequant.cli import main
from affinequant.learning.trial import trials
from affinequant.pipeline import decoder_of, tokens_of
from affinequant.plan import plan
from affinequant.progress import Silent
from affinequant.recipe.recipe import read_toml, resolve

Tiny = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
FILE = """
preset = "rtn"
tier = "online"
samples = 2

[none]

[shared]
transforms = { attn_in = "diagonal+shared-16", mlp_mid = "shared-16" }

[rotated]
transforms = { residual = "block-hadamard", mlp_mid = "shared-16" }
epochs = 1
"""


@pytest.fixture
def words(tiny: Tiny, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{number} red kites over barn {number % 7}." for number in range(1200)))
    (tmp_path / "arms.toml").write_text(FILE)
    flags = ["--data", str(text), "--samples", "4", "--seq-len", "32", "--scheme", "mxfp4", "--text", str(text)]
    flags += ["--windows", "3", "--window-len", "32", "-o", str(tmp_path / "out")]
    return ["compare", str(tiny()), *flags, "--variants", str(tmp_path / "arms.toml")]


def test_recipes_are_tried_with_each_seed(words: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main([*words, "--trial", "--seeds", "0-1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["trials"]] == ["none", "shared", "rotated"]
    assert found["calibration"].startswith("4 x 32 tokens")  # what is typed goes before what the file says
    for row in found["trials"]:
        assert row["kl"] > 0 and set(row["by_seed"]) == {"0", "1"} and row["sd"] is not None
    assert [row["online_flops_per_token"] > 0 for row in found["trials"]] == [False, True, True]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["trial.json", "trial.md"]
    assert (tmp_path / "out/trial.md").read_text().count("\n| ") == 5


def test_a_trial_diverges_as_the_checkpoint_would(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(2500)))
    fields = {"scheme": "mxfp4", "preset": "rtn", "samples": 4, "seq_len": 32, "data": tmp_path / "text.txt"}
    fields |= {"tier": "online", "transforms": {"attn_in": "diagonal+shared-32", "mlp_mid": "shared-64"}}
    made = plan(tiny(), **fields)
    tokens, decoder = tokens_of(made, Silent()), decoder_of(made)
    held = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    kl = trials({"one": made}, decoder, tokens, held)["one"]
    done = affinequant.quantize(tiny(), **fields, out=tmp_path / "out")
    with torch.no_grad():
        student, teacher = (
            affinequant.load(folder, device="cpu", dtype="float32")(held).logits.log_softmax(-1)
            for folder in (done.path, tiny())
        )
    expected = float((teacher.exp() * (teacher - student)).sum(-1).mean())
    # The checkpoint keeps norms and embeddings in 16 bits.
    assert kl == pytest.approx(expected, rel=0.05) and kl > 1e-3


@pytest.mark.parametrize(("flags", "where"), [(["--rounding", "gptq"], "--rounding"), (["--finish", "kl"], "--finish")])
def test_what_a_trial_does_not_do_is_refused(words: list[str], capsys: Capture, flags: list[str], where: str) -> None:
    assert main([*words, "--trial", *flags]) == 2
    shown = capsys.readouterr().err
    assert "a trial learns block by block" in shown and where in shown


@pytest.mark.parametrize(
    ("text", "what"), [("a = 1", "it has no tables"), ("[x", "is not TOML"), ('["../x"]', "names must be plain")]
)
def test_files_that_name_no_recipes(words: list[str], tmp_path: Path, capsys: Capture, text: str, what: str) -> None:
    (tmp_path / "arms.toml").write_text(text)
    assert main(words) == 2 and what in capsys.readouterr().err
    assert main([*words, "--presets", "rtn"]) == 2 and "cannot go together" in capsys.readouterr().err


def test_a_file_that_is_no_text_is_refused(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "arms.toml").write_bytes(b"\xff\xfe[none]")
    assert main(["compare", str(tiny()), "--trial", "--variants", str(tmp_path / "arms.toml")]) == 2
    assert "is not TOML" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[1] / "evals").glob("*.toml")), ids=lambda file: file.name
)
def test_the_variants_that_tables_come_from_are_recipes(file: Path) -> None:
    tables = read_toml(file, "--variants", "")
    shared = {name: value for name, value in tables.items() if not isinstance(value, dict)}
    named = {name: fields for name, fields in tables.items() if isinstance(fields, dict)}
    recipes = [resolve({"model": "demo"} | shared | fields) for fields in named.values()]
    assert len({recipe.to_toml() for recipe in recipes}) == len(recipes) > 1

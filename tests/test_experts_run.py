"""Mixtures of experts at work: loaded on integers, verified expert by expert, and what is exported of them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import affinequant
from affinequant import AffineQuantError, deliver
from affinequant.errors import PREFLIGHT, USAGE
from affinequant.export import read_back
from affinequant.formats import find_format
from affinequant.formats.reread import read_finished
from affinequant.models.source import open_source
from affinequant.recipe.scheme import Scheme
from affinequant.runtime import load as runtime
from affinequant.runtime.integer_linear import IntegerLinear
from affinequant.verify import TOLERANCE, Committed
from tests.conftest import NEAREST
from tests.test_verify import Written, change

Tiny = Callable[..., Path]
Make = Callable[..., Path]
CASES = [
    ("mixtral", "w4a4", "online"),
    ("qwen2_moe", "w4a4", "merged"),
    ("qwen3_moe", "w8a8", "merged"),
    ("qwen3_moe", "w4a16", "merged"),
]

IDS = torch.randint(2, 320, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits.float()


# Loading.


@pytest.mark.parametrize(("family", "scheme", "tier"), CASES[:3])
def test_every_expert_multiplies_integers_and_text_comes_out(
    family: str, scheme: str, tier: str, mixture: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = mixture(family, scheme, tier)
    capfd.readouterr()
    model: Any = affinequant.load(folder)
    assert "xpected" not in "".join(capfd.readouterr())
    scales = {name.removesuffix(".weight_scale") for name in open_source(folder).entries if name.endswith("_scale")}
    assert {name for name, module in model.named_modules() if isinstance(module, IntegerLinear)} == scales
    assert sum(".experts." in name for name in scales) >= 4 * 3
    text = model.generate(IDS[:1, :8], max_new_tokens=6, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        again = model(text, use_cache=False).logits[0, 7:-1].argmax(-1)
    assert torch.equal(again, text[0, 8:])


@pytest.mark.parametrize(("family", "scheme", "tier"), CASES)
def test_transformers_gives_the_same_model_and_reports_nothing(
    family: str, scheme: str, tier: str, mixture: Make
) -> None:
    folder = mixture(family, scheme, tier)
    both: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    theirs, info = both
    assert not any(info.values()), info
    expected = affinequant.load(folder)
    assert torch.equal(logits(theirs), logits(expected))
    body: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(body(IDS).last_hidden_state, expected.model(IDS).last_hidden_state)


def test_a_missing_expert_is_named_by_both(mixture: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixture(*CASES[1]), tmp_path / "folder"))
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale"
    change(folder, name, lambda scale: None)
    for load in (affinequant.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(AffineQuantError, match=f"{name} is missing"):
            load(folder)


def test_a_weight_only_mixture_is_saved_as_the_plain_model_that_it_is(mixture: Make, tmp_path: Path) -> None:
    model: Any = affinequant.load(mixture(*CASES[3]))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_a_file_is_opened_for_every_block_and_not_for_every_linear(
    mixture: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tensors of 128 experts in 48 blocks each opening takes tens of milliseconds."""
    opened: list[Path] = []
    plainly = safetensors.safe_open

    def watched(file: Path, **settings: Any) -> Any:
        opened.append(file)
        return plainly(file, **settings)

    folder = mixture(*CASES[0])
    monkeypatch.setattr(safetensors, "safe_open", watched)
    affinequant.load(folder)
    assert len(opened) <= 2 * 2 + 3  # linears and the rest of two blocks; embedding, norm, head


# Verification.


@pytest.fixture(scope="module")
def written(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A mixture of sixteen experts, one for each token, with what its run held it against."""
    kept: list[Written] = []
    folder = tmp_path_factory.mktemp("written")
    (folder / "text.txt").write_text(" ".join(f"{i} black swans on lake {i % 19}" for i in range(1500)))

    def seen(out: Path, contents: Any, committed: Committed, jobs: Any, *rest: Any, **options: Any) -> Any:
        blocks = [committed.block(job.index) for job in jobs]
        whole = Committed(outer=committed.outer, block=blocks.__getitem__, copied=list(committed.copied))
        kept.append(Written(out, (contents, whole, jobs, *rest), options))
        return kept[0].check(out)

    source = tiny(family="qwen3_moe", num_experts=16, num_experts_per_tok=1)
    fields = {"samples": 4, "seq_len": 32, "data": folder / "text.txt", "out": folder / "out", **NEAREST}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deliver, "verify", seen)
        affinequant.quantize(source, scheme="w4a4", tier="online", **fields)
    return kept[0]


def test_one_scale_of_one_expert_is_noticed(written: Written, tmp_path: Path) -> None:
    out = Path(shutil.copytree(written.out, tmp_path / "out"))
    name = "model.layers.0.mlp.experts.3.up_proj"
    change(out, f"{name}.weight_scale", lambda scale: (scale.float() * 1.02).to(scale))
    assert f"{name}.scale is not what the run has" in written.check(out)["wrong"]


def test_an_expert_that_computes_something_else_is_named(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens come to it: the output of its block does not show it at the median."""
    read = runtime.read_linear

    def wrong(source: Any, name: str, *rest: Any) -> nn.Module:
        made = read(source, name, *rest)
        if name == "model.layers.0.mlp.experts.3.down_proj":
            made.register_forward_hook(lambda *given: given[-1] * 1.1)
        return made

    assert written.check(written.out)["passed"]
    monkeypatch.setattr(runtime, "read_linear", wrong)
    checked = written.check(written.out)
    assert checked["hidden"] < TOLERANCE and not checked["passed"]
    [line] = checked["wrong"]
    assert line.startswith("expert 3 of block 0 computes something else")


# Exports.

EXPORTS = [
    ("qwen2_moe", "w4a4", "compressed-tensors", "w4a16"),
    ("qwen2_moe", "w4a4", "int-quantized", "w8a8"),
    ("mixtral", "w4a16-g32-sym", "int-quantized", "w4a8"),
    ("mixtral", "w4a16-g32-sym", "gptq", None),
    ("mixtral", "w4a16-g32-sym", "dense", None),
    ("qwen3_moe", "w8a8", "compressed-tensors", "w8a16"),
]


@pytest.mark.parametrize(("family", "scheme", "form", "asked"), EXPORTS)
def test_an_export_has_the_same_experts_in_the_code_of_transformers(
    family: str, scheme: str, form: str, asked: str | None, mixture: Make, tmp_path: Path
) -> None:
    """Which stacks them: what is read back is another implementation, fed by the library whose form it is."""
    source = mixture(family, scheme)
    report = affinequant.export(source, format=form, scheme=asked, out=tmp_path).report
    assert report["verified"]["passed"] and report["verified"]["divergence"] < (1e-3 if form == "dense" else 1e-6)
    model, read_by = read_back(find_format(form), tmp_path, "float32")
    assert (
        type(model.model.layers[0].mlp.experts).__name__.endswith("Experts")
        and read_by == report["verified"]["read_by"]
    )
    assert not any("experts.0" in name for name, _ in model.named_modules())
    if scheme == "w4a16-g32-sym" and form != "dense":
        torch.testing.assert_close(logits(model), logits(affinequant.load(source)), rtol=1e-4, atol=1e-4)
    declared = json.loads((tmp_path / "config.json").read_text()).get("quantization_config")
    if declared and form != "gptq":
        left = {name.partition("layers.0.")[2] for name in declared["ignore"]} - {""}
        gates = {"mixtral": {"block_sparse_moe.gate"}, "qwen2_moe": {"mlp.gate", "mlp.shared_expert_gate"}}
        assert left == gates.get(family, {"mlp.gate"})


def test_what_no_engine_runs_of_experts_is_refused_by_name(mixture: Make, tmp_path: Path) -> None:
    for folder, form, words in (
        (mixture(*CASES[3]), "nvfp4", "transformers leaves the scale per matrix out"),
        (mixture(*CASES[3]), "gguf", "Qwen3-MoE has experts in every block"),
        (mixture(*CASES[0]), "compressed-tensors", "acts at run time"),
        (mixture(*CASES[0]), "int-quantized", "acts at run time"),
    ):
        with pytest.raises(AffineQuantError, match=words) as caught:
            affinequant.export(folder, format=form, out=tmp_path / "out")
        assert caught.value.exit_code == PREFLIGHT and not (tmp_path / "out").exists()
    found = read_finished(mixture(*CASES[3]))
    assert "for experts" in str(find_format("humming").refuses(found.contents, found.shapes))
    for scheme, fits in (("w4a16", True), ("w8a16-sym", True), ("w8a16", False), ("w2a16", False)):
        contents = replace(found.contents, scheme=Scheme.parse(scheme))
        assert (find_format("compressed-tensors").refuses(contents, found.shapes) is None) is fits, scheme


@pytest.mark.parametrize("scheme", ["w2a16", "w2a16-g32", "w8a16"])
def test_what_an_export_refuses_of_experts_is_refused_before_anything_runs(
    scheme: str, tiny: Tiny, tmp_path: Path
) -> None:
    fields = {
        "scheme": scheme,
        "tier": "merged",
        "preset": "rtn",
        "seq_len": 32,
        "data": tmp_path,
        "out": tmp_path / "out",
    }
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(AffineQuantError, match=f"experts of {scheme[1]} .*vLLM has kernels for 4 bits") as caught:
        affinequant.quantize(tiny(family="mixtral"), **fields)
    assert caught.value.exit_code == USAGE and not (tmp_path / "out").exists()
    assert affinequant.plan(tiny(family="mixtral"), format="affinequant", **fields)
    assert affinequant.plan(tiny(), **fields)


@pytest.mark.parametrize(
    ("case", "served", "words"), [(1, False, "--scheme w4a16"), (2, True, "AMX"), (3, True, "symmetric")]
)
def test_a_card_says_what_runs_a_mixture(case: int, served: bool, words: str, mixture: Make) -> None:
    said = (mixture(*CASES[case]) / "README.md").read_text()
    assert words in said and ("vllm serve" in said) is served and "affinequant eval" in said

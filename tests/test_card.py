"""The card and the listing of a finished folder, and that everything of the source is in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import affinequant
from affinequant import AffineQuantError, Scheme
from affinequant.formats.card import hub_id, source_metadata, write_card
from affinequant.formats.compressed_tensors import declares_activations

Tiny = Callable[..., Path]
APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"
ODD = {
    "model.extra.proj.weight": torch.linspace(-1, 1, 64).reshape(8, 8),  # fp32, more than a bfloat16 holds
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.linspace(0.1, 1, 8).double(),
    "model.layers.2.mlp.up_proj.weight": torch.linspace(-1, 1, 35).reshape(5, 7).half(),  # behind the last block
    "model.norm.steps": torch.arange(3),
    "vision.weight": torch.ones(4).bfloat16(),
}


@pytest.fixture
def quantize(tmp_path: Path) -> Callable[..., affinequant.Result]:
    (tmp_path / "text.txt").write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(2500)))

    def call(source: Path, **fields: Any) -> affinequant.Result:
        small = {"preset": "fast", "samples": 4, "seq_len": 32, "data": tmp_path / "text.txt", "out": tmp_path / "out"}
        return affinequant.quantize(source, **(small | fields))

    return call


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def odd_source(folder: Path) -> Path:
    """With files and tensors that no Llama needs."""
    (folder / "original").mkdir()
    for name in ("original/params.json", "preprocessor_config.json", "vocab.extra", "USE_POLICY.md", "merges.txt"):
        (folder / name).write_text(f"about {name}")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "eos_token_id": [1, 7]}')
    (folder / "README.md").write_text("---\nlicense: llama2\nlanguage: [en, de]\ntags: [mine]\n---\n# The original\n")
    file = next(folder.glob("*.safetensors"))
    save_file(load_file(file) | ODD, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("tier", "form"), [("merged", "auto"), ("online", "auto"), ("merged", "dense")])
def test_everything_of_the_source_is_there(
    tiny_copy: Tiny, quantize: Callable[..., affinequant.Result], tier: str, form: str
) -> None:
    source = odd_source(tiny_copy())
    done = quantize(source, tier=tier, format=form)
    there = {path.relative_to(done.path).as_posix(): path for path in done.path.rglob("*") if path.is_file()}
    there = {name: path for name, path in there.items() if not name.startswith(".run/")}
    assert done.report["files"] == {name: path.stat().st_size for name, path in there.items() if name != "report.json"}
    assert json.loads(there["report.json"].read_text())["files"] == done.report["files"]
    assert done.report["bytes"] == sum(done.report["files"].values())
    for path in source.rglob("*"):
        name = path.relative_to(source).as_posix()
        if path.is_file() and path.suffix != ".safetensors" and name not in ("README.md", "config.json"):
            assert there[name].read_bytes() == path.read_bytes(), name
    assert there["SOURCE_README.md"].read_bytes() == (source / "README.md").read_bytes()
    written = tensors_of(done.path)
    assert done.report["unknown_tensors"] == {name: tensor.nbytes for name, tensor in ODD.items()}
    for name, tensor in ODD.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name
    assert done.report["events"] == []
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (done.path, source))
    changed = {"quantization_config", "tie_word_embeddings", "dtype"}
    assert {k: v for k, v in config.items() if k not in changed} == {
        k: v for k, v in original.items() if k not in changed
    }
    model: Any = affinequant.load(done.path)
    assert model.generation_config.temperature == 0.6 and model.generation_config.eos_token_id == [1, 7]


@pytest.mark.parametrize("recipe", [{}, {"preset": "spinquant", "rotation_steps": 2}], ids=["fast", "spinquant"])
def test_odd_tensors_change_nothing_else(
    recipe: dict[str, Any], tiny: Tiny, tiny_copy: Tiny, quantize: Callable[..., affinequant.Result], tmp_path: Path
) -> None:
    plain = quantize(tiny(), out=tmp_path / "plain", **recipe)
    odd = quantize(odd_source(tiny_copy()), out=tmp_path / "odd", **recipe)
    known = {name: tensor for name, tensor in tensors_of(odd.path).items() if name not in ODD}
    expected = tensors_of(plain.path)
    assert known.keys() == expected.keys() and plain.report["unknown_tensors"] == {}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in known.items())


def test_a_tensor_beside_a_weight_is_refused_before_any_work(tiny_copy: Tiny) -> None:
    source = tiny_copy()
    file = source / "model.safetensors"
    extra = {"model.layers.1.mlp.up_proj.weight_scale": torch.ones(128, 1)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    with pytest.raises(AffineQuantError, match=r"up_proj\.weight_scale stands beside a weight") as caught:
        affinequant.plan(str(source), data="demo")
    assert caught.value.exit_code == 3


def test_the_card_of_a_run(tiny_copy: Tiny, quantize: Callable[..., affinequant.Result]) -> None:
    source = odd_source(tiny_copy())
    done = quantize(source, tier="online")
    card = ModelCard.load(done.path / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["language"]) == ("llama2", ["en", "de"])
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["tags"] == ["affinequant", "w4a4", "quantized"] and "base_model" not in data
    [result] = card.data.eval_results
    assert result.metric_value == round(done.report["calibration_perplexity"]["quantized"], 4)
    assert result.dataset_args["in_sample"] is True and "calibration" in result.dataset_name
    text = (done.path / "README.md").read_text()
    assert str(source) not in text and str(source.parent) not in text  # nobody's disk on a hub
    assert "# source-w4a4" in text and "the 5 tensors that were copied unchanged" in text
    assert "refuse this folder" in text and "SOURCE_README.md" in text and "{{" not in text


def test_a_source_that_is_one_of_ours_keeps_both_cards(
    tiny_copy: Tiny, quantize: Callable[..., affinequant.Result], tmp_path: Path
) -> None:
    dense = quantize(odd_source(tiny_copy()), format="dense", out=tmp_path / "dense").path
    done = quantize(dense, tier="merged", out=tmp_path / "again").path
    assert (done / "SOURCE_README.md").read_bytes() == (dense / "README.md").read_bytes()
    assert (done / "SOURCE_SOURCE_README.md").read_bytes() == (dense / "SOURCE_README.md").read_bytes()
    with safe_open(done / "model.safetensors", "pt") as file:
        assert set(ODD) <= set(file.keys())


CARDS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "its own card": (
        {
            "README.md": "---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\ntags: [a]\n---\n",
            "LICENSE": APACHE,
        },
        {"license": "other", "license_name": "x", "license_link": "LICENSE"},
    ),
    "Apache's text": ({"LICENSE": APACHE, "README.md": "# no metadata"}, {"license": "apache-2.0"}),
    "MIT's text": ({"LICENSE.txt": "MIT License\n\nCopyright (c)"}, {"license": "mit"}),
    "a text that mentions Apache": (
        {"LICENSE": "Our own terms, not the Apache License\nVersion 2.0, January 2004"},
        {"license": "other", "license_link": "LICENSE"},
    ),
    "languages without a licence": ({"README.md": "---\nlanguage: fr\n---\n"}, {"language": "fr"}),
    "metadata that is no YAML": ({"README.md": "---\nlicense: [mit\n---\n"}, {}),
    "metadata that is a list": ({"README.md": "---\n- mit\n---\n"}, {}),
    "a card in another encoding": ({"README.md": "---\nlicense: mit\n---\nna\xefve"}, {"license": "mit"}),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("case", CARDS)
def test_metadata_is_carried_over_and_never_made_up(tmp_path: Path, case: str) -> None:
    files, expected = CARDS[case]
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    assert source_metadata(tmp_path) == expected


def test_an_id_on_the_hub_is_one_that_was_given_or_cached() -> None:
    assert hub_id("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    assert hub_id("/home/me/hub/models--org--Some-Model/snapshots/0123abc") == "org/Some-Model"
    assert hub_id("/home/me/llama") is None and hub_id("demo") is None


def report_of(model: str, scheme: str) -> dict[str, Any]:
    return {
        "model": model,
        "scheme": scheme,
        "tier": "merged",
        "preset": "fast",
        "calibration": {"source": "WikiText-2", "samples": 8, "seq_len": 64, "sha256": "abc"},
        "bits_per_weight": 4.25,
        "weight_bytes": 3 * 2**20,
        "calibration_perplexity": {"full": 10.0, "quantized": 12.34567, "tokens": 500},
        "unknown_tensors": {},
        "env": {"affinequant": "0.1.0"},
    }


@pytest.mark.parametrize(
    ("scheme", "says", "not_says"),
    [
        ("w4a4", "4-bit asymmetric integer weights and 16-bit activations.", "refuse"),
        ("w8a8", "quantises activations by itself", "plugin"),
        ("w4a16-g64", "loads it as it is", "plugin"),
        ("dense", "plain 16-bit weights", "plugin"),
    ],
)
def test_it_says_what_stock_engines_do(tmp_path: Path, scheme: str, says: str, not_says: str) -> None:
    parsed = Scheme.parse("w4a4" if scheme == "dense" else scheme)
    group = {"input_activations": {"num_bits": 8} if declares_activations(parsed) else None}
    declared = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    config = {} if scheme == "dense" else {"quantization_config": declared}
    path = write_card(tmp_path, tmp_path, report_of("someone/Some-Model", parsed.name), config)
    text, data = path.read_text(), ModelCard.load(path).data.to_dict()
    assert says in text and not_says not in text
    assert data["base_model"] == "someone/Some-Model" and data["base_model_relation"] == "quantized"
    assert ("compressed-tensors" in data["tags"]) is (scheme != "dense")
    assert "license" not in data and "do not tell its licence" in text and "SOURCE_README" not in text
    assert "| the same, quantised | 12.35 |" in text and f"# Some-Model-{parsed.name}" in text

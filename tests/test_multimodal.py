"""Models of several parts: the decoder is quantised as it is alone, the rest is copied, and files keep their names."""

import ast
import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import affinequant
from affinequant.cli import main
from affinequant.errors import AffineQuantError
from affinequant.formats import FORMATS
from affinequant.models import context_length, find_family, resolve
from affinequant.models.multimodal import LEFT_OUT, WRAPPERS, text_config
from affinequant.models.source import open_source

Tiny = Callable[..., Path]
IDS = torch.randint(2, 290, (2, 40), generator=torch.Generator().manual_seed(0))
IMAGE = 300
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
}
VISION |= {"patch_size": 4}
QWENS = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
QWENS |= {"out_hidden_size": 64, "num_position_embeddings": 16}
PARTS: dict[str, dict[str, Any]] = {
    "Gemma3ForConditionalGeneration": {
        "vision_config": VISION | {"vision_use_head": False},
        "mm_tokens_per_image": 4,
        "boi_token_index": 301,
        "eoi_token_index": 302,
        "image_token_index": IMAGE,
    },
    "Qwen3_5ForConditionalGeneration": {"vision_config": QWENS},
    "Qwen3_5MoeForConditionalGeneration": {"vision_config": QWENS},
    "LlavaForConditionalGeneration": {
        "vision_config": VISION | {"model_type": "clip_vision_model"},
        "image_token_index": IMAGE,
    },
    "Mistral3ForConditionalGeneration": {
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16},
        "image_token_index": IMAGE,
    },
}
"""By architecture, what a tiny model of it has beside its decoder."""
HUB = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
"""What modules are called in published files."""


def published(name: str) -> str:
    """The name that published files have for a tensor of transformers' modules."""
    here, there = next((pair for pair in HUB if name.startswith(pair[0])), ("", ""))
    return there + name.removeprefix(here)


def wrapped(architecture: str, decoder: Path, folder: Path, *, hub: bool = True) -> Path:
    """Around the decoder of a folder the other parts of a model, of random weights: files as published, or called after
    transformers' modules."""
    kind = getattr(transformers, architecture)
    text = json.loads((decoder / "config.json").read_text())
    tied = text["tie_word_embeddings"]
    config = kind.config_class(
        architectures=[architecture],
        text_config=text,
        tie_word_embeddings=tied,
        dtype="bfloat16",
        **PARTS[architecture],
    )
    model, generator = kind(config), torch.Generator().manual_seed(1)
    beside = {
        name: (torch.randn(tensor.shape, generator=generator) * 0.2).bfloat16()
        for name, tensor in model.state_dict().items()
        if not name.startswith(("model.language_model.", "lm_head."))
    }
    inside = load_file(decoder / "model.safetensors")
    if architecture.startswith("Qwen3_5Moe"):  # as published, in the layout of transformers' modules
        text = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.bfloat16)
        inside = {name: tensor.contiguous() for name, tensor in text.state_dict().items()}
    state = beside | {re.sub(r"^model\.", "model.language_model.", name): one for name, one in inside.items()}
    stored = {published(name) if hub else name: tensor for name, tensor in state.items()}
    shutil.copytree(decoder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}\n')
    return folder


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(1500)))
    return {"samples": 4, "seq_len": 32, "data": text}


@pytest.fixture(scope="module")
def decoder(tiny: Tiny) -> Path:
    return tiny(family="gemma3", tied=True)


@pytest.fixture(scope="module")
def sources(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Gemma 3 that sees: `hub` has the names of published files, `modules` those of transformers' modules."""
    folder = tmp_path_factory.mktemp("sources")
    name = "Gemma3ForConditionalGeneration"
    return {kind: wrapped(name, decoder, folder / kind, hub=kind == "hub") for kind in ("hub", "modules")}


SCHEMES: dict[str, dict[str, Any]] = {
    "merged": {"scheme": "w4a16-g32", "tier": "merged", "preset": "rtn"},
    "online": {"scheme": "w4a4kv4", "tier": "online", "preset": "default", "epochs": 1},
}
PATTERNS = {r"(.*\.)?vision_tower\..*", r"(.*\.)?multi_modal_projector\..*", r"(.*\.)?lm_head"}
SYMMETRIC = {"scheme": "w4a4-sym", "tier": "merged", "preset": "rtn"}


@pytest.fixture(scope="module")
def made(
    decoder: Path, sources: dict[str, Path], fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Any]:
    """made(which of SCHEMES or `sym`, source): the result of quantising `hub`, `modules` or `alone`, the decoder by itself."""
    folder, found = tmp_path_factory.mktemp("made"), dict[tuple[str, str], Any]()

    def make(tier: str, name: str) -> Any:
        if (tier, name) not in found:
            source = {**sources, "alone": decoder}[name]
            out = folder / f"{tier}-{name}"
            found[tier, name] = affinequant.quantize(source, out=out, **fields, **{**SCHEMES, "sym": SYMMETRIC}[tier])
        return found[tier, name]

    return make


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the names in its files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    return model.eval()(ids, use_cache=False, **more).logits.float()


PIXELS = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def with_image(count: int) -> Tensor:
    """Tokens around those of an image."""
    return torch.cat([IDS[:1, :5], torch.full((1, count), IMAGE), IDS[:1, 5:9]], 1)


@pytest.mark.parametrize("name", ["hub", "modules"])
@pytest.mark.parametrize("tier", SCHEMES)
def test_the_decoder_is_what_it_is_alone_and_the_rest_is_copied(
    tier: str, name: str, made: Callable[[str, str], Any], sources: dict[str, Path]
) -> None:
    result, alone = made(tier, name), made(tier, "alone")
    assert result.report["verified"]["passed"] and result.report["events"] == []
    before, after = tensors(sources[name]), tensors(result.path)
    text = "language_model.model." if name == "hub" else "model.language_model."
    decoder = {key.replace(text, "model."): tensor for key, tensor in after.items() if key.startswith(text)}
    expected = tensors(alone.path)
    assert decoder.keys() == expected.keys() and all(torch.equal(decoder[key], expected[key]) for key in expected)
    rest = {key for key in before if not key.startswith(text)}
    assert rest == {key for key in after if not key.startswith(text)} and len(rest) > 20
    assert all(after[key].dtype == before[key].dtype and torch.equal(after[key], before[key]) for key in rest)
    assert len(result.report["unknown_tensors"]) == len(rest)
    assert result.report["plan"]["copied"].keys() == {"vision_tower", "multi_modal_projector"}
    assert sum(result.report["plan"]["copied"].values()) == sum(before[key].nbytes for key in rest)


def test_config_and_side_files_keep_the_shape_of_the_source(
    made: Callable[[str, str], Any], sources: dict[str, Path]
) -> None:
    out = made("merged", "hub").path
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (sources["hub"], out))
    declared = after.pop("quantization_config")
    assert after == before and after["text_config"]["model_type"] == "gemma3_text"
    assert {*declared["ignore"]} == {
        "lm_head",
        *(f"re:{pattern}" for pattern in PATTERNS),
    } and "quantization_config" not in after["text_config"]
    side = "preprocessor_config.json"
    assert (out / side).read_bytes() == (sources["hub"] / side).read_bytes()
    assert "pipeline_tag: image-text-to-text" in (out / "README.md").read_text()


@pytest.mark.parametrize("tier", SCHEMES)
def test_load_gives_the_whole_model(tier: str, made: Callable[[str, str], Any]) -> None:
    alone: Any = affinequant.load(made(tier, "alone").path, device="cpu", dtype="float32")
    seen = []
    for name in ("hub", "modules"):
        model: Any = affinequant.load(made(tier, name).path, device="cpu", dtype="float32")
        assert type(model).__name__ == "Gemma3ForConditionalGeneration"
        assert torch.equal(logits(model), logits(alone))
        assert torch.equal(*(one.generate(IDS, max_new_tokens=4, do_sample=False) for one in (model, alone)))
        seen += [logits(model, with_image(4), pixel_values=pixels) for pixels in (PIXELS, 1 - PIXELS)]
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and not torch.allclose(seen[0], seen[1])


@pytest.mark.parametrize("name", ["hub", "modules"])
@pytest.mark.parametrize("tier", SCHEMES)
def test_stock_transformers_loads_the_folder(
    tier: str, name: str, made: Callable[[str, str], Any], sources: dict[str, Path]
) -> None:
    """By its own class; where it renames tensors as it reads, it takes the dtype of the files."""
    made_here = made(tier, name)
    model = AutoModelForImageTextToText.from_pretrained(made_here.path, dtype=torch.bfloat16)
    ours = affinequant.load(made_here.path, device="cpu", dtype="bfloat16")
    assert type(model) is type(ours) and torch.equal(logits(model), logits(ours))
    stored = {published(key): parameter for key, parameter in model.named_parameters() if "language_model" not in key}
    before = {published(key) if name == "modules" else key: one for key, one in tensors(sources[name]).items()}
    same = [torch.equal(parameter, before[key]) for key, parameter in stored.items() if key in before]
    assert all(same) and len(same) > 20


def test_an_interrupted_run_ends_in_the_same_bytes(
    made: Callable[[str, str], Any], sources: dict[str, Path], fields: dict[str, Any], tmp_path: Path
) -> None:
    class Stop(affinequant.progress.Silent):
        """Stops behind the first block."""

        def block(self, index: int, report: Any) -> None:
            raise KeyboardInterrupt

    asked = {"out": tmp_path / "out", **fields, **SCHEMES["online"]}
    with pytest.raises(KeyboardInterrupt):
        affinequant.quantize(sources["hub"], progress=Stop(), **asked)
    again = affinequant.quantize(sources["hub"], resume=True, **asked)
    names = ("affinequant.safetensors", "config.json")
    whole = made("online", "hub").path
    assert all((again.path / file).read_bytes() == (whole / file).read_bytes() for file in names)


REFUSING = {"gguf": r"decoder alone; .*vision_tower", **dict.fromkeys(("transform-config", "fp_quant"), "4-bit floats")}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_takes_it_or_says_why_not(
    form: str, made: Callable[[str, str], Any], sources: dict[str, Path], tmp_path: Path
) -> None:
    first = made("sym" if form in ("int-quantized", "humming") else "merged", "hub")
    if reason := REFUSING.get(form):
        with pytest.raises(AffineQuantError, match=reason):
            affinequant.export(first.path, format=form, out=tmp_path / "out")
        return
    given: dict[str, Any] = {"scheme": "w8a8"} if form == "int-quantized" else {}
    report = affinequant.export(first.path, format=form, out=tmp_path / "out", **given).report
    assert report["verified"]["passed"]
    before, after = tensors(sources["hub"]), tensors(tmp_path / "out")
    rest = [key for key in before if not key.startswith("language_model.")]
    assert all(torch.equal(after[key], before[key]) for key in rest)
    declared = json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config", {})
    if form == "gptq":
        assert declared["dynamic"].keys() == {f"-:{pattern}" for pattern in PATTERNS}


def test_eval_and_inspect_know_it(
    made: Callable[[str, str], Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The decoder's vocabulary and BOS, and which parts were copied."""
    out = made("merged", "hub").path
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i} red foxes on hill {i % 13}" for i in range(400)))
    windows = ["--text", str(text), "--seq-len", "32", "--windows", "2", "--device", "cpu", "--json"]
    assert main(["eval", str(out), *windows]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    perplexity = next(one for name, one in metrics.items() if name.startswith("perplexity"))
    assert perplexity["n"] > 0 and 0.5 < math.log(perplexity["value"]) / math.log(perplexity["baseline"]) < 2
    assert main(["inspect", str(out)]) == 0
    assert "vision_tower (0.0 MB)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("architecture", "family"),
    [(name, family) for name, families in WRAPPERS.items() for family in families if family != "gemma3"],
)
def test_relatives_go_the_same_way(
    architecture: str, family: str, tiny: Tiny, fields: dict[str, Any], tmp_path: Path
) -> None:
    decoder = tiny(family=family)
    asked = {**fields, "scheme": "w4a4", "tier": "merged", "preset": "rtn"}
    source = wrapped(architecture, decoder, tmp_path / "source", hub=not architecture.startswith("Qwen"))
    made, alone = (
        affinequant.quantize(folder, out=tmp_path / name, **asked)
        for name, folder in (("out", source), ("alone", decoder))
    )
    assert made.report["verified"]["passed"] and made.report["plan"]["copied"]
    one, other = (affinequant.load(each.path, device="cpu", dtype="float32") for each in (made, alone))
    stock = AutoModelForImageTextToText.from_pretrained(made.path, dtype=torch.float32)
    assert type(one).__name__ == architecture
    assert torch.equal(logits(one), logits(other)) and torch.equal(logits(stock), logits(other))
    if architecture.startswith("Qwen"):  # here transformers makes the decoder alone where a causal model is asked for
        with pytest.raises(AffineQuantError, match="decoder alone"):
            AutoModelForCausalLM.from_pretrained(made.path)
    before, after = tensors(source), tensors(made.path)
    copied = [key for key in before if "language_model" not in key and "lm_head" not in key]
    assert copied and all(torch.equal(before[key], after[key]) for key in copied)


def test_stock_transformers_loads_the_decoder_alone(tiny: Tiny, fields: dict[str, Any], tmp_path: Path) -> None:
    """What is not quantised in it has a name there that is neither the folder's nor the whole model's."""
    source = wrapped("Qwen3_5ForConditionalGeneration", tiny(family="qwen3_5"), tmp_path / "source", hub=False)
    asked = {**fields, "scheme": "w4a16-sym", "tier": "merged", "preset": "rtn"}
    out = affinequant.quantize(source, out=tmp_path / "out", **asked).path
    alone, whole = AutoModelForCausalLM.from_pretrained(out), affinequant.load(out, device="cpu", dtype="bfloat16")
    assert type(alone).__name__ == "Qwen3_5ForCausalLM" and torch.equal(logits(alone), logits(whole))


def test_an_image_means_what_it_did(tiny: Tiny, fields: dict[str, Any], tmp_path: Path) -> None:
    """Its features enter the stream as they are: what folds is not to change what they are added to."""
    source = wrapped("LlavaForConditionalGeneration", tiny(tied=True), tmp_path / "source")
    asked = {**fields, "scheme": "w8a16", "tier": "merged", "preset": "fast"}
    plan = affinequant.plan(source, **asked)
    assert "residual" not in plan.recipe.transforms and any("features of their own" in note for note in plan.notes)
    with pytest.raises(AffineQuantError, match="features of their own"):
        affinequant.plan(source, transforms={"residual": "hadamard"}, **asked | {"preset": "rtn"})
    made = affinequant.quantize(source, out=tmp_path / "out", **asked)
    ours, theirs = (affinequant.load(folder, device="cpu", dtype="float32") for folder in (made.path, source))
    one, other = (logits(model, with_image(16), pixel_values=PIXELS) for model in (ours, theirs))
    assert float((one - other).abs().mean()) < 0.05 * float(other.std())


def described(architecture: str, text: dict[str, Any], **whole: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "text_config": text, **whole}


GEMMA_4B = described(
    "Gemma3ForConditionalGeneration",
    {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    | {"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    model_type="gemma3",
    eos_token_id=[1, 106],
    vision_config={"hidden_size": 1152, "model_type": "siglip_vision_model"},
    torch_dtype="bfloat16",
)
"""As the model of that size is published: most sizes are left to transformers."""


def test_what_config_json_leaves_out_is_what_transformers_takes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_4B))
    whole = transformers.AutoConfig.from_pretrained(tmp_path)
    family, dims = resolve(GEMMA_4B, where="here")
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings"):
        mine = {"num_attention_heads": dims.heads, "num_key_value_heads": dims.kv_heads, "vocab_size": dims.vocab}
        mine |= {"head_dim": dims.head_dim, "tie_word_embeddings": dims.tied}
        assert getattr(whole.text_config, key) == mine[key]
    assert (dims.layers, dims.hidden, family.name, family.bos) == (34, 2560, "gemma3", True)
    for kind, sizes in LEFT_OUT.items():
        made = transformers.AutoConfig.for_model(kind)
        assert sizes.items() <= made.to_dict().items()
    for name in WRAPPERS:
        made = getattr(transformers, name).config_class()
        empty = described(name, {"model_type": made.text_config.model_type})
        assert text_config(empty)["tie_word_embeddings"] == made.tie_word_embeddings
        assert find_family(empty) is not None


def test_the_whole_says_more_than_the_decoder() -> None:
    text = {"model_type": "gemma3_text", "tie_word_embeddings": True, "max_position_embeddings": 99}
    found = text_config(described("Gemma3ForConditionalGeneration", text, tie_word_embeddings=False))
    assert found["tie_word_embeddings"] is False and text_config(found) == found
    assert context_length(described("Gemma3ForConditionalGeneration", text)) == 99
    assert context_length(described("LlamaForCausalLM", text)) is None


REFUSED = [
    ("PaliGemmaForConditionalGeneration", {"model_type": "gemma"}, "a model of several parts", "Gemma3ForCond.*alone"),
    (
        "LlavaForConditionalGeneration",
        {"model_type": "gemma"},
        "around a decoder of type 'gemma'",
        "llama, mistral, qwen2",
    ),
    ("LlavaForConditionalGeneration", "llama", "text_config = 'llama'", "as a table"),
    (
        "Gemma3ForConditionalGeneration",
        {"model_type": "gemma3_text", "final_logit_softcapping": 3.0},
        "softcapping",
        "None",
    ),
    ("Gemma3ForConditionalGeneration", {"model_type": "gemma3_text", "hidden_size": "4"}, "hidden_size = '4'", "whole"),
]


@pytest.mark.parametrize(("architecture", "text", "what", "fix"), REFUSED)
def test_what_is_not_known_is_refused_by_name(architecture: str, text: Any, what: str, fix: str) -> None:
    with pytest.raises(AffineQuantError, match=what) as caught:
        resolve(described(architecture, text), where="here")
    assert caught.value.exit_code == 3 and re.search(fix, caught.value.fix)


def test_names_of_two_versions_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    """One would stand for the other in silence."""
    folder = Path(shutil.copytree(sources["hub"], tmp_path / "source"))
    state = load_file(folder / "model.safetensors")
    name = "language_model.model.norm.weight"
    for change in (
        {"model.language_model.norm.weight": state[name] + 1},
        {"model.language_model.other": state[name] + 1},
    ):
        save_file(state | change, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AffineQuantError, match="several versions") as caught:
            open_source(folder)
        assert caught.value.exit_code == 3
    state["mtp.norm.weight"] = state.pop(name)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "mtp.norm.weight" in open_source(folder).entries


def test_models_are_listed_with_what_they_are_inside_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["list"]["models"]
    inside = {row["family"]: row["inside"] for row in rows}
    assert inside["gemma3"] == ["Gemma3ForConditionalGeneration"] and inside["phi3"] == []


def vllm_names(file: str) -> dict[str, str]:
    """How vLLM's code of a model calls modules of transformers, beginning to beginning; to import it takes torchvision."""
    spec = importlib.util.find_spec(f"vllm.model_executor.models.{file}")
    assert spec is not None and spec.origin is not None
    keywords = (node for node in ast.walk(ast.parse(Path(spec.origin).read_text())) if isinstance(node, ast.keyword))
    return next(ast.literal_eval(one.value) for one in keywords if one.arg == "orig_to_new_prefix")


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")
def test_vllm_quantises_the_decoder_alone(made: Callable[[str, str], Any]) -> None:
    """By its own config class, as it calls the modules: in a tower of Siglip's another name stands between."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.models.utils import WeightsMapper

    from affinequant.serve.vllm_linear import AffineQuantLinear
    from affinequant.serve.vllm_plugin import AffineQuantConfig

    mapper = WeightsMapper(orig_to_new_prefix=vllm_names("gemma3_mm"))
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    layer = "language_model.model.layers.1"
    decoder = [
        f"{layer}.self_attn.qkv_proj",
        f"{layer}.self_attn.o_proj",
        f"{layer}.mlp.gate_up_proj",
        f"{layer}.mlp.down_proj",
    ]
    tower = "vision_tower.vision_model.encoder.layers.0"
    rest = [f"{tower}.self_attn.qkv_proj", f"{tower}.mlp.fc1", "multi_modal_projector.linear", "language_model.lm_head"]
    for kind, tier in ((CompressedTensorsConfig, "merged"), (AffineQuantConfig, "online")):
        folder = made(tier, "hub").path
        declared = json.loads((folder / "config.json").read_text())["quantization_config"]
        config: Any = kind.from_config(declared)
        config.packed_modules_mapping = fused
        config.apply_vllm_mapper(mapper)
        for name in (*decoder, *rest):
            if kind is CompressedTensorsConfig:
                scheme = config.get_scheme_dict(nn.Linear(1, 1), name)
                assert (scheme is not None) == (name in decoder), name
            else:
                method = config.get_quant_method(LinearBase.__new__(LinearBase), name)
                assert isinstance(method, AffineQuantLinear if name in decoder else UnquantizedLinearMethod), name
                members = config.members(name)
                assert name in rest or (config.matrices(members) and config.clip(members) > 0)


@pytest.mark.parametrize("name", ["hub", "modules"])
def test_linears_with_numbers_of_their_own_are_found_whatever_an_engine_calls_them(
    name: str, sources: dict[str, Path], fields: dict[str, Any], tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"keep": ["*.down_proj"], "set": {"*.o_proj": "w8a16-sym"}, **SCHEMES["merged"]}
    made = affinequant.quantize(sources[name], out=tmp_path / "out", **fields, **asked)
    model = AutoModelForImageTextToText.from_pretrained(made.path, dtype=torch.bfloat16)
    ours = affinequant.load(made.path, device="cpu", dtype="bfloat16")
    assert torch.equal(logits(model), logits(ours))
    done = affinequant.export(made.path, format="compressed-tensors", out=tmp_path / "export")
    assert done.report["verified"]["passed"]

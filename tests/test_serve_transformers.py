"""`from_pretrained` after `import affinequant`: the model of `affinequant.load`, or a clear refusal."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from affinequant import AffineQuantError, load
from affinequant.formats import find_format
from affinequant.runtime.integer_linear import IntegerLinear
from affinequant.serve import transformers_quantizer
from affinequant.serve.importing import WATCHED, Finder, register_with_transformers
from tests.tiny import VOCAB, dense_model, rounded

Tiny = Callable[..., Path]
Write = Callable[..., Path]
FORMS = ["compressed-tensors", "affinequant"]
IDS = torch.randint(2, VOCAB, (2, 48), generator=torch.Generator().manual_seed(1))
MANY = 45_000
"""Bytes of a shard, so that a tiny checkpoint has several."""


@pytest.fixture
def write(tiny: Tiny, tmp_path: Path) -> Write:
    """write(form, scheme, **shape): a checkpoint of that tiny model, with matrices on inputs in our own form."""

    def checkpoint(form: str, scheme: str = "w4a4", *, shard_bytes: int = 2**30, **shape: Any) -> Path:
        contents = rounded(tiny(**shape), scheme, clip=1.0 if scheme == "w8a8" else 0.9)
        if form == "affinequant":
            contents = with_transforms(contents)
        out = tmp_path / form
        find_format(form).write(contents, out, shard_bytes=shard_bytes)
        return out

    return checkpoint


def with_transforms(contents: Any) -> Any:
    """The same contents with a Kronecker product at the input of every down_proj, and blocks at that of o_proj."""
    from dataclasses import replace

    random = torch.Generator().manual_seed(3)

    def stages():
        for stage in contents.stages():
            for name in [name.removesuffix(".codes") for name in stage if name.endswith(".codes")]:
                width = stage[f"{name}.codes"].shape[1]
                if name.endswith("down_proj"):
                    for part, size in (("left", 4), ("right", width // 4)):
                        stage[f"{name}.online_{part}"] = torch.randn(size, size, generator=random) / size**0.5
                if name.endswith("o_proj"):
                    stage[f"{name}.online_blocks"] = torch.randn(width // 8, 8, 8, generator=random) / 3
            yield stage

    return replace(contents, stages=stages)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def in_transformers(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | arguments))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-g32", "w4a8", "w8a8", "w4a16"])
def test_it_is_the_model_of_load(write: Write, form: str, scheme: str) -> None:
    folder = write(form, scheme)
    ours, theirs = load(folder), in_transformers(folder)
    assert torch.equal(logits(theirs), logits(ours))
    if scheme != "w4a16":
        kinds = {type(module) for _, module in theirs.model.named_modules() if hasattr(module, "in_features")}
        assert kinds == {IntegerLinear} and theirs.quantization_method == "affinequant"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape",
    [{"tied": True}, {"bias": True}, {"kv_heads": 4}, {"layers": 3, "shard_bytes": MANY}],
    ids=["tied", "biases", "mha", "shards"],
)
def test_every_shape(write: Write, form: str, shape: dict[str, Any]) -> None:
    folder = write(form, **shape)
    if "shard_bytes" in shape:
        assert len(list(folder.glob("*.safetensors"))) > 2
    theirs = in_transformers(folder)
    assert torch.equal(logits(theirs), logits(load(folder)))
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) is bool(shape.get("tied"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=["auto", "cpu", "a dict"])
def test_device_maps(write: Write, form: str, device_map: Any) -> None:
    folder = write(form)
    assert torch.equal(logits(in_transformers(folder, device_map=device_map)), logits(load(folder)))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(write: Write, form: str) -> None:
    folder = write(form)
    assert torch.equal(logits(in_transformers(folder, dtype=torch.bfloat16)), logits(load(folder, dtype="bfloat16")))
    assert in_transformers(folder, dtype="auto").dtype == torch.bfloat16  # transformers goes by config.json


@pytest.mark.parametrize("form", FORMS)
def test_the_model_without_its_head_and_the_class_itself(write: Write, form: str) -> None:
    folder = write(form)
    expected = load(folder)
    body: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(body(IDS).last_hidden_state, expected.model(IDS).last_hidden_state)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)), logits(expected))


def test_nothing_is_reported_missing_or_unexpected(write: Write) -> None:
    for form in FORMS:
        _, info = in_transformers(write(form, bias=True), output_loading_info=True)
        assert not any(info.values()), (form, info)


@pytest.mark.parametrize("form", FORMS)
def test_it_generates_as_load_does(write: Write, form: str) -> None:
    folder = write(form)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(["on the other", "in"], return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    ours, theirs = (
        model.generate(**inputs, max_new_tokens=12, do_sample=False)
        for model in (load(folder), in_transformers(folder))
    )
    assert torch.equal(ours, theirs) and theirs.shape[1] == inputs["input_ids"].shape[1] + 12


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_graph_compiles(write: Write, form: str) -> None:
    model = in_transformers(write(form))
    assert torch.equal(logits(torch.compile(model, backend="aot_eager", fullgraph=True)), logits(model))


def test_a_second_model_is_not_run_by_the_code_compiled_for_the_first(write: Write) -> None:
    torch._dynamo.reset()
    for form in FORMS:
        model: Any = load(write(form))
        assert torch.equal(logits(torch.compile(model, backend="aot_eager", fullgraph=True)), logits(model)), form


@pytest.mark.filterwarnings("ignore:You passed .quantization_config.:UserWarning")  # lm-eval passes it twice
@pytest.mark.parametrize("form", FORMS)
def test_lm_eval_takes_the_model_or_the_name_of_the_folder(write: Write, form: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = write(form)
    request = Instance("loglikelihood", doc={}, arguments=("in the", " ore"), idx=0)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    subjects: list[dict[str, Any]] = [
        {"pretrained": load(folder), "tokenizer": tokenizer},
        {"pretrained": in_transformers(folder), "tokenizer": tokenizer},
    ]
    scores = [HFLM(batch_size=1, **subject).loglikelihood([request]) for subject in subjects]
    scores.append(HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1).loglikelihood([request]))
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["load", "from_pretrained"])
def test_saving_it_is_refused_before_anything_is_written(write: Write, form: str, way: str, tmp_path: Path) -> None:
    folder = write(form)
    model: Any = load(folder) if way == "load" else in_transformers(folder)
    with pytest.raises(AffineQuantError, match="cannot save") as caught:
        model.save_pretrained(tmp_path / "saved")
    assert str(folder) in caught.value.fix and not (tmp_path / "saved").exists()


@pytest.mark.parametrize("form", FORMS)
def test_it_can_be_copied_and_pickled(write: Write, form: str) -> None:
    model = in_transformers(write(form))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        with pytest.raises(AffineQuantError, match="cannot save"):
            other.save_pretrained("nowhere")


def test_a_weight_only_model_of_load_is_saved_as_the_plain_model_that_it_is(write: Write, tmp_path: Path) -> None:
    model: Any = load(write("compressed-tensors", "w4a16"))
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    assert torch.equal(logits(in_transformers(tmp_path / "saved")), logits(model))


def test_the_config_survives_as_it_was_written(write: Write, tmp_path: Path) -> None:
    for form in FORMS:
        folder = write(form)
        model = in_transformers(folder)
        model.config.save_pretrained(tmp_path / "config")
        written, saved = (json.loads((part / "config.json").read_text()) for part in (folder, tmp_path / "config"))
        assert saved["quantization_config"] == written["quantization_config"]
        assert "transformers_weights" not in saved and not hasattr(model.config, "transformers_weights")


# What is wrong is said in both ways of loading.

Q_PROJ = "model.layers.1.self_attn.q_proj"


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def cut(folder: Path) -> None:
    [file] = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])


def change_ours(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    ours = config["quantization_config"]["affinequant"]
    ours.update(fields)
    (folder / "config.json").write_text(json.dumps(config))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no scale": (
        lambda folder: change_tensors(folder, lambda t: t.pop(f"{Q_PROJ}.weight_scale")),
        rf"{Q_PROJ}\.weight_scale is missing",
    ),
    "no norm": (
        lambda folder: change_tensors(folder, lambda t: t.pop("model.norm.weight")),
        r"model\.norm\.weight is missing",
    ),
    "no head": (
        lambda folder: change_tensors(folder, lambda t: t.pop("lm_head.weight")),
        r"lm_head\.weight is missing",
    ),
    "norm of another size": (
        lambda folder: change_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        r"size \(3,\) where .*\(64,\)",
    ),
    "NaN scale": (
        lambda folder: change_tensors(folder, lambda t: t[f"{Q_PROJ}.weight_scale"].fill_(float("nan"))),
        rf"{Q_PROJ}.*finite",
    ),
    "infinite embedding": (
        lambda folder: change_tensors(folder, lambda t: t["model.embed_tokens.weight"].fill_(float("inf"))),
        r"embed_tokens.*finite",
    ),
    "cut short": (cut, r"is cut short"),
    "newer version": (
        lambda folder: change_ours(folder, version=3, written_by="affinequant 9.1"),
        r"version 3, written by affinequant 9\.1; this is affinequant",
    ),
    "no grid": (lambda folder: change_ours(folder, weight=None), "is not whole"),
    "no clips": (lambda folder: change_ours(folder, input_clip={}), "no entry in input_clip"),
}


@pytest.mark.parametrize("way", [load, in_transformers], ids=["load", "from_pretrained"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused(write: Write, case: str, form: str, way: Callable[[Path], Any]) -> None:
    folder = write(form)
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(AffineQuantError, match=message) as caught:
        way(folder)
    assert caught.value.where and caught.value.fix


@pytest.mark.parametrize("device_map", [{"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}])
def test_a_model_in_two_kinds_of_memory_is_refused(write: Write, device_map: dict[str, Any]) -> None:
    with pytest.raises(AffineQuantError, match="cannot be moved in and out"):
        in_transformers(write("affinequant"), device_map=device_map)


def test_shards_that_transformers_does_not_look_for_are_named(write: Write) -> None:
    folder = write("affinequant", shard_bytes=MANY)
    with pytest.raises(AffineQuantError, match="did not say where the config comes from"):
        LlamaForCausalLM.from_pretrained(folder)


def test_a_checkpoint_in_the_cache_of_the_hub(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard_bytes in (2**30, MANY):
        folder = write("affinequant", shard_bytes=shard_bytes)
        cache = tmp_path / f"hub{shard_bytes}"
        revision = "0123456789abcdef0123456789abcdef01234567"
        shutil.copytree(folder, cache / "models--someone--tiny/snapshots" / revision)
        (cache / "models--someone--tiny/refs").mkdir()
        (cache / "models--someone--tiny/refs/main").write_text(revision)
        monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
        model = AutoModelForCausalLM.from_pretrained("someone/tiny", dtype=torch.float32)
        assert torch.equal(logits(model), logits(load(folder)))


# Without this package, and the moment of registration


WITHOUT = """
import torch
from transformers import AutoModelForCausalLM
def run(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kind = type(model.model.layers[0].mlp.down_proj)
    return kind.__name__, model(torch.tensor({ids})).logits.detach()
try:
    refused = run({ours!r})
except OSError as problem:
    refused = str(problem)
found = [refused, run({merged!r})]
import affinequant
torch.save([*found, run({ours!r}), run({merged!r})], {out!r})
"""
LATE = """
import sys, transformers, affinequant
assert "transformers.quantizers.auto" not in sys.modules and "affinequant.runtime.load" not in sys.modules
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
print(AUTO_QUANTIZER_MAPPING["affinequant"].__name__, AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"].__name__)
"""


def in_a_process(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_the_import_an_error_or_the_weight_only_model_and_with_it_both(
    tiny: Tiny, write: Write, tmp_path: Path
) -> None:
    merged, ours = (write(form) for form in FORMS)
    out = tmp_path / "found"
    in_a_process(WITHOUT.format(ids=IDS.tolist(), ours=str(ours), merged=str(merged), out=str(out)))
    refused, alone, late_ours, late_merged = torch.load(out)
    assert "no file named model.safetensors" in refused
    weight_only = logits(dense_model(rounded(tiny(), "w4a4")))
    assert alone[0] == "Linear" and torch.equal(alone[1], weight_only)
    for (kind, found), folder in ((late_ours, ours), (late_merged, merged)):
        assert kind == "IntegerLinear" and torch.equal(found, logits(load(folder)))


def test_the_import_waits_for_the_quantisers_of_transformers() -> None:
    assert in_a_process(LATE).split() == ["AffineQuantizer", "StockOrOurs"]


def test_where_transformers_is_there_it_registers_at_once() -> None:
    from transformers.quantizers import auto

    with transformers_quantizer.stock():
        assert "affinequant" not in auto.AUTO_QUANTIZER_MAPPING
        register_with_transformers()
        assert auto.AUTO_QUANTIZER_MAPPING["affinequant"] is transformers_quantizer.AffineQuantizer


def test_registering_again_changes_nothing() -> None:
    from transformers.quantizers import auto

    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    register_with_transformers()
    transformers_quantizer.register()
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert sum(isinstance(finder, Finder) for finder in sys.meta_path) <= 1


def test_the_finder_answers_for_one_module_only() -> None:
    import transformers.quantizers

    assert Finder().find_spec("transformers", None) is None and Finder().find_spec("json", None) is None
    spec = Finder().find_spec(WATCHED, transformers.quantizers.__path__)
    assert spec is not None and spec.origin is not None and spec.origin.endswith("auto.py")


def test_a_name_that_another_package_holds_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import auto

    class Other:
        __module__ = "other_package.quantizer"

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "affinequant", Other)
    with pytest.raises(AffineQuantError, match=r"other_package\.quantizer"):
        transformers_quantizer.register()


def test_an_untested_transformers_is_warned_about(
    write: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transformers_quantizer.transformers, "__version__", "5.9.0")
    monkeypatch.setattr(transformers_quantizer._log, "propagate", True)
    warned: list[str] = []
    monkeypatch.setattr(transformers_quantizer._log, "warning_once", warned.append)
    in_transformers(write("affinequant"))
    assert warned and all("5.16.1" in line and "this is 5.9.0" in line for line in warned)


def test_checkpoints_of_others_stay_with_compressed_tensors(write: Write) -> None:
    folder = write("compressed-tensors", "w4a16")
    assert in_transformers(folder).hf_quantizer.__class__.__name__ == "CompressedTensorsHfQuantizer"
    change_config = json.loads((write("compressed-tensors") / "config.json").read_text())
    del change_config["quantization_config"]["affinequant"]
    (folder / "config.json").write_text(json.dumps(change_config))
    model = in_transformers(folder)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)

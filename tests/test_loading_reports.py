"""What transformers says while it loads a sound folder of ours: nothing."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import affinequant
from affinequant.formats import FORMATS, find_format
from affinequant.serve.transformers_quantizer import stock
from tests.tiny import rounded

Tiny = Callable[..., Path]
READ = [form for form in FORMATS if form not in ("gptq", "transform-config", "fp_quant")]
"""transformers reads GPTQ's layout and fp_quant with other packages, which want a GPU; a transform_config it does not read."""


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What any logger of transformers says, from warnings on; warnings of Python's own fail the test by themselves."""
    from transformers.utils import logging as library

    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Kept(logging.WARNING), logging.getLogger("transformers")
    level = library.get_verbosity()
    library.set_verbosity_warning()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    library.set_verbosity(level)


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def test_a_tensor_too_many_is_heard(tiny: Tiny, tmp_path: Path, said: list[str]) -> None:
    find_format("compressed-tensors").write(rounded(tiny(), "w4a16"), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored | {"model.stranger": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path)
    assert any("model.stranger" in line for line in said)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("form", READ)
def test_every_format(form: str, tied: bool, tiny: Tiny, tmp_path: Path, said: list[str]) -> None:
    from transformers import GgufConfig

    scheme = {"int-quantized": "w8a8", "humming": "w4a4-sym"}.get(form, "w4a4")
    find_format(form).write(rounded(tiny(hidden=128, mlp=256, tied=tied), scheme), tmp_path)
    gguf = {"gguf_file": "model.gguf", "quantization_config": GgufConfig(dequantize=True)}
    model = load(tmp_path, **(gguf if form == "gguf" else {}))
    assert said == [] and model.config.tie_word_embeddings == tied


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-g32-sym", "w8a8", "w4a4", "w4a8-g32", "w4a4kv4"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_a_merged_folder_read_by_transformers_alone(
    scheme: str, tied: bool, tiny: Tiny, tmp_path: Path, said: list[str]
) -> None:
    find_format("compressed-tensors").write(rounded(tiny(tied=tied), scheme), tmp_path)
    with stock():
        load(tmp_path)
    assert said == []


@pytest.mark.parametrize("tier", ["merged", "online"])
@pytest.mark.parametrize(
    "source", ["plain", "biases", "a copy of the tied head", "old frequencies", "in shards", "a cache in 4 bits"]
)
def test_what_a_run_has_written(source: str, tier: str, tiny_copy: Tiny, tmp_path: Path, said: list[str]) -> None:
    folder = tiny_copy(
        tied=source not in ("plain", "biases"), bias=source == "biases", shards=2 if source == "in shards" else 1
    )
    if source in ("a copy of the tied head", "old frequencies"):
        stored = load_file(folder / "model.safetensors")
        if source == "old frequencies":
            stored["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
        else:
            stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(900)))
    out = tmp_path / "out"
    small: dict[str, Any] = {"samples": 4, "seq_len": 32, "data": text, "preset": "fast"}
    scheme = "w4a4kv4" if source == "a cache in 4 bits" else "w4a4"  # its matrices lie beside no linear
    affinequant.quantize(folder, scheme=scheme, tier=tier, out=out, **small)
    said.clear()
    load(out)
    if tier == "merged":
        with stock():
            load(out)
    affinequant.load(out)
    assert said == []
    declared = json.loads((out / "config.json").read_text())["quantization_config"]
    assert declared["quant_method"] == ("compressed-tensors" if tier == "merged" else "affinequant")

"""Stock vLLM on what `export` writes. In a file of its own, late in the order: an engine in this process takes torch's
threads for itself, and what forks after it would wait for them."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import affinequant
from tests.test_export import SHAPE, export
from tests.test_export import made as made
from tests.test_vllm import reference_losses, stock_needs_avx512, vllm_losses
from tests.tiny import dense_model, rounded

Tiny = Callable[..., Path]
Make = Callable[..., Path]

VLLM = [
    pytest.param("w4a4", "compressed-tensors", "w4a16", "CompressedTensorsWNA16", marks=stock_needs_avx512),
    ("w4a4", "int-quantized", "w8a8", "CompressedTensorsW8A8Int8"),
    ("w4a16-sym", "int-quantized", "w4a8", "CompressedTensorsW4A8Int"),
    pytest.param("w4a16-sym", "gptq", None, "AutoGPTQLinearMethod", marks=stock_needs_avx512),
]


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("source", "form", "asked", "runs_as"), VLLM, ids=lambda value: str(value))
def test_stock_vllm_computes_an_export(
    source: str, form: str, asked: str | None, runs_as: str, made: Make, tiny: Tiny, tmp_path: Path
) -> None:
    export(made(source), form, tmp_path / "out", asked)
    window = [torch.randint(3, 300, (48,), generator=torch.Generator().manual_seed(0)).tolist()]
    expected = torch.tensor(reference_losses(dense_model(rounded(tiny(**SHAPE), source)), window))
    difference = torch.tensor(vllm_losses(tmp_path / "out", window, runs_as)) - expected
    # bfloat16, and 8-bit activations where they are declared, against weights alone in float32.
    assert float(difference.abs().mean()) < 0.05 * float(expected.std())


@contextmanager
def loaded(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[Any]:
    """A folder in vLLM's own model, without an engine. The parameters of experts are as they were read: for those kernels that
    would arrange them anew a CPU needs AMX."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.model_loader import get_model

    module = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_"
    packed, whole = (importlib.import_module(module + kind) for kind in ("wna16", "w8a8_int8"))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(packed, "select_wna16_moe_backend", lambda **_: (WNA16MoEBackend.MARLIN, None))
    monkeypatch.setattr(packed, "check_moe_marlin_supports_config", lambda *_, **__: True)
    monkeypatch.setattr(whole, "select_int8_moe_backend", lambda **_: (None, None))
    for kind in (packed.CompressedTensorsWNA16MoEMethod, whole.CompressedTensorsW8A8Int8MoEMethod):
        monkeypatch.setattr(kind, "process_weights_after_loading", lambda *_: None)
    config = EngineArgs(model=str(folder), max_model_len=64, enforce_eager=True, **settings).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/../{folder.name}.group", 0, "gloo")
        initialize_model_parallel(1, 1)
        try:
            yield get_model(vllm_config=config)
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


MIXTURES = [
    ("mixtral", "w4a16-g32-sym", "compressed-tensors", None),
    ("qwen2_moe", "w4a4", "compressed-tensors", "w4a16"),
    ("qwen2_moe", "w4a4", "int-quantized", "w8a8"),
    ("qwen3_moe", "w4a16", "compressed-tensors", None),
]


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("family", "scheme", "form", "asked"), MIXTURES)
def test_stock_vllm_reads_every_expert(
    family: str,
    scheme: str,
    form: str,
    asked: str | None,
    mixture: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gate above up, expert behind expert; routers and the shared expert's gate stay in 16 bits."""
    out = tmp_path / "out"
    wide = {"shared_expert_intermediate_size": 64} if family == "qwen2_moe" else {}  # of 48 vLLM makes no linear
    affinequant.export(mixture(family, scheme, **wide), format=form, scheme=asked, out=out)
    stored = load_file(out / "model.safetensors")
    module, gate, up, down = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}.get(
        family, ("mlp", "gate_proj", "up_proj", "down_proj")
    )
    where = f"model.layers.0.{module}"
    parts = {name.rpartition(".")[2] for name in stored if f"{where}.experts.0." in name} - {"weight_shape"}
    assert parts == {"weight_scale", *([] if asked == "w8a8" else ["weight_packed"])} | (
        {"weight"} if asked == "w8a8" else set() if scheme.endswith("sym") else {"weight_zero_point"}
    )
    with loaded(out, monkeypatch) as model:
        found = dict(model.named_parameters())
        for part in parts:
            both = [[stored[f"{where}.experts.{n}.{one}.{part}"] for one in (gate, up)] for n in range(4)]
            fused = found[f"{where}.experts.routed_experts.w13_{part}"]
            assert torch.equal(fused, torch.stack([torch.cat(pair) for pair in both]).to(fused.dtype)), part
            single = found[f"{where}.experts.routed_experts.w2_{part}"]
            expected = torch.stack([stored[f"{where}.experts.{n}.{down}.{part}"] for n in range(4)])
            assert torch.equal(single, expected.to(single.dtype)), part
        routers = [f"{where}.gate.weight", *([f"{where}.shared_expert_gate.weight"] if family == "qwen2_moe" else [])]
        assert all(torch.equal(found[name], stored[name]) for name in routers)


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")
def test_the_plugin_says_which_export_to_serve(mixture: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from affinequant.serve import register_vllm

    register_vllm()
    words = r"model\.layers\.0\.mlp\.experts: .*Serve an export.* compressed-tensors --scheme w4a16.*int-quantized"
    with pytest.raises(ValueError, match=words), loaded(mixture("qwen2_moe", "w4a4"), monkeypatch):
        pass
    folder = mixture("mixtral", "w4a4", "online")
    with pytest.raises(ValueError, match=r"act at run time.* --tier merged"), loaded(folder, monkeypatch):
        pass

"""Stock vLLM on what `export` writes. In a file of its own, late in the order: an engine in this process takes torch's
threads for itself, and what forks after it would wait for them."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import affinequant
from affinequant.formats import float_packed
from affinequant.numbers import grid_of
from affinequant.recipe.scheme import Scheme
from affinequant.transforms.online import apply_online
from tests.test_export import SHAPE, export
from tests.test_export import made as made
from tests.test_export_floats import shared as shared
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
    """A folder in vLLM's own model, without an engine. Parameters are as they were read: those of experts for kernels that
    would arrange them anew and need AMX, others because a CPU that has it gets copies in their place."""
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
    plain = {"cpu_linear": torch.nn.functional.linear}
    monkeypatch.setattr(
        "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", lambda layer, **_: vars(layer).update(plain)
    )
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


def to_floats(x: Tensor, scale: Tensor) -> Tensor:
    """x [M, K] to 4-bit floats of blocks that are counted in scale [M, G], packed two to a byte."""
    grid = grid_of(Scheme.parse("nvfp4").weight)
    blocks = x.unflatten(1, (scale.shape[1], -1))
    codes = grid.nearest(blocks.clone(), scale[..., None], torch.zeros(1)).flatten(1)
    return float_packed.pack(codes.to(torch.int8), torch.ones_like(scale), Scheme.parse("mxfp4").weight, None)[
        "weight_packed"
    ]


def values(packed: Tensor, scale: Tensor) -> Tensor:
    """What packed floats [M, K / 2] stand for, with a scale of 8 bits of either kind for each block."""
    tensors = {"weight_packed": packed, "weight_scale": torch.full((len(packed), 1), 127)}
    floats = float_packed.unpack(tensors, Scheme.parse("mxfp4").weight)[0] / 2
    return (floats.unflatten(1, (scale.shape[1], -1)) * scale.float()[..., None]).flatten(1)


def quantize_nv(x: Tensor, matrix: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """What QuTLASS's fusedQuantizeNv computes, by its source and its own tests: x B in row-major order, scales of reach / 6."""
    turned = (x.float().unflatten(1, (-1, len(matrix))) @ matrix.float()).flatten(1)
    reach = turned.unflatten(1, (-1, 16)).abs().amax(-1)
    scale = (whole * reach / 6).clamp_max(448).to(torch.float8_e4m3fn)
    return to_floats(turned * whole, scale.float()), scale


def quantize_mx(x: Tensor, matrix: Tensor, *, method: str) -> tuple[Tensor, Tensor]:
    """The same of fusedQuantizeMx: scales are powers of two below the reach, and three times the value is rounded."""
    assert method == "abs_max"
    turned = (x.float().unflatten(1, (-1, len(matrix))) @ matrix.float()).flatten(1)
    scale = turned.unflatten(1, (-1, 32)).abs().amax(-1).log2().floor().exp2()
    return to_floats(3 * turned, scale), scale.to(torch.float8_e8m0fnu)


def multiply(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, alpha: Tensor, *_: Any, **__: Any) -> Tensor:
    """The product that hardware takes of 4-bit floats, by the values that they stand for."""
    return (values(x, x_scale) @ values(w, w_scale).T * alpha).bfloat16()


def stand_in(monkeypatch: pytest.MonkeyPatch, *, qutlass: bool) -> None:
    """In the place of kernels, which CPU builds of vLLM have none of: what they compute, in torch."""
    quantization = "vllm.model_executor.layers.quantization."
    importlib.import_module(quantization + "compressed_tensors.compressed_tensors")  # its parts import each other
    schemes = quantization + "compressed_tensors.schemes.compressed_tensors_w4a4_"
    for kind in ("nvfp4", "mxfp4"):
        unit = (lambda layer: layer.weight_global_scale) if kind == "nvfp4" else (lambda layer: torch.tensor(1.0))
        kernel = SimpleNamespace(
            process_weights_after_loading=lambda layer: None,
            apply_weights=lambda layer, x, bias, unit=unit: (
                x.float() @ (values(layer.weight, scale_of(layer.weight_scale)) * unit(layer)).T
            ),
        )
        module = importlib.import_module(schemes + kind)
        monkeypatch.setattr(module, f"init_{kind}_linear_kernel", lambda *_, kernel=kernel, **__: kernel)
    monkeypatch.setattr(importlib.import_module(schemes + "nvfp4"), "expose_input_quant_key", lambda *_: None)
    transform = quantization + "compressed_tensors.transform."
    # It remembers matrices that it has divided by where they lay, beyond the life of a model.
    monkeypatch.setattr(importlib.import_module(transform + "module").HadamardTransform, "scaled_data_ptrs", set())
    platform = SimpleNamespace(has_device_capability=lambda *_: qutlass)
    monkeypatch.setattr(importlib.import_module(transform + "linear"), "current_platform", platform)
    fused = importlib.import_module(transform + "schemes.linear_qutlass_nvfp4")
    monkeypatch.setattr(fused.QutlassNvFP4LinearMethod, "_get_flashinfer_gemm_backend", staticmethod(lambda _: "any"))
    monkeypatch.setattr(fused, "flashinfer_scaled_fp4_mm", multiply)
    monkeypatch.setattr(fused, "slice_nvfp4_output", lambda out, size: out)
    other = importlib.import_module(quantization + "fp_quant")
    monkeypatch.setattr(other, "fusedQuantizeMx", quantize_mx)
    monkeypatch.setattr(other, "matmul_mxf4_bf16_tn", multiply)
    monkeypatch.setattr(other, "cutlass_scaled_fp4_mm", multiply)
    for module in (fused, other):
        monkeypatch.setattr(module, "fusedQuantizeNv", quantize_nv)
        monkeypatch.setattr(module, "to_blocked", lambda scale, backend: scale)


def scale_of(stored: Tensor) -> Tensor:
    """Scales as they are, or by the exponents of powers of two."""
    return stored.float() if stored.is_floating_point() else stored.view(torch.float8_e8m0fnu).float()


FLOATS = [
    ("transform-config", "nvfp4", False),
    ("transform-config", "nvfp4", True),
    ("transform-config", "mxfp4", False),
    ("fp_quant", "nvfp4", True),
    ("fp_quant", "mxfp4", True),
]


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("form", "kind", "qutlass"), FLOATS)
def test_stock_vllm_multiplies_with_the_matrix_as_we_do(
    form: str, kind: str, qutlass: bool, shared: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own loader and its own layers, fused ones too, around stand-ins for kernels. The dense product leaves activations to
    the kernel behind it, which rounds none here; QuTLASS rounds them, as finely as ours."""
    stand_in(monkeypatch, qutlass=qutlass)
    affinequant.export(shared(kind), format=form, out=tmp_path / "out")
    ours = affinequant.load(shared(kind), device="cpu", dtype="float32")
    x = {n: torch.randn(8, n, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (64, 128)}
    fused = {"self_attn.qkv": "q k v", "self_attn.o": "o", "mlp.gate_up": "gate up", "mlp.down": "down"}
    allowed = {"allow_deprecated_quantization": True} if form == "fp_quant" else {}
    with loaded(tmp_path / "out", monkeypatch, **allowed) as model:
        for layer, (name, members) in ((layer, pair) for layer in range(2) for pair in fused.items()):
            module = model.get_submodule(f"model.layers.{layer}.{name}_proj")
            for child in module.children():
                child.cpu_linear = torch.nn.functional.linear  # vLLM's CPU build forgets it
            where = f"model.layers.{layer}.{name.partition('.')[0]}"
            parts: list[Any] = [ours.get_submodule(f"{where}.{one}_proj") for one in members.split()]
            inputs = x[parts[0].in_features]
            got = module.quant_method.apply(module, inputs).float()
            expected = torch.cat([part(inputs.float()) for part in parts], -1)
            plain = torch.cat([unrounded(part, inputs.float()) for part in parts], -1)
            noise = float((expected - plain).norm() / plain.norm())
            assert 0.03 < noise < 0.3, name
            error = float((got - plain).norm() / plain.norm())
            rounds = qutlass and not (form == "transform-config" and name == "self_attn.o")
            assert error < (1.3 * noise if rounds else 0.01), name


def unrounded(linear: Any, x: Tensor) -> Tensor:
    """One of our linears on activations that are transformed alone."""
    matrices = {part: linear.get_buffer(name) for part, name in linear.parts.items()}
    return (apply_online(x, matrices) if matrices else x) @ linear.weight.T

"""The cache of a loaded model: packed bytes that hold what calibration saw, in every way of generating."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_kernels import reference
from safetensors.torch import load_file, save_file
from torch import Tensor

import affinequant
from affinequant.errors import AffineQuantError
from affinequant.numbers import grid_of
from affinequant.numbers.activations import fake_quantize_activation
from affinequant.recipe.scheme import NumberFormat
from affinequant.rounding.job import BlockJob
from affinequant.runtime.cache import PackedLayer, pack, unpack
from tests.tiny import SLIDING, VOCAB

Tiny = Callable[..., Path]
TEXT = " ".join(f"{i} black crows in tree {i % 17}" for i in range(1500))
SMALL: dict[str, Any] = {"samples": 4, "seq_len": 32, "preset": "fast"}
IDS = torch.randint(2, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
ROWS: dict[str, Tensor] = {
    "random": torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0)),
    "narrow": torch.randn(1, 1, 7, 6, generator=torch.Generator().manual_seed(1)),
    "wide": 9 * torch.randn(1, 2, 3, 80, generator=torch.Generator().manual_seed(2)) + 40,
    "constant": torch.full((1, 1, 2, 96), -3.3),
    "zero": torch.zeros(1, 1, 2, 128),
    "tiny": 1e-9 * torch.randn(1, 1, 3, 16, generator=torch.Generator().manual_seed(3)),
    "huge": 1e9 * torch.randn(1, 1, 3, 16, generator=torch.Generator().manual_seed(4)),
}


def cached(bits: int) -> NumberFormat:
    return NumberFormat(bits=bits, symmetric=False, granularity="head", dynamic=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", ROWS)
def test_bytes_hold_what_calibration_saw(rows: str, bits: int, dtype: torch.dtype) -> None:
    x, kv = ROWS[rows].to(dtype).mT.contiguous().mT, cached(bits)
    packed = pack(x, kv)
    assert packed.dtype == torch.uint8 and packed.shape == (*x.shape[:-1], x.shape[-1] * bits // 8 + 4)
    assert torch.equal(unpack(packed, kv, dtype), fake_quantize_activation(x, grid_of(kv)))


@pytest.mark.parametrize("rows", ROWS)
def test_calibration_rounds_as_the_kernels_do(rows: str) -> None:
    x = ROWS[rows].flatten(0, 1)
    assert torch.equal(fake_quantize_activation(x, grid_of(cached(4))), reference.kv_unpack(*reference.kv_pack(x)))


def test_rounding_is_half_a_step_and_its_gradient_straight() -> None:
    x = (ROWS["random"] + 3).requires_grad_()
    for bits in (4, 8):
        value = fake_quantize_activation(x, grid_of(cached(bits)))
        step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
        # The step itself is rounded to float16, which moves the last code by up to 2^bits / 2^11 steps.
        assert bool(((value - x).abs().amax(-1) <= step * (0.5 + 2**bits / 2**11)).all())
        (gradient,) = torch.autograd.grad(value.sum(), x)
        assert float((gradient == 1).float().mean()) > 0.97 and set(gradient.unique().tolist()) <= {0.0, 1.0}


@pytest.fixture(scope="module")
def make(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., affinequant.Result]:
    """make(scheme, tier, ...): a checkpoint, made once."""
    made: dict[tuple, affinequant.Result] = {}
    folder = tmp_path_factory.mktemp("kv")
    (folder / "text.txt").write_text(TEXT)

    def call(scheme: str, tier: str, **shape: Any) -> affinequant.Result:
        key = (scheme, tier, *sorted(shape.items()))
        if key not in made:
            fields: dict[str, Any] = SMALL | {"data": folder / "text.txt", "out": folder / str(len(made))}
            made[key] = affinequant.quantize(str(tiny(**shape)), scheme=scheme, tier=tier, **fields)
        return made[key]

    return call


def logits(model: Any, **fields: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, **fields).logits


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("w4a4kv4", "online", {}),
    ("w4a4kv4", "online", {"kv_heads": 4}),
    ("w4a16kv4", "online", {"hidden": 72, "heads": 3, "kv_heads": 1}),
    ("w4a16kv8", "merged", {}),
    ("w8a8kv4", "merged", {}),
    ("w4a4kv4", "online", SLIDING),
]


@pytest.mark.parametrize(("scheme", "tier", "shape"), CASES, ids=str)
def test_a_loaded_model_is_the_run(scheme: str, tier: str, shape: dict[str, Any], make: Any) -> None:
    done = make(scheme, tier, **shape)
    checked = done.report["verified"]
    assert checked["passed"] and checked["compared"] and checked["hidden"] < 1e-3
    declared = json.loads((done.path / "config.json").read_text())["quantization_config"]
    assert declared["quant_method"] == ("affinequant" if tier == "online" else "compressed-tensors")
    assert NumberFormat(**declared["affinequant"]["kv"]) == affinequant.Scheme.parse(scheme).kv
    model = affinequant.load(done.path)
    assert torch.equal(logits(model), logits(model, use_cache=False))


def test_a_run_without_the_cache_would_fail_that(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(BlockJob, "cached_heads", lambda self, rotation: None)
    (tmp_path / "text.txt").write_text(TEXT)
    fields: dict[str, Any] = SMALL | {"data": tmp_path / "text.txt", "out": tmp_path / "bad"}
    with pytest.raises(AffineQuantError, match="block 0 computes something else"):
        affinequant.quantize(str(tiny()), scheme="w4a16kv4", tier="online", **fields)


@pytest.mark.parametrize(("scheme", "tier", "shape"), CASES, ids=str)
def test_every_way_of_generating_gives_the_same_tokens(scheme: str, tier: str, shape: Any, make: Any) -> None:
    model: Any = affinequant.load(make(scheme, tier, **shape).path)
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0  # padded on the left
    common = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "attention_mask": mask}
    expected = model.generate(IDS, use_cache=False, **common)
    dynamic = model.generate(IDS, return_dict_in_generate=True, **common)
    assert torch.equal(dynamic.sequences, expected)
    static = model.generate(IDS, cache_implementation="static", disable_compile=True, **common)
    assert torch.equal(static, expected)
    beams = [model.generate(IDS, num_beams=2, use_cache=cache, **common) for cache in (True, False)]
    assert torch.equal(beams[0], beams[1])
    layers = dynamic.past_key_values.layers
    if shape == SLIDING:  # a window's keys and values are rounded as they are read, and not packed
        assert (
            [type(layer) is PackedLayer for layer in layers]
            == [not layer.is_sliding for layer in layers]
            == [True, False]
        )
        return
    assert all(type(layer) is PackedLayer for layer in layers)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    tokens = layers[0].keys.shape[0] * layers[0].get_seq_length()
    assert held == tokens * make(scheme, tier, **shape).report["plan"]["cache_bytes_per_token"]


def test_a_cache_goes_on_and_goes_back(make: Any) -> None:
    from transformers import DynamicCache

    model: Any = affinequant.load(make("w4a16kv4", "online").path)
    cache, whole = DynamicCache(), logits(model)
    first = model(IDS[:, :13], past_key_values=cache)
    assert cache.get_seq_length() == 13 and first.past_key_values is cache
    cache.crop(-4)
    with torch.no_grad():
        rest = model(IDS[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 9:], rtol=1e-4, atol=1e-4)


def test_the_whole_graph_compiles(make: Any) -> None:
    model: Any = affinequant.load(make("w4a4kv4", "online").path)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(logits(compiled), logits(model))


def test_the_checkpoint_s_own_cache_and_rotation_are_used(make: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make("w4a16kv4", "online").path, tmp_path / "copy"))
    whole, config = logits(affinequant.load(folder)), json.loads((folder / "config.json").read_text())
    file = folder / "affinequant.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.online_blocks"
    save_file(tensors | {name: torch.eye(16)[None].contiguous()}, file)
    unrotated = logits(affinequant.load(folder))
    config["quantization_config"]["affinequant"]["kv"] = None
    (folder / "config.json").write_text(json.dumps(config))
    plain = logits(affinequant.load(folder))
    assert (unrotated - whole).abs().max() > 1e-3 and (plain - whole).abs().max() > 1e-3
    save_file(tensors | {name: torch.eye(5)[None].contiguous()}, file)
    config["quantization_config"]["affinequant"]["kv"] = cached(4).stored()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AffineQuantError, match=r"self_attn: expected matrices for 16 features"):
        affinequant.load(folder)


def test_another_attention_is_refused_and_not_left_in_16_bits(make: Any) -> None:
    model: Any = affinequant.load(make("w4a16kv4", "online").path)
    model.set_attn_implementation("eager")
    with pytest.raises(AffineQuantError, match="attention 'eager' cannot quantise the KV cache") as caught:
        logits(model)
    model.set_attn_implementation("affinequant")
    assert "set_attn_implementation('affinequant')" in caught.value.fix and logits(model).isfinite().all()


def test_in_bfloat16(make: Any) -> None:
    model: Any = affinequant.load(make("w4a4kv4", "online").path, dtype="bfloat16")
    assert torch.equal(logits(model), logits(model, use_cache=False))

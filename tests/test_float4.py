"""4-bit floats: equal to compressed-tensors' own, learned, rounded, finished, written, and read by whoever reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

import affinequant
from affinequant.errors import AffineQuantError
from affinequant.learning.distill import Continuous, Divergence
from affinequant.learning.objective import BlockObjective
from affinequant.numbers import grid_of, in_units, unit_for
from affinequant.numbers.activations import fake_quantize_activation
from affinequant.numbers.float4 import unit_of
from affinequant.numbers.weights import codes_of, dequantize, fake_quantize, weight_range
from affinequant.recipe.scheme import Scheme
from affinequant.rounding.gptq import gptq, refine, search_weight_range
from affinequant.serve.transformers_quantizer import stock
from tests.test_distill import make
from tests.test_gptq import correlated, output_error, random
from tests.test_objective import make_job
from tests.tiny import quantized_input

Tiny = Callable[..., Path]
KINDS = ["nvfp4", "mxfp4"]
FLOATS = {0, 1, 2, 3, 4, 6, 8, 12}


def uneven(*shape: int) -> Tensor:
    """Numbers of many sizes, with ties of every kind, a row of zeros and one that is tiny."""
    x = random(*shape) * torch.exp(2 * random(shape[0], 1, seed=1))
    x[1], x[2] = 0, x[2] * 1e-6
    x[3, :16] = torch.tensor([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, -5, -2.5])
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_as_compressed_tensors_rounds_them(kind: str) -> None:
    grid, args = grid_of(Scheme.parse(kind).weight), preset_name_to_scheme(kind.upper(), ["Linear"]).weights
    assert args is not None
    weight = uneven(24, 64)
    low, high = weight_range(weight, grid)
    whole = (1 / unit_of(high / 6)).reshape(1) if kind == "nvfp4" else None
    scale, zero = calculate_qparams(low, high, args, whole)
    expected = theirs(weight, scale, zero.float(), args, global_scale=whole)
    assert torch.equal(fake_quantize(weight, low, high, grid), expected)
    ours, none = grid.params(low, high)
    codes = codes_of(weight, ours, none, grid)
    assert torch.equal(dequantize(codes, ours, none, grid), expected) and not bool(none.any())
    assert set(codes.abs().unique().tolist()) == FLOATS
    assert torch.equal(ours, ours.bfloat16().float())
    if whole is not None:  # a power of two within three of the reciprocal that the library itself would take
        own = generate_gparam(weight.min(), weight.max())
        assert float(whole.frexp().mantissa) == 0.5 and 1 <= float(own / whole) < 4


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_rounded_as_compressed_tensors_rounds_them(kind: str) -> None:
    fmt, args = Scheme.parse(kind).activation, preset_name_to_scheme(kind.upper(), ["Linear"]).input_activations
    assert fmt is not None and args is not None
    x = uneven(12, 64).reshape(3, 4, 64)
    blocks = x.unflatten(-1, (-1, fmt.group_size or 0))
    unit = unit_for(grid_of(fmt), x.abs().amax())
    whole = None if unit is None else torch.tensor([1 / unit])
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, whole)
    expected = theirs(x, scale, zero.float(), args, global_scale=whole)
    assert torch.equal(fake_quantize_activation(x, in_units(grid_of(fmt), unit)), expected)


def test_a_unit_is_the_whole_tensors_and_bounds_its_scales() -> None:
    grid = in_units(grid_of(Scheme.parse("nvfp4").weight), 2.0**-4)
    reach = torch.tensor([6 * 448.0 / 16, 1e9, 6 * 2.0**-9 / 16, 1e-9])
    assert grid.params(-reach, reach)[0].tolist() == [28.0, 28.0, 2.0**-13, 2.0**-7]


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_kept_as_they_are_stored_with_a_gradient(kind: str) -> None:
    grid = grid_of(Scheme.parse(kind).weight)
    start = (random(8, 4).abs() + 0.1).requires_grad_()
    kept = grid.kept(start)
    assert torch.equal(grid.kept(kept), kept) and bool(((kept / start).log().abs() < 0.35).all())
    kept.sum().backward()
    assert start.grad is not None and torch.equal(start.grad, torch.ones_like(start))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_straight_through_within_reach(kind: str) -> None:
    grid = grid_of(Scheme.parse(kind).weight)
    x = random(5, 32).requires_grad_()
    clip = torch.tensor(0.6, requires_grad=True)
    fake_quantize_activation(x, grid, clip).sum().backward()
    assert x.grad is not None and clip.grad is not None and bool(clip.grad.isfinite()) and float(clip.grad) != 0
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}  # what is cut off is none of x's


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_rounded_with_second_order_information(kind: str) -> None:
    grid, weight, x = grid_of(Scheme.parse(kind).weight), random(24, 64), correlated(64)
    hessian = x.mT @ x / len(x)
    scale, zero = grid.params(*search_weight_range(weight, hessian, grid, torch.bfloat16), torch.bfloat16)
    found = [codes_of(weight, scale, zero, grid), gptq(weight, hessian, scale, zero, grid, damping=0.01)]
    found.append(refine(found[-1], weight, hessian, scale, zero, grid, damping=0.01, sweeps=4))
    errors = [output_error(x, weight, dequantize(codes, scale, zero, grid)) for codes in found]
    assert errors[2] < errors[1] < 0.7 * errors[0]
    assert all(set(codes.abs().unique().tolist()) <= FLOATS for codes in found)


def test_a_block_of_nvfp4_may_end_at_four() -> None:
    """4, 3 and 2 are floats, 6, 4.5 and 3 are not: the largest value is best left at 4, which a search of ranges finds."""
    grid = grid_of(Scheme.parse("nvfp4").weight)
    weight = torch.tensor([4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, 3.0, -3.0, 0.0])[None]
    low, high = search_weight_range(weight, torch.eye(16), grid, torch.bfloat16)
    assert float(high) == 6.0 == -float(low)
    scale, zero = grid.params(low, high, torch.bfloat16)
    assert torch.equal(dequantize(codes_of(weight, scale, zero, grid), scale, zero, grid), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_learns_for_it(tiny: Tiny, kind: str) -> None:
    job, tensors, x = make_job(tiny(), preset="rtn", scheme=kind, weight_clip="learn", activation_clip="learn")
    objective = BlockObjective(job, tensors, {})
    objective.loss((x, job.run_all(tensors, x)))["block"].backward()
    for group in objective.groups():
        assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in group.parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_finished_on_it(tiny: Tiny, kind: str) -> None:
    case = make(tiny(), Scheme.parse(kind), rounding="gptq", sweeps=2, activation_clip="search")
    for job, made, stage in zip(case.jobs, case.rounded, case.stages, strict=True):
        assert all(set(stage[name].abs().unique().tolist()) <= FLOATS for name in stage if name.endswith(".codes"))
        assert any(name.endswith("_unit") for name in stage) is (kind == "nvfp4")
        one = Continuous(job, stage)
        expected = job.run_all(made.tensors, case.embedded, quantized_input(one.job, made.clips, {}))
        assert torch.equal(one.run_all(case.embedded), expected)
    blocks = [Continuous(job, stage) for job, stage in zip(case.jobs, case.stages, strict=True)]
    Divergence(blocks, case.outer, 1e-2).loss((case.embedded, case.full)).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for block in blocks for p in block.logs)
    for block, stage in zip(blocks, case.stages, strict=True):
        with torch.no_grad():
            for log in block.logs:
                log.copy_(0.5 * torch.randn(log.shape, generator=torch.Generator().manual_seed(0)))
        for name, scale in block.changed().items():
            if name.endswith(".scale"):
                unit = stage.get(f"{name.removesuffix('.scale')}.weight_unit")
                grid = in_units(block.job.weight_grid("vo"), None if unit is None else float(unit))
                assert torch.equal(grid.kept(scale), scale) and not torch.equal(scale, stage[name]), name


@pytest.fixture
def quantize(tiny: Tiny, tmp_path: Path) -> Callable[..., affinequant.Result]:
    (tmp_path / "text.txt").write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(2500)))

    def call(out: str = "out", **fields: Any) -> affinequant.Result:
        small = {"samples": 6, "seq_len": 32, "data": tmp_path / "text.txt", "preset": "fast"}
        return affinequant.quantize(tiny(tied=True), **(small | fields), out=tmp_path / out)

    return call


def logits(model: Any) -> Tensor:
    ids = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "nvfp4a16"])
def test_a_merged_folder_is_what_stock_engines_read(scheme: str, quantize: Callable[..., affinequant.Result]) -> None:
    from affinequant.formats.compressed_tensors import reload

    done = quantize(scheme=scheme)
    assert done.report["verified"]["passed"] and done.report["verified"]["hidden"] == 0 and not done.report["events"]
    assert done.report["tier"] == "merged" and done.report["bits_per_weight"] == 4 + 8 / (16 if "nv" in scheme else 32)
    declared = json.loads((done.path / "config.json").read_text())["quantization_config"]
    assert declared["format"] == f"{scheme[:5]}-pack-quantized"
    group = declared["config_groups"]["group_0"]
    preset = preset_name_to_scheme(scheme.upper(), ["Linear"]).model_dump(mode="json", exclude_none=True)
    assert group.get("input_activations") == preset.get("input_activations")
    ours = affinequant.load(done.path, device="cpu", dtype="float32")
    with stock():
        stocks, reader = reload(done.path, "float32")
    assert "compressed-tensors" in reader
    for name, module in stocks.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(module.weight, ours.get_submodule(name).weight), name
    assert torch.equal(logits(ours), logits(stocks))
    again = quantize("again", scheme=scheme)
    files = [path.relative_to(done.path) for path in done.path.glob("*.safetensors")]
    assert files and all((done.path / file).read_bytes() == (again.path / file).read_bytes() for file in files)


@pytest.mark.parametrize("scheme", KINDS)
def test_transforms_stay_online_beside_it(scheme: str, quantize: Callable[..., affinequant.Result]) -> None:
    done = quantize(scheme=scheme, tier="online", activation_clip="search")
    assert done.report["verified"]["passed"] and done.report["verified"]["hidden"] == 0
    model = affinequant.load(done.path, device="cpu", dtype="float32")
    import transformers

    second = transformers.AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32)
    assert torch.equal(logits(model), logits(second))
    narrow = affinequant.load(done.path, device="cpu", dtype="bfloat16")
    weight = {name: buffer for name, buffer in model.named_buffers() if name.endswith("_proj.weight")}
    assert weight and all(torch.equal(narrow.get_buffer(name).float(), buffer) for name, buffer in weight.items())


def test_its_folder_is_exported_as_far_as_others_hold_floats(
    quantize: Callable[..., affinequant.Result], tmp_path: Path
) -> None:
    from affinequant.export import export

    done = quantize(scheme="nvfp4")
    same = export(done.path, format="compressed-tensors", out=tmp_path / "same")
    assert same.report["verified"]["divergence"] == 0 and same.report["verified"]["quantised_activations"]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (done.path, same.path)]
    assert weights[0] == weights[1]
    narrow = export(done.path, format="compressed-tensors", scheme="nvfp4a16", out=tmp_path / "narrow")
    assert narrow.report["scheme"] == "nvfp4a16" and not narrow.report["verified"]["quantised_activations"]
    dense = export(done.path, format="dense", out=tmp_path / "dense")
    assert dense.report["verified"]["divergence"] < 1e-9
    for form in ("gptq", "gguf", "int-quantized", "humming", "nvfp4", "mxfp4"):
        with pytest.raises(AffineQuantError, match="4-bit floats"):
            export(done.path, format=form, out=tmp_path / "no")
    for text in ("w4a16", "mxfp4"):
        with pytest.raises(AffineQuantError, match="round them anew"):
            export(done.path, format="compressed-tensors", scheme=text, out=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_blocks_that_do_not_fit_are_refused_with_what_does(tiny: Tiny) -> None:
    with pytest.raises(AffineQuantError, match="groups of 32 do not divide 144") as caught:
        affinequant.plan(tiny(mlp=144), scheme="mxfp4", data="demo", seq_len=128)
    assert caught.value.fix == "use 'nvfp4'"
    with pytest.raises(AffineQuantError) as caught:
        affinequant.plan(tiny(mlp=136), scheme="nvfp4", data="demo", seq_len=128)
    assert caught.value.fix == "use 'w4a4'"
    with pytest.raises(AffineQuantError, match="experts are not rounded to 4-bit floats"):
        affinequant.plan(tiny(family="mixtral"), scheme="nvfp4", data="demo", seq_len=128)

"""`load`: integers equal to a reference written out in int64, models that generate, and folders that are broken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from affinequant.errors import AffineQuantError
from affinequant.formats import find_format
from affinequant.recipe.scheme import NumberFormat
from affinequant.runtime.integer_linear import IntegerLinear
from affinequant.runtime.load import load
from tests.tiny import VOCAB, dense_model, rounded

Tiny = Callable[..., Path]
IDS = torch.randint(2, VOCAB, (2, 48), generator=torch.Generator().manual_seed(1))
SCHEMES = ["w4a4", "w4a4-sym", "w4a8", "w4a8-sym", "w8a8", "w8a8-asym", "w4a4-g32", "w4a8-g32-sym", "w8a8-g32"]
SCHEMES += ["w4a4-ag32", "w4a4-g32-ag32-sym"]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(source, scheme): a checkpoint of that source, rounded to nearest."""

    def checkpoint(source: Path, scheme: str, clip: float = 1.0) -> Path:
        find_format("auto").write(rounded(source, scheme, clip=clip), tmp_path / "checkpoint")
        return tmp_path / "checkpoint"

    return checkpoint


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def token_codes(x: Tensor, grid: NumberFormat, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero) by the published formula, in float32 and then int64; written apart from the package."""
    low_code, high_code = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    ratio = torch.tensor(clip, dtype=torch.float32)
    if grid.symmetric:
        scale = torch.clamp(x.abs().max(-1, keepdim=True).values * ratio / high_code, min=1e-8)
        codes = torch.round(torch.clamp(x * scale.reciprocal(), low_code, high_code))
        return codes.long(), scale, torch.zeros_like(scale).long()
    low = torch.clamp(x.min(-1, keepdim=True).values, max=0) * ratio
    high = torch.clamp(x.max(-1, keepdim=True).values, min=0) * ratio
    scale = torch.clamp((high - low) / (2**grid.bits - 1), min=1e-8)
    inverse = scale.reciprocal()
    zero = torch.clamp(torch.round(-low * inverse) + low_code, low_code, high_code)
    codes = torch.clamp(torch.round(x * inverse) + zero, low_code, high_code)
    return codes.long(), scale, zero.long()


def reference_linear(x: Tensor, stage: dict[str, Tensor], name: str, grid: NumberFormat) -> tuple[Tensor, Tensor]:
    """(product in the order float(acc) * weight scale * token scale + bias, the same in float64); of tokens in groups the
    second alone."""
    codes, scale = stage[f"{name}.codes"].long(), stage[f"{name}.scale"]
    zero = stage[f"{name}.zero"].long() if f"{name}.zero" in stage else torch.zeros_like(scale).long()
    if grid.group_size:
        q, token_scale, token_zero = token_codes(
            x.unflatten(-1, (-1, grid.group_size)), grid, float(stage[f"{name}.input_clip"])
        )
        values = ((q - token_zero).double() * token_scale.double()).flatten(1)
        weights = (codes.unflatten(1, (scale.shape[1], -1)) - zero[..., None]).double() * scale[..., None].double()
        return x, values @ weights.flatten(1).T + stage.get(f"{name}.bias", torch.zeros(len(codes))).double()
    q, token_scale, token_zero = token_codes(x, grid, float(stage[f"{name}.input_clip"]))
    width = codes.shape[1] // scale.shape[1]
    parts = [
        (q - token_zero)[:, start : start + width] @ (codes[:, start : start + width] - zero[:, [group]]).T
        for group, start in enumerate(range(0, codes.shape[1], width))
    ]
    bias = stage.get(f"{name}.bias", torch.zeros(len(codes))).float()
    exact = sum(part.double() * scale[:, group].double() for group, part in enumerate(parts)) * token_scale.double()
    return parts[0].float() * scale[:, 0] * token_scale + bias, exact + bias.double()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_linear_equals_the_integer_reference(tiny: Tiny, write: Callable[..., Path], scheme: str) -> None:
    clip = 1.0 if scheme == "w8a8" else 0.85
    source = tiny(bias=True)
    contents = rounded(source, scheme, clip=clip)
    stage = {name: tensor for part in contents.stages() for name, tensor in part.items()}
    model = load(write(source, scheme, clip))
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str, x: Tensor, y: Tensor) -> None:
        seen[name] = (x.flatten(0, -2), y.flatten(0, -2))

    for name in contents.linears:
        module = model.get_submodule(name)
        assert isinstance(module, IntegerLinear)
        module.register_forward_hook(lambda _, inputs, y, name=name: record(name, inputs[0], y))
    logits(model)
    assert set(seen) == set(contents.linears)
    assert contents.scheme.activation is not None
    for name, (x, y) in seen.items():
        ordered, exact = reference_linear(x, stage, name, contents.scheme.activation)
        if contents.scheme.weight.granularity == "channel" and not contents.scheme.activation.group_size:
            assert torch.equal(y, ordered), name
        else:  # the order of float32 sums over the groups is the kernel's own
            assert (y - exact).abs().max() < 1e-5 * exact.abs().max(), name


def test_activations_are_really_quantised(tiny: Tiny, write: Callable[..., Path]) -> None:
    weight_only = logits(dense_model(rounded(tiny(), "w4a4")))
    errors = {
        scheme: float((logits(load(write(tiny(), scheme))) - weight_only).pow(2).mean()) for scheme in ("w4a4", "w4a8")
    }
    power = float(weight_only.pow(2).mean())
    assert 0 < errors["w4a8"] < 0.01 * power < errors["w4a4"] < 0.5 * power


def test_the_clip_of_the_checkpoint_is_used(tiny: Tiny, write: Callable[..., Path]) -> None:
    folder = write(tiny(), "w4a4", 0.7)
    clips = {module.clip for module in load(folder).modules() if isinstance(module, IntegerLinear)}
    assert clips == {float(torch.tensor(0.7))}


def test_it_generates_text(tiny: Tiny, write: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    folder = write(tiny(), "w4a4")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = load(folder)
    inputs = tokenizer(["on the other", "in"], return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    once, twice = (model.generate(**inputs, max_new_tokens=8, do_sample=False) for _ in range(2))
    assert torch.equal(once, twice) and once.shape[1] > inputs["input_ids"].shape[1]
    assert tokenizer.decode(once[0]).startswith(tokenizer.decode(inputs["input_ids"][0]))
    assert model.name_or_path == str(folder)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a16"])
def test_the_whole_graph_compiles(tiny: Tiny, write: Callable[..., Path], scheme: str) -> None:
    model: Any = load(write(tiny(), scheme))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(logits(compiled), logits(model))


@pytest.mark.slow
def test_inductor_compiles_it(tiny: Tiny, write: Callable[..., Path]) -> None:
    model: Any = load(write(tiny(layers=1), "w4a8"))
    difference = (logits(torch.compile(model)) - logits(model)).abs().max()
    assert difference < 0.2  # fused norms move a few roundings of the activations by one step


def test_lm_eval_scores_it(tiny: Tiny, write: Callable[..., Path]) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    folder = write(tiny(), "w4a4")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = load(folder)
    request = Instance("loglikelihood", doc={}, arguments=("in the", " ore"), idx=0)
    scorer: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)  # pyright: ignore[reportCallIssue]
    [(score, _)] = scorer.loglikelihood([request])
    context, whole = tokenizer("in the")["input_ids"], tokenizer("in the ore")["input_ids"]
    with torch.no_grad():
        logprobs = model(torch.tensor([whole])).logits.log_softmax(-1)[0]
    expected = sum(float(logprobs[place - 1, whole[place]]) for place in range(len(context), len(whole)))
    assert score == pytest.approx(expected, abs=1e-4)


def test_bfloat16_keeps_the_numbers_of_the_grid(tiny: Tiny, write: Callable[..., Path]) -> None:
    folder = write(tiny(), "w4a4-g32")
    once, model = load(folder, dtype="bfloat16"), load(folder)
    moved = model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    assert logits(once).dtype == logits(moved).dtype == torch.bfloat16
    linear, kept = (side.get_submodule("model.layers.0.mlp.down_proj") for side in (moved, once))
    for part in ("parts.0.scale", "parts.0.colsum"):
        assert linear.get_buffer(part).dtype == torch.float32
        assert torch.equal(linear.get_buffer(part), kept.get_buffer(part))
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(linear(x), kept(x))


def test_a_plain_folder_loads_as_it_is(tiny: Tiny) -> None:
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(tiny(shards=2), dtype=torch.float32)
    assert torch.equal(logits(load(tiny(shards=2))), logits(expected))
    assert load(tiny(), dtype="bfloat16").dtype == torch.bfloat16


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q_PROJ = "model.layers.1.self_attn.q_proj"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "newer version": (
        lambda folder: change_config(folder, lambda c: c["quantization_config"]["affinequant"].update(version=3)),
        r"version 3, written by affinequant .*; this is affinequant .*, which reads versions 1 and 2",
    ),
    "no version": (
        lambda folder: change_config(folder, lambda c: c["quantization_config"]["affinequant"].pop("version")),
        "version None",
    ),
    "no clip": (
        lambda folder: change_config(
            folder, lambda c: c["quantization_config"]["affinequant"]["input_clip"].pop(Q_PROJ)
        ),
        rf"{Q_PROJ} has no entry",
    ),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json"),
    "no scale": (
        lambda folder: change_tensors(folder, lambda t: t.pop(f"{Q_PROJ}.weight_scale")),
        rf"{Q_PROJ}\.weight_scale is missing",
    ),
    "no zero point": (
        lambda folder: change_tensors(folder, lambda t: t.pop(f"{Q_PROJ}.weight_zero_point")),
        r"weight_zero_point is missing",
    ),
    "no norm": (
        lambda folder: change_tensors(folder, lambda t: t.pop("model.norm.weight")),
        r"model\.norm\.weight is missing",
    ),
    "NaN scale": (
        lambda folder: change_tensors(folder, lambda t: t[f"{Q_PROJ}.weight_scale"].fill_(float("nan"))),
        rf"{Q_PROJ}.*finite",
    ),
    "infinite norm": (
        lambda folder: change_tensors(folder, lambda t: t["model.norm.weight"].fill_(float("inf"))),
        r"model\.norm\.weight.*finite",
    ),
    "wrong size": (
        lambda folder: change_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        r"size \(3,\) where config\.json says \(64,\)",
    ),
    "wrong scale size": (
        lambda folder: change_tensors(folder, lambda t: t.update({f"{Q_PROJ}.weight_scale": torch.ones(64, 2)})),
        r"size \(64, 2\) where \(64, 1\) was expected",
    ),
    "cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000]),
        r"model\.safetensors is cut short",
    ),
    "no shard": (lambda folder: (folder / "model.safetensors").unlink(), r"no weights"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused(tiny: Tiny, write: Callable[..., Path], case: str) -> None:
    folder = write(tiny(), "w4a4")
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(AffineQuantError, match=message) as caught:
        load(folder)
    assert caught.value.where and caught.value.fix


@pytest.mark.parametrize("case", ["no norm", "infinite norm", "cut short", "no shard", "not JSON", "no config"])
def test_a_broken_plain_folder_is_refused(tiny_copy: Tiny, case: str) -> None:
    folder = tiny_copy()
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(AffineQuantError, match=message.replace(" is missing", "").replace(r"\.weight", "")):
        load(folder)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AffineQuantError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_code_in_the_folder_is_not_run(tiny_copy: Tiny, tmp_path: Path) -> None:
    folder, trace = tiny_copy(), tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    change_config(
        folder, lambda c: c.update(model_type="evil", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    )
    with pytest.raises(AffineQuantError):
        load(folder)
    assert not trace.exists()


# Transforms that stay online


@pytest.fixture
def online(tiny: Tiny, tmp_path: Path) -> Path:
    import affinequant

    (tmp_path / "text.txt").write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(2500)))
    fields = {"samples": 4, "seq_len": 32, "data": tmp_path / "text.txt", "out": tmp_path / "online"}
    return affinequant.quantize(tiny(), preset="fast", tier="online", **fields).path


def test_an_online_checkpoint_generates_and_keeps_its_matrices_whole(online: Path) -> None:
    model: Any = load(online, dtype="bfloat16")
    assert model.generate(IDS[:1, :8], max_new_tokens=4, do_sample=False, pad_token_id=1).shape == (1, 12)
    left = model.model.layers[0].mlp.down_proj.parts[0].matrix_0
    stored = load_file(online / "affinequant.safetensors")["model.layers.0.mlp.down_proj.online_left"]
    assert stored.dtype == torch.float32 and left.dtype in (torch.float32, torch.bfloat16)


def test_without_its_transforms_it_is_another_model(online: Path, tmp_path: Path) -> None:
    whole = logits(load(online))
    file = online / "affinequant.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "online_" not in name}, file)
    assert (logits(load(online)) - whole).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.down_proj.online_left"), "down_proj: expected left and right"),
        (lambda t: t.update({"model.layers.1.mlp.down_proj.online_left": torch.eye(4)}), "matrices for 128 features"),
        (lambda t: t["model.layers.1.mlp.down_proj.online_left"].fill_(float("nan")), "not finite"),
    ],
)
def test_a_broken_transform_is_refused(online: Path, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    file = online / "affinequant.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(AffineQuantError, match=message):
        load(online)

"""Experts by their names on disk: the same model as transformers' own, whatever it stacks and renames."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import affinequant
from affinequant.errors import AffineQuantError
from affinequant.models import FAMILIES, resolve, resolve_sites
from affinequant.models.decoder import open_decoder, run_block
from affinequant.models.experts import split_experts
from affinequant.models.source import check_tensors, open_source, read_through, settle
from affinequant.transforms.fold import fold
from tests.test_equivalence import TOLERANCE, KeepDouble, randomised
from tests.tiny import tiny_llama

Tiny = Callable[..., Path]
MIXTURES = [name for name, family in FAMILIES.items() if any(layer.experts for layer in family.layers.values())]
IDS = torch.randint(2, 320, (2, 24), generator=torch.Generator().manual_seed(0))


def stock(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """As transformers reads the folder, with its own stacked experts."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", MIXTURES)
def test_split_experts_compute_what_the_stacked_ones_do(family: str, tiny: Tiny) -> None:
    """On the names of the files, whose tensors are all taken and all there."""
    folder = tiny(family=family)
    model = stock(folder)
    expected, names = logits(model), set(load_file(folder / "model.safetensors"))
    ours = split_experts(model, FAMILIES[family])
    assert set(ours.state_dict()) == names
    torch.testing.assert_close(logits(ours), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits(split_experts(ours, FAMILIES[family])), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # what is compared is there to be seen
        next(value for name, value in ours.named_parameters() if ".experts.1." in name).zero_()
    assert float((logits(ours) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("family", MIXTURES)
def test_block_by_block_equals_the_model(family: str, tiny: Tiny) -> None:
    source = open_source(tiny(family=family))
    known, dims = resolve(source.config, where="")
    check_tensors(source, known, dims)
    decoder = open_decoder(source, known, dims, torch.device("cpu"), torch.float32)
    state = {name: tensor.float() for name, tensor in source.read(source.entries).items()}
    assert decoder.unknown(state) == []
    x, kwargs = decoder.embed(IDS, state)
    for index in range(dims.layers):
        prefix = f"model.layers.{index}."
        part = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        x = run_block(decoder.block(index), known.at(dims, index), part, x, kwargs[index])
    torch.testing.assert_close(decoder.logits(x, decoder.head(state)), logits(stock(source.folder, torch.float32)))
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


@pytest.mark.parametrize("family", MIXTURES)
def test_gradients_reach_every_expert_that_was_asked(family: str, tiny: Tiny) -> None:
    model = split_experts(stock(tiny(family=family)), FAMILIES[family]).requires_grad_(True)
    model(IDS, use_cache=False).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_expert_has_linears_and_a_site_of_its_own_and_all_read_one(tiny: Tiny) -> None:
    family, dims = resolve(open_source(tiny(family="qwen2_moe")).config, where="")
    names = [linear.name for linear in family.linears]
    assert len(names) == 4 + 3 + 3 * dims.experts and not any("*" in name for name in names)
    sites = {site.name: site for site in resolve_sites(family, dims)}
    mids = [name for name in sites if name.startswith("mlp_mid")]
    assert mids == ["mlp_mid.shared", *(f"mlp_mid.{number}" for number in range(dims.experts))]
    assert [edge.module for edge in sites["mlp_mid.2"].sinks] == ["mlp.experts.2.down_proj"]
    assert (sites["mlp_mid.2"].width, sites["mlp_mid.shared"].width) == (dims.expert, dims.shared) == (32, 48)
    assert {edge.module for edge in sites["mlp_in"].sinks} == {
        *("mlp.gate", "mlp.shared_expert_gate", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        *(f"mlp.experts.{number}.{part}_proj" for number in range(dims.experts) for part in ("gate", "up")),
    }
    assert [name for name in family.left_alone(dims) if ".0." in name] == [
        "model.layers.0.mlp.shared_expert_gate",
        "model.layers.0.mlp.gate",
    ]


@pytest.mark.parametrize(
    ("settings", "dense"),
    [({}, []), ({"mlp_only_layers": [0, 2]}, [0, 2]), ({"decoder_sparse_step": 2}, [0, 2]), ({"num_experts": 8}, [])],
    ids=str,
)
def test_which_blocks_are_dense_is_read_from_the_config(settings: dict[str, Any], dense: list[int]) -> None:
    from transformers import Qwen3MoeConfig

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    config = Qwen3MoeConfig(
        **sizes, num_hidden_layers=4, vocab_size=96, **{"num_experts": 4, "num_experts_per_tok": 2, **settings}
    ).to_dict()
    config |= {"architectures": ["Qwen3MoeForCausalLM"]}
    family, dims = resolve(config, where="")
    assert [index for index, kinds in enumerate(dims.kinds) if "mlp" in kinds] == dense
    assert ("mlp" in family.layers) == bool(dense) and dims.experts == settings.get("num_experts", 4)
    published = {**config, "num_experts": config["num_local_experts"], "num_local_experts": None}
    assert resolve(published, where="") == (family, dims)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_local_experts": 0}, "num_local_experts = 0"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5 of 4 experts"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers"),
        ({"moe_intermediate_size": "wide"}, "moe_intermediate_size = 'wide'"),
        ({"num_local_experts": None}, "num_experts = None"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused_by_its_key(settings: dict[str, Any], words: str, tiny: Tiny) -> None:
    config = dict(open_source(tiny(family="qwen3_moe")).config)
    with pytest.raises(AffineQuantError, match=words) as caught:
        resolve(config | settings, where="")
    assert caught.value.exit_code == 3


def test_a_window_that_is_not_used_may_be_anything(tiny: Tiny) -> None:
    """transformers writes 0 for it."""
    config = dict(open_source(tiny(family="qwen2_moe")).config)
    assert config["sliding_window"] == 0 and resolve(config, where="")
    with pytest.raises(AffineQuantError, match="sliding_window = 0"):
        resolve(config | {"use_sliding_window": True}, where="")


@pytest.mark.parametrize("family", [name for name in MIXTURES if name != "mixtral"])
def test_experts_that_lie_stacked_are_the_same_as_those_apart(family: str, tiny: Tiny, tmp_path: Path) -> None:
    """As transformers saves them when it is not asked for the published form, and Qwen3.5's mixtures are published."""
    stock(tiny(family=family), torch.bfloat16).save_pretrained(tmp_path, save_original_format=False)
    apart, source = open_source(tiny(family=family)), open_source(tmp_path)
    assert any(name.endswith(".experts.gate_up_proj") for name in source.entries)
    source, dims = settle(source, *resolve(source.config, where=""))
    check_tensors(source, *resolve(source.config, where=""))
    assert dims.experts == 4 and read_through(source)["weights"] == read_through(apart)["weights"]
    name = next(name for name in apart.entries if name.endswith("experts.2.up_proj.weight"))
    entry, (there,) = source.entries[name], source.read([name]).values()
    with (tmp_path / entry.file).open("rb") as file:
        file.seek(entry.start)
        assert file.read(entry.size) == there.contiguous().view(torch.uint8).numpy().tobytes()


def test_stacked_experts_under_other_names_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    stock(tiny(family="mixtral"), torch.bfloat16).save_pretrained(tmp_path, save_original_format=False)
    source = open_source(tmp_path)
    known, dims = resolve(source.config, where="")
    with pytest.raises(AffineQuantError, match=r"experts\.down_proj holds all experts of a layer in one") as caught:
        check_tensors(settle(source, known, dims)[0], known, dims)
    assert caught.value.exit_code == 3 and "save_original_format" in caught.value.fix


def test_a_router_of_another_size_is_refused_before_anything_runs(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, family="mixtral")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.gate.weight"
    save_file(stored | {name: stored[name][:3].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(folder)
    known, dims = resolve(source.config, where="")
    with pytest.raises(AffineQuantError, match=rf"{name} has shape \[3, 64\]"):
        open_decoder(source, known, dims, torch.device("cpu"), torch.float32)


NEAREST = {"preset": "fast", "rounding": "nearest", "weight_clip": "none", "activation_clip": "none"}


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize(("scheme", "tier"), [("w4a16", "merged"), ("w4a4", "online")])
def test_rounded_to_nearest_from_folder_to_folder(
    family: str, scheme: str, tier: str, tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(1500)))
    fields = {"samples": 4, "seq_len": 32, "data": tmp_path / "text.txt", "out": tmp_path / "out", **NEAREST}
    made = affinequant.quantize(tiny(family=family), scheme=scheme, tier=tier, **fields)
    assert made.report["verified"]["passed"]
    stored = {name.rpartition(".")[0] for name in open_source(made.path).entries}
    assert {name.rpartition(".")[0] for name in open_source(tiny(family=family)).entries} <= stored


@pytest.mark.parametrize("family", MIXTURES)
def test_what_acts_at_run_time_does_not_reach_the_router(family: str, tiny: Tiny) -> None:
    source = open_source(tiny(family=family))
    known, dims = resolve(source.config, where="")
    decoder = open_decoder(source, known, dims, torch.device("cpu"), torch.float64)
    prefix, block = f"{known.blocks}.0.", known.at(dims, 0)
    state = {name: tensor.double() for name, tensor in source.read(source.entries).items()}
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    x, kwargs = decoder.embed(torch.randint(2, 320, (2, 24), generator=torch.Generator().manual_seed(0)), state)
    sites = {site.name: site for site in resolve_sites(block, dims)}
    acting = {name: randomised("kronecker", sites[name], 3) for name in ("mlp_in", "mlp_mid.1")}
    after = dict(tensors)
    for name, transform in acting.items():
        after = fold(after, sites[name], transform, online=True)
    routers = {edge.module for edge in sites["mlp_in"].sinks if edge.plain}
    assert routers and all(torch.equal(after[f"{name}.weight"], tensors[f"{name}.weight"]) for name in routers)

    def on_input(site: str, value: Tensor) -> Tensor:
        return acting[site].on_activations(value) if site in acting else value

    with KeepDouble(), torch.no_grad():
        expected = run_block(decoder.block(0), block, tensors, x, kwargs[0])
        found = run_block(decoder.block(0), block, after, x, kwargs[0], on_input)
        bare = run_block(decoder.block(0), block, after, x, kwargs[0])
    assert float((found - expected).abs().max()) < TOLERANCE < 1e-4 < float((bare - expected).abs().max())

"""The plugin for vLLM on a CPU: the integers of `affinequant.load`, layer by layer and end to end, and what it refuses."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import affinequant
from affinequant.serve.families import PROVEN
from tests.tiny import OWN

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

PROMPTS, LENGTH, NEW = 64, 12, 8


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """made(scheme=..., tier=..., **recipe): a checkpoint of a tiny model whose heads vLLM takes, written once."""
    folder = tmp_path_factory.mktemp("made")
    text = folder / "text.txt"
    text.write_text(" ".join(f"{i} red foxes and {i % 7} hens" for i in range(2000)))

    def make(*, bias: bool = False, family: str = "llama", **recipe: Any) -> Path:
        out = folder / "-".join(str(value) for value in (family, bias, *recipe.values())).replace("/", "_")[:80]
        if not out.exists():
            wide = {"head_dim": 32} if "head_dim" in OWN.get(family, {}) else {}  # vLLM knows no narrower heads
            tied = family.startswith("gemma")
            source = tiny(hidden=128, heads=4, kv_heads=2, mlp=256, bias=bias, family=family, tied=tied, **wide)
            settings = {"preset": "fast", "samples": 4, "seq_len": 32, "data": text} | recipe
            affinequant.quantize(source, out=out, **settings)
        return out

    return make


@contextmanager
def engine(folder: Path, *, dtype: str = "float32", eager: bool = True, **settings: Any) -> Iterator[Any]:
    """A vLLM engine with our plugin in this process, gone afterwards."""
    from vllm import LLM

    from affinequant.serve import register_vllm

    register_vllm()  # in vain if the package is installed, as its entry point did this already
    llm = LLM(
        model=str(folder),
        dtype=dtype,
        max_model_len=64,
        enforce_eager=eager,
        max_logprobs=1,
        gpu_memory_utilization=0.3,
        disable_log_stats=True,
        **settings,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()  # now, or a late collection takes away the next engine's groups
        del llm
        gc.collect()


def blocks_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.get_model().model.layers


def prompts() -> list[list[int]]:
    return torch.randint(3, 300, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()


def served(llm: Any) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens, and the log-probability of every prompt token but the first, [PROMPTS, LENGTH - 1]."""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=NEW, temperature=0, prompt_logprobs=0, ignore_eos=True)
    results = llm.generate([{"prompt_token_ids": ids} for ids in prompts()], settings, use_tqdm=False)
    logprobs = [
        [entry[token].logprob for token, entry in zip(ids[1:], result.prompt_logprobs[1:], strict=True)]
        for ids, result in zip(prompts(), results, strict=True)
    ]
    return [list(result.outputs[0].token_ids) for result in results], torch.tensor(logprobs)


def loaded(folder: Path) -> tuple[list[list[int]], torch.Tensor]:
    """The same by `affinequant.load`."""
    model: Any = affinequant.load(folder, device="cpu", dtype="float32")
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts())
    with torch.no_grad():
        logprobs = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return tokens[:, LENGTH:].tolist(), logprobs


def assert_same(folder: Path, got: tuple[list[list[int]], torch.Tensor]) -> None:
    """Equal but for single roundings: a norm or an attention that differs in its last bit (1e-7) may put a value on the
    other side of a half, and then that token's numbers jump. Of some thousand values a token that happens to one in a
    hundred tokens on a grid of 256 steps, and hardly ever on 16. A wrong function would differ nearly everywhere."""
    (tokens, logprobs), (wanted_tokens, wanted) = got, loaded(folder)
    far = (logprobs - wanted).abs() > 1e-4
    assert float(far.float().mean()) <= 0.05, f"{int(far.sum())} of {far.numel()} log-probabilities differ"
    same = sum(mine == theirs for mine, theirs in zip(tokens, wanted_tokens, strict=True))
    assert same >= PROMPTS - 2, f"{same} of {PROMPTS} continuations agree"


CASES = [
    {"scheme": "w4a4", "tier": "merged"},
    {"scheme": "w4a4", "tier": "online"},
    {"scheme": "w4a8", "tier": "online", "bias": True},
    {"scheme": "w4a4-g32-ag32-sym", "tier": "merged"},
    {"scheme": "w4a16-g32", "tier": "online"},
    {"scheme": "w8a8", "tier": "online", "activation_clip": "none"},
    {"scheme": "w4a4", "tier": "online", "family": "qwen2"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_the_engine_computes_what_load_computes(case: dict[str, Any], made: Callable[..., Path]) -> None:
    folder = made(**case)
    with engine(folder) as llm:
        block, x = blocks_of(llm)[0], torch.randn(7, 128, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            fused = {"qkv": block.self_attn.qkv_proj(x)[0], "gate_up": block.mlp.gate_up_proj(x)[0]}
            plain = block.mlp.down_proj(x.repeat(1, 2))[0]
            # What rounds its inputs is not additive; what reads 16 bits is, to a millionth.
            integers = block.mlp.down_proj.integers
            one, other = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(2))
            whole = integers(one + other)
            apart = whole + integers(torch.zeros_like(one)) - integers(one) - integers(other)
        got = served(llm)
    model: Any = affinequant.load(folder, device="cpu", dtype="float32")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    with torch.no_grad():
        assert torch.equal(fused["qkv"], torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1))
        assert torch.equal(fused["gate_up"], torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], -1))
        assert torch.equal(plain, mlp.down_proj(x.repeat(1, 2)))
    # Activations are quantised for real, which stock vLLM does not do: it leaves them in 16 bits.
    share = float(apart.norm() / whole.norm())
    assert share > 0.01 or not case["scheme"].startswith("w4a4")
    assert share < 1e-4 or not case["scheme"].startswith("w4a16")
    assert_same(folder, got)


@pytest.mark.parametrize(
    "family", [name for name in PROVEN if name not in {case.get("family", "llama") for case in CASES}]
)
def test_the_engine_computes_other_families_too(family: str, made: Callable[..., Path]) -> None:
    folder = made(scheme="w4a4", tier="online", family=family)
    with engine(folder) as llm:
        got = served(llm)
    assert_same(folder, got)


ADAPTED = ("self_attn.v_proj", "mlp.down_proj")  # one of a fused layer, one that stands alone


def adapter(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """Write an adapter (LoRA) of rank 8; linear to what it adds to the weight."""
    model: Any = affinequant.load(folder, device="cpu", dtype="float32")
    generator, tensors, added = torch.Generator().manual_seed(3), {}, {}
    for layer in range(2):
        for name in (f"model.layers.{layer}.{linear}" for linear in ADAPTED):
            linear = model.get_submodule(name)
            down = 0.05 * torch.randn(8, linear.in_features, generator=generator)
            up = 0.05 * torch.randn(linear.out_features, 8, generator=generator)
            tensors |= {f"base_model.model.{name}.lora_{part}.weight": one for part, one in (("A", down), ("B", up))}
            added[name] = 2 * up @ down
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "task_type": "CAUSAL_LM"}
    config |= {"target_modules": [name.rpartition(".")[2] for name in ADAPTED]}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return added


def next_tokens(llm: Any, **given: Any) -> list[tuple[int, float]]:
    """The likeliest next token of each prompt, and its log-probability. (vLLM gives none of a prompt beside an adapter.)"""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=1, temperature=0, logprobs=0)
    results = llm.generate([{"prompt_token_ids": ids} for ids in prompts()], settings, use_tqdm=False, **given)
    return [(token, entry.logprob) for result in results for token, entry in result.outputs[0].logprobs[0].items()]


def test_adapters_act_beside_the_integers_and_weights_are_not_reloaded(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.request import LoRARequest

    from affinequant.serve import vllm_plugin

    said: list[str] = []
    monkeypatch.setattr(vllm_plugin._log, "warning_once", lambda text, *parts: said.append(text % parts))
    folder = made(scheme="w4a4", tier="merged")
    added, model = adapter(folder, tmp_path / "adapter"), affinequant.load(folder, device="cpu", dtype="float32")
    with engine(folder, enable_lora=True, max_lora_rank=8) as llm:
        got = [next_tokens(llm), next_tokens(llm, lora_request=LoRARequest("one", 1, str(tmp_path / "adapter")))]
        with pytest.raises(Exception, match=r"cannot be loaded again into a running engine \(reload_weights\)"):
            llm.collective_rpc("reload_weights")
    for adapted, found in enumerate(got):
        for name, weight in added.items() if adapted else ():
            model.get_submodule(name).register_forward_hook(
                lambda _, given, result, weight=weight: result + given[0] @ weight.T
            )
        with torch.no_grad():
            wanted, tokens = model(torch.tensor(prompts())).logits[:, -1].log_softmax(-1).max(-1)
        same = [
            token == other and abs(logprob - value) < 1e-4
            for (token, logprob), other, value in zip(found, tokens.tolist(), wanted.tolist(), strict=True)
        ]
        assert sum(same) >= PROMPTS - 8, f"adapter: {bool(adapted)}; {sum(same)} of {PROMPTS} agree"
    assert sum(abs(one[1] - other[1]) > 1e-3 for one, other in zip(*got, strict=True)) > PROMPTS // 2
    assert said and all("folded" in line and "attn_in" in line and "LoRA" in line for line in said)


def test_small_scales_survive_in_float16(made: Callable[..., Path], tmp_path: Path) -> None:
    """Numbers below 6e-5 lose digits in float16, below 6e-8 all of them."""
    folder = broken(made, tmp_path, lambda tensors, config: [
        tensor.mul_(2.0**-20) for name, tensor in tensors.items() if name.endswith("down_proj.weight_scale")
    ])  # fmt: skip
    with engine(folder, dtype="float16") as llm:
        block = blocks_of(llm)[0]
        weight = block.mlp.down_proj.integers.parts[0].weight()
        activations = block.mlp.gate_up_proj(torch.randn(3, 128, dtype=torch.float16))[0]
    model: Any = affinequant.load(folder, device="cpu", dtype="float32")
    wanted = model.model.layers[0].mlp.down_proj.parts[0].weight()
    assert activations.dtype == torch.float16 and weight.scale.dtype == torch.float32
    assert torch.equal(weight.scale, wanted.scale) and 0 < float(weight.scale.max()) < 6e-5


def test_unpacking_needs_a_byte_for_each_code_and_little_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressed_tensors import compressors

    from affinequant.formats import packing

    codes = torch.randint(-8, 8, (37, 43), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed, unpack, sizes = compressors.pack_to_int32(codes, 4), compressors.unpack_from_int32, []

    def watched(value: torch.Tensor, bits: int, shape: torch.Size) -> torch.Tensor:
        sizes.append(shape.numel())
        return unpack(value, bits, shape)

    monkeypatch.setattr(compressors, "unpack_from_int32", watched)
    monkeypatch.setattr(packing, "_UNPACKED", 5 * 43 + 1)
    assert torch.equal(packing.unpack(packed, 4, 43), codes)
    assert sizes == [5 * 43] * 7 + [2 * 43]
    monkeypatch.setattr(packing, "_UNPACKED", 1)
    assert torch.equal(packing.unpack(packed, 4, 43), codes) and max(sizes[8:]) == 43


def test_experts_are_refused_by_name() -> None:
    from affinequant.formats import VERSION
    from affinequant.serve.vllm_plugin import AffineQuantConfig

    numbers = {"bits": 4, "symmetric": False, "granularity": "channel", "group_size": None}
    ours = {"version": VERSION, "scheme": "w4a4", "weight": numbers, "activation": None, "input_clip": {}}
    config = AffineQuantConfig({"quant_method": "compressed-tensors", "affinequant": ours, "ignore": ["a.mlp.experts"]})
    for name in ("RoutedExperts", "FusedMoE"):
        layer = type("Derived", (type(name, (torch.nn.Module,), {}),), {})()
        with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.experts: .* does not run layers of experts"):
            config.get_quant_method(layer, "model.layers.3.mlp.experts")
        assert config.get_quant_method(layer, "a.mlp.experts") is None  # left as it is in the checkpoint
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


def test_a_quantised_cache_stays_in_16_bits_there_and_the_log_says_so(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM has no such cache. Without it the rotation of queries and keys changes nothing, so vLLM leaves it out."""
    from affinequant.serve import vllm_plugin

    said: list[Any] = []
    monkeypatch.setattr(vllm_plugin._log, "warning", lambda text, *parts: said.append(text % parts))
    folder = Path(shutil.copytree(made(scheme="w4a4kv4", tier="online"), tmp_path / "folder"))
    assert any(".self_attn.online_" in name for name in load_file(folder / "affinequant.safetensors"))
    with engine(folder) as llm:
        got = served(llm)
    assert any("w4a4kv4 asks for a KV cache in 4 bits, vLLM keeps its own" in line for line in said)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["affinequant"]["kv"] |= {"kept_first": 4, "kept_latest": 32}
    vllm_plugin.AffineQuantConfig.from_config(config["quantization_config"])
    assert "4 bits, the latest 32 tokens in 16; vLLM keeps its own" in said[-1]
    config["quantization_config"]["affinequant"]["kv"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(folder, got)


def test_compiled_it_is_the_same_and_a_changed_checkpoint_is_noticed(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clips of a checkpoint become constants of compiled code: another checkpoint in its place must not run them."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(made(scheme="w4a4", tier="online"), tmp_path / "folder"))
    for changed in (False, True):
        if changed:
            config = json.loads((folder / "config.json").read_text())
            clips = config["quantization_config"]["affinequant"]["input_clip"]
            clips.update(dict.fromkeys(clips, 0.5))
            (folder / "config.json").write_text(json.dumps(config))
        with engine(folder, eager=False) as llm:
            got = served(llm)
        assert_same(folder, got)


def broken(made: Callable[..., Path], tmp_path: Path, change: Callable[[dict, dict], None]) -> Path:
    """A copy of an online checkpoint whose tensors and config `change` has changed."""
    folder = Path(shutil.copytree(made(scheme="w4a4", tier="online"), tmp_path / "broken"))
    tensors, config = load_file(folder / "affinequant.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"]["affinequant"])
    save_file(tensors, folder / "affinequant.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


BLOCK = "model.layers.1."
FAULTS: dict[str, tuple[Callable[[dict, dict], Any], str]] = {
    "a scale that is missing": (lambda t, c: t.pop(BLOCK + "mlp.up_proj.weight_scale"), "lacks weight_scale of"),
    "codes that are missing": (lambda t, c: t.pop(BLOCK + "self_attn.o_proj.weight_packed"), "lacks weight_packed of"),
    "a scale that is not finite": (
        lambda t, c: t[BLOCK + "mlp.up_proj.weight_scale"].fill_(float("nan")),
        "gate_up_proj: scale: expected finite values",
    ),
    "a transform that is not finite": (
        lambda t, c: t[BLOCK + "mlp.down_proj.online_left"].fill_(float("inf")),
        "down_proj: a transform holds values that are not finite",
    ),
    "members with different transforms": (
        lambda t, c: t[BLOCK + "self_attn.k_proj.online_left"].mul_(1.5),
        "members of a fused layer have different transforms",
    ),
    "members with different clips": (
        lambda t, c: c["input_clip"].update({BLOCK + "self_attn.k_proj": 0.5}),
        "need one input_clip",
    ),
    "another version": (lambda t, c: c.update(version=99), "a checkpoint of version 99"),
    "no list of transforms": (lambda t, c: c.pop("online"), "does not list the transforms"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_refused(fault: str, made: Callable[..., Path], tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    folder = broken(made, tmp_path, change)
    with pytest.raises((ValueError, RuntimeError), match=message), engine(folder):
        pass


def test_another_plugin_of_that_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import quantization

    from affinequant.serve import register_vllm

    register_vllm()
    register_vllm()  # vLLM may call it more than once
    held = dict(quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG) | {"affinequant": int}
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", held)
    with pytest.raises(RuntimeError, match="already builtins's"):
        register_vllm()


@pytest.mark.parametrize(("version", "warned"), [("0.32.0", 0), ("0.32.0+cpu", 0), ("0.31.2", 1), ("1.0.0", 1)])
def test_an_untested_vllm_is_warned_about(version: str, warned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from affinequant.serve import vllm_plugin

    said: list[Any] = []
    monkeypatch.setattr(vllm_plugin._log, "warning", lambda *parts: said.append(parts))
    vllm_plugin.warn_if_untested(version)
    assert len(said) == warned


def test_stock_checkpoints_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from affinequant.serve import vllm_plugin
    from affinequant.serve.vllm_plugin import AffineQuantConfig

    said: list[str] = []
    monkeypatch.setattr(vllm_plugin._log, "warning_once", lambda text, *parts: said.append(text % parts))

    override = AffineQuantConfig.override_quantization_method
    declared = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"input_activations": None}}}
    assert override(declared, None) is None
    assert override(declared | {"affinequant": {"activation": None}}, None) is None
    ours = declared | {"affinequant": {"activation": {"bits": 4}, "scheme": "w4a4"}}
    assert override(ours, None, hf_config=None) == "affinequant"
    assert said == []
    assert override(ours, "compressed-tensors") is None
    assert len(said) == 1 and "--quantization compressed-tensors activations stay in 16 bits" in said[0]
    full = ours | {"config_groups": {"group_0": {"input_activations": {"num_bits": 8}}}}
    assert override(full, None) is None

"""Which config.json is understood, with what sizes, and which are refused by name."""

from importlib.util import find_spec
from typing import Any

import pytest

from affinequant.errors import AffineQuantError
from affinequant.models import FAMILIES, LLAMA, Dims, context_length, resolve

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
}


def refused(changes: dict[str, Any]) -> AffineQuantError:
    with pytest.raises(AffineQuantError) as caught:
        resolve({key: value for key, value in (CONFIG | changes).items() if value != "absent"}, where="config.json")
    assert caught.value.exit_code == 3 and caught.value.where == "config.json"
    return caught.value


def test_sizes_and_their_defaults() -> None:
    family, dims = resolve(CONFIG, where="here")
    assert family is LLAMA
    assert dims == Dims(layers=2, hidden=64, mlp=128, heads=4, kv_heads=4, head_dim=16, vocab=320, tied=False)
    explicit = CONFIG | {"num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True}
    dims = resolve(explicit, where="here")[1]
    assert (dims.kv_heads, dims.head_dim, dims.query, dims.value, dims.tied) == (2, 24, 96, 48, True)
    nothing = CONFIG | {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None}
    assert resolve(nothing, where="here")[1].kv_heads == 4


@pytest.mark.parametrize("rope", [{"rope_type": "llama3", "factor": 8.0}, {"rope_type": "default", "rope_theta": 1e6}])
def test_scaled_rotary_embeddings_are_the_same_algebra(rope: dict[str, Any]) -> None:
    assert resolve(CONFIG | {"rope_parameters": rope}, where="here")[0] is LLAMA


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "DeepseekV3ForCausalLM", "DbrxForCausalLM"])
def test_an_unknown_architecture_is_named_with_those_that_are_known(name: str) -> None:
    error = refused({"architectures": [name]})
    assert name in error.what and "LlamaForCausalLM" in error.fix


@pytest.mark.parametrize("names", ["absent", None, []])
def test_a_config_without_an_architecture(names: Any) -> None:
    assert "model_type 'llama'" in refused({"architectures": names}).what


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", None])
def test_a_quantised_model_is_refused(method: str | None) -> None:
    declared = {"bits": 4} | ({"quant_method": method} if method else {})
    error = refused({"quantization_config": declared})
    assert "quantised already" in error.what and (method or "unknown") in error.what and "16-bit" in error.fix


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_act": "swiglu_oai"}, "hidden_act = 'swiglu_oai'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor = 0.25"),
        ({"hidden_size": "absent"}, "hidden_size = None"),
        ({"hidden_size": "64"}, "hidden_size = '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"intermediate_size": 128.0}, "intermediate_size = 128.0"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6 query heads cannot share 4 KV heads"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(changes: dict[str, Any], what: str) -> None:
    assert what in refused(changes).what


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_a_family_is_complete(family) -> None:
    import transformers

    assert FAMILIES[family.name] is family
    assert all(hasattr(transformers, name) for name in family.architectures)
    assert family.rope in ("half", "interleaved")
    assert {spec.kind for spec in family.sites} >= {"residual", "norm"}
    assert family.site("residual").name == "residual"
    assert find_spec(f"affinequant.models.{family.name}"), "the file that a refusal says to start from"


WRONG_TYPES: dict[str, list[Any]] = {
    "architectures": ["LlamaForCausalLM", [3], {"a": 1}],
    "quantization_config": ["gptq", ["gptq"], 4],
    "rope_parameters": ["llama3", [1], 3, {"rope_type": 5}, {"rope_theta": "1e4"}, {"factor": [8]}],
    "rope_scaling": ["dynamic", {"factor": "2"}],
    "tie_word_embeddings": ["false", 0, []],
    "attention_bias": ["false", 1],
    "hidden_act": [["silu"], 3],
    "rms_norm_eps": ["1e-5", [1e-5], True, -1.0],
    "rope_theta": ["10000", [1.0]],
    "max_position_embeddings": ["2048", 2048.0, 0, [1]],
    "auto_map": ["x", []],
    "eos_token_id": ["2", [1, "2"], 1.5],
    "hidden_size": ["64", 64.0, [64], True, 0, {}],
    "num_key_value_heads": ["2", -1],
    "vocab_size": ["320", [320]],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG_TYPES.items() for value in values], ids=repr
)
def test_a_key_of_a_wrong_type_is_named_with_what_it_must_be(key: str, value: Any) -> None:
    with pytest.raises(AffineQuantError) as caught:
        resolve(CONFIG | {key: value}, where="config.json")
    assert caught.value.exit_code == 3
    assert key in caught.value.what and f"config.json must give {key}" in caught.value.fix


def test_null_is_absent() -> None:
    optional = dict.fromkeys([key for key in WRONG_TYPES if key not in CONFIG])
    assert resolve(CONFIG | optional, where="config.json") == resolve(CONFIG, where="config.json")


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
    ],
)
def test_the_context_that_a_config_gives(config: dict[str, Any], longest: int | None) -> None:
    assert context_length(config) == longest

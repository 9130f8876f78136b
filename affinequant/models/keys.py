"""The keys of a config.json that are read here, and what each must hold: told before anything is computed from them."""

from collections.abc import Callable, Mapping
from typing import Any

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.models.multimodal import text_config


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_ids(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, int) and not isinstance(item, bool) for item in items)


def _is_indices(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


Check = Callable[[Any], bool]
_COUNT: tuple[Check, str] = (_is_count, "a positive whole number")
_NUMBER: tuple[Check, str] = (_is_number, "a positive number")
_FLAG: tuple[Check, str] = (_is_flag, "true or false")
_TEXT: tuple[Check, str] = (_is_text, "a string")
_TABLE: tuple[Check, str] = (_is_table, "a table")
_IDS: tuple[Check, str] = (_is_ids, "a token's number, or a list of them")

KEYS: dict[str, tuple[Check, str]] = {
    "architectures": (_is_names, "a list of names"),
    "model_type": _TEXT,
    "quantization_config": _TABLE,
    "auto_map": _TABLE,
    "text_config": _TABLE,
    "rope_parameters": _TABLE,
    "rope_scaling": _TABLE,
    "tie_word_embeddings": _FLAG,
    "attention_bias": _FLAG,
    "mlp_bias": _FLAG,
    "hidden_act": _TEXT,
    "use_sliding_window": _FLAG,
    "sliding_window": _COUNT,
    "mlp_only_layers": (_is_indices, "a list of the numbers of blocks"),
    "decoder_sparse_step": _COUNT,
    "num_experts_per_tok": _COUNT,
    "norm_topk_prob": _FLAG,
    "qkv_bias": _FLAG,
    "layer_types": (_is_names, "a list of names"),
    "partial_rotary_factor": _NUMBER,
    "rms_norm_eps": _NUMBER,
    "rope_theta": _NUMBER,
    "max_position_embeddings": _COUNT,
    "bos_token_id": _IDS,
    "eos_token_id": _IDS,
    "pad_token_id": _IDS,
}
"""By key: whether a value will do, and in words what it must be. Null and absent are the same."""
ROPE_KEYS: dict[str, tuple[Check, str]] = {
    **{key: _TEXT for key in ("rope_type", "type")},
    **{key: _NUMBER for key in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor")},
    "partial_rotary_factor": _NUMBER,
    "original_max_position_embeddings": _COUNT,
}
"""The same inside `rope_parameters` and `rope_scaling`."""
SIZES = (
    *("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size"),
    *("num_key_value_heads", "head_dim"),
    *("num_experts", "num_local_experts", "moe_intermediate_size", "shared_expert_intermediate_size"),
)


def check_keys(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config.json whose values are of a kind that nothing could be computed from.

    Raises:
        AffineQuantError: naming the key, its value and what it must be (exit 3).
    """
    known = KEYS | dict.fromkeys(SIZES, _COUNT)
    if (inner := text_config(config)) is not config:
        check_keys(inner, where)
    if config.get("use_sliding_window") is False:  # whatever the window is then, transformers itself writes 0
        known.pop("sliding_window")
    _check(config, known, "", where)
    for name in ("rope_parameters", "rope_scaling"):
        _check(config.get(name) or {}, ROPE_KEYS, f"{name}.", where)


def context_length(config: Mapping[str, Any]) -> int | None:
    """The longest text that the model was made for, in tokens; None where its config says nothing.

    Stretched rotary positions count in full, where `max_position_embeddings` keeps the length before.
    """
    config = text_config(config)
    longest: Any = config.get("max_position_embeddings")
    rope: Any = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not _is_count(longest):
        return None
    if not isinstance(rope, dict) or not _is_number(factor := rope.get("factor")):
        return longest
    before: Any = rope.get("original_max_position_embeddings")
    stretches = rope.get("rope_type", rope.get("type")) in ("linear", "dynamic")
    if not _is_count(before):
        return int(longest * factor) if stretches else longest
    return max(longest, int(before * factor))


def _check(values: Mapping[str, Any], keys: Mapping[str, tuple[Check, str]], prefix: str, where: str) -> None:
    for key, (fits, words) in keys.items():
        value = values.get(key)
        if value is not None and not fits(value):
            raise AffineQuantError(
                f"{prefix}{key} = {value!r}"[:200],
                where,
                f"config.json must give {prefix}{key} as {words}",
                exit_code=PREFLIGHT,
            )


def check_length(seq_len: int, config: Mapping[str, Any]) -> None:
    """Whether the model that a config.json describes reads as many tokens as a window has.

    Raises:
        AffineQuantError: its context is shorter (exit 2).
    """
    longest = context_length(config)
    if longest is not None and seq_len > longest:
        what = f"windows of {seq_len} tokens are longer than the model's context of {longest}"
        raise AffineQuantError(what, "--seq-len", f"use --seq-len {longest} or less")

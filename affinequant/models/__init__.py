"""Which networks are known, and which of them a config.json describes."""

from collections.abc import Mapping
from typing import Any

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.models.family import Dims as Dims
from affinequant.models.family import Family as Family
from affinequant.models.family import resolve_sites as resolve_sites
from affinequant.models.keys import check_keys
from affinequant.models.keys import check_length as check_length
from affinequant.models.keys import context_length as context_length
from affinequant.models.llama import LLAMA

FAMILIES: dict[str, Family] = {"llama": LLAMA}


def resolve(config: Mapping[str, Any], *, where: str) -> tuple[Family, Dims]:
    """The family and sizes that a config.json describes.

    Raises:
        AffineQuantError: a key of a wrong type, an architecture or a setting that no family here computes rightly, a size
            that is missing or impossible, or weights that are already quantised.
    """
    check_keys(config, where)
    names = config.get("architectures") or []
    supported = sorted(arch for family in FAMILIES.values() for arch in family.architectures)
    family = next((f for f in FAMILIES.values() if any(name in f.architectures for name in names)), None)
    if family is None:
        found = ", ".join(map(str, names)) or f"none named (model_type {config.get('model_type')!r})"
        raise AffineQuantError(
            f"unsupported architecture: {found}",
            where,
            f"supported: {', '.join(supported)} (`affinequant list models`)",
            exit_code=PREFLIGHT,
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise AffineQuantError(
            f"this model is quantised already (quant_method {method!r})",
            where,
            "give the original 16-bit model",
            exit_code=PREFLIGHT,
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for key, allowed in family.settings.items():
        value = next((table[key] for table in (config, rope) if table.get(key) is not None), allowed[0])
        if value not in allowed:
            raise AffineQuantError(
                f"{key} = {value!r} is not supported for {family.name}",
                where,
                f"supported: {', '.join(map(repr, allowed))}",
                exit_code=PREFLIGHT,
            )
    return family, _dims(config, where)


def _dims(config: Mapping[str, Any], where: str) -> Dims:
    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise AffineQuantError(
                f"{key} = {value!r}",
                where,
                f"config.json must give {key} as a positive whole number",
                exit_code=PREFLIGHT,
            )
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    dims = Dims(
        layers=size("num_hidden_layers"),
        hidden=hidden,
        mlp=size("intermediate_size"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        vocab=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
    )
    if heads % dims.kv_heads:
        raise AffineQuantError(
            f"{heads} query heads cannot share {dims.kv_heads} KV heads",
            where,
            "correct config.json",
            exit_code=PREFLIGHT,
        )
    return dims

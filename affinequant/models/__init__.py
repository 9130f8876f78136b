"""Which networks are known, and which of them a config.json describes."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.models.dims import Dims as Dims
from affinequant.models.family import Family as Family
from affinequant.models.gemma2 import GEMMA2
from affinequant.models.gemma3 import GEMMA3
from affinequant.models.keys import check_keys
from affinequant.models.keys import check_length as check_length
from affinequant.models.keys import context_length as context_length
from affinequant.models.llama import LLAMA
from affinequant.models.mistral import MISTRAL
from affinequant.models.mixtral import MIXTRAL
from affinequant.models.multimodal import WRAPPERS, decoder_type, inside, text_config, wraps
from affinequant.models.opt import OPT
from affinequant.models.phi3 import PHI3
from affinequant.models.qwen2 import QWEN2
from affinequant.models.qwen2_moe import QWEN2_MOE
from affinequant.models.qwen3 import QWEN3
from affinequant.models.qwen3_5 import QWEN3_5
from affinequant.models.qwen3_5_moe import QWEN3_5_MOE
from affinequant.models.qwen3_moe import QWEN3_MOE
from affinequant.models.qwen3_next import QWEN3_NEXT
from affinequant.models.sized_sites import resolve_sites as resolve_sites
from affinequant.models.smollm3 import SMOLLM3

_DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, SMOLLM3, OPT)
_MIXTURES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE)
_HYBRIDS = (QWEN3_5, QWEN3_NEXT, QWEN3_5_MOE)
FAMILIES: dict[str, Family] = {family.name: family for family in (*_DENSE, *_MIXTURES, *_HYBRIDS)}


def resolve(config: Mapping[str, Any], *, where: str) -> tuple[Family, Dims]:
    """The family and sizes that a config.json describes: where kinds of layer or experts are many, the family with those that
    this model has.

    Raises:
        AffineQuantError: a key of a wrong type, an architecture or a setting that no family here computes rightly, a size
            that is missing or impossible, or weights that are already quantised.
    """
    check_keys(config, where)
    family = find_family(config)
    if family is None:
        raise _unsupported(config, where)
    config = text_config(config)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise AffineQuantError(
            f"this model is quantised already (quant_method {method!r})",
            where,
            "give the original 16-bit model",
            exit_code=PREFLIGHT,
        )
    config = family.read(config)
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
    flags = {linear.bias for linear in family.linears if isinstance(linear.bias, str) and linear.has_bias(config)}
    dims = replace(family.dims(config, where), biases=tuple(sorted(flags)))
    if family.kinds is not None:
        dims = replace(dims, kinds=tuple(family.kinds(config, index) for index in range(dims.layers)))
    return family.sized(dims), dims


def find_family(config: Mapping[str, Any]) -> Family | None:
    """The family of a config.json's architecture; None where there is none here."""
    names = config.get("architectures") or []
    if wraps(config):
        kind = decoder_type(config)
        return inside(FAMILIES[kind]) if kind in WRAPPERS[names[0]] else None
    return next((f for f in FAMILIES.values() if any(name in f.architectures for name in names)), None)


def _unsupported(config: Mapping[str, Any], where: str) -> AffineQuantError:
    """The refusal of an architecture, with the family whose name is nearest: a relative differs from it in a few lines."""
    names: Sequence[str] = config.get("architectures") or []
    found = ", ".join(map(str, names)) or f"none named (model_type {config.get('model_type')!r})"
    if wraps(config):
        what = f"unsupported architecture: {found} around a decoder of type {decoder_type(config)!r}"
        fix = f"decoders that are supported in it: {', '.join(WRAPPERS[names[0]])} (`affinequant list models`)"
        return AffineQuantError(what, where, fix, exit_code=PREFLIGHT)
    if isinstance(config.get("text_config"), Mapping):
        what = f"unsupported architecture: {found}, a model of several parts"
        fix = f"those whose decoder is quantised and whose other parts are copied: {', '.join(WRAPPERS)}; or give a model "
        return AffineQuantError(what, where, f"{fix}that is a decoder alone", exit_code=PREFLIGHT)
    known = {arch: family.name for family in FAMILIES.values() for arch in family.architectures}
    near = difflib.get_close_matches(str(names[0]) if names else "", known, n=1, cutoff=0.6)
    start = (
        f"models/{known[near[0]]}.py is the nearest to start from" if near else "models/llama.py is where to start from"
    )
    fix = f"supported: {', '.join(sorted(known))} (`affinequant list models`). To add one ('Add a model' in the README), {start}"
    return AffineQuantError(f"unsupported architecture: {found}", where, fix, exit_code=PREFLIGHT)

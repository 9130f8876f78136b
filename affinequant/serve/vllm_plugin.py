"""The plugin for vLLM: our checkpoints on integers, by the same layer and op as in `affinequant.load`.

It answers to `quant_method: affinequant`, and takes over those compressed-tensors checkpoints of ours whose integer
activations stock vLLM would leave out. Layers that vLLM fuses (q, k and v; gate and up) read one input, so their members
must agree on its transform and its clipping; a checkpoint in which they do not is refused.

Under tensor parallelism a row-parallel layer (o, down) sees a slice of its input. Scales per token and transforms over the
whole input would come out differently there, so the checkpoint must have been made for that many slices.

vLLM has no cache of integers with a scale per token and head. A checkpoint whose scheme quantises the KV cache is served
with vLLM's own, in 16 bits, and the log says so: nearer to full precision than `affinequant.load`, and no memory saved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from vllm import __version__ as vllm_version
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.models.utils import WeightsMapper

from affinequant.errors import AffineQuantError
from affinequant.formats import check_readable, numbers_of, rounds_inputs
from affinequant.formats.compressed_tensors import declares_activations
from affinequant.recipe.scheme import Scheme
from affinequant.serve.vllm_linear import AffineQuantLinear

NAME = "affinequant"
TESTED = ("0.32.0", "0.32.0")
"""Oldest and newest vLLM on which the tests of this package ran."""

EXPERTS = ("RoutedExperts", "FusedMoE")
"""vLLM's layers of experts, by name: the classes change their place with its versions."""

_log = init_logger(f"vllm.{__name__}")


def register() -> None:
    """See `affinequant.serve.register_vllm`."""
    held = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(NAME)
    if held is AffineQuantConfig:
        return
    if held is not None or NAME in quantization.QUANTIZATION_METHODS:
        owner = held.__module__ if held else "vLLM itself"
        raise RuntimeError(
            f"the quantisation method {NAME} is already {owner}'s. Uninstall one of the two plugins, or choose by "
            f"VLLM_PLUGINS={NAME}"
        )
    quantization.register_quantization_config(NAME)(AffineQuantConfig)
    warn_if_untested(vllm_version)


def warn_if_untested(version: str) -> None:
    """Say in vLLM's log which versions of vLLM this package was tested with, where `version` is not among them."""
    oldest, newest = (Version(tested) for tested in TESTED)
    if not oldest <= Version(Version(version).base_version) <= newest:
        tested = str(oldest) if oldest == newest else f"{oldest} to {newest}"
        _log.warning("affinequant was tested with vLLM %s, this is %s", tested, version)


class AffineQuantConfig(QuantizationConfig):
    """What `config.json` says of a checkpoint of ours.

    Args:
        declared: its `quantization_config`.

    Raises:
        ValueError: another version, or a key that is missing.
    """

    def __init__(self, declared: Mapping[str, Any]) -> None:
        super().__init__()
        ours = declared["affinequant"]
        try:
            check_readable(ours, "quantization_config of config.json")
        except AffineQuantError as problem:
            raise ValueError(str(problem)) from None  # the kind of error that vLLM shows as one about its input
        self.scheme = numbers_of(ours, "")
        self.others = {name: numbers_of(ours, name) for name in ours.get("linears", {})}
        schemes = (self.scheme, *self.others.values())
        if floats := next((scheme.name for scheme in schemes if scheme.weight.kind != "int"), ""):
            raise ValueError(
                f"{floats} with transforms at run time has no kernels here, which multiply integers: load it by "
                "affinequant.load; for vLLM's own kernels export it as transform-config or fp_quant, which hold one matrix "
                "per input, or quantise with --tier merged"
            )
        self.declared = declares_activations(*schemes)
        self.clips: dict[str, float] = dict(ours["input_clip"])
        if "online" not in ours and declared["quant_method"] == NAME:
            raise ValueError(
                "config.json does not list the transforms (key `online`): export the folder again by `affinequant export`"
            )
        self.online: dict[str, dict[str, list[int]]] = dict(ours.get("online", {}))
        self.slices: dict[str, int] = dict(ours.get("slices", {}))
        self.folded = [site for site, place in ours.get("placements", {}).items() if place["how"] == "folded"]
        if ours.get("kv"):
            bits = ours["kv"]["bits"]
            own = "vLLM keeps its own (--kv-cache-dtype; 16 bits unless given)"
            if latest := ours["kv"].get("kept_latest"):
                own = f"the latest {latest} tokens in 16; {own}"
            _log.warning("%s asks for a KV cache in %d bits, %s", ours["scheme"], bits, own)
        self.ignore: list[str] = list(declared.get("ignore", []))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AffineQuantConfig:
        """From the `quantization_config` of a checkpoint."""
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None = None, hf_config: Any = None
    ) -> Any:
        """Our name, for compressed-tensors checkpoints of ours that quantise activations without declaring it."""
        ours = hf_quant_cfg.get("affinequant")
        if hf_quant_cfg.get("quant_method") != "compressed-tensors" or not ours:
            return None
        if user_quant not in (None, NAME):
            if rounds_inputs(ours) and not _declared(hf_quant_cfg):
                left = "activations stay in 16 bits where the checkpoint was made for %s: leave --quantization out"
                _log.warning_once(f"with --quantization %s {left}", user_quant, ours["scheme"])
            return None
        return NAME if rounds_inputs(ours) and not _declared(hf_quant_cfg) else None

    def get_name(self) -> Any:
        """`affinequant`."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """float32 is for tests and comparisons."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere: the int8 tensor cores that the kernels are written for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Everything stands in config.json."""
        return []

    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        """vLLM's own, less what rotates queries and keys for a quantised cache: one orthogonal matrix on both sides of
        their product changes nothing where the cache is not quantised."""
        dropped: dict[Any, str | None] = {re.compile(r"\.self_attn\.online_\w+$"): None}
        return QuantizationConfig.get_cache_scale_mapper() | WeightsMapper(orig_to_new_regex=dropped)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow a model whose modules have other names in vLLM."""
        self.others = hf_to_vllm_mapper.apply_dict(self.others)
        self.clips = hf_to_vllm_mapper.apply_dict(self.clips)
        self.online = hf_to_vllm_mapper.apply_dict(self.online)
        self.slices = hf_to_vllm_mapper.apply_dict(self.slices)
        self.ignore = hf_to_vllm_mapper.apply_list(self.ignore)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for linears; None, which is vLLM's own, for embeddings, head and attention.

        Raises:
            ValueError: experts, which no checkpoint of ours holds in a form that vLLM's one layer for all of them takes.
        """
        if not isinstance(layer, LinearBase):
            self._refuse_experts(layer, prefix)
            return None
        self._warn_of_adapters()
        if should_ignore_layer(prefix, self.ignore, self.packed_modules_mapping):
            return UnquantizedLinearMethod()
        return AffineQuantLinear(self, prefix)

    def _refuse_experts(self, layer: nn.Module, prefix: str) -> None:
        experts = any(kind.__name__ in EXPERTS for kind in type(layer).__mro__)
        if experts and not any(f"{name}.".startswith(f"{prefix}.") for name in self.ignore):
            merged = "Its transforms act at run time, which nothing else does: quantise with --tier merged; of that s"
            raise ValueError(
                f"{prefix}: affinequant's plugin does not run layers of experts ({type(layer).__name__}). "
                f"{merged if self.online else 'S'}erve an export, for whose experts vLLM has kernels on GPUs: "
                f"`affinequant export FOLDER --format compressed-tensors --scheme w{self.scheme.weight.bits}a16`, or "
                "`--format int-quantized --scheme w8a8`. affinequant.load and transformers run this one on integers"
            )

    def _warn_of_adapters(self) -> None:
        running = get_current_vllm_config_or_none()
        if self.folded and running is not None and running.lora_config is not None:
            _log.warning_once(
                "transforms were folded into the weights of this checkpoint (%s). An adapter (LoRA) that was trained on the "
                "model it was made from acts on other numbers here and gives wrong results: merge it into the model before "
                "quantising, or quantise with --preset rtn",
                ", ".join(self.folded),
            )

    def members(self, prefix: str) -> list[str]:
        """The linears of the checkpoint that make up one of vLLM's."""
        parent, _, leaf = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{parent}.{name}" if parent else name for name in names]

    def numbers(self, members: list[str]) -> Scheme:
        """The numbers of linears that make up one layer.

        Raises:
            ValueError: they do not agree.
        """
        first, *others = (self.others.get(name, self.scheme) for name in members)
        if any((other.weight, other.activation) != (first.weight, first.activation) for other in others):
            raise ValueError(f"{', '.join(members)} make one layer here, and their numbers differ")
        return first

    def whole(self, scheme: Scheme) -> bool:
        """Whether codes of these numbers are stored as int8, as they are, instead of packed into words."""
        return self.declared and scheme.activation is not None

    def clip(self, members: list[str]) -> float:
        """The ratio by which the range of their common input is narrowed.

        Raises:
            ValueError: they have none, or do not agree.
        """
        if self.numbers(members).activation is None:
            return 1.0
        found = {self.clips.get(name) for name in members}
        if len(found) != 1 or None in found:
            raise ValueError(f"{', '.join(members)} need one input_clip, config.json has {sorted(map(str, found))}")
        return float(found.pop())  # pyright: ignore[reportArgumentType]

    def matrices(self, members: list[str]) -> dict[str, list[int]]:
        """Part to shape, of what acts on their common input.

        Raises:
            ValueError: they do not agree.
        """
        first, *others = (self.online.get(name, {}) for name in members)
        if any(other != first for other in others):
            raise ValueError(f"{', '.join(members)} read one input, and their transforms differ")
        return first


def _declared(quantization: Mapping[str, Any]) -> bool:
    """Whether a config of compressed-tensors itself says that activations are quantised."""
    return any(group.get("input_activations") for group in quantization.get("config_groups", {}).values())

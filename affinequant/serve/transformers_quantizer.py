"""The quantiser for transformers: `from_pretrained` on a checkpoint of ours gives the modules that `affinequant.load` gives.

It answers to `quant_method: affinequant`, and takes over those compressed-tensors checkpoints of ours whose integer
activations transformers would leave out, and those with experts, which transformers stacks: of these it reads no zero
points and no codes in whole bytes. All others stay with the quantiser of compressed-tensors. transformers reads
what is not quantised; the linears are read by `affinequant.runtime.load`, after it, into the places that were kept for them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from affinequant.errors import AffineQuantError
from affinequant.formats import check_readable, numbers_of, rounds_inputs
from affinequant.formats.native import STEM
from affinequant.models import resolve
from affinequant.models.experts import split_experts
from affinequant.models.multimodal import wraps
from affinequant.models.source import Source, by_block, open_source, unquantized
from affinequant.runtime.load import check_finite, keep_from_saving, pack_cache, read_linear, replace_linears
from affinequant.transforms.online import stored_name

NAME, STOCK = "affinequant", "compressed-tensors"
TESTED = ("5.16.1", "5.20")
"""The first transformers that this is known to work with, and the first that it is not known to."""

_log = logging.get_logger(f"transformers.{__name__}")


class AffineQuantConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint, kept as it was written."""

    def __init__(self, **declared: Any) -> None:
        self.declared = declared
        self.quant_method = NAME  # pyright: ignore[reportAttributeAccessIssue]

    def to_dict(self) -> dict[str, Any]:
        """What stands in `config.json`."""
        return copy.deepcopy(self.declared)


class StockOrOurs(CompressedTensorsConfig):
    """In the place of transformers' class for compressed-tensors: chooses by the checkpoint which of the two it is."""

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of ours where activations, the cache or experts are left to us, else that of compressed-tensors."""
        ours = config_dict.get("affinequant") or {}
        mine = any(ours.get(key) for key in ("kv", "experts")) or rounds_inputs(ours)
        kind = AffineQuantConfig if mine else CompressedTensorsConfig
        return kind.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)


class AffineQuantizer(HfQuantizer):
    """See the module."""

    requires_calibration = True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse, before anything is read, what cannot be read or run.

        Raises:
            AffineQuantError: another version of ours, or weights that are to lie on a disk or beside a GPU.
        """
        check_readable(self.quantization_config.to_dict()["affinequant"], "quantization_config of config.json")
        places = {str(place) for place in device_map.values()} if isinstance(device_map, Mapping) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise AffineQuantError(
                f"this model would lie on {', '.join(sorted(places))}; its linears cannot be moved in and out",
                "device_map",
                'give a GPU (or GPUs) that hold all of it, or device_map="cpu"',
            )
        if not Version(TESTED[0]) <= Version(transformers.__version__) < Version(TESTED[1]):
            _log.warning_once(
                f"affinequant is tested with transformers from {TESTED[0]} to before {TESTED[1]}, "
                f"this is {transformers.__version__}"
            )

    def update_tp_plan(self, config: Any) -> Any:
        """Say how the files of weights are called: this is called with the config before transformers looks for them."""
        if self.quantization_config.declared["quant_method"] == NAME:  # pyright: ignore[reportAttributeAccessIssue]
            config.transformers_weights = _weights_file(config)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise AffineQuantError(
                "transformers cannot split this model over devices by tensor parallelism",
                "distributed_config",
                "use device_map, or serve it with vLLM",
            )
        if not checkpoint_files:
            raise AffineQuantError("no files of weights", "state_dict", "give from_pretrained the checkpoint's folder")
        declared = self.quantization_config.to_dict()
        self._source = _open(Path(checkpoint_files[0]), declared)
        ours = declared["affinequant"]
        if wraps(self._source.config) and not hasattr(model.base_model, "language_model"):
            raise AffineQuantError(
                f"{type(model).__name__} is the decoder alone of the model that this folder holds",
                str(self._source.folder),
                "load all of it: AutoModelForImageTextToText.from_pretrained, or affinequant.load",
            )
        split_experts(model, resolve(unquantized(self._source.config), where=str(self._source.folder))[0])
        replace_linears(
            model, declared["ignore"], lambda name, linear: _Place(name, linear, numbers_of(ours, name).weight.bits)
        )
        _check_rest(model, self._source)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        # transformers has no use for the tensors of these linears, nor for what acts on queries and keys beside an
        # attention, and would report every one of them.
        unused = {rf"(^|\.){_any_number(name)}\." for name, _ in _places(model.base_model)} | {
            re.escape(stored_name("", ""))
        }
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *unused}

    def update_weight_conversions(self, weight_conversions: Any) -> Any:
        """None where there are experts: they have the names that are in the files."""
        return [] if self.quantization_config.to_dict()["affinequant"].get("experts") else weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        of = by_block(self._source)
        for name, place in _places(model):
            made = read_linear(of(place.name), place.name, place.linear[0], place.room.device)
            model.set_submodule(name, made)
        # transformers keeps the file's dtype where it renames a tensor.
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(self._dtypes.get(name, parameter.dtype))
        pack_cache(self._source, model)
        model.requires_grad_(False)  # rounding has no gradient
        check_finite(model, self._source.folder)
        keep_from_saving(model, self._source.folder)
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        return model

    def is_serializable(self) -> Any:
        """Never: see `keep_from_saving`."""
        return False

    @property
    def is_trainable(self) -> Any:
        """Rounding has no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The linears are single ops to `torch.compile`."""
        return True


class _Place(nn.Module):
    """Keeps the place of a linear until the checkpoint's takes it. `room` is as large as that will be, so that
    transformers finds a device for it; it lies on `meta`, then on that device."""

    room: torch.Tensor

    def __init__(self, name: str, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.name, self.linear = name, (linear,)  # in a tuple: not a module of this one, nothing to load
        room = torch.empty(linear.weight.numel() * bits // 8, dtype=torch.uint8, device="meta")
        self.register_buffer("room", room, persistent=False)


def _places(model: nn.Module) -> list[tuple[str, _Place]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _Place)]


def _any_number(name: str) -> str:
    """A pattern for modules of that name in any block and, of an expert, in all of them: there may be tens of thousands."""
    return re.sub(r"\d+", r"\\d+", re.escape(name))


def register() -> None:
    """Make transformers load our checkpoints; called again, it changes nothing.

    Raises:
        AffineQuantError: another package holds the name of our method.
    """
    held = auto.AUTO_QUANTIZER_MAPPING.get(NAME)
    if held is not None and held is not AffineQuantizer:
        raise AffineQuantError(
            f"the quantisation method {NAME} of transformers is already that of {held.__module__}",
            "import affinequant",
            "uninstall one of the two packages",
        )
    auto.AUTO_QUANTIZER_MAPPING[NAME] = AffineQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = AffineQuantConfig
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[STOCK] = StockOrOurs


@contextmanager
def stock() -> Iterator[None]:
    """transformers as it is without this package, to see what it makes of a checkpoint by itself."""
    mappings = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    before = [dict(mapping) for mapping in mappings]
    for mapping in mappings:
        mapping.pop(NAME, None)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[STOCK] = CompressedTensorsConfig
    try:
        yield
    finally:
        for mapping, entries in zip(mappings, before, strict=True):
            mapping.update(entries)


def _weights_file(config: Any) -> str:
    """The name of the file of weights, or of the index where there are several.

    The config of `AutoConfig` knows where it comes from. A config that does not is taken to have one file beside it.
    """
    one, index = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"
    origin = config.name_or_path
    if not origin:
        return one
    found = cached_file(
        origin,
        index,
        revision=getattr(config, "_commit_hash", None),
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return index if found else one


def _open(file: Path, declared: Mapping[str, Any]) -> Source:
    if not file.is_file() and file.with_name(f"{STEM}.safetensors.index.json").is_file():
        raise AffineQuantError(
            "transformers did not say where the config comes from, so the shards were not looked for",
            str(file.parent),
            "load it with AutoModelForCausalLM, or give config=AutoConfig.from_pretrained(folder)",
        )
    source = open_source(file.parent)
    return replace(source, config={**source.config, "quantization_config": declared})


def _check_rest(model: Any, source: Source) -> None:
    """Everything that the checkpoint must hold beside the linears is there; transformers would make up what is not."""
    prefix = model.base_model_prefix
    names = {f"{prefix}.{name}": parameter for name, parameter in model.base_model.named_parameters()}
    head = model.get_output_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if head is not None and not tied:
        names |= {name: parameter for name, parameter in model.named_parameters() if parameter is head.weight}
    for name, parameter in names.items():
        entry = source.entries.get(name)
        if entry is None or entry.shape != tuple(parameter.shape):
            what = "is missing" if entry is None else f"has size {entry.shape} where {tuple(parameter.shape)} is due"
            raise AffineQuantError(f"the tensor {name} {what}", str(source.folder), "write or fetch the folder again")


register()  # for whoever imports this module before transformers (`serve/importing.py`)

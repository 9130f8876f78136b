"""Written folders read back by the library that they were written for, and models put together from tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from affinequant.data.files import first_line
from affinequant.errors import AffineQuantError
from affinequant.models import resolve
from affinequant.models.multimodal import auto_class, is_ignored, wraps
from affinequant.models.source import Source, by_block, open_source, unquantized

if TYPE_CHECKING:  # a plan asks `supports`, and must not wait for torch
    import torch
    from torch import Tensor

Dtype = Literal["float32", "bfloat16"]

_AGAIN = "write it again"


def in_transformers(folder: Path, dtype: Dtype, **options: Any) -> tuple[Any, str]:
    """The folder as stock transformers loads it, on the CPU, and in words what has read it.

    Raises:
        AffineQuantError: transformers cannot load it, or finds tensors missing and would go on with random ones.
    """
    config = open_source(folder, weights=False).config
    if wraps(config) and "quantization_config" in config and open_source(folder).renamed:
        return decompressed(folder, dtype)
    model = pretrained(auto_class(config), folder, folder, dtype, _AGAIN, **options)
    words = f"transformers {_version('transformers')}"
    packed = getattr(model.config, "quantization_config", None) is not None and not options
    return model, words + (f" with compressed-tensors {_version('compressed-tensors')}" if packed else "")


def decompressed(folder: Path, dtype: Dtype) -> tuple[Any, str]:
    """A folder of compressed-tensors with its weights as the library of that name decompresses them, in stock transformers'
    own code on the CPU, and in words what has read it. Nothing quantises activations there.

    For experts, which transformers stacks while it reads: of these it leaves zero points out, finds no codes in whole bytes,
    and rounds the products to the scales' 16 bits, as it does wherever it calls tensors otherwise than the file.
    """
    tensors, words = decompressed_tensors(open_source(folder))
    return from_tensors(folder, tensors, dtype), words


def decompressed_tensors(source: Source) -> "tuple[dict[str, Tensor], str]":
    """The tensors of such a folder, and in words what reads them: those of a linear as its weight, all others as they are."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    declared = source.config["quantization_config"]
    groups = declared["config_groups"].values()
    numbers = [(group["targets"], QuantizationScheme(**group), group.get("format")) for group in groups]
    of, tensors = by_block(source), {}
    for name in source.entries:
        linear, _, part = name.rpartition(".")
        if part == "weight_scale":
            there = of(name)
            beside = [one for one in there.names_under(linear) if one.startswith(f"{linear}.weight")]
            state = {one.rpartition(".")[2]: tensor for one, tensor in there.read(beside).items()}
            if state["weight_scale"].is_floating_point():  # else powers of two by their exponents
                state["weight_scale"] = state["weight_scale"].float()
            every = (one for one in numbers if is_ignored(linear, one[0]) or "Linear" in one[0])
            _, scheme, form = next(every)
            compressor: Any = BaseCompressor.get_value_from_registry(form or declared["format"])
            tensors[f"{linear}.weight"] = compressor.decompress(state, scheme)["weight"]
        elif f"{linear}.weight_scale" not in source.entries or part == "bias":
            tensors |= of(name).read([name])
    return tensors, f"compressed-tensors {_version('compressed-tensors')}, in transformers {_version('transformers')}"


def from_tensors(folder: Path, tensors: "Mapping[str, Tensor]", dtype: Dtype, **config: Any) -> Any:
    """A transformers model on the CPU by the folder's config.json, changed by `config`, with these tensors in it.

    Raises:
        AffineQuantError: tensors are missing.
    """
    from transformers import AutoConfig

    described: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(described, "quantization_config"):
        del described.quantization_config
    described.update(config)
    maker = auto_class(open_source(folder, weights=False).config)._model_mapping[type(described)]
    return pretrained(maker, None, folder, dtype, _AGAIN, config=described, state_dict=dict(tensors))


def skeleton(source: Source, dtype: "torch.dtype") -> Any:
    """The model without weights: parameters stay on `meta`, buffers that follow from the config exist. Its modules are
    called as the files call them, experts one by one."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, GenerationConfig

    from affinequant.models.experts import split_experts

    folder = source.folder
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = attending(auto_class(source.config).from_config(config, dtype=dtype).eval())
    split_experts(model, resolve(unquantized(source.config), where=str(folder / "config.json"))[0])
    model.tie_weights()  # accelerate has put a new parameter in each place
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.config.name_or_path = model.name_or_path = str(folder)
    return model


def pretrained(maker: Any, source: Path | None, folder: Path, dtype: Dtype, fix: str, **options: Any) -> Any:
    """`maker.from_pretrained(source, ...)` on the CPU, quietly and in eval mode.

    Raises:
        AffineQuantError: with `folder` and `fix`: it cannot be loaded, or tensors are missing.
    """
    import torch
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = maker.from_pretrained(
            source, dtype=getattr(torch, dtype), output_loading_info=True, local_files_only=True, **options
        )
    except Exception as problem:  # files that are not what they should be end in errors of every kind
        raise AffineQuantError(f"transformers cannot load it: {first_line(problem)}", str(folder), fix) from problem
    finally:
        if bars:
            logging.enable_progress_bar()
    if info["missing_keys"]:  # transformers goes on with random numbers
        names = sorted(info["missing_keys"])
        raise AffineQuantError(f"{len(names)} tensors are missing, among them {names[0]}", str(folder), fix)
    return attending(model.eval())


def attending(model: Any) -> Any:
    """The model with an attention that computes what its config says: transformers takes one that does not cap scores."""
    from affinequant.models.attention import register
    from affinequant.models.caps import caps_scores

    if caps_scores(model.config):
        model.set_attn_implementation(register())
    return model


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)

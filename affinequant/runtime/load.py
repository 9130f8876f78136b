"""`load`: a checkpoint folder as a transformers model, its activations quantised for real where the scheme says so."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from affinequant.data.wheels import quiet
from affinequant.errors import AffineQuantError
from affinequant.formats import check_readable, numbers_of
from affinequant.formats.linear_tensors import read_units, unpack_linear
from affinequant.formats.reading import pretrained, skeleton
from affinequant.models.device import check_device, compute_device, compute_dtype
from affinequant.models.multimodal import auto_class, is_ignored
from affinequant.models.source import Source, by_block, open_source
from affinequant.numbers import grid_of
from affinequant.numbers.weights import dequantize
from affinequant.progress import Steps, told_by_transformers
from affinequant.recipe.recipe import Device, Dtype
from affinequant.recipe.scheme import NumberFormat
from affinequant.runtime.float_linear import FloatLinear
from affinequant.runtime.integer_linear import IntegerLinear, check_engine, warmed
from affinequant.transforms.online import check_online, in_order, parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AGAIN = "write or fetch the folder again"


def load(
    path: str | Path, *, device: Device = "auto", dtype: Dtype = "auto", say: Callable[[str], None] | None = None
) -> "PreTrainedModel":
    """The model of a local folder, in eval mode, ready for `generate()`.

    A checkpoint of this package with quantised activations computes its linears on integers; one without has its weights
    dequantised, as has one of 4-bit floats, to which activations are then rounded. A folder that this package did not
    write loads as transformers loads it. `auto` is the GPU where there is one; then bfloat16 on a GPU and float32 on a
    CPU. Code from the folder is never run. `say` is told how far reading is, where that takes long.

    Raises:
        AffineQuantError: no such folder, another version, or tensors that are missing, truncated or not finite.
    """
    check_device(device)
    check_engine()
    source = open_source(Path(path))
    target = compute_device(device)
    kind = compute_dtype(dtype, target)
    ours = "affinequant" in (source.config.get("quantization_config") or {})
    model: Any = _quantized(source, target, kind, say or quiet) if ours else _plain(source, kind, say or quiet)
    check_finite(model, source.folder)
    return model.to(target).eval()


def replace_linears(
    model: Any, ignored: Iterable[str], make: Callable[[str, nn.Linear], nn.Module], under: str = ""
) -> None:
    """Put `make(name, linear)` in the place of each linear that a checkpoint of ours has quantised.

    They all lie in the base model; `name` is theirs in the checkpoint, whatever head the transformers model has, and
    starts with `under`.
    """
    base, skipped = model.base_model, set(ignored)
    for name, module in list(base.named_modules()):
        stored = f"{model.base_model_prefix}.{name}"
        if isinstance(module, nn.Linear) and stored.startswith(under) and not is_ignored(stored, skipped):
            base.set_submodule(name, make(stored, module))


def read_linear(source: Source, name: str, like: nn.Linear, device: torch.device) -> nn.Module:
    """What the checkpoint holds in the place of the linear `like`, which may lie on `meta`; it computes in its dtype.

    Raises:
        AffineQuantError: tensors that are missing, or of a size that does not fit.
    """
    made = _linear(source, name, like, source.config["quantization_config"]["affinequant"]).to(device)
    return warmed(made, like.weight.dtype)


def pack_cache(source: Source, model: Any) -> None:
    """Keep keys and values in the checkpoint's number format, where it has one for them."""
    kv = source.config["quantization_config"]["affinequant"].get("kv")
    if kv is not None:
        from affinequant.runtime.cache import quantize_cache

        quantize_cache(model, NumberFormat(**kv), functools.partial(_online_parts, source))


def keep_from_saving(model: Any, folder: Path) -> None:
    """Make `save_pretrained` (and with it `push_to_hub`) refuse: transformers would leave out the integers in silence."""
    model.save_pretrained = functools.partial(_refuse_to_save, folder)


def check_finite(model: nn.Module, folder: Path) -> None:
    """Look at every number of the model.

    Raises:
        AffineQuantError: naming a tensor that holds NaN or infinity.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        values = tensor.float() if tensor.element_size() == 1 else tensor  # torch knows no isfinite for 8-bit floats
        if tensor.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise AffineQuantError(f"{name} holds values that are not finite", str(folder), _AGAIN)


def _refuse_to_save(folder: Path, *_args: Any, **_kwargs: Any) -> None:
    raise AffineQuantError(
        "transformers cannot save this model: its integers are not in its state dict",
        "save_pretrained",
        f"copy the folder {folder}, or upload it as it is",
    )


def _plain(source: Source, dtype: torch.dtype, say: Callable[[str], None]) -> "PreTrainedModel":
    kind: Any = str(dtype).removeprefix("torch.")
    with told_by_transformers(say):
        return pretrained(auto_class(source.config), source.folder, source.folder, kind, _AGAIN, use_safetensors=True)


def open_empty(source: Source, device: torch.device, dtype: torch.dtype) -> Any:
    """The model of a folder, its buffers on the device and its weights on `meta` until `fill` reads them.

    Raises:
        AffineQuantError: another version, or a KV cache without its matrices.
    """
    declared = source.config.get("quantization_config") or {}
    if "affinequant" in declared:
        check_readable(declared["affinequant"], str(source.folder / "config.json"))
    model = skeleton(source, dtype)
    if "affinequant" in declared:
        pack_cache(source, model)
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    return model


def fill(
    source: Source,
    model: Any,
    under: str,
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Read the weights whose names start with `under` into the model of `open_empty`, onto the device; `advance` is
    called after each linear that is quantised.

    Raises:
        AffineQuantError: tensors that are missing, or of a size that does not fit.
    """
    declared = source.config.get("quantization_config") or {}
    if "affinequant" in declared:
        entries = {name: entry for name, entry in source.entries.items() if name.startswith(under)}
        of = by_block(replace(source, entries=entries))

        def make(name: str, module: nn.Linear) -> nn.Module:
            made = read_linear(of(name), name, module, device)
            advance()
            return made

        replace_linears(model, declared["ignore"], make, under)
    left = {name: one for name, one in model.named_parameters() if one.is_meta and name.startswith(under)}
    of = by_block(replace(source, entries={name: source.entries[name] for name in left if name in source.entries}))
    for name, parameter in left.items():
        module, _, leaf = name.rpartition(".")
        value = _read(of(name), name, like=parameter).to(device, dtype)
        setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))


def _quantized(
    source: Source, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]
) -> "PreTrainedModel":
    model = open_empty(source, device, dtype)
    linears = sum(name.endswith(".weight_scale") for name in source.entries)
    fill(source, model, "", device, dtype, Steps(say, "reading the weights", linears))
    model.tie_weights()
    if any(isinstance(module, IntegerLinear | FloatLinear) for module in model.modules()):
        keep_from_saving(model, source.folder)
    return model


def _linear(source: Source, name: str, module: nn.Linear, ours: Mapping[str, Any]) -> nn.Module:
    """One quantised linear: on integers where its input is quantised or transformed, else dequantised in place."""
    numbers, dtype = numbers_of(ours, name), module.weight.dtype
    weight, activation = numbers.weight, numbers.activation
    codes, scale, zero = unpack_linear(source, name, weight)
    _check_shape(codes, module.weight, name)
    bias = None if module.bias is None else _read(source, f"{name}.bias", like=module.bias).to(dtype)
    slices = ours.get("slices", {}).get(name, 1)
    online = _online_parts(source, name, module.in_features, slices)
    if activation is None and not online:
        zero = torch.zeros_like(scale) if zero is None else zero.float()
        value = dequantize(codes, scale, zero, grid_of(weight))
        module.weight = nn.Parameter(value.to(dtype), requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        return module
    if activation and name not in ours["input_clip"]:
        raise AffineQuantError(f"{name} has no entry in input_clip", str(source.folder / "config.json"), _AGAIN)
    clip = float(ours["input_clip"][name]) if activation else 1.0
    settings = {"activation": activation, "clip": clip, "slices": slices}
    try:
        if weight.kind != "int":
            unit = read_units(source, name).get("input_unit")
            value = dequantize(codes, scale, torch.zeros_like(scale), grid_of(weight)).to(dtype)
            return FloatLinear(value, bias, online=online, unit=None if unit is None else float(unit), **settings)
        matrices = in_order(online) if online else []
        return IntegerLinear(codes, scale, zero, bias, bits=weight.bits, dtype=dtype, matrices=matrices, **settings)
    except ValueError as problem:
        raise AffineQuantError(f"{name}: {problem}", str(source.folder), _AGAIN) from None


def _online_parts(source: Source, name: str, width: int, slices: int = 1) -> dict[str, Tensor]:
    """The matrices, on `width` features, that the checkpoint keeps beside the module `name`, by part."""
    parts = parts_of(source.entries, name)
    tensors = source.read(parts.values())
    found = {part: tensors[stored] for part, stored in parts.items()}
    try:
        if found:
            check_online(found, width, slices)
    except ValueError as problem:
        raise AffineQuantError(f"the transform of {name}: {problem}", str(source.folder), _AGAIN) from None
    return found


def _read(source: Source, name: str, *, like: Tensor) -> Tensor:
    if name not in source.entries:
        raise AffineQuantError(f"the tensor {name} is missing", str(source.folder), _AGAIN)
    tensor = source.read([name])[name]
    _check_shape(tensor, like, name)
    return tensor


def _check_shape(tensor: Tensor, like: Tensor, name: str) -> None:
    if tensor.shape != like.shape:
        what = f"a tensor of size {tuple(tensor.shape)} where config.json says {tuple(like.shape)}"
        raise AffineQuantError(what, name, _AGAIN)

"""A device that is not there: tensors that report `cuda`, compute on the CPU, and refuse to meet a tensor of the CPU.

What would fail on a GPU because two tensors of one operation lie on different devices fails here as well. And a plain
number divides as it does there: through its reciprocal, which rounds twice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
GETTERS = {
    Tensor.device.__get__: CUDA,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.is_cuda.__get__: True,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.is_cpu.__get__: False,  # pyright: ignore[reportAttributeAccessIssue]
}
# These take a tensor of another device as it is: a copy, or indices that a GPU's tensor may have from the CPU.
MOVES = {Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__}
DIVISIONS = {Tensor.div, Tensor.true_divide, Tensor.__truediv__, torch.div, torch.true_divide}


class Pretend(Tensor):
    """A tensor that says it is on a GPU."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _call(func, args, dict(kwargs or {}))


class _Factories(TorchFunctionMode):
    """Sees what has no tensor of ours among its arguments: factories, and moves from the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _call(func, args, dict(kwargs or {}))


@contextmanager
def pretend() -> Iterator[None]:
    """Within, `cuda` is a device like any other."""
    with _Factories():
        yield


def _call(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if func in GETTERS:
        return GETTERS[func] if isinstance(args[0], Pretend) else func(*args)
    if func is torch._has_compatible_shallow_copy_type:
        return isinstance(args[0], Pretend) == isinstance(args[1], Pretend)  # a moved Parameter is a new one
    if func is Tensor.__deepcopy__:  # whose memo holds tensors of every device
        return args[0].detach().clone()
    tensors = list(_tensors((args, kwargs)))
    here = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    there = [tensor for tensor in tensors if not isinstance(tensor, Pretend) and tensor.dim()]
    if here and there and func not in MOVES and func is not Tensor.to:
        raise RuntimeError(f"{func.__name__} of tensors on {CUDA} and {CPU}")
    if func is Tensor.numpy and here:
        raise TypeError("a tensor on a GPU has no numpy array: copy it to the CPU first")
    if func in DIVISIONS and here and isinstance(args[1], int | float) and args[0].is_floating_point():
        func, args = Tensor.mul, (args[0], torch.tensor(1 / args[1], dtype=args[0].dtype))
    asked, args, kwargs = _device_of(func, args, kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    on_gpu = asked == CUDA.type if asked else bool(here)
    if func in MOVES:
        on_gpu = isinstance(args[0], Pretend)
    return _placed(result, on_gpu)


def _device_of(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[str | None, Sequence[Any], dict[str, Any]]:
    """The type of the device that a call names, and the call with the CPU in its place."""
    if func is Tensor.cpu:
        return "cpu", args, kwargs
    if func is Tensor.cuda:
        raise NotImplementedError("use .to(device)")
    asked, places = None, list(args)
    if kwargs.get("device") is not None:
        asked = torch.device(kwargs["device"]).type
        kwargs = kwargs | {"device": CPU}
    elif func is Tensor.to:
        for index, value in enumerate(places[1:], start=1):
            if isinstance(value, torch.device | str):
                asked, places[index] = torch.device(value).type, CPU
            elif isinstance(value, Tensor):
                asked = value.device.type
                places[index] = value.as_subclass(Tensor)
        if isinstance(kwargs.get("other"), Tensor):
            asked = kwargs["other"].device.type
    return asked, places, kwargs


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _placed(value: Any, on_gpu: bool) -> Any:
    if isinstance(value, Tensor):
        if isinstance(value, Pretend) == on_gpu:
            return value
        return value.as_subclass(Pretend if on_gpu else Tensor)
    if isinstance(value, list | tuple):
        parts = [_placed(part, on_gpu) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value

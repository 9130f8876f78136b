"""Where, and in what, a model is computed."""

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.recipe.recipe import Device, Dtype


def check_device(name: str) -> None:
    """Whether torch can compute on a device of that kind here.

    Raises:
        AffineQuantError: it cannot, with the reason (exit 3).
    """
    if name != "cuda":
        return
    fix = "use --device cpu, or auto"
    if not torch.backends.cuda.is_built():
        what = f"the torch that is installed here ({torch.__version__}) is built without CUDA"
        raise AffineQuantError(what, "--device cuda", f"install a CUDA build of torch, or {fix}", exit_code=PREFLIGHT)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    reason = f"CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else "torch finds none"
    reason = str(said[0].message).splitlines()[0] if said else reason
    raise AffineQuantError(f"no CUDA device can be used: {reason}", "--device cuda", fix, exit_code=PREFLIGHT)


def compute_device(name: Device) -> torch.device:
    """The device to compute on; `auto` is the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def compute_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in; `auto` is bfloat16 on a GPU and float32 elsewhere."""
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@contextlib.contextmanager
def coarse_products(device: torch.device, coarse: bool = True) -> Iterator[None]:
    """Within it a CPU that has instructions for bfloat16 multiplies float32 matrices with them, twice as fast where they are
    large: operands are rounded to 8 bits, products summed in float32. Elsewhere nothing changes. With `coarse` off: a part
    that must not."""
    setting = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = setting.fp32_precision
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        setting.fp32_precision = "bf16" if coarse else "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before

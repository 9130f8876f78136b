"""What a model's norms compute, asked of the norms themselves before anything is folded into them."""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.models.dims import Dims
from affinequant.models.family import Family


def check_norms(model: nn.Module, family: Family, dims: Dims, where: str) -> None:
    """Whether every norm of the family is x / rms(x) * (weight + offset) and no more, or of a family of layer norms
    (x - mean) / deviation * weight + bias. A diagonal or a rotation is folded as if it were: a bias or the mean that a
    LayerNorm takes away would be lost in silence.

    Raises:
        AffineQuantError: naming the norm that is another (exit 3).
    """
    inside = (
        f"{family.blocks}.{index}.{norm}"
        for index, block in enumerate(family.each_block(dims))
        for norm in block.norms()
    )
    for name in (*inside, family.norm):
        norm = model.get_submodule(name)
        known = ("weight", "bias") if family.layer_norm else ("weight",)
        others = [part for part, _ in norm.named_parameters() if part not in known]
        if others:
            raise _refused(f"{name} has a {others[0]}", family, where)
        if not _is_known(norm, family):
            kind = "layer norm" if family.layer_norm else "RMS norm"
            raise _refused(f"{name} is no {kind} with weights of {family.name}'s", family, where)


def _is_known(norm: Any, family: Family) -> bool:
    """By what it gives for one vector, whose mean is not zero."""
    ends = ((1, 9), (0.5, -1.5), (-1, 2))
    x, weight, bias = (torch.linspace(low, high, len(norm.weight), device="cpu") for low, high in ends)
    lent = {"weight": weight, "bias": bias} if family.layer_norm else {"weight": weight}
    seen = x - x.mean() if family.layer_norm else x
    expected = seen * seen.square().mean().rsqrt() * (weight + family.norm_offset) + (bias if family.layer_norm else 0)
    return torch.allclose(functional_call(norm, lent, (x,)), expected, rtol=1e-3, atol=1e-3)


def _refused(what: str, family: Family, where: str) -> AffineQuantError:
    fix = f"the family {family.name} does not say what becomes of that; supported models: `affinequant list models`"
    return AffineQuantError(what, where, fix, exit_code=PREFLIGHT)

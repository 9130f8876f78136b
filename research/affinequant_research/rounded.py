"""A network of research in few bits: its linears on the quantiser's own grids."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.numbers import grid_of
from affinequant.numbers.weights import fake_quantize, weight_range
from affinequant.recipe.scheme import NumberFormat


@torch.no_grad()
def rounded_weight(weight: Float[Tensor, "rows columns"], bits: int) -> Float[Tensor, "rows columns"]:
    """A weight rounded to nearest: asymmetric, one scale for each row."""
    grid = grid_of(NumberFormat(bits=bits, symmetric=False, granularity="channel"))
    return fake_quantize(weight, *weight_range(weight, grid), grid)


@torch.no_grad()
def rounded(network: nn.Module, bits: int) -> nn.Module:
    """A copy of the network, the weights of its linears rounded to nearest: asymmetric, one scale for each output channel."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(rounded_weight(module.weight, bits))
    return copied

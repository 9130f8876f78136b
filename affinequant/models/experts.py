"""A layer of experts as a source's files have it: one small MLP per expert, each of three linears with names of its own.

transformers 5 keeps all experts of a layer in two parameters, `mlp.experts.gate_up_proj` [experts, 2 x width, hidden] and
`mlp.experts.down_proj` [experts, hidden, width]; it renames, stacks and fuses the files' tensors as it reads them. Nothing
can be hooked there, and nothing lies under the name that is on disk. `split_experts` puts this module's experts in their
place, called as the files call them (`block_sparse_moe.experts.3.w1` in a Mixtral, `mlp.experts.3.gate_proj` in a Qwen). So
tensors, hooks, lists of what is ignored, verification and `load` go by the names on disk, as they do everywhere else. The
router, and what stands beside the experts, stay the model's own code.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from affinequant.models.family import Family
from affinequant.models.layer import ExpertNames

_CODE = "mlp"
"""What transformers calls a block's module of router and experts, whatever its files call it."""


class Expert(nn.Module):
    """act(x gate^T) * (x up^T), through down: the linears are called by `names` (gate, up, down)."""

    def __init__(self, names: tuple[str, str, str], weights: tuple[Tensor, Tensor, Tensor], act: nn.Module) -> None:
        """Args:
        weights: of the three linears, in their order; [width, hidden] twice and [hidden, width].
        """
        super().__init__()
        self.names, self.act = names, act
        for name, weight in zip(names, weights, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, linear)

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """Of the tokens that were sent here."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(self.act(gate(x)) * up(x))


class Experts(nn.ModuleList):
    """The experts of a layer, by number."""

    lent: Callable[[int, str], Tensor] | None = None
    """(number, linear) -> its weight, where weights are `lending`; each is asked for when its turn comes."""

    def __init__(self, fused: Any, names: ExpertNames) -> None:
        """Args:
        fused: transformers' module, whose parameters may lie on `meta`; ours are views of them.
        """
        width = fused.down_proj.shape[2]
        pairs = zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True)
        super().__init__(
            Expert(names.linears, (both[:width], both[width:], down), fused.act_fn) for both, down in pairs
        )

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """What the experts `top_k_index` of each token give, weighted and added up, one expert after the other: no token
        comes to one twice, so that the order of the sum is the same every time, on a GPU too. An expert that no token
        was sent to is not called."""
        total = torch.zeros_like(hidden_states)
        for number in torch.unique(top_k_index).tolist():
            tokens, place = torch.where(top_k_index == number)
            given = self._of(number, hidden_states[tokens]) * top_k_weights[tokens, place, None]
            total.index_add_(0, tokens, given.to(total.dtype))
        return total

    def _of(self, number: int, rows: Tensor) -> Tensor:
        expert: Any = self[number]
        if self.lent is None:
            return expert(rows)
        return functional_call(expert, {f"{name}.weight": self.lent(number, name) for name in expert.names}, (rows,))


@contextmanager
def lending(experts: Experts, tensors: Mapping[str, Tensor], module: str) -> Iterator[None]:
    """Let `experts`, a block's `module` that may have no weights, take each from `tensors` of that block as its turn comes."""
    experts.lent = lambda number, name: tensors[f"{module}.{number}.{name}.weight"]
    try:
        yield
    finally:
        del experts.lent


def split_experts(model: Any, family: Family) -> Any:
    """The model of transformers' own code, empty or not, with its fused experts split into `Experts`, and all of a layer of
    experts called as `family` says that files call it. Weights are shared with what was fused."""
    names = next((layer.experts for layer in family.layers.values() if layer.experts), None)
    if names is None:
        return model
    blocks = family.blocks.removeprefix(f"{model.base_model_prefix}.")
    for block in model.base_model.get_submodule(blocks):
        layer = block.get_submodule(_CODE)
        if not hasattr(getattr(layer, "experts", None), "gate_up_proj"):  # a dense one, or split already
            continue
        layer.experts = Experts(layer.experts, names)
        if names.module != _CODE:
            # The block's code asks for it by the old name, as a plain attribute that no name of a parameter goes through.
            block.add_module(names.module, block._modules.pop(_CODE))
            object.__setattr__(block, _CODE, layer)
    return model

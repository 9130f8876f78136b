"""Transforms one after the other at one site."""

from jaxtyping import Float
from torch import Tensor, nn

from affinequant.transforms.banded import Banded


class Chain(nn.Module):
    """P = P1 P2 ...; its inverse transpose is the product of theirs in the same order."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def on_activations(self, x: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """x P."""
        for part in self.parts:
            x = part.on_activations(x, copies)  # pyright: ignore[reportCallIssue]
        return x

    def on_weights(self, w: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """w P^-T."""
        for part in self.parts:
            w = part.on_weights(w, copies)  # pyright: ignore[reportCallIssue]
        return w

    def online(self) -> dict[str, Tensor]:
        """Each part's tensors, its position in front of their names (see `online.py`). Every part must have some."""
        return {
            f"{position}.{name}": tensor
            for position, part in enumerate(self.parts)
            for name, tensor in part.online().items()  # pyright: ignore[reportCallIssue]
        }

    def progress(self, t: float) -> bool:
        """Pass it on; True when any part released parameters."""
        return any([part.progress(t) for part in self.parts])  # pyright: ignore[reportCallIssue]

    def condition(self) -> float:
        """An upper bound: the product of the parts'."""
        bound = 1.0
        for part in self.parts:
            bound *= part.condition()  # pyright: ignore[reportCallIssue]
        return bound

    def dominance(self) -> float:
        """The largest of its banded parts; 0 where there is none."""
        return max((part.dominance() for part in self.parts if isinstance(part, Banded)), default=0.0)

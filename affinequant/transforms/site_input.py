"""What happens at run time to what the linears of a site read: it is transformed, and rounded on a grid."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from affinequant.numbers import Grid
from affinequant.numbers.activations import fake_quantize_activation


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteInput:
    """x to what the linears compute with.

    `online` is what did not fold, x P; None where nothing acts. `grid` is that of the activations; None leaves them as
    they are. The range of each token is narrowed to `clip` of what it spans, and each of `slices` equal parts of it has a
    grid of its own.
    """

    online: Callable[[Tensor], Tensor] | None = None
    grid: Grid | None = None
    clip: Float[Tensor, ""] | float = 1.0
    slices: int = 1

    def __call__(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """Transformed, then rounded; in the dtype of x, differentiable in x, the transform and the clip."""
        return self.rounded(self.transformed(x))

    def transformed(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """The first step alone."""
        return x if self.online is None else self.online(x)

    def rounded(self, x: Float[Tensor, "*b n"], *, through: bool = False) -> Float[Tensor, "*b n"]:
        """The second step alone: `through` lets the gradient pass the extremes of a token as well."""
        if self.grid is None:
            return x
        return fake_quantize_activation(x, self.grid, self.clip, self.slices, through=through)

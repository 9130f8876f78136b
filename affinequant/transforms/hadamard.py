"""A fixed rotation that spreads outliers over all features: random signs, then a Hadamard matrix of any width."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.models.sites import Site, rotation_factors
from affinequant.transforms.linalg import kronecker_apply, orthogonal_factors


class Hadamard(nn.Module):
    """P = diag(signs) (A (x) B) per head, orthogonal, so P^-T = P. Nothing is learned.

    Signs are free where P folds. Where it stays online over a whole row, the signs are a Kronecker product too, and so
    is P; on queries and keys one sequence of signs serves all heads, since they share one matrix at run time.
    """

    signs: Tensor
    a: Tensor
    b: Tensor

    def __init__(self, site: Site, *, seed: int, alpha: float, start: Tensor | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.whole = site.kind in ("norm", "linear")
        heads, n = (site.slices, site.width // site.slices) if self.whole else (site.heads, site.head_width)

        def signs(*shape: int) -> Tensor:
            return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1

        if self.whole:
            first, second = rotation_factors(n)
            drawn = torch.kron(signs(first), signs(second)).expand(heads, n)
            a, b = orthogonal_factors(n, most=second)
        else:
            drawn = signs(1, n).expand(heads, n) if site.kind == "rope" else signs(heads, n)
            a, b = orthogonal_factors(n)
        self.register_buffer("signs", drawn.contiguous())
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def on_activations(self, x: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """x P."""
        heads, n = self.signs.shape
        parts = x.reshape(*x.shape[:-1], heads, copies, n) * self.signs.to(x)[:, None]
        return kronecker_apply(parts, self.a.to(x), self.b.to(x)).reshape(x.shape)

    def on_weights(self, w: Float[Tensor, "*b n"], copies: int = 1) -> Float[Tensor, "*b n"]:
        """w P^-T."""
        return self.on_activations(w, copies)

    def online(self) -> dict[str, Tensor]:
        """What the run time applies: the two factors over a whole row, else one matrix per head (one for all on
        queries and keys)."""
        if self.whole:
            # The signs are s1 (x) s2: any row of their matrix gives s2, its first column s1, up to a common sign.
            signs = self.signs[0].reshape(len(self.a), len(self.b))
            return {"left": (signs[:, 0] * signs[0, 0])[:, None] * self.a, "right": signs[0][:, None] * self.b}
        signs = self.signs[:1] if bool((self.signs == self.signs[0]).all()) else self.signs
        return {"blocks": signs[..., None] * torch.kron(self.a, self.b)}

    def progress(self, t: float) -> bool:
        """Nothing changes over training."""
        return False

    def condition(self) -> float:
        """1: orthogonal."""
        return 1.0

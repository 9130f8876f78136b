"""Square matrices with a bounded condition number, whose inverse costs no more than they do."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.transforms.linalg import cayley

LIMIT = 4.0
"""Logarithms of singular values stay this close to their centre, so that a condition number is at most e^8 = 2981."""
_KEPT = 0.98  # of the limit, for a start: at the limit itself nothing would be learned any more


class BoundedMatrix(nn.Module):
    """P = U C(a) diag(s) C(b)^T V^T for each of a batch: U, V fixed and orthogonal, C the Cayley map, a, b, s learned.

    log s = centre + limit tanh(start + stretch / limit), hence the condition number is at most exp(2 limit) whatever
    the parameters are. U, V, centre and start are those of a start matrix, which is what zero parameters give. They are
    kept in fp64, so that in fp64 `matrix` and `inverse_transpose` cancel however the parameters were trained.
    """

    u: Tensor
    v: Tensor
    centre: Tensor
    begin: Tensor

    def __init__(self, *shape: int, start: Float[Tensor, "*batch n n"] | None = None, limit: float = LIMIT) -> None:
        """Args:
        shape: (*batch, n).
        start: the matrices at zero parameters, or None for the identity. Singular values below a fraction
            exp(-1.96 limit) of the largest are raised to it.
        """
        super().__init__()
        self.limit = limit
        n = shape[-1]
        matrix = torch.eye(n, dtype=torch.float64).expand(*shape, n) if start is None else start.detach().double().cpu()
        assert matrix.shape == (*shape, n), (matrix.shape, shape)
        u, s, vh = torch.linalg.svd(matrix)
        most = torch.where(s[..., :1] > 0, s[..., :1], 1.0)
        log_s = s.clamp_min(most * math.exp(-2 * _KEPT * limit)).log()
        centre = (log_s[..., :1] + log_s[..., -1:]) / 2
        self.register_buffer("u", u.contiguous())
        self.register_buffer("v", vh.mT.contiguous())
        self.register_buffer("centre", centre)
        self.register_buffer("begin", ((log_s - centre) / limit).atanh())
        self.left = nn.Parameter(torch.zeros(*shape, n))
        self.right = nn.Parameter(torch.zeros(*shape, n))
        self.stretch = nn.Parameter(torch.zeros(shape))

    def matrix(self) -> Float[Tensor, "*batch n n"]:
        """P, in the parameters' dtype."""
        return self._product(1)

    def inverse_transpose(self) -> Float[Tensor, "*batch n n"]:
        """P^-T, from the reciprocals of the singular values."""
        return self._product(-1)

    def log_singular_values(self) -> Float[Tensor, "*batch n"]:
        """Logarithms of the singular values."""
        dtype = self.stretch.dtype
        return self.centre.to(dtype) + self.limit * torch.tanh(self.begin.to(dtype) + self.stretch / self.limit)

    def condition(self) -> float:
        """Ratio of the extreme singular values, the largest of the batch."""
        log_s = self.log_singular_values().detach().double()
        return float((log_s.amax(-1) - log_s.amin(-1)).max().exp())

    def _product(self, sign: int) -> Tensor:
        # The two Cayley maps as one batch: half as many calls, which is what small matrices cost.
        left, right = cayley(torch.stack([self.left, self.right])).unbind(0)
        scale = (sign * self.log_singular_values()).exp()
        return (self.u.to(left) @ left * scale[..., None, :]) @ (self.v.to(right) @ right).mT

"""Small exact algebra: orthogonal matrices of any size, applied in factors."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def hadamard(n: int) -> Float[Tensor, "n n"]:
    """The orthonormal Sylvester Hadamard matrix of a power of two, in fp64."""
    assert n > 0 and n & (n - 1) == 0, n
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(n)


def dct(n: int) -> Float[Tensor, "n n"]:
    """The orthonormal type-II cosine matrix of any size, in fp64."""
    k, i = torch.arange(n, dtype=torch.float64), torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * torch.outer(k, i + 0.5)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def orthogonal_factors(n: int, most: int = 128) -> tuple[Float[Tensor, "a a"], Float[Tensor, "b b"]]:
    """Orthonormal A and B in fp64 with a * b = n, for a rotation A (x) B without large entries (at most sqrt(2 / n)).

    B is a Hadamard matrix of the largest power of two that divides n, up to `most`; A covers the rest: a Hadamard
    matrix where that is a power of two, else a product of a cosine and a Hadamard matrix, so every width has one.
    """
    two = n & -n
    b = min(two, most)
    a, odd = n // b, n // two
    return torch.kron(dct(odd), hadamard(a // odd)), hadamard(b)


def kronecker_apply(
    x: Float[Tensor, "*batch n"], a: Float[Tensor, "a a"], b: Float[Tensor, "b b"]
) -> Float[Tensor, "*batch n"]:
    """x (A (x) B) for n = a * b, without forming the product matrix."""
    n1, n2 = a.shape[0], b.shape[0]
    parts = (x.reshape(-1, n2) @ b).reshape(-1, n1, n2)
    # One matrix for all rows, as a batch without copies: a third faster forwards and backwards than by broadcasting.
    return (a.mT.expand(len(parts), n1, n1) @ parts).reshape(x.shape)


def masked_band(n: int, width: int, alpha: float) -> Float[Tensor, "n n"]:
    """The gradual mask of AffineQuant: 1 on the diagonal, `alpha` where 0 < |i - j| < width, else 0
    (arXiv 2403.12544)."""
    distance = (torch.arange(n)[:, None] - torch.arange(n)[None, :]).abs()
    return torch.where(distance == 0, 1.0, torch.where(distance < width, alpha, 0.0))


def to_blocks(x: Float[Tensor, "*batch n"], count: int, copies: int = 1) -> Float[Tensor, "count rows b"]:
    """The last axis in `count` runs of `copies` consecutive blocks, the runs first: what one batched product needs."""
    width = x.shape[-1] // (count * copies)
    return x.reshape(-1, count, copies, width).movedim(1, 0).reshape(count, -1, width)


def from_blocks(
    blocks: Float[Tensor, "count rows b"], like: Float[Tensor, "*batch n"], copies: int = 1
) -> Float[Tensor, "*batch n"]:
    """Undo `to_blocks`, into the shape of `like`."""
    count, _, width = blocks.shape
    return blocks.reshape(count, -1, copies, width).movedim(0, 1).reshape(like.shape)


def cayley(params: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The Cayley map of the skew-symmetric A = params - params^T: (I - A)(I + A)^-1, orthogonal with determinant 1.

    Zero gives the identity. I + A is invertible whatever A is, since the eigenvalues of A are imaginary. All rotations
    but those with an eigenvalue of -1 are reached.
    """
    skew = params - params.mT
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + skew, eye - skew)


def gram_schmidt(matrix: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch n n"]:
    """The orthogonal matrix whose leading columns Gram-Schmidt makes of those of `matrix`, for k = n or k = n - 1.

    With k = n - 1 the last column is the one that makes the determinant 1: a continuous map onto all rotations, whose
    right inverse is continuous too (arXiv 1812.07035, where n = 3 is the six-dimensional representation); gradients are
    finite everywhere, and nothing but the first derivative is there. With k = n the determinant has the sign of the
    argument's, and it is differentiable while the columns are independent.
    """
    n, k = matrix.shape[-2:]
    assert k in (n, n - 1), (n, k)
    if k < n:
        return _Completed.apply(matrix)  # pyright: ignore[reportReturnType]
    q, r = torch.linalg.qr(matrix)
    return q * _signs(r)[..., None, :]


def polar(matrix: Float[Tensor, "*batch n n"], *, proper: bool = False) -> Float[Tensor, "*batch n n"]:
    """The orthogonal matrix nearest to `matrix`, from its singular value decomposition U S V^T: U V^T. Of rotations alone
    (`proper`) the nearest is U diag(1, ..., det U V^T) V^T (Levinson et al. 2020, arXiv 2006.14616).

    Gradients are finite everywhere, equal singular values included, where those of U and V by themselves are not; nothing
    but the first derivative is there.
    """
    return _Polar.apply(matrix, proper)  # pyright: ignore[reportReturnType]


_LEAST = 1e-8
"""What gradients divide by is no smaller: columns that vanish or fall together have a direction, but no slope."""


def _signs(r: Float[Tensor, "*batch k k"]) -> Float[Tensor, "*batch k"]:
    """Gram-Schmidt is the QR decomposition with a positive diagonal; LAPACK's sign depends on the entries."""
    return torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(r)


class _Completed(torch.autograd.Function):
    """Gram-Schmidt on n - 1 columns, and the column that makes it a rotation. From Z = QR follows dQ = Q (L - L^T) with L
    the part of Q^T dZ R^-1 below the diagonal."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        q, r = torch.linalg.qr(matrix, mode="complete")
        r = r[..., :-1, :]
        signs = _signs(r)
        last = torch.linalg.det(q) * signs.prod(-1)
        r = r * signs[..., None]
        r.diagonal(dim1=-2, dim2=-1).clamp_(min=_LEAST)
        q = q * torch.cat([signs, last.sign()[..., None]], -1)[..., None, :]
        ctx.save_for_backward(q, r)
        return q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, r = ctx.saved_tensors
        below = q.mT @ grads[0]
        below = (below - below.mT).tril(-1)[..., :-1]
        return torch.linalg.solve_triangular(r.mT, q @ below, upper=False, left=False)


class _Polar(torch.autograd.Function):
    """The polar factor. From Z = U S V^T follows dQ = U W V^T, where W_ij = (M_ij - M_ji) / (s_i + s_j), M = U^T dZ V."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, proper: bool) -> Tensor:
        u, s, vh = torch.linalg.svd(matrix)
        if proper:
            sign = torch.linalg.det(u @ vh).sign()[..., None]
            u = torch.cat([u[..., :-1], u[..., -1:] * sign[..., None]], -1)
            s = torch.cat([s[..., :-1], s[..., -1:] * sign], -1)
        ctx.save_for_backward(u, s, vh)
        return u @ vh

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        u, s, vh = ctx.saved_tensors
        inner = u.mT @ grads[0] @ vh.mT
        return u @ ((inner - inner.mT) / (s[..., None] + s[..., None, :]).clamp_min(_LEAST)) @ vh, None

"""Representations of rotations as maps between R^D and matrices, and how they break (arXiv 1812.07035).

A representation is a pair: f makes a matrix of any D numbers, g makes D numbers of a matrix, f(g(R)) = R. It is continuous
where g is: a network learns g, and where g jumps it cannot follow. SO(3) has no continuous representation
with D <= 4 and has one for D >= 5. Vectors are *columns* of matrices here, and a matrix turns columns: y = R x.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.transforms.linalg import gram_schmidt, polar

Numbers = Float[Tensor, "*batch d"]
Matrices = Float[Tensor, "*batch n n"]
_LEAST = 1e-8
"""Lengths that are divided by are no smaller, so that gradients are finite where a direction is not defined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Representation:
    """One row of the table: `f` and `g` over any batch, and what is known of them.

    Attributes:
        dims: D.
        continuous: whether g is, everywhere.
        trained: what training uses in place of f: the free matrix is made a rotation only where it is tested.
    """

    dims: int
    f: Callable[[Tensor], Tensor]
    g: Callable[[Tensor], Tensor]
    continuous: bool
    trained: Callable[[Tensor], Tensor] | None = None


def _as_columns(a: Tensor, n: int) -> Tensor:
    """[*batch, n k] -> [*batch, n, k], one column after the other."""
    return a.unflatten(-1, (-1, n)).mT


def _leading(matrix: Tensor) -> Tensor:
    return matrix[..., :-1].mT.flatten(-2)


def _length(a: Tensor) -> Tensor:
    return a.norm(dim=-1, keepdim=True).clamp_min(_LEAST)


def columns(n: int) -> Representation:
    """SO(n) in n^2 - n numbers, for n = 3 the 6D representation: all columns but the last, and Gram-Schmidt."""
    return Representation(dims=n * n - n, f=lambda a: gram_schmidt(_as_columns(a, n)), g=_leading, continuous=True)


def projected(n: int) -> Representation:
    """SO(n), n >= 3, in n^2 - 2n + 2 numbers, for n = 3 the 5D representation.

    Each of the columns 2, ..., n - 1 takes a number of the first along: (x, c) in R^(n+1), normalised, is projected from
    the sphere onto R^n by v = u_1: / (1 - u_0). As |c| = 1, u_0 <= 1 / sqrt 2, so that the pole is never near. Worked out,
    v = c (x + sqrt(1 + x^2)): the column's length carries the number, x = (|v| - 1 / |v|) / 2.
    """
    kept = 2  # numbers of the first column that stay as they are

    def g(matrix: Tensor) -> Tensor:
        first, others = matrix[..., :, 0], matrix[..., :, 1:-1].mT
        x = first[..., kept:, None]
        return torch.cat([first[..., :kept], (others * (x + (1 + x * x).sqrt())).flatten(-2)], -1)

    def f(a: Tensor) -> Tensor:
        others = a[..., kept:].unflatten(-1, (n - 2, n))
        lengths = _length(others)[..., 0]
        first = torch.cat([a[..., :kept], (lengths - 1 / lengths) / 2], -1)
        return gram_schmidt(torch.cat([first[..., None], others.mT], -1))

    return Representation(dims=n * n - 2 * n + 2, f=f, g=g, continuous=True)


def scaled(one: Representation, lengths: Sequence[float]) -> Representation:
    """The same representation in units of its own for each number."""

    def f(a: Tensor) -> Tensor:
        return one.f(a * a.new_tensor(lengths))

    def g(matrix: Tensor) -> Tensor:
        return one.g(matrix) / matrix.new_tensor(lengths)

    return Representation(dims=one.dims, f=f, g=g, continuous=one.continuous)


def all_columns(n: int) -> Representation:
    """O(n) in n^2 numbers: Gram-Schmidt on every column, which keeps the sign of the determinant."""
    return Representation(
        dims=n * n, f=lambda a: gram_schmidt(_as_columns(a, n)), g=lambda m: m.mT.flatten(-2), continuous=True
    )


def signed(n: int) -> Representation:
    """O(n) in n^2 - n + 1 numbers: a rotation's, and one whose sign is that of the determinant (of the last column)."""
    inner = columns(n)

    def f(a: Tensor) -> Tensor:
        made = inner.f(a[..., 1:])
        sign = torch.where(a[..., :1] < 0, -1.0, 1.0).to(a)
        return torch.cat([made[..., :-1], made[..., -1:] * sign[..., None]], -1)

    def g(matrix: Tensor) -> Tensor:
        return torch.cat([torch.linalg.det(matrix).sign()[..., None], inner.g(matrix)], -1)

    return Representation(dims=n * n - n + 1, f=f, g=g, continuous=True)


def similarity(n: int) -> Representation:
    """Similarity transforms, [s R | t] of n rows and n + 1 columns with s > 0, in n^2 numbers: the first column's length
    is kept, where a rotation's is thrown away, and t stands beside it."""

    def f(a: Tensor) -> Tensor:
        leading = _as_columns(a[..., :-n], n)
        scale = _length(leading[..., :, 0])[..., None]
        return torch.cat([scale * gram_schmidt(leading), a[..., -n:, None]], -1)

    def g(matrix: Tensor) -> Tensor:
        return torch.cat([_leading(matrix[..., :-1]), matrix[..., -1]], -1)

    return Representation(dims=n * n, f=f, g=g, continuous=True)


def nearest(n: int) -> Representation:
    """SO(n) in n^2 numbers: the nearest rotation (SVD; arXiv 2006.14616)."""
    return Representation(
        dims=n * n,
        f=lambda a: polar(_as_columns(a, n), proper=True),
        g=lambda matrix: matrix.mT.flatten(-2),
        continuous=True,
    )


def of_quaternion(q: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 3 3"]:
    """The rotation of q = (w, x, y, z) of any length."""
    w, x, y, z = (q / _length(q)).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def to_quaternion(matrix: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 4"]:
    """The unit quaternion with w >= 0: of the four rows of q q^T, which the matrix holds, the longest, normalised."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in matrix.unbind(-2))
    rows = [
        [1 + a + e + i, h - f, c - g, d - b],
        [h - f, 1 + a - e - i, b + d, c + g],
        [c - g, b + d, 1 - a + e - i, f + h],
        [d - b, c + g, f + h, 1 - a - e + i],
    ]
    products = torch.stack([torch.stack(row, -1) for row in rows], -2)
    longest = products.diagonal(dim1=-2, dim2=-1).argmax(-1)
    q = products.take_along_dim(longest[..., None, None], -2).squeeze(-2)
    return q / _length(q) * torch.where(q[..., :1] < 0, -1.0, 1.0).to(q)


def _of_axis_angle(a: Tensor) -> Tensor:
    """Angle pi tanh(a_0) about the direction of the other three, as the authors' code has it."""
    half = math.pi / 2 * torch.tanh(a[..., :1])
    return of_quaternion(torch.cat([half.cos(), half.sin() * a[..., 1:] / _length(a[..., 1:])], -1))


def _to_axis_angle(matrix: Tensor) -> Tensor:
    """The angle pi itself has no number: there the last one before it stands."""
    q = to_quaternion(matrix)
    sine = q[..., 1:].norm(dim=-1, keepdim=True)
    share = torch.atan2(sine, q[..., :1]) * 2 / math.pi
    axis = torch.where(sine > 0, q[..., 1:] / sine.clamp_min(torch.finfo(q.dtype).tiny), torch.eye(3).to(q)[0])
    return torch.cat([torch.atanh(share.clamp(max=1 - torch.finfo(q.dtype).eps)), axis], -1)


def _of_rodrigues(a: Tensor) -> Tensor:
    """Axis times half the angle, as the authors' code has it; smooth at 0."""
    half = _length(a)
    return of_quaternion(torch.cat([half.cos(), half.sin() / half * a], -1))


def _to_rodrigues(matrix: Tensor) -> Tensor:
    q = to_quaternion(matrix)
    sine = q[..., 1:].norm(dim=-1, keepdim=True)
    return torch.where(sine > 0, torch.atan2(sine, q[..., :1]) / sine.clamp_min(_LEAST), 1.0) * q[..., 1:]


def _of_euler(a: Tensor) -> Tensor:
    """X(a_0) Z(a_1) Y(a_2): intrinsic turns about x, z and y."""
    (c0, c1, c2), (s0, s1, s2) = a.cos().unbind(-1), a.sin().unbind(-1)
    rows = [
        [c1 * c2, -s1, c1 * s2],
        [s0 * s2 + c0 * c2 * s1, c0 * c1, c0 * s1 * s2 - c2 * s0],
        [c2 * s0 * s1 - c0 * s2, c1 * s0, c0 * c2 + s0 * s1 * s2],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _to_euler(matrix: Tensor) -> Tensor:
    """The middle angle in [-pi/2, pi/2]. The last is read off once the first is undone, so that it is right at the poles
    too, where any first one serves."""
    first = torch.atan2(matrix[..., 2, 1], matrix[..., 1, 1])
    middle = torch.atan2(-matrix[..., 0, 1], torch.hypot(matrix[..., 1, 1], matrix[..., 2, 1]))
    c, s = first.cos(), first.sin()
    sine, cosine = (s * matrix[..., 1, k] - c * matrix[..., 2, k] for k in (0, 2))
    return torch.stack([first, middle, torch.atan2(sine, -cosine)], -1)


def _free(a: Tensor) -> Tensor:
    return _as_columns(a, 3)


REPRESENTATIONS: dict[str, Representation] = {
    "euler": Representation(dims=3, f=_of_euler, g=_to_euler, continuous=False),
    "rodrigues": Representation(dims=3, f=_of_rodrigues, g=_to_rodrigues, continuous=False),
    "axis-angle": Representation(dims=4, f=_of_axis_angle, g=_to_axis_angle, continuous=False),
    "quaternion": Representation(dims=4, f=of_quaternion, g=to_quaternion, continuous=False),
    # As in the authors' code: what is projected is measured in the most that each of its numbers comes to.
    "5d": scaled(projected(3), (1, 1, 1 + math.sqrt(2), 1 + math.sqrt(2), math.sqrt(2))),
    "6d": columns(3),
    "svd": nearest(3),
    "matrix": Representation(
        dims=9,
        f=lambda a: gram_schmidt(_free(a)[..., :2]),
        g=lambda m: m.mT.flatten(-2),
        continuous=True,
        trained=_free,
    ),
}
"""Those of SO(3) that the experiments compare, by their dimension."""


def random_rotations(count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """[count, 3, 3], all equally likely (Haar): quaternions of normal numbers."""
    return of_quaternion(torch.randn(count, 4, generator=generator, dtype=dtype))


def angle_between(a: Matrices, b: Matrices) -> Float[Tensor, "*batch"]:
    """The angle in radians of the rotation that leads from one to the other, for n = 3. From the chord: acos of the trace
    loses all angles below 1e-3 in fp32, and has no slope at 0."""
    chord = (a - b).flatten(-2).norm(dim=-1)
    return 2 * torch.asin((chord / math.sqrt(8)).clamp(max=1.0))


def steepest(g: Callable[[Tensor], Tensor], path: Callable[[Tensor], Tensor], step: float) -> float:
    """The discontinuity probe: the largest |g(R(t + step)) - g(R(t))| / step over t in [0, 1] along a closed path of
    matrices. Bounded for all steps where g is continuous along it, growing as 1 / step where it jumps."""
    t = torch.linspace(0, 1, round(1 / step) + 1, dtype=torch.float64)
    return float(g(path(t)).diff(dim=0).norm(dim=-1).max() / step)


def turning(axis: Float[Tensor, "3"], start: Float[Tensor, "3 3"]) -> Callable[[Tensor], Tensor]:
    """The closed path of t in [0, 1] that turns `start` once about an axis."""

    def path(t: Tensor) -> Tensor:
        half = math.pi * t[:, None]
        return of_quaternion(torch.cat([half.cos(), half.sin() * axis / axis.norm()], -1)) @ start

    return path

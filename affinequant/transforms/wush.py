"""Closed-form transforms: balance activations against weights without a gradient (WUSH, arXiv 2512.00956).

Let M = E[x^T x] be the second moment of the activations and G = W^T W / rows that of the weights' rows. Rounding adds
noise in proportion to what is rounded, so a good P makes E|x P|^2 = tr(P^T M P) and E|w P^-T|^2 = tr(P^-1 G P^-T) small
together. With M = B^T B and G = C^T C these are |B P|^2 and |C P^-T|^2, and by Cauchy and Schwarz their product is at
least the square of the nuclear norm of B C^T, that is of tr S in

    B G B^T = V S^2 V^T    (V orthogonal, S a positive diagonal).

P = B^-1 V S^(1/2) H reaches it for any orthogonal H, and is the most general map that does so with equal energies:

    P^T M P    = H^T S^(1/2) V^T (B^-T B^T B B^-1) V S^(1/2) H = H^T S H,
    P^-1 G P^-T = H^T S^(-1/2) V^T (B G B^T) V S^(-1/2) H      = H^T S H.

A quantiser's step follows the largest coordinate, so H is a Hadamard-like rotation that gives every coordinate the same
energy tr S / n, on both sides.

Condition number: P P^T = B^-1 V S V^T B^-T is the geometric mean of M^-1 and G, whose condition number is at most the
geometric mean of theirs. Damping by a fraction d of the mean energy bounds each by 1 + n / d, hence
cond(P) <= (cond M cond G)^(1/4) <= (1 + n / d)^(1/2): 80 for n = 64 at d = 0.01, and rank does not matter.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from affinequant.transforms.linalg import orthogonal_factors, to_blocks

DAMPING = 0.01
ROUNDS = 1
"""More lower the product of energies by a few per cent, and no perplexity (SmolLM2-135M at W4A4)."""


def wush(
    moment: Float[Tensor, "*batch n n"], gram: Float[Tensor, "*batch n n"], damping: float = DAMPING
) -> Float[Tensor, "*batch n n"]:
    """The P above, in fp64, for each of a batch; its condition number is at most (1 + n / damping)^(1/2)."""
    m, g = damped(moment, damping), damped(gram, damping)
    b = torch.linalg.cholesky(m, upper=True)
    squares, v = torch.linalg.eigh(b @ g @ b.mT)
    # Largest first: the first row of a cosine matrix is flat, so what matters most is spread evenly from the start.
    squares, v = squares.flip(-1), v.flip(-1)
    s = squares.clamp_min(0).sqrt()
    return torch.linalg.solve_triangular(b, v * s.sqrt()[..., None, :], upper=True) @ level(s)


def level(energies: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n n"]:
    """An orthogonal H with mean(energies) all along the diagonal of H^T diag(energies) H, in fp64.

    A Hadamard matrix where n is a power of two. Elsewhere the factors of `orthogonal_factors` come close, and n - 1
    plane rotations finish it, each of which brings one entry to the mean (Schur and Horn: any diagonal that the
    eigenvalues majorise can be had, and a constant one always).
    """
    n = energies.shape[-1]
    energies = energies.double()
    h = torch.kron(*orthogonal_factors(n)).to(energies.device).expand(*energies.shape, n)
    if n & (n - 1) == 0:
        return h
    h = h.reshape(-1, n, n).clone()
    a = h.mT @ (energies.reshape(-1, n, 1) * h)
    mean = energies.mean(-1).reshape(-1, 1)
    every = torch.arange(len(a), device=a.device)
    for _ in range(n - 1):
        off = a.diagonal(dim1=-2, dim2=-1) - mean
        low, high = off.argmin(-1), off.argmax(-1)
        _turn(a, h, every, low, high, off)
    return h.reshape(*energies.shape, n)


def _turn(a: Tensor, h: Tensor, every: Tensor, low: Tensor, high: Tensor, off: Tensor) -> None:
    """Rotate the plane (low, high) of each matrix by the smaller angle that brings a[low, low] to the mean."""
    below, above, cross = off[every, low], off[every, high], a[every, low, high]
    # (c e_low + s e_high) has the mean's energy: above t^2 + 2 cross t + below = 0 for t = s / c, with below <= 0.
    root = (cross.square() - above * below).clamp_min(0).sqrt()
    t = -below / torch.where(cross < 0, cross - root, cross + root).where(above > 0, torch.ones_like(cross))
    t = torch.where((above > 0) & t.isfinite(), t, torch.zeros_like(t))
    c = (1 + t.square()).rsqrt()[:, None]
    s = t[:, None] * c
    for matrix in (h, a):
        first, second = matrix[every, :, low], matrix[every, :, high]
        matrix[every, :, low], matrix[every, :, high] = c * first + s * second, c * second - s * first
    first, second = a[every, low], a[every, high]
    a[every, low], a[every, high] = c * first + s * second, c * second - s * first


def damped(moment: Float[Tensor, "*batch n n"], damping: float) -> Float[Tensor, "*batch n n"]:
    """The symmetric part in fp64, plus a fraction of its mean energy (of 1, where there is none) on the diagonal."""
    m = moment.double()
    m = (m + m.mT) / 2
    mean = m.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None]
    extra = damping * torch.where(mean > 0, mean, torch.ones_like(mean))
    return m + torch.diag_embed(extra.expand(m.shape[:-1]))


def partial_moments(
    x: Float[Tensor, "*batch n"], n1: int, n2: int
) -> tuple[Float[Tensor, "n1 n1"], Float[Tensor, "n2 n2"]]:
    """Partial traces of the sum of x^T x over rows x, in fp64, without forming it: sums over X X^T and X^T X for each
    row as a matrix X [n1, n2]. Those of several batches add up.

    If the moment is M1 (x) M2 they are multiples of M1 and M2, so `wush` of each gives a Kronecker start in one pass
    over data that need not be kept; `wush_kronecker` refines it.
    """
    rows = x.reshape(-1, n1, n2).double()
    return _trace_second(rows, None), _trace_first(rows, None)


def wush_kronecker(
    moment: Float[Tensor, "n n"],
    gram: Float[Tensor, "n n"],
    n1: int,
    n2: int,
    *,
    damping: float = DAMPING,
    rounds: int = ROUNDS,
) -> tuple[Float[Tensor, "n1 n1"], Float[Tensor, "n2 n2"]]:
    """(P1, P2), in fp64: the Kronecker product P1 (x) P2 that minimises the same product of energies.

    For a given P2 that is the problem above for P1, with the partial traces of both moments after P2 in the place of M
    and G; so the two are solved in turn. Exact for Kronecker products, where one round is enough. The problem is convex
    along geodesics of positive matrices (Sra and Hosseini, doi 10.1137/140978168), so no other minimum is in the way.
    """
    x, w = (_rows_of(matrix) for matrix in (moment, gram))
    return wush_kronecker_rows(x, w, n1, n2, damping=damping, rounds=rounds)


def wush_kronecker_rows(
    x: Float[Tensor, "*batch n"],
    w: Float[Tensor, "rows n"] | Iterable[Float[Tensor, "rows n"]],
    n1: int,
    n2: int,
    *,
    damping: float = DAMPING,
    rounds: int = ROUNDS,
) -> tuple[Float[Tensor, "n1 n1"], Float[Tensor, "n2 n2"]]:
    """`wush_kronecker` from activations and weights themselves, without moments of full width, which would cost n per
    entry where this costs n1 + n2.

    Give activations as they are, first token included, after a `balance` that folds: on SmolLM2-135M at W4A4 both matter
    more than anything else here (tokens scaled to one length: 14 % more perplexity; no balance: 19 %). Weights may come in
    several matrices, which are gone through twice a round.
    """
    x, parts = x.reshape(-1, n1, n2).double(), (w,) if isinstance(w, Tensor) else w
    first, second = None, None
    for _ in range(rounds):
        inverse = None if second is None else torch.linalg.inv(second).mT
        gram = torch.stack([_trace_second(part.reshape(-1, n1, n2).double(), inverse) for part in parts]).sum(0)
        first = wush(_trace_second(x, second), gram, damping)
        inverse = torch.linalg.inv(first).mT
        gram = torch.stack([_trace_first(part.reshape(-1, n1, n2).double(), inverse) for part in parts]).sum(0)
        second = wush(_trace_first(x, first), gram, damping)
    assert first is not None and second is not None, "at least one round"
    return first, second


def _rows_of(moment: Tensor) -> Tensor:
    """Rows with this second moment as their sum, whatever its rank."""
    squares, v = torch.linalg.eigh(damped(moment, 0.0))
    return squares.clamp_min(0).sqrt()[:, None] * v.mT


def _trace_second(rows: Tensor, p2: Tensor | None) -> Tensor:
    """Sum of (X P2)(X P2)^T over rows X [n1, n2]."""
    turned = (rows if p2 is None else rows @ p2).movedim(1, 0).flatten(1)
    return turned @ turned.mT


def _trace_first(rows: Tensor, p1: Tensor | None) -> Tensor:
    """Sum of (P1^T X)^T (P1^T X) over rows X [n1, n2]."""
    turned = (rows if p1 is None else p1.mT @ rows).flatten(0, 1)
    return turned.mT @ turned


def block_moments(x: Float[Tensor, "*batch n"], count: int, copies: int = 1) -> Float[Tensor, "count b b"]:
    """The sum of x^T x over rows x for each of `count` blocks, in fp64: what `wush` needs for one matrix per block, or
    per KV head, with those of the `copies` query heads that share it added up. Those of several batches add up too."""
    rows = to_blocks(x.double(), count, copies)
    return rows.mT @ rows


def wush_blocks(
    moment: Float[Tensor, "n n"], gram: Float[Tensor, "n n"], width: int, damping: float = DAMPING
) -> Float[Tensor, "count width width"]:
    """`wush` of each block of `width` features on its own."""
    blocks = []
    for matrix in (moment, gram):
        count = len(matrix) // width
        index = torch.arange(count, device=matrix.device)
        blocks.append(matrix.reshape(count, width, count, width)[index, :, index])
    return wush(blocks[0], blocks[1], damping)


def balance(
    moment: Float[Tensor, "*batch n"], gram: Float[Tensor, "*batch n"], damping: float = DAMPING
) -> Float[Tensor, "*batch n"]:
    """The diagonal p, with geometric mean 1, that minimises sum(m p^2) sum(g / p^2), in fp64.

    m and g are the diagonals of both moments. By Cauchy and Schwarz the product is at least (sum (m g)^(1/2))^2, which is
    reached where m p^2 and g / p^2 are the same up to a factor: p = (g / m)^(1/4). Its extremes differ by a factor of at
    most (1 + n / damping)^(1/2). Ahead of a Kronecker product it folds, and does what factors cannot.
    """

    def safe(value: Tensor) -> Tensor:
        value = value.double()
        mean = value.mean(-1, keepdim=True)
        return value + damping * torch.where(mean > 0, mean, torch.ones_like(mean))

    log_p = (safe(gram).log() - safe(moment).log()) / 4
    return (log_p - log_p.mean(-1, keepdim=True)).exp()

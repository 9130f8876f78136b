"""The almost-linear RNN (arXiv 2410.14240): z_t = A z_{t-1} + W phi(z_{t-1}) + h with a ReLU on the last P of M units.

In each of the at most 2^P regions that the signs of those P units tell apart the map is affine, which is what makes the
network an analysis of the system it was trained on.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from affinequant.errors import AffineQuantError

FAR = 1e5
"""A latent number beyond it is divergence."""
CHECKED = 100
"""Steps of a free run between two looks at whether it has diverged."""
Floats = NDArray[np.floating]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AlmostLinear:
    """An AL-RNN. It is run in float64 whatever it was trained in.

    Attributes:
        A: the diagonal, [M].
        W: [M, M].
        h: [M].
        L: latent units of a start from what is observed of it, [M - N, N].
        P: how many units have a ReLU: the last ones. Bit k of a region's code is that of unit M - P + k.
    """

    A: Floats
    W: Floats
    h: Floats
    L: Floats
    P: int

    def __post_init__(self) -> None:
        check(len(self.A), self.P, self.N)

    @property
    def M(self) -> int:
        """Latent units."""
        return len(self.A)

    @property
    def N(self) -> int:
        """Observed ones: the first, none of which has a ReLU."""
        return self.L.shape[1]

    def start(self, observed: Floats) -> Floats:
        """The latent state [M] that an observation [N] starts with."""
        return np.concatenate([observed, self.L @ observed])

    def free_run(self, start: Floats, steps: int) -> Floats:
        """The trajectory from a latent start [M], which is its first row: [steps, M], or what came before it diverged."""
        made = np.empty((steps, self.M))
        made[:1] = start
        weights = packed(self.A, self.W, self.h, self.P).astype(np.float64)
        entry = np.ones(weights.shape[1])
        state, last, bent = entry[: self.M], entry[self.M - self.P : self.M], entry[self.M : self.M + self.P]
        state[:] = start
        np.maximum(last, 0, out=bent)
        for begin in range(1, steps, CHECKED):
            block = made[begin : begin + CHECKED]
            for row in block:
                weights.dot(entry, out=row)
                state[:] = row
                np.maximum(last, 0, out=bent)
            near = (np.abs(block) <= FAR).all(axis=1)  # a NaN is not near
            if not near.all():
                return made[: begin + int(near.argmin())]
        return made


def check(units: int, bent: int, observed: int) -> None:
    """Refuse numbers of units that make no AL-RNN.

    Raises:
        AffineQuantError: 1 <= N <= M - P or P >= 0 does not hold (exit 2).
    """
    if bent < 0 or not 1 <= observed <= units - bent:
        raise AffineQuantError(
            f"{units} units with {bent} ReLUs cannot show {observed} numbers",
            "almost-linear RNN",
            f"give 0 <= P and M >= N + P, e.g. M = {observed + max(bent, 0)}",
        )


def new_model(units: int, bent: int, observed: int, random: np.random.Generator) -> AlmostLinear:
    """An untrained one as the authors' code starts it: A the diagonal of a positive definite matrix of norm 1, W small."""
    check(units, bent, observed)
    root = random.standard_normal((units, units))
    definite = root.T @ root / units + np.eye(units)
    bound = math.sqrt(6 / units)  # Glorot's, of (M - N) x N
    return AlmostLinear(
        A=np.diag(definite) / np.linalg.eigvalsh(definite)[-1],
        W=0.01 * random.standard_normal((units, units)),
        h=np.zeros(units),
        L=random.uniform(-bound, bound, (units - observed, observed)),
        P=bent,
    )


def packed(A: Floats, W: Floats, h: Floats, bent: int) -> Floats:
    """All weights as one matrix [M, M + P + 1], which takes [z, ReLU of its last P, 1] to the next z."""
    straight = len(A) - bent
    matrix = np.concatenate([W[:, :straight], np.zeros((len(A), bent), A.dtype), W[:, straight:], h[:, None]], axis=1)
    matrix[np.arange(len(A)), np.arange(len(A))] += A
    return matrix


def unpacked(matrix: Floats, bent: int) -> tuple[Floats, Floats, Floats]:
    """The adjoint of `packed`: a gradient with respect to its result as those of A, W and h."""
    units = len(matrix)
    W = np.concatenate([matrix[:, : units - bent], matrix[:, units : units + bent]], axis=1)
    return np.diagonal(matrix).copy(), W, matrix[:, -1].copy()

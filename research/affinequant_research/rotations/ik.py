"""Inverse kinematics (arXiv 1812.07035): from where the joints of a body are, the rotations that take them there.

A network sees joint positions and gives a rotation for each joint, forward kinematics makes positions of these, and those
are compared with what was seen; no rotation is ever shown to it. The paper has motion capture of 57 joints; here is a
skeleton of 21 whose joints turn by limited random angles, and whose root turns anyhow. So orders can be compared with the
paper's, not centimetres.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from affinequant_evals import Suite
from affinequant_evals.harness import Battery
from jaxtyping import Float
from torch import Tensor, nn

from affinequant.learning.phases import Phase
from affinequant.report.figure import Figure
from affinequant_research.experiment import Claim, Experiment, Found, Trial, arms
from affinequant_research.rotations.angles import by_dimension, by_percentile, figures, over_updates, spread_scores
from affinequant_research.rotations.learner import BLOCK, Learner, in_blocks, perceptron, seeded, start_at
from affinequant_research.rotations.representations import REPRESENTATIONS, random_rotations

COMPARED = ("euler", "axis-angle", "quaternion", "5d", "6d", "matrix")
SKELETON: dict[str, tuple[str, tuple[float, float, float], float]] = {
    "pelvis": ("", (0, 0, 0), math.inf),
    "spine": ("pelvis", (0, 0, 15), 15),
    "chest": ("spine", (0, 0, 20), 15),
    "neck": ("chest", (0, 0, 20), 20),
    "head": ("neck", (4, 0, 15), 0),
}
"""Joint -> parent, where it is from there in centimetres (x ahead, y to the left, z up), and by how much it turns: the
standard deviation in degrees about each axis."""
for _side, _sign in (("left", 1), ("right", -1)):
    SKELETON |= {
        f"{_side} shoulder": ("chest", (0, 18 * _sign, 15), 40),
        f"{_side} elbow": (f"{_side} shoulder", (0, 28 * _sign, 0), 35),
        f"{_side} wrist": (f"{_side} elbow", (0, 25 * _sign, 0), 25),
        f"{_side} hand": (f"{_side} wrist", (0, 9 * _sign, 0), 0),
        f"{_side} hip": ("pelvis", (0, 9 * _sign, -5), 30),
        f"{_side} knee": (f"{_side} hip", (0, 0, -42), 30),
        f"{_side} ankle": (f"{_side} knee", (0, 0, -40), 15),
        f"{_side} toe": (f"{_side} ankle", (14, 0, -6), 0),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`near`: how much more the joints beside the root count, as in the paper's code; `tested`: poses."""

    representations: tuple[str, ...] = COMPARED
    updates: int = 10_000
    rate: float = 1e-3
    batch: int = 64
    width: int = 512
    near: float = 10.0
    tested: int = 10_000


class Body:
    """Forward kinematics of the skeleton, one generation of joints after the other."""

    def __init__(self) -> None:
        depth: dict[str, int] = {}
        for name, (parent, _, _) in SKELETON.items():
            depth[name] = depth[parent] + 1 if parent else 0
        self.names = sorted(SKELETON, key=lambda name: depth[name])
        self.sizes = [list(depth.values()).count(level) for level in range(max(depth.values()) + 1)]
        places = {name: index for index, name in enumerate(self.names)}
        begins = [sum(self.sizes[:level]) for level in range(len(self.sizes))]
        self.parents = [
            torch.tensor([places[SKELETON[name][0]] - begins[level - 1] for name in self.names[begin : begin + size]])
            for level, (begin, size) in enumerate(zip(begins, self.sizes, strict=True))
            if level
        ]
        self.offsets = torch.tensor([SKELETON[name][1] for name in self.names])[..., None] / 100
        self.spread = torch.tensor([SKELETON[name][2] for name in self.names[1:]])[:, None].deg2rad()
        self.near = torch.tensor([places[name] for name in self.names if SKELETON[name][0] == "pelvis"])

    def positions(self, turns: Float[Tensor, "batch joints 3 3"]) -> Float[Tensor, "batch joints 3"]:
        """Where the joints are, in metres from the root, when each turns what hangs on it."""
        generations, offsets = turns.split(self.sizes, 1), self.offsets.to(turns).split(self.sizes)
        frame, place = generations[0], turns.new_zeros(len(turns), 1, 3, 1)
        found = [place]
        for parents, own, offset in zip(self.parents, generations[1:], offsets[1:], strict=True):
            frame, place = frame.index_select(1, parents), place.index_select(1, parents)
            place = place + frame @ offset
            frame = frame @ own
            found.append(place)
        return torch.cat(found, 1).squeeze(-1)

    def poses(self, count: int, generator: torch.Generator) -> Float[Tensor, "count joints 3"]:
        """Joint positions of random poses: limited normal angles, and any rotation of the root."""
        normal = torch.randn(count, len(self.names) - 1, 3, generator=generator).clamp(-2.5, 2.5)
        turns = REPRESENTATIONS["rodrigues"].f(normal * self.spread / 2)
        root = random_rotations(count, generator)
        return self.positions(torch.cat([root[:, None], turns], 1))


class Solver(nn.Module):
    """Joint positions -> a rotation for each joint."""

    def __init__(self, name: str, config: Settings, body: Body) -> None:
        super().__init__()
        self.representation, self.body, self.config = REPRESENTATIONS[name], body, config
        joints, width = len(body.names), config.width
        self.net = perceptron(3 * joints, width, width, width, joints * self.representation.dims)
        start_at(self.net[-1], self.representation.g(torch.eye(3)).repeat(joints))  # pyright: ignore[reportArgumentType]

    def forward(self, positions: Float[Tensor, "batch joints 3"]) -> Float[Tensor, "batch joints d"]:
        """The network's numbers."""
        return self.net(positions.flatten(1)).unflatten(-1, (len(self.body.names), -1))

    def loss(self, positions: Tensor) -> Tensor:
        """Squared error of the positions, those beside the root once more."""
        made = self.body.positions((self.representation.trained or self.representation.f)(self(positions)))
        error = (made - positions).square()
        return error.mean() + self.config.near * error[:, self.body.near].mean()

    @torch.no_grad()
    def errors(self, positions: Tensor) -> Float[Tensor, "values"]:
        """Distances in centimetres, of every joint but the root in every pose."""
        made = self.body.positions(self.representation.f(self(positions)))
        return (100 * (made - positions)[:, 1:].norm(dim=-1)).flatten()


def build(config: Settings, seed: int, arm: str) -> Trial:
    """The trial of one representation."""
    body = Body()
    subject, tested = Solver(arm, config, body), body.poses(config.tested, seeded(seed, -1))

    def batches(epoch: int) -> Iterator[Tensor]:
        yield from body.poses(BLOCK * config.batch, seeded(seed, epoch)).split(config.batch)

    battery = Battery(name="joints", function=lambda net: spread_scores(net.errors(tested)))
    phase = Phase(Learner(subject, config.rate, subject.loss), batches, in_blocks(config.updates))
    suite = Suite(name="joints", metrics=(battery,))
    return Trial(phase=phase, subject=subject, suite=suite, tensors=subject.state_dict)


def drawn(found: Found) -> tuple[Figure, ...]:
    """The figures of this experiment."""
    caption = "Over all joints but the root, and poses that were not trained on."
    draw = (partial(by_dimension, unit="cm", caption=caption), partial(by_percentile, unit="cm"), over_updates)
    return figures(found, "ik", found.config.representations, draw)


_PAPER = "paper: inverse kinematics, mean 1.9 against 3.3, 2.7 and 22.9 cm"
CLAIMS = (
    Claim(metric="6d/mean", op="<=", than="quaternion/mean", source=_PAPER),
    Claim(metric="6d/mean", op="<=", than="euler/mean", source=_PAPER),
    Claim(metric="6d/mean", op="<=", than="matrix/mean", source=_PAPER),
    Claim(
        metric="6d/max", op="<=", than="quaternion/max", factor=0.5, source="paper: inverse kinematics, 28.7 and 104 cm"
    ),
)
BENCH = Settings()
EXPERIMENT = Experiment(
    name="ik",
    about="rotations of a body's joints from their positions; errors of positions in centimetres",
    source="arXiv 1812.07035, inverse kinematics",
    presets={
        "smoke": replace(BENCH, representations=("6d",), updates=100, width=16, batch=4, tested=50),
        "ci": replace(BENCH, representations=("quaternion", "6d"), updates=600, width=256, tested=2000),
        "bench": BENCH,
        "paper": replace(BENCH, updates=1_000_000, rate=1e-5, width=1024),
    },
    stages=lambda config: arms(config.representations),
    build=build,
    claims={
        "ci": (Claim(metric="6d/mean", op="<=", than=40.0, source="derived: two random poses are 78 cm apart"),),
        "bench": CLAIMS,
        "paper": CLAIMS,
    },
    figures=drawn,
    shown=("mean", "median", "p90", "max", "std"),
)

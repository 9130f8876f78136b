"""How an AL-RNN is trained: windows of a series with noise, the loss under sparse teacher forcing, the best checkpoint."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from affinequant.errors import AffineQuantError
from affinequant.fit import FitConfig, Group
from affinequant.learning.phases import Phase
from affinequant_research.alrnn.model import AlmostLinear, Floats, new_model
from affinequant_research.alrnn.rollout import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Settings of a training; the letters are the paper's.

    Attributes:
        M: latent units.
        T: steps that a window is predicted for.
        tau: the observed units are set to the data every so many steps.
        noise: deviation of what is added to inputs and targets, of data whose deviation is 1.
        rate, last_rate: of learning, falling exponentially.
        check_every: updates between two checkpoints, of which one is kept, by its free run.
    """

    M: int = 20
    T: int = 200
    tau: int = 16
    batch: int = 16
    noise: float = 0.05
    rate: float = 1e-3
    last_rate: float = 1e-5
    updates: int = 20_000
    check_every: int = 500


def relus_of(arm: str) -> int:
    """2 for `P2`.

    Raises:
        AffineQuantError: it is not written like that (exit 2).
    """
    if arm[:1] != "P" or not arm[1:].isdecimal():
        raise AffineQuantError(f"{arm!r} names no number of ReLUs", "--set arms", "write P2 for two")
    return int(arm[1:])


class Learner:
    """The objective: what a network of `AlmostLinear`'s weights predicts of windows is to be near to them."""

    def __init__(self, config: Training, relus: int, observed: int, seed: int) -> None:
        self.config, self.relus = config, relus
        start = new_model(config.M, relus, observed, np.random.default_rng([seed, config.M, relus]))
        self.A, self.W, self.h, self.L = (
            nn.Parameter(torch.from_numpy(one.astype(np.float32))) for one in (start.A, start.W, start.h, start.L)
        )
        self.rollout = Rollout(
            units=config.M, bent=relus, observed=observed, steps=config.T, batch=config.batch, every=config.tau
        )

    def groups(self) -> Sequence[Group]:
        """All weights."""
        return [Group(name="rnn", parameters=[self.A, self.W, self.h, self.L], lr=self.config.rate)]

    def loss(self, batch: Tensor) -> Tensor:
        """Mean squared error of the predictions before they are forced, of windows [T + 1, N, batch]."""
        start = torch.cat([batch[0], self.L @ batch[0]])
        return (self.rollout(self.A, self.W, self.h, start, batch) - batch[1:]).square().mean()

    def model(self) -> AlmostLinear:
        """The network as it stands, in float64."""
        weights = {name: getattr(self, name).detach().double().numpy() for name in "AWhL"}
        return AlmostLinear(**weights, P=self.relus)


def windows(series: Floats, config: Training, seed: int, epoch: int) -> Iterator[Tensor]:
    """An epoch's batches of windows [T + 1, N, batch] from anywhere in a series [steps, N], with noise: by (seed, epoch)."""
    random = np.random.default_rng([seed, epoch])
    within = np.arange(config.T + 1)[:, None]
    held = series.astype(np.float32)
    for _ in range(config.check_every):
        starts = random.integers(0, len(series) - config.T, config.batch)
        window = held[starts + within].transpose(0, 2, 1)
        noise = random.standard_normal(window.shape, np.float32)
        yield torch.from_numpy(window + np.float32(config.noise) * noise)


def probes_of(
    learner: Learner, measure: Callable[[AlmostLinear], Mapping[str, float]], names: Sequence[str]
) -> dict[str, Callable[[], float]]:
    """Each of what is measured of a network as a probe of its own. While its weights stay they are measured once."""
    seen: list[tuple[Tensor, Mapping[str, float]]] = []

    def probe(name: str) -> float:
        now = learner.W.detach()
        if not seen or not torch.equal(seen[0][0], now):
            seen[:] = [(now.clone(), measure(learner.model()))]
        return seen[0][1][name]

    return {name: partial(probe, name) for name in names}


def phase_of(
    learner: Learner, series: Floats, seed: int, probes: Mapping[str, Callable[[], float]], judge: str = "d_stsp"
) -> Phase:
    """The training of a network on a series [steps, N].

    Args:
        probes: what is logged of each checkpoint.
        judge: the one of them by which a checkpoint is kept, the lower the better.

    Raises:
        AffineQuantError: the settings do not fit the series or one another (exit 2).
    """
    config = learner.config
    if config.check_every < 1 or config.updates < 1 or config.updates % config.check_every:
        raise AffineQuantError(
            f"updates is {config.updates}, check_every {config.check_every}", "--set", "give a multiple of check_every"
        )
    if len(series) <= config.T:
        raise AffineQuantError(
            f"the series has {len(series)} steps, a window {config.T + 1}", "--set", "give a smaller T"
        )
    fit = FitConfig(
        epochs=config.updates // config.check_every,
        steps_per_epoch=config.check_every,
        optimizer="radam",
        schedule="exponential",
        last_rate=config.last_rate / config.rate,
        judge=judge,
        probe_every=1,
    )
    return Phase(learner, lambda epoch: windows(series, config, seed, epoch), fit, probes)

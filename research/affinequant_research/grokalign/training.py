"""What the experiments have in common: networks without biases, the objective with its penalty, Grokfast, measurements."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from affinequant_evals import Better, Metric, Score, Suite, mean_score
from jaxtyping import Float, Int
from torch import Tensor, nn

from affinequant.errors import unknown_name
from affinequant.fit import FitReport, Group
from affinequant_research.experiment import Series
from affinequant_research.grokalign.jacobian import (
    Estimator,
    centroid_alignment,
    frobenius,
    jacobian_norms,
    jacobians,
    leading_share,
    row_alignment,
)
from affinequant_research.series import first_update, one_of

Batch = tuple[Tensor, Tensor]
"""Inputs, and what belongs to them."""


def dtype_of(name: str) -> torch.dtype:
    """float32 or float64.

    Raises:
        AffineQuantError: another.
    """
    known = {"float32": torch.float32, "float64": torch.float64}
    if name not in known:
        raise unknown_name("dtype", name, known, where="--set dtype")
    return known[name]


def mlp(widths: Sequence[int], scale: float, dtype: torch.dtype) -> nn.Sequential:
    """ReLU between linears without biases, at `scale` times torch's own start: a large one makes the delay."""
    layers = [nn.Linear(a, b, bias=False, dtype=dtype) for a, b in itertools.pairwise(widths)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(scale)
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


def squared_error(outputs: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> Tensor:
    """Mean over samples and classes of the square to the one-hot label."""
    return nn.functional.mse_loss(outputs, nn.functional.one_hot(labels, outputs.shape[1]).to(outputs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalty:
    """`weight` * the mean norm N of the samples' Jacobians, or with a `level` `weight` * |level - mean N|: held there."""

    weight: float = 0.0
    level: float | None = None
    estimator: Estimator = "projected"
    count: int = 1

    def __call__(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        """What is added to the loss."""
        norm = jacobian_norms(outputs, inputs, self.estimator, self.count).mean()
        return self.weight * (norm if self.level is None else (norm - self.level).abs())


@dataclass(kw_only=True)
class Grokfast:
    """Grokfast-EMA (arXiv 2405.20233): to each gradient `gain` times the running mean of its past is added.

    `fit` leaves gradients alone: this sits where autograd has just put one, and belongs to no optimizer.
    """

    parameters: Sequence[nn.Parameter]
    decay: float = 0.8
    gain: float = 0.1
    means: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(lambda one, index=index: self._add(one, index))

    def _add(self, parameter: Tensor, index: int) -> None:
        assert parameter.grad is not None
        if not self.means:
            self.means += [torch.full_like(one, torch.nan) for one in self.parameters]
        mean, gradient = self.means[index], parameter.grad
        mean.copy_(torch.where(mean.isfinite(), mean.lerp(gradient, 1 - self.decay), gradient))
        gradient.add_(mean, alpha=self.gain)


@dataclass(kw_only=True)
class Aligned:
    """Task loss and penalty out of one forward pass.

    Attributes:
        enter: batch's inputs -> what the Jacobian is taken with respect to, which `network` reads.
    """

    network: Callable[[Tensor], Tensor]
    group: Group
    task: Callable[[Tensor, Tensor], Tensor] = squared_error
    penalty: Penalty = field(default_factory=Penalty)
    grokfast: Grokfast | None = None
    enter: Callable[[Tensor], Tensor] = lambda x: x.detach().clone().requires_grad_()

    def groups(self) -> list[Group]:
        """The whole network."""
        return [self.group]

    def loss(self, batch: Batch) -> Iterator[tuple[Sequence[str], Mapping[str, Tensor]]]:
        """One update of the parameters alone: the inputs, which have gradients too, need none of the loss."""
        inputs = self.enter(batch[0])
        outputs = self.network(inputs)
        terms = {"task": self.task(outputs, batch[1])}
        if self.penalty.weight:
            terms["jacobian"] = self.penalty(outputs, inputs)
        yield (self.group.name,), terms

    def state(self) -> dict[str, Any]:
        """Grokfast's running means."""
        return {"means": self.grokfast.means if self.grokfast else []}

    def load(self, state: Mapping[str, Any]) -> None:
        """Have them again."""
        if self.grokfast:
            self.grokfast.means = list(state["means"])


def slices_of(data: Batch, size: int) -> list[Batch]:
    """Batches of `size` in the order of the data, as the reference takes them."""
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


@torch.no_grad()
def hits(network: Callable[[Tensor], Tensor], data: Batch) -> Tensor:
    """1 for each sample that is told right, else 0."""
    return (network(data[0]).argmax(-1) == data[1]).float()


def accuracy(network: Callable[[Tensor], Tensor], data: Batch) -> float:
    """The share of samples that are told right."""
    return float(hits(network, data).mean())


GEOMETRY: Mapping[str, Better] = {
    "jac_fro": "lower",
    "jac_pc1": "higher",
    "centroid_cos": "higher",
    "row_alignment": "higher",
}
"""What `geometry` measures of Jacobians, and which way the paper wants it."""


def geometry(network: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Each sample's norm, rank proxy and alignments."""
    found = jacobians(network, x)
    values = frobenius(found), leading_share(found), centroid_alignment(found, x), row_alignment(found, x)
    return dict(zip(GEOMETRY, values, strict=True))


def geometry_probes(network: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Callable[[], float]]:
    """Each mean of `geometry` as a probe of its own; the Jacobians are computed once for all."""
    kept: dict[str, Tensor] = {}

    def probe(name: str) -> float:
        if name not in kept:  # the first to be asked again measures anew
            kept.clear()
            kept.update(geometry(network, x))
        return float(kept.pop(name).mean())

    return {name: lambda name=name: probe(name) for name in GEOMETRY}


def measured(name: str, better: Better, values: Callable[[Any], Tensor], **about: Any) -> Metric[Any]:
    """A metric that is a mean over samples."""
    return Metric(
        name=name, better=better, function=lambda subject: mean_score(values(subject).tolist(), key=name, about=about)
    )


def suite_of(name: str, train: Batch, test: Batch, probed: Tensor, more: Sequence[Metric[Any]] = ()) -> Suite[Any]:
    """Accuracies on both halves, the geometry at `probed`, and more."""
    kinds = [
        measured(key, better, lambda network, key=key: geometry(network, probed)[key])
        for key, better in GEOMETRY.items()
    ]
    sides = [
        measured(f"{side}_acc", "higher", lambda network, data=data: hits(network, data))
        for side, data in (("train", train), ("test", test))
    ]
    return Suite(name=name, metrics=(*sides, *kinds, *more))


def delays(fitted: FitReport, series: Mapping[str, Series], reach: float, learnt: float = 0.99) -> dict[str, Score]:
    """How long `test_acc` took to be `reach`, in updates and seconds, and `train_acc` to be `learnt`; what an update cost.
    Seconds are those of `fit`, probes included, at its mean rate."""
    rate = fitted.seconds / fitted.steps
    return {
        "updates": first_update(series["test_acc"], ">=", reach),
        "seconds": first_update(series["test_acc"], ">=", reach, rate),
        "updates_to_train": first_update(series["train_acc"], ">=", learnt),
        "ms_per_update": one_of(1000 * rate),
    }

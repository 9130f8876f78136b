"""Delayed robustness: accuracy on digits that an attacker may shift, on the way of training with and without the penalty.

The paper trains a convolutional network on CIFAR-10 for 36000 epochs against AutoAttack; digits, the network without
biases and 20 steps of projected gradients (Madry et al., arXiv 1706.06083) stand in, and keep the question: does what the
penalty brings include robustness, or only accuracy sooner?
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from affinequant.report.figure import Figure
from affinequant_research.experiment import Claim, Experiment, Found, Trial, arms
from affinequant_research.grokalign.digits import SMOKE, OnDigits, network_and_data, trial_of
from affinequant_research.grokalign.drawing import over
from affinequant_research.grokalign.training import Batch, Penalty, accuracy, hits, measured, squared_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Robust(OnDigits):
    """Settings: as the digits', without an end at some accuracy.

    Attributes:
        reach: by how much each pixel may be shifted, in deviations of all pixels.
        attacked: test samples that are attacked on the way; all of them are at the end.
    """

    arms: tuple[str, ...] = ("decay", "grokalign")
    probe_every: int = 50
    reach: float = 0.1
    attacked: int = 128


def attacked(network: Callable[[Tensor], Tensor], data: Batch, reach: float, steps: int = 20) -> Batch:
    """The samples shifted by at most `reach` in each number so that the network errs: from a random place inside, each
    step goes along the signs of the loss's gradient and back into reach."""
    x, labels = data
    shift = (2 * torch.rand_like(x) - 1) * reach
    for _ in range(steps):
        shift = shift.detach().requires_grad_()
        with torch.enable_grad():
            (along,) = torch.autograd.grad(squared_error(network(x + shift), labels), shift)
        shift = (shift + 2.5 * reach / steps * along.sign()).clamp(-reach, reach)
    return x + shift.detach(), labels


def build(config: Robust, seed: int, arm: str) -> Trial:
    """The training of one arm."""
    network, _, test = start = network_and_data(config, seed)
    some = test[0][: config.attacked], test[1][: config.attacked]
    worst = measured(
        "pgd_acc", "higher", lambda subject: hits(subject, attacked(subject, test, config.reach)), reach=config.reach
    )
    return trial_of(
        "robust",
        config,
        start,
        Penalty(weight=config.jacobian * (arm == "grokalign")),
        probes={"pgd_acc": lambda: accuracy(network, attacked(network, some, config.reach))},
        more=[worst],
    )


def figures(found: Found) -> list[Figure]:
    """Accuracy with and without an attacker."""
    shifted = f"Every pixel may be shifted by {found.config.reach:g} deviations; 20 steps of projected gradients."
    return [
        over(found, "robust", "pgd_acc", shifted),
        over(found, "robust", "test_acc", "The same trainings without an attacker."),
    ]


def _claims() -> tuple[Claim, ...]:
    source = "arXiv 2506.12284 in kind; digits and this attack are stand-ins"
    return (Claim(metric="grokalign/pgd_acc", op=">=", than="decay/pgd_acc", source=source),)


BENCH = Robust()
EXPERIMENT = Experiment(
    name="robust",
    about="digits under attack, with and without the penalty",
    source="arXiv 2506.12284, in kind",
    presets={
        "smoke": dataclasses.replace(BENCH, **SMOKE, attacked=16),
        "ci": dataclasses.replace(BENCH, epochs=200),
        "bench": BENCH,
    },
    stages=lambda config: arms(config.arms, BENCH.arms),
    build=build,
    claims={"bench": _claims()},
    figures=figures,
)

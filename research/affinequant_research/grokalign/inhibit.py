"""Generalisation inhibited: a regulariser that holds the Jacobians' norm at a level keeps digits from being told.

The same penalty that pulls the norm down can hold it up, `weight * |level - mean N|`. Where delayed generalisation comes
of Jacobians that shrink and align, a network that is held at the norm of one that has memorised should stay there.
"""

import dataclasses
from dataclasses import dataclass

from affinequant.report.figure import Figure
from affinequant_research.experiment import Claim, Experiment, Found, Trial, arms
from affinequant_research.grokalign.digits import PAPER, SMOKE, OnDigits, network_and_data, trial_of
from affinequant_research.grokalign.drawing import over
from affinequant_research.grokalign.training import Penalty
from affinequant_research.series import first_update


@dataclass(frozen=True, slots=True, kw_only=True)
class Inhibit(OnDigits):
    """Settings: as the digits', with a level for the arm `held` and the level 0 for the arm `minimised`.

    Attributes:
        clip: of the gradients' norm, as the authors' code has it in this experiment and not in that with the digits.
        reach: test accuracy whose first update is noted.
    """

    arms: tuple[str, ...] = ("free", "held", "minimised")
    level: float = 16.0
    clip: float = 1.0
    reach: float = 0.85


def build(config: Inhibit, seed: int, arm: str) -> Trial:
    """The training of one arm."""
    level = {"free": None, "held": config.level, "minimised": 0.0}[arm]
    return trial_of(
        "inhibit",
        config,
        network_and_data(config, seed),
        Penalty(weight=0.0 if level is None else config.jacobian, level=level),
        outcome=lambda fitted, series: {"updates": first_update(series["test_acc"], ">=", config.reach)},
        clip_norm=config.clip,
    )


def figures(found: Found) -> list[Figure]:
    """Accuracy and norm of the three."""
    level = f"{found.config.level:g}"
    return [
        over(found, "inhibit", "test_acc", "All three learn their training digits."),
        over(found, "inhibit", "jac_fro", f"At test samples; `held` is kept at {level} on training samples."),
    ]


def _claims() -> tuple[Claim, ...]:
    source = "arXiv 2506.12284 in kind; the levels and factors are this project's"
    return (
        Claim(metric="held/train_acc", op=">=", than=0.99, source=source),
        Claim(metric="held/jac_fro", op=">=", than="free/jac_fro", source=source),
        Claim(metric="held/test_acc", op="<=", than="free/test_acc", source=source),
        Claim(metric="minimised/test_acc", op=">=", than="free/test_acc", source=source),
    )


BENCH = Inhibit()
EXPERIMENT = Experiment(
    name="inhibit",
    about="digits where the Jacobians' norm is held up, left alone, and pulled down",
    source="arXiv 2506.12284",
    presets={
        "smoke": dataclasses.replace(BENCH, **SMOKE),
        "ci": dataclasses.replace(BENCH, epochs=200),
        "bench": BENCH,
        "paper": dataclasses.replace(BENCH, **PAPER, jacobian=1e-3, level=5.0, batch=196, epochs=32_000),
    },
    stages=lambda config: arms(config.arms, BENCH.arms),
    build=build,
    claims={"ci": _claims(), "bench": _claims()},
    figures=figures,
)

"""`--max-ppl-increase` and `--max-kl`: what a checkpoint may lose before a command ends with exit code 4."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from affinequant.cli.arguments import Parser
from affinequant.cli.output import Screen

if TYPE_CHECKING:
    from affinequant_evals.gates import Limits
    from affinequant_evals.harness import Scorecard


def add_gates(parser: Parser, about: str = "") -> None:
    """The two limits, in a group of their own; `about` says what is scored for them, where that is not plain."""
    group = parser.add_argument_group(f"what is good enough (else exit code 4, and the checkpoint is kept){about}")
    group.add_argument(
        "--max-ppl-increase",
        metavar="X|X%",
        help="most that a text's perplexity may lie above the baseline's, e.g. 0.5 or 5%%",
    )
    group.add_argument("--max-kl", metavar="X", help="most nats per token between next-token distributions")


def limits_of(args: argparse.Namespace) -> "Limits | None":
    """The limits that were typed.

    Raises:
        AffineQuantError: one that is no number from 0 on, or no share.
    """
    if args.max_ppl_increase is None and args.max_kl is None:
        return None
    from affinequant_evals.gates import Limits

    return Limits.read(args.max_ppl_increase, args.max_kl)


def judged(card: "Scorecard", limits: "Limits | None") -> "Scorecard":
    """The scorecard with `gates` in its JSON, where there are limits."""
    if limits is None:
        return card
    from affinequant_evals.gates import judge

    return replace(card, more={**card.more, "gates": [gate.to_json() for gate in judge(card, limits)]})


def print_gates(card: "Scorecard", screen: Screen) -> None:
    """A line for each."""
    for gate in card.more.get("gates", ()):
        screen.print(f"{'passed' if gate['passed'] else 'FAILED'}: {gate['said']}")


def gate_code(card: "Scorecard", where: str | Path, screen: Screen) -> int:
    """0, or 4 and what failed, said on stderr beside the result."""
    gates = card.more.get("gates", ())
    if all(gate["passed"] for gate in gates):
        return 0
    from affinequant_evals.gates import failure

    problem = failure(gates, str(where))
    screen.warn(problem)
    return problem.exit_code

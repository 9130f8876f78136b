"""`--max-ppl-increase` and `--max-kl`: what a checkpoint may lose before a command ends with exit code 4."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.cli.arguments import Parser
from affinequant.cli.output import Screen

if TYPE_CHECKING:
    from affinequant_evals.gates import Gate, Limits
    from affinequant_evals.harness import Scorecard


def add_gates(parser: Parser, *, about: str = "") -> None:
    """The two limits, in a group of their own."""
    group = parser.add_argument_group(f"what is good enough (else exit code 4){about}")
    group.add_argument(
        "--max-ppl-increase",
        metavar="X|X%",
        help="most that a text's perplexity may rise above the baseline's, e.g. 0.5 or 5%%",
    )
    group.add_argument("--max-kl", metavar="X", help="most nats per token between the two's next-token distributions")


def limits_of(args: argparse.Namespace) -> "Limits | None":
    """The limits that were typed.

    Raises:
        AffineQuantError: one that is no number from 0 on, or no share.
    """
    if args.max_ppl_increase is None and args.max_kl is None:
        return None
    from affinequant_evals.gates import Limits

    return Limits.read(args.max_ppl_increase, args.max_kl)


def judged(card: "Scorecard", limits: "Limits | None") -> "tuple[Gate, ...]":
    """Each limit on each text."""
    if limits is None:
        return ()
    from affinequant_evals.gates import judge

    return judge(card, limits)


def print_gates(gates: "Sequence[Gate]", screen: Screen) -> None:
    """A line for each."""
    for gate in gates:
        screen.print(f"{'passed' if gate.passed else 'FAILED'}  {gate.said}")


def as_json(gates: "Sequence[Gate]") -> dict[str, Any]:
    """`gates`, where there are any."""
    return {"gates": [gate.to_json() for gate in gates]} if gates else {}


def gate_code(gates: "Sequence[Gate]", where: str | Path, screen: Screen) -> int:
    """0, or 4 and what failed, said on stderr: the result has been printed."""
    if not gates:
        return 0
    from affinequant_evals.gates import failure

    problem = failure(gates, str(where))
    if problem is None:
        return 0
    screen.warn(problem)
    return problem.exit_code

"""`affinequant bench`: the integer kernels of this machine, next to torch's linears."""

import argparse
from pathlib import Path

from affinequant.cli.arguments import Parser, choice, number, whole
from affinequant.cli.output import Screen
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.recipe import Device

USAGE = "[--shapes NxK,...] [--rows M,...] [--out DIR] ..."
EPILOG = """
Linear layers in each number format, quantising the activations included, against torch's bfloat16 (on a CPU also
float32), torch._int_mm and, on a GPU, gemlite and humming where they are installed. All are timed in turns, cold (no
layer is in a cache) and warm; ratios are taken within turns, so another job on the machine disturbs them little.

examples:
  affinequant bench
  affinequant bench --shapes 4096x4096,4096x11008 --rows 1,16,512 --out results
  affinequant bench --json > bench.json
"""


def add_arguments(parser: Parser) -> None:
    """What to measure."""
    parser.add_argument("checkpoint", metavar="CKPT", nargs="?", help="not there yet: only the kernels can be timed")
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--shapes", metavar="NxK,...", help="sizes of the linears, K a multiple of 128 (default: by device)"
    )
    group.add_argument("--rows", metavar="M,...", help="numbers of tokens (default: by device)")
    group.add_argument("--rounds", type=whole, metavar="N", default=15, help="turns of each layer (default: 15)")
    group.add_argument("--minutes", type=number, metavar="X", default=6.0, help="start no size later (default: 6)")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", metavar="auto|cpu|cuda", default="auto", help="where to compute (default: auto)")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR", help="also write JSON, table and roofline plot there")


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Measure, and print the table."""
    if args.checkpoint is not None:
        fix = "leave it out to time the kernels; `affinequant eval` scores a checkpoint"
        raise AffineQuantError("timing a checkpoint is not there yet", args.checkpoint, fix, exit_code=PREFLIGHT)
    device = choice(args.device, Device, "--device")
    from affinequant.runtime import benchmark

    result, table = benchmark(
        device=device,
        shapes=args.shapes,
        rows=args.rows,
        rounds=args.rounds,
        minutes=args.minutes,
        out=args.out,
        say=screen.say,
    )
    screen.print(table)
    screen.result(result)
    return 0

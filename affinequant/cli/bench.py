"""`affinequant bench`: a checkpoint's tokens per second next to its model's; or the integer kernels of this machine."""

import argparse
import json
from pathlib import Path

from affinequant.cli.arguments import Parser, choice, number, whole
from affinequant.cli.output import Screen
from affinequant.errors import AffineQuantError, unknown_name
from affinequant.recipe.recipe import Device

USAGE = "[CKPT] [--engines vllm,transformers] [--batches N,...] [--shapes NxK,...] [--out DIR] ..."
EPILOG = """
With CKPT: how fast the checkpoint generates, in vLLM and in transformers, next to its own model in bfloat16, with 4-bit
weights and in 8-bit integers. Each is measured in a process of its own, in turns. It says where the checkpoint loses.

Without: linear layers in each number format, quantising the activations included, against torch's bfloat16 (on a CPU
also float32), torch._int_mm and, on a GPU, gemlite and humming where they are installed. All are timed in turns, cold (no
layer is in a cache) and warm; ratios are taken within turns, so another job on the machine disturbs them little.

examples:
  affinequant bench smollm2-w4a4 --batches 1,4,16
  affinequant bench smollm2-w4a4 --engines vllm --against bf16 --out results
  affinequant bench --shapes 4096x4096,4096x11008 --rows 1,16,512 --out results
  affinequant bench --json > bench.json
"""


def add_arguments(parser: Parser) -> None:
    """What to measure."""
    parser.add_argument(
        "checkpoint", metavar="CKPT", nargs="?", help="a checkpoint; without one, the kernels are timed"
    )
    group = parser.add_argument_group("a checkpoint")
    group.add_argument("--engines", metavar="NAME,...", help="vllm, transformers (default: those that are installed)")
    group.add_argument("--against", metavar="NAME,...", help="bf16, w4a16, w8a8, none (default: the first three)")
    group.add_argument("--batches", metavar="N,...", default="1,4,16,64", help="sequences at once (default: 1,4,16,64)")
    group.add_argument("--prompt", type=whole, metavar="N", default=32, help="tokens of a prompt (default: 32)")
    group.add_argument("--new", type=whole, metavar="N", default=32, help="tokens generated, 2 or more (default: 32)")
    group.add_argument("--turns", type=whole, metavar="N", default=2, help="times that all are measured (default: 2)")
    group.add_argument("--dtype", metavar="bfloat16|float32", default="bfloat16", help="of what stays in float")
    group.add_argument("--eager", action="store_true", help="do not let vLLM compile: starts sooner, runs slower")
    group = parser.add_argument_group("the kernels")
    group.add_argument(
        "--shapes", metavar="NxK,...", help="sizes of the linears, K a multiple of 128 (default: by device)"
    )
    group.add_argument("--rows", metavar="M,...", help="numbers of tokens (default: by device)")
    group.add_argument("--minutes", type=number, metavar="X", default=6.0, help="start no size later (default: 6)")
    group.add_argument("--device", metavar="auto|cpu|cuda", default="auto", help="where to compute (default: auto)")
    group = parser.add_argument_group("both")
    group.add_argument(
        "--rounds", type=whole, metavar="N", help="of each measurement (default: kernels 15, checkpoint 2)"
    )
    group.add_argument("--out", type=Path, metavar="DIR", help="also write JSON, table and plot there")


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Measure, and print the table."""
    return _kernels(args, screen) if args.checkpoint is None else _checkpoint(args, screen)


def _kernels(args: argparse.Namespace, screen: Screen) -> int:
    device = choice(args.device, Device, "--device")
    from affinequant.runtime.measured import benchmark

    result, table = benchmark(
        device=device,
        shapes=args.shapes,
        rows=args.rows,
        rounds=args.rounds or 15,
        minutes=args.minutes,
        out=args.out,
        say=screen.say,
    )
    screen.print(table)
    screen.result(result)
    return 0


def _checkpoint(args: argparse.Namespace, screen: Screen) -> int:
    from affinequant_evals import speed

    batches = _numbers(args.batches, "--batches")
    for flag, value, least in (("--new", args.new, 2), ("--prompt", args.prompt, 1), ("--turns", args.turns, 1)):
        if value < least:
            raise AffineQuantError(f"{flag} {value}", flag, f"use {least} or more")
    if args.dtype not in ("bfloat16", "float32"):
        raise unknown_name("dtype", args.dtype, ("bfloat16", "float32"), where="--dtype")
    work = speed.Workload(
        batches=batches,
        prompt=args.prompt,
        new=args.new,
        rounds=args.rounds or 2,
        turns=args.turns,
        dtype=args.dtype,
        eager=args.eager,
    )
    engines = _names(args.engines, speed.ENGINES, "--engines") or speed.installed()
    against = () if args.against == "none" else _names(args.against, tuple(speed.AGAINST), "--against")
    result = speed.bench_checkpoint(
        args.checkpoint,
        engines=engines,
        against=tuple(speed.AGAINST) if args.against is None else against,
        workload=work,
        say=screen.say,
    )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "speed.json").write_text(json.dumps(result, indent=2) + "\n")
        speed.plot(result, args.out / "speed.png")
        screen.say(f"written to {args.out}")
    columns, rows = speed.table(result)
    screen.table(columns, rows, right=(1, 3, 4, 5, 6, 7, 8, 9))
    for line in speed.verdict(result):
        screen.print(line)
    screen.result(result)
    return 0


def _names(text: str | None, known: tuple[str, ...], flag: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    for name in names:
        if name not in known:
            raise unknown_name(flag[2:].rstrip("s"), name, known, where=flag)
    return names


def _numbers(text: str, flag: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise AffineQuantError(f"{text!r} is not a list of numbers", flag, "write it like 1,4,16")
    return numbers

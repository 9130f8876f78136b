"""`affinequant export`: a finished folder in another format, read back and compared."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from affinequant.cli.arguments import Parser, choice
from affinequant.cli.output import Screen, size, spoken
from affinequant.cli.quantize import print_next
from affinequant.formats import FORMATS, find_format

USAGE = "RUN_OR_CKPT --format NAME [--scheme w8a8] [-o DIR]"
_WIDTH = max(map(len, FORMATS))
_FORMATS = "\n".join(f"  {name:<{_WIDTH}}  {find_format(name).ABOUT}" for name in FORMATS)
EPILOG = f"""
formats:
{_FORMATS}
  compressed-tensors, int-quantized, humming, affinequant, gptq and gguf hold the same integers; dense rounds their product with
  the scale to 16 bits; nvfp4 and mxfp4 round every weight again. transform-config and fp_quant hold the floats of --scheme nvfp4
  and mxfp4, with one matrix for all blocks of an input (--tier online; transforms shared-16 to shared-128). Nothing is trained.
  What a format cannot hold (any other online transform outside `affinequant`, zero points, biases, sizes) is refused by name.

--scheme says what becomes of activations; the weights keep their groups and symmetry:
  w4a16   weights only: stock vLLM and transformers
  w8a8    4-bit weights as 8-bit ones, exactly, and activations as stock vLLM quantises them (one scale per channel)
  w4a8    symmetric weights for vLLM on CPUs (int-quantized), or any weights for affinequant.load (affinequant)

examples:
  affinequant export llama-w4a4 --format compressed-tensors --scheme w4a16
  affinequant export llama-w4a4 --format int-quantized --scheme w8a8 -o llama-w8a8
  affinequant export llama-w4a4 --format gguf

Every export is loaded again (gptq: unpacked) and its logits held against the source's weights; a folder that diverges is
kept, with report.failed.json, and the command exits with 4. That needs memory for the model once, at --dtype.
"""
Dtype = Literal["float32", "bfloat16"]


def add_arguments(parser: Parser) -> None:
    """What to export, as what, and where to."""
    parser.add_argument("checkpoint", metavar="RUN_OR_CKPT", help="a finished output folder of `quantize`")
    group = parser.add_argument_group("what to make")
    group.add_argument("--format", metavar="NAME", required=True, help="one of the names below")
    group.add_argument("--scheme", metavar="NAME", help="number formats (default: the source's, or weights only)")
    group = parser.add_argument_group("machine")
    text = "float32|bfloat16: in which both are compared, on the CPU (default: float32)"
    group.add_argument("--dtype", metavar="NAME", default="float32", help=text)
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--out", metavar="DIR", default="", help="folder to write; default ./SOURCE-FORMAT")
    group.add_argument(
        "--overwrite", action="store_true", help="remove an earlier run or export from the output folder first"
    )


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Write, compare, and say what was rounded."""
    dtype = choice(args.dtype, Dtype, "--dtype")
    find_format(args.format)  # a wrong name is answered before torch is loaded
    from affinequant.export import export

    done = export(
        args.checkpoint,
        format=args.format,
        scheme=args.scheme,
        out=args.out,
        overwrite=args.overwrite,
        dtype=dtype,
        say=screen.say,
    )
    following = next_commands(done.path, done.report)
    screen.facts(outcome(done.path, done.report, verbose=screen.verbose))
    if following:
        print_next(following, screen)
    screen.result({"schema": 1, "path": done.path.absolute(), "report": done.report, "next": following})
    return 0


def next_commands(path: Path, report: Mapping[str, Any]) -> list[str]:
    """What to type next; no engine is named that would refuse the folder."""
    folder, symmetric = spoken(path), report["scheme"].endswith("-sym") or report["scheme"].startswith("w8a8")
    evaluate = f"affinequant eval {folder}"
    match report["format"]:
        case "gguf":
            return [f"llama-cli -m {folder}/model.gguf"]
        case "gptq":
            return [f"vllm serve {folder}"] if symmetric else []  # vLLM reads no zero points of this layout
        case "transform-config":  # nothing else applies it
            return [f"vllm serve {folder}"]
        case "fp_quant":
            return [f"vllm serve {folder} --dtype bfloat16 --allow-deprecated-quantization"]
        case "nvfp4" | "mxfp4":  # compressed-tensors unpacks them to bfloat16
            return [f"{evaluate} --dtype bfloat16"]
        case _:
            return [f"vllm serve {folder}", evaluate]


def outcome(path: Path, report: Mapping[str, Any], *, verbose: bool) -> dict[str, str]:
    """The report of an export in a few lines."""
    checked = report["verified"]
    lines = {
        "format": f"{report['format']}, {report['scheme']}",
        "size": f"{size(report['bytes'])}, weights {size(report['weight_bytes'])}",
        "activations": report["activations"],
        "rounded": report["rounded"] or "nothing: the same integers and scales",
        "verified": f"{checked['divergence']:.2g} nats per token from {checked['reference']}, on {checked['probe']}",
        "read by": checked["read_by"],
        "path": str(path),
    }
    if verbose:
        lines["sample"] = f"{checked['sample']}; of the source {checked['sample_of_source']}"
    return lines

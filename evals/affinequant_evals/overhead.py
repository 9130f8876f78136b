"""`python -m affinequant_evals.overhead MODEL`: what measuring costs over the bare forward passes.

Passes over the same windows take turns in one process, so that whatever else the machine does meets them alike: the bare
forward passes, perplexity, perplexity and KL beside a live baseline, and the two passes where the baseline is kept on
disk. Prints a line to stderr and one JSON object to stdout: times, their ratios, the kept KL beside the exact
one, and the peak memory with a few windows and with four times as many.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

import affinequant
from affinequant.data.tokenizer import load_tokenizer
from affinequant.data.tokens import evaluation_text
from affinequant.models.source import locate
from affinequant.recipe.recipe import Device, Dtype
from affinequant_evals.generate import peak_bytes
from affinequant_evals.logits import BUDGET
from affinequant_evals.perplexity import LanguageModel, Sums, read
from affinequant_evals.reference import K, Kept, Live
from affinequant_evals.windows import Windows, cut_windows

ASKED = {"perplexity": 1.1, "live": 2.3}
"""How often a pass may take the time of the bare forward passes of one model."""
MORE = 4
"""So many times the windows that are timed show whether memory grows with them."""


def measure(
    subject: LanguageModel, other: LanguageModel, windows: Windows, *, timed: int, rounds: int = 3, k: int = K
) -> dict[str, Any]:
    """Time the passes on the first `timed` windows; all of them, where there are more, go into the peak of memory.

    Returns:
        seconds: wall clock of each kind of pass, summed over rounds; `cpu_seconds` of all threads.
        ratios: to the bare passes of the model that is read, in CPU seconds where it computes on a CPU; of `live` to
            those of the subject alone.
        kl: nats per token, `live` and `kept` with the bound that is sure, and the baseline's probability `outside` of its
            `top_k` tokens.
        peak_bytes: by number of windows; on a GPU what was allocated there.
    """
    few = replace(windows, ids=windows.ids[:timed])
    with tempfile.TemporaryDirectory(prefix="affinequant-") as name:
        folder = Path(name)
        passes, found = _passes(subject, other, folder, k), {}
        clocks: dict[str, dict[str, float]] = {what: dict.fromkeys(passes, 0.0) for what in ("seconds", "cpu_seconds")}
        for _ in range(rounds):
            for what, function in passes.items():
                wall, cpu = time.perf_counter(), time.process_time()
                found[what] = function(few)
                _wait(subject)
                clocks["seconds"][what] += time.perf_counter() - wall
                clocks["cpu_seconds"][what] += time.process_time() - cpu
        peaks = {len(few.ids): _peak(subject)}
        if len(windows.ids) > timed:
            for function in passes.values():
                function(windows)
            peaks[len(windows.ids)] = _peak(subject)
    clock = clocks["seconds" if _device(subject).type == "cuda" else "cpu_seconds"]
    tokens = sum(few.counts)
    return {
        **{what: {name: round(took, 3) for name, took in times.items()} for what, times in clocks.items()},
        "ratios": {
            "perplexity": clock["perplexity"] / clock["bare"],
            "live": clock["live"] / clock["bare"],
            "baseline kept": clock["baseline kept"] / clock["bare baseline"],
            "kept": clock["kept"] / clock["bare"],
        },
        "kl": {what: float(found[what]["kl"].sum()) / tokens for what in ("live", "kept")}
        | {name: float(found["kept"][name].sum()) / tokens for name in ("at_least", "outside")}
        | {"top_k": k},
        "peak_bytes": peaks,
        "budget_bytes": BUDGET,
    }


def _passes(
    subject: LanguageModel, other: LanguageModel, folder: Path, k: int
) -> Mapping[str, Callable[[Windows], Sums]]:
    kept = Kept(folder=folder, k=k)

    def record(windows: Windows) -> Sums:
        shutil.rmtree(folder)
        return read(replace(other, record=kept), windows)

    return {
        "bare": lambda windows: _bare(subject, windows),
        "perplexity": lambda windows: read(subject, windows),
        "live": lambda windows: read(replace(subject, reference=Live(load=lambda: other.model)), windows),
        "bare baseline": lambda windows: _bare(other, windows),
        "baseline kept": record,
        "kept": lambda windows: read(replace(subject, reference=kept), windows),
    }


@torch.inference_mode()
def _bare(subject: LanguageModel, windows: Windows) -> Sums:
    for ids in windows.ids:
        subject.model(input_ids=ids[None].to(subject.model.device), use_cache=False)
    return {}


def _device(subject: LanguageModel) -> torch.device:
    return subject.model.device


def _wait(subject: LanguageModel) -> None:
    if _device(subject).type == "cuda":
        torch.cuda.synchronize()


def _peak(subject: LanguageModel) -> int:
    return torch.cuda.max_memory_allocated() if _device(subject).type == "cuda" else peak_bytes()


def summary(result: Mapping[str, Any]) -> str:
    """The ratios beside what was asked, in a line."""
    parts = []
    for name, ratio in result["ratios"].items():
        asked = ASKED.get(name)
        verdict = "" if asked is None else f" ({'met' if ratio <= asked else 'MISSED'}: {asked} asked)"
        parts.append(f"{name} {ratio:.2f}{verdict}")
    (few, first), *more = result["peak_bytes"].items()
    memory = [f"peak {first / 1e6:.0f} MB with {few} windows"]
    memory += [f"{(last - first) / 1e6:+.0f} MB with {many}" for many, last in more]
    return f"x the bare forward passes: {', '.join(parts)}; {', '.join(memory)}"


def main(argv: list[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint folder, any model folder, a hub id or `demo`")
    parser.add_argument("--against", metavar="MODEL", help="the baseline (default: the model itself, loaded once)")
    parser.add_argument("--text", default="demo", help="`demo`, `wikitext2` or a file (default: demo)")
    parser.add_argument("--windows", type=int, default=2, help="windows that are timed (default: 2)")
    parser.add_argument(
        "--more", type=int, default=MORE, help=f"times as many for the memory (default: {MORE}; 1: none)"
    )
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--top-k", type=int, default=K, help=f"logits of a token that are kept (default: {K})")
    parser.add_argument("--device", choices=get_args(Device), default="auto")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="auto")
    given = parser.parse_args(argv)
    folders = [locate(name) for name in (given.model, given.against) if name]
    models = [affinequant.load(folder, device=given.device, dtype=given.dtype) for folder in folders]
    tokenizer = load_tokenizer(folders[0], models[0].config.get_text_config().vocab_size)
    name, text = evaluation_text(given.text)
    windows = cut_windows(name, text, tokenizer, seq_len=given.seq_len, windows=given.windows * given.more)
    subject, other = (LanguageModel(model=models[place], tokenizer=tokenizer, name="") for place in (0, -1))
    result = measure(subject, other, windows, timed=given.windows, rounds=given.rounds, k=given.top_k)
    print(summary(result), file=sys.stderr)
    asked = {"model": given.model, "against": given.against, "text": name, "windows": given.windows}
    print(json.dumps(asked | {"seq_len": given.seq_len, "rounds": given.rounds} | result), flush=True)


if __name__ == "__main__":
    main()

